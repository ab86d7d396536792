"""Loading from disk and the Hub: each refusal is one sentence, before memory is allocated or a file overwritten.

The functions raise the exceptions of the host libraries (`ValueError`, `OSError`, Hub and safetensors errors); the
message names the thing, its value and the allowed values.
"""

import copy
import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from hf_archs import registry
from hf_archs.errors import did_you_mean, similar
from hf_archs.model.adapters import quiet_peft
from hf_archs.native.disk import check_weights, looks_local
from hf_archs.native.hub import check_downloads
from hf_archs.native.reading import Checkpoint


def sized_config(architecture: registry.Architecture, size: str | None, overrides: Mapping[str, Any]) -> Any:
    """The config of a named size of an architecture; ``tiny`` is that of the tests, with room for every byte.

    Raises:
        ValueError: if there is no such size or field.
    """
    name = size or next(iter(architecture.sizes), "tiny")
    if name != "tiny" and name not in architecture.sizes:
        raise ValueError(f"size is {name!r}; {architecture.name} has tiny, {', '.join(architecture.sizes)}")
    known = {f.name for f in dataclasses.fields(architecture.config_class)}
    for wrong in overrides.keys() - known:
        hint = did_you_mean(similar(wrong, known), f"its fields are {', '.join(sorted(known))}")
        raise ValueError(f"{architecture.config_class.__name__} has no field {wrong!r}; {hint}")
    if name == "tiny":
        return architecture.tiny_config(**{"vocab_size": 512, **overrides})
    return architecture.config_class(**{**architecture.sizes[name], **overrides})


def described_config(source: str, overrides: Mapping[str, Any]) -> Any:
    """The config of a checkpoint, a ``config.json`` file, or an architecture's size, as in ``hybrid:jamba``.

    Raises:
        ValueError, OSError: if there is no such config, or no architecture can read it.
    """
    name, colon, size = source.partition(":")
    exists = Path(source).expanduser().exists()
    if not exists and (name in registry.architectures() or (colon and "/" not in source)):
        return sized_config(registry.get_architecture(name), size or None, overrides)
    folder = str(Path(source).parent) if Path(source).is_file() else source
    checkpoint = look_at(folder)
    config = checkpoint.config()
    fields = {**config.to_diff_dict(), **overrides}
    return checkpoint.architecture.config_class.from_dict(fields) if overrides else config


def check_name(source: str) -> None:
    """Refuse a name similar to an architecture's or a preset's before the Hub is asked, where names have an owner.

    Raises:
        OSError: if the name is similar.
    """
    if "/" in source or Path(source).expanduser().exists():
        return
    known = {name: name for name in registry.architectures()}
    for name in registry.architectures():
        known |= {size: f"{name}:{size}" for size in registry.get_architecture(name).sizes if size.isalpha()}
    near = [source] if source in known else similar(source, known, cutoff=0.7)
    if near:
        hint = did_you_mean([f"the architecture {' or '.join(known[name] for name in near)}"])
        raise OSError(
            f"{source!r} is no folder here, and a repository on the Hub is owner/name; {hint} `hf-archs init` makes a "
            "model of one"
        )


def count_parameters(config: PreTrainedConfig) -> int:
    """The number of parameters of the causal language model of ``config``, counted without allocating them."""
    with torch.device("meta"):
        model = _architecture_of(config).causal_lm_class(config)
    return sum(parameter.numel() for parameter in model.parameters())


def check_memory(config: PreTrainedConfig, copies: int = 1) -> int:
    """Refuse a model that does not fit into this machine's free memory, before it is allocated.

    Args:
        copies: number of float32 copies of the weights in memory: 1 to run, 4 to train with AdamW.

    Returns:
        the number of parameters.

    Raises:
        ValueError: if the model does not fit.
    """
    parameters = count_parameters(config)
    needed = parameters * 4 * copies
    free = psutil.virtual_memory().available
    if torch.cuda.is_available():
        free = max(free, torch.cuda.mem_get_info()[0])
    if needed > free:
        use = "training it needs" if copies > 1 else "its weights need"
        raise ValueError(
            f"{type(config).__name__}: a model with hidden_size {config.hidden_size}, {config.num_hidden_layers} "
            f"layers and vocab_size {config.vocab_size} has {parameters:,} parameters; {use} {_size(needed)}, and "
            f"{_size(free)} are free here: choose a smaller size"
        )
    return parameters


def weight_bytes(config: PreTrainedConfig) -> int:
    """Bytes of a causal language model's weights on disk, in the dtype of ``config``, or float32 if it has none."""
    return count_parameters(config) * (getattr(config, "dtype", None) or torch.float32).itemsize


def check_output(folder: str | Path, size: float = 0) -> None:
    """Refuse an output folder that cannot be written, or whose disk has too little room, before any work is done.

    Args:
        folder: the folder, which need not exist.
        size: bytes of weights to be written; a twentieth is added for other files.

    Raises:
        OSError: if the folder is refused.
    """
    path = Path(folder).expanduser().resolve()
    place = next(p for p in (path, *path.parents) if p.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"the output folder is {str(folder)!r}, but {str(place)!r} is a file; choose another")
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise OSError(
            f"the output folder is {str(folder)!r}, and nothing can be written into {str(place)!r} ({error.strerror}); "
            "choose another"
        ) from error
    needed, free = size * 1.05, shutil.disk_usage(place).free
    if needed > free:
        raise OSError(
            f"the output folder is {str(folder)!r}: {_size(needed)} are to be written there, and {_size(free)} are "
            "free; make room, or choose another folder or a smaller size"
        )


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**29 else f"{count / 2**20:,.1f} MiB"


