"""Model cards of saved and pushed models and adapters: a description, code that loads them, measured results."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from peft import PeftModel
from transformers import PreTrainedModel

from hf_archs import registry
from hf_archs.parts import VERSION

_CARD = """\
---
{metadata}
---

# {title}

{description}

## Load

```python
import hf_archs  # pip install {packages}; without this line, pass trust_remote_code=True below
{load}
```
"""

_LOAD_MODEL = """\
from transformers import {auto}

model = {auto}.from_pretrained("{model}")"""

_LOAD_AND_GENERATE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{model}")
model = AutoModelForCausalLM.from_pretrained("{model}")
start = tokenizer.bos_token or tokenizer.eos_token  # in training, it began every document
inputs = tokenizer(start{prompt}, add_special_tokens=False, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"""

_LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained("{model}"{labels}), "{repository}")"""

_TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
}
_QUANTISERS = ("bitsandbytes", "torchao")  # quantisation methods of transformers that are packages of the same name
# the description in the card that transformers pushes with a model that has none
_EMPTY = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)
_MARK = "\n<!-- {digest}: written while saving, and again until somebody changes it -->\n"


def model_card(
    model: Any,
    repository: str,
    *,
    training: str,
    results: Mapping[str, str],
    license: str | None = None,
    base_model: str | None = None,
    prompt: str = "",
) -> ModelCard:
    """The card of a model of this library, or of a PEFT adapter for such a model.

    Args:
        model: the model, or the `PeftModel` with the adapter.
        repository: repository name on the Hub.
        training: one or more sentences on data, steps and hardware.
        results: each measurement, and its value with the unit.
        license: a licence identifier of the Hub; None leaves it out.
        base_model: repository or folder of the adapter's base model.
        prompt: prompt of the example in the card; without one, the example begins a document.

    Raises:
        ValueError: if the model is not of this library.
    """
    is_adapter = isinstance(model, PeftModel)
    base = model.get_base_model() if is_adapter else model
    architecture = registry.find_architecture(type(base.config))
    if architecture is None:
        raise ValueError(f"model is a {type(base).__name__}; allowed are models of hf-archs, and PEFT adapters on them")
    auto = _auto_class(base, architecture)
    if is_adapter:
        names = sorted(_target_names(model))
        counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
        description = (
            f"A LoRA adapter for `{base_model}`, a {architecture.name} language model. It adapts "
            f"{', '.join(f'`{name}`' for name in names)} with {counted:,} parameters of its own."
        )
        labels = f", num_labels={base.num_labels}" if auto == "AutoModelForSequenceClassification" else ""
        load = _LOAD_ADAPTER.format(auto=auto, model=base_model, labels=labels, repository=repository)
    else:
        description = _description(base, architecture)
        generates = auto == "AutoModelForCausalLM"
        form = _LOAD_AND_GENERATE if generates else _LOAD_MODEL
        load = form.format(auto=auto, model=repository, prompt=f' + "{prompt}"' if prompt else "")
    metadata = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=_TASKS[auto],
        tags=[*_tags(architecture), *(["lora"] if is_adapter else [])],
        license=license,
        # the Hub accepts only a repository here
        base_model=None if base_model is None or Path(base_model).exists() else base_model,
    )
    rows = [f"| {name} | {value} |" for name, value in results.items()]
    measured = "\n".join(["| measurement | value |", "|---|---|", *rows]) if rows else "Nothing yet."
    more = f"\n## Training\n\n{training}\n\n## Measured\n\n{measured}\n\nMade with hf-archs {VERSION}.\n"
    return ModelCard(_text(metadata, repository, description, load, base.config) + more)


def tag(model: PreTrainedModel) -> None:
    """Add to ``model`` the tags that transformers, the Trainer and PEFT write into their cards."""
    architecture = registry.find_architecture(type(model.config))
    if architecture is not None:
        model.add_model_tags(_tags(architecture))


def automatic_card(model: PreTrainedModel, repository: str | None = None, tags: Iterable[str] = ()) -> ModelCard | None:
    """A card generated from a model's class and config; None if the model is of no registered architecture.

    Args:
        model: a model of any class of this library; the card names the Auto class that loads it.
        repository: repository name on the Hub; None for a model that is saved into a folder.
        tags: tags in addition to the library's and the architecture's.
    """
    architecture = registry.find_architecture(type(model.config))
    if architecture is None:
        return None
    auto = _auto_class(model, architecture)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=_TASKS[auto],
        tags=list(dict.fromkeys([*_tags(architecture), *tags])),
    )
    load = _LOAD_MODEL.format(auto=auto, model=repository or "this/folder")
    title = repository or f"A model of the architecture {architecture.name}"
    card = ModelCard(_text(metadata, title, _description(model, architecture), load, model.config))
    return ModelCard(f"{str(card).rstrip()}\n{_MARK.format(digest=_digest(card))}")


def is_automatic(card: str) -> bool:
    """Whether a card is an `automatic_card` or transformers' empty card, and unchanged since."""
    if not card.startswith("---"):  # no metadata
        return False
    try:
        found = ModelCard(card)
    except (ValueError, yaml.YAMLError):
        return False
    return _is_ours(found) or _is_empty(found)


