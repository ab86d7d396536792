"""How `from_pretrained` of every model class reads foreign checkpoints of the same mathematics from disk.

`hf_archs.native.formats` says what a format is, and `hf_archs.native.conversion` converts models in memory.
"""

import contextlib
import copy
import inspect
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from hf_archs import registry
from hf_archs.errors import CheckpointMismatch, reason
from hf_archs.native import pickles
from hf_archs.native.formats import OURS, NativeCheckpoint, NativeFormat
from hf_archs.native.state_spaces import state_spaces_layer
from hf_archs.registry import Architecture

# the arguments of `from_pretrained` that say where files are and how they are fetched
WHERE = frozenset(inspect.signature(find_adapter_config_file).parameters) - {"model_id"}


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
    return _fields(raw, config_class, source, find_format(raw, config_class, source, reader))


def _fields(
    raw: dict[str, Any], config_class: type[PreTrainedConfig], source: object, native: NativeFormat | None
) -> dict[str, Any]:
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
        said = reason(error)
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


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was looked at: its ``config.json`` is read before this is made, and not again.

    Attributes:
        source: folder or repository.
        raw: the content of ``config.json``.
        architecture: the one that reads it.
        native: its format; None where it is ours.
        whole: whether the head has to be there.
    """

    source: str
    raw: dict[str, Any]
    architecture: Architecture
    native: NativeFormat | None
    whole: bool = False

    def fields(self, config_class: type[PreTrainedConfig]) -> dict[str, Any]:
        """The config in the fields of ``config_class``, a copy. Raises `ValueError` as `translate` does."""
        return _fields(copy.deepcopy(self.raw), config_class, self.source, self.native)

    def config(self) -> Any:
        """The config of ours. Raises as `fields` does, and as the config's class does for a wrong value."""
        config_class = self.architecture.config_class
        return config_class.from_dict(self.fields(config_class))


def prepare(
    model_class: type[PreTrainedModel],
    source: str | os.PathLike | None,
    kwargs: dict[str, Any],
    checkpoint: Checkpoint | None = None,
) -> Checkpoint | None:
    """Change the arguments of ``from_pretrained`` so that it reads a native checkpoint.

    Args:
        model_class: the class that reads; one of ours.
        source: folder or repository, as ``from_pretrained`` gets it.
        kwargs: the other arguments; ``key_mapping`` is set, and a native ``config`` translated.
        checkpoint: that of ``source``, where the caller has looked at it.

    Returns:
        the checkpoint: of an adapter, that of its base model; None where there is none to look at.

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
    if checkpoint is None:
        checkpoint = _look(model_class, source, {name: kwargs[name] for name in WHERE & kwargs.keys()})
    if checkpoint is not None and checkpoint.native is not None:
        kwargs["key_mapping"] = {**checkpoint.native.key_mapping(), **(kwargs.get("key_mapping") or {})}
    return checkpoint


def _look(
    model_class: type[PreTrainedModel], source: str | os.PathLike | None, where: Mapping[str, Any]
) -> Checkpoint | None:
    if source is None:
        return None
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
            return _look(model_class, json.load(file).get("base_model_name_or_path"), where)
    config_class: Any = model_class.config_class
    architecture = registry.find_architecture(config_class)
    native = find_format(raw, config_class, source, model_class.__name__)
    return None if architecture is None else Checkpoint(str(source), raw, architecture, native)


@contextlib.contextmanager
def unpickled(
    checkpoint: Checkpoint | None, source: str | os.PathLike | None, kwargs: dict[str, Any]
) -> Iterator[Checkpoint | None]:
    """The checkpoint in a folder where its weights are safetensors; None where they are no pickle.

    Args:
        checkpoint: what `prepare` gives.
        source, kwargs: the arguments of ``from_pretrained``, where ``use_safetensors=False`` asks for the pickle; the
            folder needs no such argument, and it is taken out.

    Raises:
        ValueError: where the weights are a pickle, and nobody asked for it or it holds none.
    """
    if checkpoint is None or checkpoint.native is None or checkpoint.native.pickle is None or source is None:
        yield None
        return
    pickle = checkpoint.native.pickle
    where = {name: kwargs[name] for name in WHERE & kwargs.keys()}

    def find(name: str) -> str | None:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **where)  # type: ignore[call-arg]

    asked = kwargs.get("use_safetensors") is False
    safe = not asked and any(map(find, (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)))
    pickled = None if safe else find(pickle)
    if pickled is None:
        yield None
        return
    if not asked:
        raise ValueError(
            f"the weights of {source} are a pickle, {pickle}, which is read on request only: by "
            "from_pretrained(..., use_safetensors=False), or once by `hf-archs convert --pickle`; nothing that stands "
            "in the file is run"
        )
    with tempfile.TemporaryDirectory() as folder:
        NativeCheckpoint(checkpoint.raw, pickles.read_state_dict(pickled)).save_pretrained(folder)
        for name in ("use_safetensors", "subfolder"):
            kwargs.pop(name, None)
        try:
            yield replace(checkpoint, source=folder)
        except (ValueError, CheckpointMismatch) as error:  # which names the folder
            error.args = tuple(str(part).replace(folder, str(source)) for part in error.args)
            raise


@dataclass(frozen=True)
class Reading:
    """A checkpoint while ``from_pretrained`` reads it.

    Attributes:
        source: folder or repository.
        checkpoint: what `prepare` gives.
        any_shape: whether tensors may have other shapes than the config asks for, and are made anew then.
        reported: whether the caller gets a list of what is missing and left over, and decides.
    """

    source: Any
    checkpoint: Checkpoint | None
    any_shape: bool
    reported: bool

    def pass_over_buffers(self, found: Any) -> None:
        """Take what follows from the config out of the list of what is left over, in transformers' report."""
        form = None if self.checkpoint is None else self.checkpoint.native
        if form is not None:
            found.unexpected_keys -= {name for name in found.unexpected_keys if form.is_buffer(name)}

    def check(self, model: PreTrainedModel, found: Any) -> None:
        """Hold the names and shapes in the files against the model.

        Everything below the heads has to be there, and nothing else. A head may be missing, and is a new one then; that
        of another class of model may be left over. Other tensors beside both are, in our own files, their writer's.

        Args:
            found: transformers' report on what it read.

        Raises:
            CheckpointMismatch: naming a tensor and how many others there are.
        """
        native = self.checkpoint is not None and self.checkpoint.native is not None
        whole = self.checkpoint is not None and self.checkpoint.whole
        base = "" if model.base_model is model or whole else f"{OURS}."
        tied: Any = model.all_tied_weights_keys  # which files hold once
        missing = sorted(name for name in found.missing_keys if name.startswith(base) and name not in tied)
        below, heads = (
            rf"(?:{OURS}\.)?(?:embed_tokens|embed_norm|layers|norm)\.",
            r"(?:lm_head|score|classifier|qa_outputs)\.",
        )
        left = sorted(
            name for name in found.unexpected_keys if re.match(below, name) or (native and not re.match(heads, name))
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
        raise CheckpointMismatch(f"{wrong}; allowed is a checkpoint that fits its config")


def _and_others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