def _architecture_of(config: PreTrainedConfig) -> registry.Architecture:
    architecture = registry.find_architecture(type(config))
    if architecture is None:
        raise ValueError(
            f"a {type(config).__name__} is no config of hf-archs; allowed are {', '.join(registry.architectures())}"
        )
    return architecture


def look_at(source: str) -> Checkpoint:
    """Read the config of a checkpoint of this library, or of a native one that an architecture can read.

    Args:
        source: a folder, or a repository on the Hub.

    Raises:
        OSError: if there is no checkpoint.
        ValueError: if no architecture can read it.
    """
    path = Path(source).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        has_adapter = (path / "adapter_config.json").exists()
        hint = "; it holds an adapter, which is given beside its model with --adapter" if has_adapter else ""
        raise OSError(f"{source!r} is no checkpoint: it has no config.json{hint}")
    if not path.is_dir() and looks_local(source):
        raise OSError(f"{source!r} does not exist; allowed is a folder with a checkpoint, or owner/name on the Hub")
    check_name(source)
    raw, _ = PreTrainedConfig.get_config_dict(source)
    for name in registry.architectures():
        architecture = registry.get_architecture(name)
        if raw.get("model_type") == architecture.model_type:
            return Checkpoint(source, raw, architecture, None)
        form = next((f for f in architecture.native_formats if f.detect(raw)), None)
        if form is not None:
            return Checkpoint(source, raw, architecture, form)
    readable = [registry.get_architecture(name).model_type for name in registry.architectures()]
    native = [str(f) for name in registry.architectures() for f in registry.get_architecture(name).native_formats]
    raise ValueError(
        f"{source!r} is a checkpoint of {raw.get('model_type', 'an unnamed type')!r}; allowed are "
        f"{', '.join(dict.fromkeys(readable + native))}"
    )


def load_model(source: str | Checkpoint, *, copies: int = 1, **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model from a checkpoint of this library or a native one.

    Args:
        source: a folder, a repository, or the result of `look_at`.
        copies: see `check_memory`.
        kwargs: further arguments of ``from_pretrained``.

    Raises:
        OSError, ValueError, CheckpointMismatch, SafetensorError: see `look_at`, `check_memory`, `check_weights` and
            ``from_pretrained``; `CheckpointMismatch` also if there is no language-model head.
    """
    checkpoint = look_at(source) if isinstance(source, str) else source
    check_memory(checkpoint.config(), copies)
    check_weights(Path(checkpoint.source).expanduser())
    model_class: Any = checkpoint.architecture.causal_lm_class
    whole = dataclasses.replace(checkpoint, whole=True)
    return model_class.from_pretrained(checkpoint.source, checkpoint=whole, **kwargs)


def load_adapter(model: PreTrainedModel, source: str, **kwargs: Any) -> PeftModel:
    """``model`` with a PEFT adapter from a folder or the Hub.

    Raises:
        OSError: if a folder holds no adapter, or the download is not the Hub's file; see `check_downloads`.
        ValueError: if the Hub has no such adapter, or it does not fit the model.
    """
    path = Path(source).expanduser()
    if (path.is_dir() or looks_local(source)) and not (path / "adapter_config.json").exists():
        raise OSError(f"{source!r} is no adapter: it has no adapter_config.json")
    check_name(source)
    check_weights(path)
    weights = cached_file(source, SAFETENSORS_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    check_downloads([weights] if weights else [])  # before PEFT reads them
    try:
        with quiet_peft():
            return PeftModel.from_pretrained(model, source, **kwargs)
    except RuntimeError as error:
        raise ValueError(f"the adapter {source!r} does not fit this model: {error}") from error


def load_tokenizer(
    source: str | Checkpoint, other: str | None = None, config: PreTrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint.

    Args:
        source: a folder, a repository, or the result of `look_at`.
        other: another checkpoint, whose tokenizer is loaded instead.
        config: the model's config, which the tokenizer of ``other`` must fit.

    Raises:
        OSError: if there is no tokenizer.
        ValueError: if the tokenizer of ``other`` has more tokens than the model.
    """
    checkpoint = source if isinstance(source, Checkpoint) and not other else None
    found = other or (source if isinstance(source, str) else source.source)
    if Path(found).expanduser().is_dir() and not has_tokenizer(found):
        raise OSError(f"{found!r} has no tokenizer; `hf-archs train` makes one, and --tokenizer takes another's")
    check_name(found)
    tokenizer = AutoTokenizer.from_pretrained(found, config=None if checkpoint is None else _native_config(checkpoint))
    if other is not None and config is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {other!r} has {len(tokenizer)} tokens, and the model's vocab_size is "
            f"{config.vocab_size}; allowed are at most as many"
        )
    return tokenizer


def load_ready(source: str, adapter: str | None = None, tokenizer: str | None = None) -> tuple[Any, Any]:
    """Load a model with its adapter, in evaluation on the accelerator, and its tokenizer or that of ``tokenizer``."""
    checkpoint = look_at(source)
    model: Any = load_model(checkpoint)
    encoder = load_tokenizer(checkpoint, tokenizer, model.config)
    if adapter is not None:
        model = load_adapter(model, adapter)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model.eval(), encoder


def _native_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The config of the checkpoint's own type, by which `AutoTokenizer` chooses the tokenizer class."""
    raw = copy.deepcopy(checkpoint.raw)
    try:
        return AutoConfig.for_model(**{"model_type": "", **raw, "name_or_path": checkpoint.source})
    except ValueError:  # transformers has no class of this type, or it refuses these values
        return PreTrainedConfig.from_dict(raw)


def has_tokenizer(source: str) -> bool:
    """Whether a folder holds a tokenizer; always True for a repository on the Hub."""
    path = Path(source).expanduser()
    return not path.is_dir() or any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