def _is_ours(card: ModelCard) -> bool:
    return _MARK.format(digest=_digest(card)).strip() in card.text


def _is_empty(card: ModelCard) -> bool:
    template = ModelCard.from_template(ModelCardData(), model_description=_EMPTY)
    return card.text.strip() == template.text.strip()


def save_card(model: PreTrainedModel, folder: str | os.PathLike, repository: str | None = None) -> None:
    """Write the `automatic_card` of ``model`` into ``folder``, unless that holds a card written by hand."""
    path = Path(folder) / REPOCARD_NAME
    tags: list[str] = []
    if path.exists():
        text = path.read_text(encoding="utf-8")
        if not is_automatic(text):
            return
        found = ModelCard(text)
        tags = found.data.to_dict().get("tags") or []
        if _is_ours(found):  # drop the library's and the architecture's tag: the architecture may be another now
            tags = tags[2:]
    card = automatic_card(model, repository, tags)
    if card is not None:
        card.save(path)


def _digest(card: ModelCard) -> str:
    """The digest of a card without its tags, because transformers adds tags."""
    text = re.sub(r"<!-- [0-9a-f]{16}: .*? -->", "", card.text).strip()
    metadata = {name: value for name, value in card.data.to_dict().items() if name != "tags"}
    return hashlib.sha256(json.dumps([metadata, text], sort_keys=True).encode()).hexdigest()[:16]


def _auto_class(model: PreTrainedModel, architecture: registry.Architecture) -> str:
    """The name of the Auto class that loads ``model``."""
    classes = {auto: model_class for auto, (_, model_class) in architecture.auto_classes().items()}
    return next((auto for auto, model_class in classes.items() if isinstance(model, model_class)), "AutoModel")


def _tags(architecture: registry.Architecture) -> list[str]:
    return ["hf-archs", architecture.name]


def _description(model: PreTrainedModel, architecture: registry.Architecture) -> str:
    config: Any = model.config
    kind = "language model" if model.get_output_embeddings() is not None else "model"
    return (
        f"A {architecture.name} {kind} (`{type(model).__name__}`) of {model.num_parameters():,} "
        f"parameters: {config.num_hidden_layers} layers of width {config.hidden_size}, {config.vocab_size:,} tokens."
    )


def _text(metadata: ModelCardData, title: str, description: str, load: str, config: Any) -> str:
    architecture: Any = registry.find_architecture(type(config))
    method = getattr(getattr(config, "quantization_config", None), "quant_method", None)
    quantisers = [name for name in _QUANTISERS if name == method]
    return _CARD.format(
        metadata=metadata.to_yaml(),
        title=title,
        description=description,
        packages=" ".join([registry.distribution_of(architecture), *quantisers]),
        load=load,
    )


def _target_names(model: PeftModel) -> set[str]:
    targets = model.active_peft_config.target_modules
    return {targets} if isinstance(targets, str) else {name.rpartition(".")[2] for name in targets or ()}
