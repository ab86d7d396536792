"""Models out of foreign checkpoints of the same mathematics, and back.

`from_native` and `to_native` convert models in memory, and `from_pretrained` of every model class reads the formats
from disk; `hf_archs.formats` says what a format is.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from hf_archs import pickles, registry
from hf_archs.errors import CheckFailed, message_of
from hf_archs.formats import (
    OURS,
    NativeCheckpoint,
    NativeFormat,
    StateDictFormat,
    TransformersFormat,
    state_spaces_layer,
)
from hf_archs.registry import Architecture


def find_format(
    raw: Mapping[str, Any], config_class: type[PreTrainedConfig], source: object, reader: str | None = None
) -> NativeFormat | None:
    """The native format of a ``config.json``; None where it is ours.

    Args:
        raw: the content of ``config.json``.
        config_class: one of ours; its architecture's formats are tried.
        source: where the checkpoint is, for the error.
        reader: the class that reads it, for the error.

    Raises:
        ValueError: where the checkpoint is of another architecture, or its ``config.json`` says nothing of its type and
            is of no format.
        OSError: where there is no ``config.json``.
    """
    architecture = registry.find_architecture(config_class)
    if architecture is None or raw.get("model_type") == config_class.model_type:
        return None
    for candidate in architecture.native_formats:
        if candidate.detect(raw):
            return candidate
    kind, layer = raw.get("model_type"), state_spaces_layer(raw)
    if layer is not None:
        kind = f"state-spaces {layer}"
    *others, last = [config_class.model_type, *map(str, architecture.native_formats)]
    readable = f"{reader or config_class.__name__} reads {', '.join(others) + ' and ' if others else ''}{last}"
    if not raw:
        raise OSError(f"{source} has no config.json, or an empty one; {readable}")
    if kind is None:
        fields = ", ".join(sorted(raw)[:5])
        raise ValueError(
            f"the config.json of {source} has no model_type, and its fields ({fields}, ...) are of no known "
            f"format; {readable}"
        )
    raise ValueError(f"{source} is a {kind!r} checkpoint; {readable}")


def read_config(
    raw: dict[str, Any], config_class: type[PreTrainedConfig], source: object, reader: str | None = None
) -> dict[str, Any]:
    """A ``config.json`` in the fields of ``config_class``: as it is, or translated. Raises as `find_format` does."""
    native = find_format(raw, config_class, source, reader)
    if native is None:
        return raw
    try:
        return translate(native, raw, config_class)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def translate(form: NativeFormat, raw: Mapping[str, Any], config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """A ``config.json`` of a native format as sound fields of ``config_class``.

    Raises:
        ValueError: see `NativeFormat.read_config`, and for a value that no such config may have: naming the field of
            theirs without which the file would do, where the error speaks of one of ours or of none.
    """
    try:
        fields = form.read_config(raw, config_class)
        config_class(**fields)
    except Exception as error:  # transformers' own configs compute with a value before they look at its type
        said = message_of(error)
        if not isinstance(error, ValueError | StrictDataclassError):
            said = f"{type(error).__name__}: {said}"
        if not any(_speaks_of(said, name) for name in raw):
            blamed = _blamed(form, raw, config_class, said)
            said = f"{', '.join(f'{name} is {raw[name]!r}' for name in blamed)} in this {form.name} checkpoint: {said}"
        raise ValueError(said) from error
    return fields


def _speaks_of(said: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", said) is not None


def _blamed(form: NativeFormat, raw: Mapping[str, Any], config_class: type[PreTrainedConfig], said: str) -> list[str]:
    """Fields of theirs that may be why a file cannot be read, where the error names none of them."""

    def reads(part: Mapping[str, Any]) -> bool:
        with contextlib.suppress(Exception):
            return bool(config_class(**form.read_config(part, config_class)))
        return False

    ours = [theirs for ours, theirs in form.fields.items() if theirs in raw and _speaks_of(said, ours.split(".")[-1])]
    alone = {"model_type": raw.get("model_type")}
    return (
        list(dict.fromkeys(ours))
        or [name for name in raw if reads({k: v for k, v in raw.items() if k != name})]
        or [name for name, value in raw.items() if not reads({**alone, name: value})]
    )


def prepare(
    model_class: type[PreTrainedModel], source: str | os.PathLike | None, kwargs: dict[str, Any]
) -> NativeFormat | None:
    """Change the arguments of ``from_pretrained`` so that it reads a native checkpoint; gives its format.

    Args:
        model_class: the class that reads; one of ours.
        source: folder or repository, as ``from_pretrained`` gets it.
        kwargs: the other arguments; ``key_mapping`` is set, and a native ``config`` translated.

    Raises:
        ValueError: where the checkpoint is of another architecture.
    """
    config_class: Any = model_class.config_class
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig) and not isinstance(config, config_class):
        fields = read_config(config.to_dict(), config_class, "config", model_class.__name__)
        kwargs["config"] = config_class.from_dict(fields)
    if source is None or kwargs.get("gguf_file"):
        return None
    where = {name: kwargs[name] for name in inspect.signature(find_adapter_config_file).parameters if name in kwargs}
    try:
        raw, _ = PreTrainedConfig.get_config_dict(source, **where)
    except OSError:
        return None  # transformers says in its own words what cannot be reached or read
    if not raw:
        # an adapter, whose base model is what will be read, or weights without a config
        adapter = find_adapter_config_file(str(source), **where)
        if adapter is None:
            return None
        with open(adapter, encoding="utf-8") as file:
            base = json.load(file).get("base_model_name_or_path")
        return prepare(model_class, base, kwargs)
    native = find_format(raw, config_class, source, model_class.__name__)
    if native is not None:
        kwargs["key_mapping"] = {**native.key_mapping(), **(kwargs.get("key_mapping") or {})}
    return native


@contextlib.contextmanager
def unpickled(
    native: NativeFormat | None, source: str | os.PathLike | None, kwargs: dict[str, Any]
) -> Iterator[str | None]:
    """A folder with the checkpoint of ``source``, its weights as safetensors; None where they are no pickle.

    Args:
        native: the format of the checkpoint.
        source, kwargs: the arguments of ``from_pretrained``, where ``use_safetensors=False`` asks for the pickle; the
            folder needs no such argument, and it is taken out.

    Raises:
        ValueError: where the weights are a pickle, and nobody asked for it or it holds none.
    """
    if native is None or native.pickle is None or source is None:
        yield None
        return
    where = {name: kwargs[name] for name in inspect.signature(find_adapter_config_file).parameters if name in kwargs}

    def find(name: str) -> str | None:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **where)  # type: ignore[call-arg]

    asked = kwargs.get("use_safetensors") is False
    safe = not asked and any(map(find, (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)))
    pickled = None if safe else find(native.pickle)
    if pickled is None:
        yield None
        return
    if not asked:
        raise ValueError(
            f"the weights of {source} are a pickle, {native.pickle}, which is read on request only: by "
            "from_pretrained(..., use_safetensors=False), or once by `hf-archs convert --pickle`; nothing that stands "
            "in the file is run"
        )
    raw, _ = PreTrainedConfig.get_config_dict(source, **where)
    with tempfile.TemporaryDirectory() as folder:
        NativeCheckpoint(raw, pickles.read_state_dict(pickled)).save_pretrained(folder)
        for name in ("use_safetensors", "subfolder"):
            kwargs.pop(name, None)
        try:
            yield folder
        except (ValueError, CheckFailed) as error:  # which names the folder
            error.args = tuple(str(part).replace(folder, str(source)) for part in error.args)
            raise


@dataclass(frozen=True)
class Reading:
    """A checkpoint while ``from_pretrained`` reads it.

    Attributes:
        source: folder or repository.
        native: whether it is of a native format.
        any_shape: whether tensors may have other shapes than the config asks for, and are made anew then.
        reported: whether the caller gets a list of what is missing and left over, and decides.
        whole: whether the head has to be there.
    """

    source: Any
    native: bool
    any_shape: bool
    reported: bool
    whole: bool

    def check(self, model: PreTrainedModel, found: Any) -> None:
        """Hold the names and shapes in the files against the model.

        Everything below the heads has to be there, and nothing else. A head may be missing, and is a new one then; that
        of another class of model may be left over. Other tensors beside both are, in our own files, their writer's.

        Args:
            found: transformers' report on what it read.

        Raises:
            CheckFailed: naming a tensor and how many others there are.
        """
        base = "" if model.base_model is model or self.whole else f"{OURS}."
        tied: Any = model.all_tied_weights_keys  # which files hold once
        missing = sorted(name for name in found.missing_keys if name.startswith(base) and name not in tied)
        below, heads = (
            rf"(?:{OURS}\.)?(?:embed_tokens|embed_norm|layers|norm)\.",
            r"(?:lm_head|score|classifier|qa_outputs)\.",
        )
        left = sorted(
            name
            for name in found.unexpected_keys
            if re.match(below, name) or (self.native and not re.match(heads, name))
        )
        if found.conversion_errors:
            name = min(found.conversion_errors)
            wrong = f"the parts of {name} in {self.source} do not fit each other, or one is missing"
        elif found.mismatched_keys and not self.any_shape:
            name, given, expected = min(found.mismatched_keys)
            wrong = f"{name} has shape {tuple(given)} in {self.source}, and its config asks for {tuple(expected)}"
        elif self.reported:
            return
        elif missing:
            wrong = f"{missing[0]}{_and_others(missing)} is missing in {self.source}, whose config asks for it"
        elif left:
            wrong = f"{left[0]}{_and_others(left)} stands in {self.source}, whose config has no place for it"
        else:
            return
        for names in (found.conversion_errors, found.mismatched_keys, found.missing_keys, found.unexpected_keys):
            names.clear()  # or transformers says it once more, in a table
        raise CheckFailed(f"{wrong}; allowed is a checkpoint that fits its config")


def _and_others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _formats() -> list[tuple[Architecture, TransformersFormat]]:
    return [
        (architecture, candidate)
        for architecture in map(registry.get_architecture, registry.architectures())
        for candidate in architecture.native_formats
        if isinstance(candidate, TransformersFormat)
    ]


def from_native(model: PreTrainedModel | NativeCheckpoint) -> PreTrainedModel:
    """A model of this library with the weights of one of transformers' own, or of another package's; they share no
    memory.

    Every value is the same and tied embeddings stay tied; parameters that this library keeps in float32 under lower
    precision are widened. Device, training mode and generation config are carried over.

    Args:
        model: a base model or causal language model of a class that an architecture's native formats name, or a
            `NativeCheckpoint` of any format, or a model of the package whose checkpoints they are.

    Raises:
        ValueError: for any other model, a config that ours cannot represent, or parameters that do not fit it.
    """
    if isinstance(model, NativeCheckpoint):
        return _from_checkpoint(model)
    pairs = [(form, *pair) for architecture, form in _formats() for pair in form.classes(architecture)]
    match = next((pair for pair in pairs if isinstance(model, pair[2])), None)
    if match is None and _detect(model.config.to_dict()) is not None:
        converted = _from_checkpoint(NativeCheckpoint(model.config.to_dict(), model.state_dict()))
        return converted.train(model.training)
    if match is None:
        names = ", ".join(theirs.__name__ for *_, theirs in pairs)
        raise ValueError(f"from_native: a {type(model).__name__} cannot be converted; allowed are {names}")
    form, ours, _ = match
    config_class: Any = ours.config_class
    config = config_class(**translate(form, model.config.to_dict(), config_class))
    state = {form.ours(name): tensor for name, tensor in model.state_dict().items()}
    return _take_over(_build(ours, config, _widened(ours, state), model.device, model.dtype), model)


def _widened(model_class: type[PreTrainedModel], state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies, with what this library keeps in float32 in at least that."""
    wide = set(model_class._keep_in_fp32_modules_strict or ())
    return {
        name: tensor.to(
            tensor.dtype if wide.isdisjoint(name.split(".")) else torch.promote_types(tensor.dtype, torch.float32),
            copy=True,
        )
        for name, tensor in state.items()
    }


