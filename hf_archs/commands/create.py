"""``hf-archs init`` and ``hf-archs convert``: models written into a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from hf_archs import registry
from hf_archs.commands import loading
from hf_archs.native import disk
from hf_archs.native.conversion import to_native


def init(arch: str, output: Path, size: str | None, fields: Mapping[str, Any], tokenizer: str | None, seed: int) -> int:
    """Write a model with random weights, and the tokenizer of another checkpoint if one is named.

    Args:
        size, fields: as for `loading.sized_config`.

    Returns:
        the number of parameters.
    """
    architecture = registry.get_architecture(arch)
    chosen = None if tokenizer is None else loading.load_tokenizer(tokenizer)
    if chosen is not None:
        special = {f"{name}_token_id": getattr(chosen, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        fields = {"vocab_size": len(chosen), **special, **fields}
    config = loading.sized_config(architecture, size, fields)
    parameters = loading.check_memory(config)
    loading.check_output(output, loading.weight_bytes(config))
    transformers.set_seed(seed)
    model = architecture.causal_lm_class(config)
    with disk.replacing(output) as folder:
        model.save_pretrained(folder)
        if chosen is not None:
            chosen.save_pretrained(folder)
    return parameters


def convert(source: str, output: Path, to: str | None, pickle: bool) -> str:
    """Write the checkpoint in the other format, with its tokenizer.

    Args:
        to: the native model type, if several are possible.
        pickle: read the weights from a pickle.

    Returns:
        the name of the class that was written.
    """
    checkpoint = loading.look_at(source)
    config = checkpoint.config()
    if to is not None and checkpoint.native is not None:
        raise ValueError(f"--to is {to!r}, but {source!r} is native already and becomes {config.model_type}")
    loading.check_output(output, loading.weight_bytes(config))
    model = loading.load_model(checkpoint, dtype="auto", use_safetensors=False if pickle else None)
    converted = to_native(model, to) if checkpoint.native is None else model
    with disk.replacing(output) as folder:
        converted.save_pretrained(folder)
        if loading.has_tokenizer(source):
            loading.load_tokenizer(checkpoint).save_pretrained(folder)
    return type(converted).__name__
