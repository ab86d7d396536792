"""PEFT adapters, with errors for two mistakes that PEFT ignores: a name that matches nothing, and a tied layer."""

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from peft import PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from transformers import PreTrainedModel

from hf_archs.errors import did_you_mean, similar

# PEFT itself adds these to modules_to_save for classification and question answering, whatever the model
_HEADS = {"classifier", "score", "qa_outputs"}


def add_adapter(
    model: PreTrainedModel, config: PeftConfig, adapter_name: str = "default", **kwargs: Any
) -> PeftModel | PeftMixedModel:
    """Add a trainable adapter to ``model``, as `peft.get_peft_model` does.

    Args:
        model: any model; the names in ``config`` must match its modules and parameters.
        config: the config of any kind of adapter.
        adapter_name, kwargs: passed to `peft.get_peft_model`.

    Raises:
        ValueError: if a name in ``config`` matches nothing, or a target's weight is tied to that of another layer,
            which merging would change too. The model is unchanged then.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    leaves = [name for name, module in modules.items() if not any(module.children())]
    parameters = [name for name, _ in model.named_parameters()]
    _check_names(model, config, "target_modules", modules, leaves)
    _check_names(model, config, "exclude_modules", modules, leaves)
    _check_names(model, config, "target_parameters", parameters, parameters)
    _check_names(model, config, "modules_to_save", modules, modules)
    _check_tied(model, config)
    with quiet_peft():
        return get_peft_model(model, config, adapter_name, **kwargs)


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Suppress the warning of transformers 5.23 for an attribute that PEFT 0.21 reads from every model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _matches(name: str, wanted: str | Iterable[str] | None) -> bool:
    """Whether PEFT selects the module ``name`` by ``wanted``: a regular expression, or names or their ends."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in wanted or ())


def _check_names(
    model: PreTrainedModel, config: PeftConfig, field: str, names: Iterable[str], offered: Iterable[str]
) -> None:
    given: Any = getattr(config, field, None)
    if not given or given == "all-linear":
        return
    own = _HEADS if field == "modules_to_save" else set()
    for wanted in [given] if isinstance(given, str) else sorted(set(given) - own):
        if any(_matches(name, wanted if isinstance(given, str) else [wanted]) for name in names):
            continue
        holders = {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith(f".{wanted}")}
        known = sorted({name.rpartition(".")[2] for name in offered if not name.rpartition(".")[2].isdigit()})
        near = sorted(holders) or similar(wanted.rpartition(".")[2], known)
        hint = did_you_mean(near, f"allowed are {', '.join(known)}")
        raise ValueError(
            f"{field} of this {type(config).__name__} has {wanted!r}, which stands for nothing in this "
            f"{type(model).__name__}; {hint}"
        )


def _check_tied(model: PreTrainedModel, config: PeftConfig) -> None:
    targets = getattr(config, "target_modules", None)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if targets == "all-linear" or head is None or getattr(head, "weight", None) is not embedding.weight:
        return
    for name, module in model.named_modules():
        tied = module is embedding or module is head
        if tied and _matches(name, targets) and not _matches(name, getattr(config, "exclude_modules", None)):
            raise ValueError(
                f"target_modules of this {type(config).__name__} has {name}, and the embedding and the head of this "
                f"{type(model).__name__} are one weight (tie_word_embeddings is True), so the merged adapter would "
                f"change both; allowed are other layers, or {name} in modules_to_save"
            )