def _detect(raw: Mapping[str, Any]) -> tuple[Architecture, NativeFormat] | None:
    for architecture in map(registry.get_architecture, registry.architectures()):
        for form in architecture.native_formats:
            if form.detect(raw):
                return architecture, form
    return None


def _from_checkpoint(checkpoint: NativeCheckpoint) -> PreTrainedModel:
    found = _detect(checkpoint.config)
    if found is None:
        known = [str(f) for name in registry.architectures() for f in registry.get_architecture(name).native_formats]
        raise ValueError(
            f"from_native: a checkpoint of {checkpoint.config.get('model_type', 'an unnamed type')!r} cannot be "
            f"converted; allowed are {', '.join(dict.fromkeys(known))}"
        )
    architecture, form = found
    config_class: Any = architecture.config_class
    config = config_class(**translate(form, checkpoint.config, config_class))
    state = {
        form.ours(name): tensor
        for name, tensor in checkpoint.state_dict.items()
        if not (isinstance(form, StateDictFormat) and form.is_buffer(name))
    }
    state = form.convert(state, config)
    embedding = state.get(f"{OURS}.embed_tokens.weight")
    if config.tie_word_embeddings and embedding is not None:  # files leave one of the two out
        state.setdefault("lm_head.weight", embedding)
    model_class = architecture.causal_lm_class
    if "lm_head.weight" not in state:
        model_class = architecture.model_class
        state = {name.removeprefix(f"{OURS}."): tensor for name, tensor in state.items()}
    first = next(iter(state.values()))
    try:
        return _build(model_class, config, _widened(model_class, state), first.device, first.dtype).eval()
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise ValueError(f"from_native: the state dict does not fit its config: {lines}") from error


