"""The card that a pushed model or adapter carries: what it is, how to load it, what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel

import hf_archs
from hf_archs import registry

_CARD = """\
---
{metadata}
---

# {repository}

{what}

## Load

```python
import hf_archs  # pip install {distribution}; without this line, pass trust_remote_code=True below
{load}
```

## Training

{training}

## Measured

{results}

Made with hf-archs {version}.
"""

_LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{model}")
model = AutoModelForCausalLM.from_pretrained("{model}")
start = tokenizer.bos_token or tokenizer.eos_token  # in training, it began every document
inputs = tokenizer(start{prompt}, add_special_tokens=False, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"""

_LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{model}"), "{repository}")"""


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
    """The card of a causal language model of this library, or of a PEFT adapter on one.

    Args:
        model: the model, or the `PeftModel` whose adapter is meant.
        repository: its name on the Hub.
        training: a sentence or more on data, steps and hardware.
        results: what was measured, and the figure with its unit.
        license: an identifier that the Hub knows; left out where nobody said.
        prompt: what a reader can let the model go on from; without one, it begins a document.
        base_model: the repository (or the folder) of the model that an adapter belongs to.

    Raises:
        ValueError: where the model is none of this library.
    """
    is_adapter = isinstance(model, PeftModel)
    base = model.get_base_model() if is_adapter else model
    architecture = registry.find_architecture(type(base.config))
    if architecture is None:
        raise ValueError(f"a {type(base).__name__} is no model of hf-archs, so it gets no card of its")
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad or not is_adapter)
    if is_adapter:
        names = sorted(_target_names(model))
        what = (
            f"A LoRA adapter for `{base_model}`, a {architecture.name} language model. It adapts "
            f"{', '.join(f'`{name}`' for name in names)} with {counted:,} parameters of its own."
        )
        load = _LOAD_ADAPTER.format(model=base_model, repository=repository)
    else:
        config = base.config
        what = (
            f"A {architecture.name} language model (`{type(base).__name__}`) of {counted:,} parameters: "
            f"{config.num_hidden_layers} layers of width {config.hidden_size}, {config.vocab_size:,} tokens."
        )
        load = _LOAD_MODEL.format(model=repository, prompt=f' + "{prompt}"' if prompt else "")
    metadata = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["hf-archs", architecture.name, *(["lora"] if is_adapter else [])],
        license=license,
        # the Hub refuses anything but a repository here
        base_model=None if base_model is None or Path(base_model).exists() else base_model,
    )
    rows = [f"| {what} | {figure} |" for what, figure in results.items()]
    return ModelCard(
        _CARD.format(
            metadata=metadata.to_yaml(),
            repository=repository,
            what=what,
            distribution=registry.distribution_of(architecture),
            load=load,
            training=training,
            results="\n".join(["| what | figure |", "|---|---|", *rows]) if rows else "Nothing yet.",
            version=hf_archs.__version__,
        )
    )


def _target_names(model: PeftModel) -> set[str]:
    targets = model.active_peft_config.target_modules
    return {targets} if isinstance(targets, str) else {name.rpartition(".")[2] for name in targets or ()}