def to_native(model: PreTrainedModel, format: str | None = None) -> PreTrainedModel | NativeCheckpoint:
    """A model of transformers' own, or another package's checkpoint, with the weights of one of this library.

    They share no memory.

    Every value is the same and tied embeddings stay tied. Parameters that this library keeps in float32 under lower
    precision get the model's dtype where that changes no value of any of them; transformers' models run with either.

    Args:
        model: a base model or causal language model of an architecture with native formats.
        format: the name of the format wanted, for transformers' models their ``model_type``; None takes the first
            that can represent the config.

    Raises:
        ValueError: where there is no such format, or none can represent the config, naming the field.
    """
    candidates: dict[str, tuple[TransformersFormat | StateDictFormat, Any]] = {}
    allowed: list[str] = []
    for architecture in map(registry.get_architecture, registry.architectures()):
        pairs: list[tuple[Any, TransformersFormat | StateDictFormat, Any]] = []
        for form in architecture.native_formats:
            if isinstance(form, TransformersFormat):
                pairs += [(ours, form, theirs) for ours, theirs in form.classes(architecture)]
            elif isinstance(form, StateDictFormat):
                pairs += [(ours, form, None) for ours in (architecture.model_class, architecture.causal_lm_class)]
        allowed += [ours.__name__ for ours, *_ in pairs]
        candidates.update({form.name: (form, theirs) for ours, form, theirs in pairs if isinstance(model, ours)})
    if not candidates:
        names = ", ".join(dict.fromkeys(allowed))
        raise ValueError(f"to_native: a {type(model).__name__} cannot be converted; allowed are {names}")
    if format is not None and format not in candidates:
        raise ValueError(
            f"to_native: format is {format!r}; allowed for a {type(model).__name__} are {', '.join(candidates)}"
        )
    refusals = []
    for form, theirs in [candidates[format]] if format else candidates.values():
        try:
            config: Any = form.write_config(model.config)
        except ValueError as refusal:
            refusals.append(str(refusal))
            continue
        state = _narrow(form, model)
        if isinstance(form, StateDictFormat):
            prefix = f"{form.prefix}." if model.base_model is model else ""
            state.update({name.removeprefix(prefix): t for name, t in form.buffers(model.config).items()})
            return NativeCheckpoint(config, state)
        return _take_over(_build(theirs, config, state, model.device, model.dtype), model)
    raise ValueError("; ".join(refusals))


def _narrow(form: NativeFormat, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters under their names, in the model's dtype where no value of any of them changes by that."""
    theirs = form.names_for(model.config)
    state = {theirs(name): tensor.clone() for name, tensor in model.state_dict().items()}
    wide = {name: tensor.to(model.dtype) for name, tensor in state.items() if tensor.dtype != model.dtype}
    if all(torch.equal(narrow.to(state[name].dtype), state[name]) for name, narrow in wide.items()):
        state.update(wide)
    return state


def _build(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    state: dict[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """A model of ``model_class`` that takes over ``state`` as it is, dtypes included."""
    with no_init_weights(), torch.device(device):
        model = model_class._from_config(config, dtype=dtype)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def _take_over(model: PreTrainedModel, source: PreTrainedModel) -> PreTrainedModel:
    """``model`` with the rest of what ``source`` is."""
    model.config.name_or_path = source.config.name_or_path
    if source.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)
    return model.train(source.training)
