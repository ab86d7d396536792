"""Reading of foreign checkpoints of the same mathematics, by `from_pretrained` of every model class.

`hf_archs.native.formats` defines the formats; `hf_archs.native.conversion` converts models in memory.
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
from hf_archs.native.hub import check_downloads
from hf_archs.native.state_spaces import state_spaces_layer
from hf_archs.registry import Architecture

# the arguments of `from_pretrained` that locate and fetch files
WHERE = frozenset(inspect.signature(find_adapter_config_file).parameters) - {"model_id"}


def find_format(
    raw: Mapping[str, Any], config_class: type[PreTrainedConfig], source: object, reader: str | None = None
) -> NativeFormat | None:
    """The native format of a ``config.json``; None for this library's own.

    Args:
        raw: the content of ``config.json``.
        config_class: a config class of this library; the formats of its architecture are tried.
        source: folder or repository, for the error message.
        reader: name of the class that reads the checkpoint, for the error message.

    Raises:
        ValueError: if the checkpoint is of another architecture, or its ``config.json`` has no ``model_type`` and is of
            no known format.
        OSError: if there is no ``config.json``.
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
    """The fields of ``config_class`` in a ``config.json``. Raises as `find_format` and `translate` do."""
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
    """Translate a ``config.json`` of a native format to fields that ``config_class`` accepts.

    Raises:
        ValueError: as `NativeFormat.read_config`, and for a value that ``config_class`` refuses. If the refusal names
            no field of the file, the message adds the fields that probably caused it.
    """
    try:
        fields = form.read_config(raw, config_class)
        config_class(**fields)
    except Exception as error:  # transformers' own configs use a value before they check its type
        message = reason(error)
        if not isinstance(error, ValueError | StrictDataclassError):
            message = f"{type(error).__name__}: {message}"
        if not any(_mentions(message, name) for name in raw):
            causes = ", ".join(f"{name} is {raw[name]!r}" for name in _causes(form, raw, config_class, message))
            message = f"{causes} in this {form.name} checkpoint: {message}"
        raise ValueError(message) from error
    return fields


def _mentions(message: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", message) is not None


def _causes(form: NativeFormat, raw: Mapping[str, Any], config_class: type[PreTrainedConfig], error: str) -> list[str]:
    """The fields of a file that probably caused an error that names none of them."""

    def reads(part: Mapping[str, Any]) -> bool:
        with contextlib.suppress(Exception):
            return bool(config_class(**form.read_config(part, config_class)))
        return False

    named = [theirs for ours, theirs in form.fields.items() if theirs in raw and _mentions(error, ours.split(".")[-1])]
    alone = {"model_type": raw.get("model_type")}
    return (
        list(dict.fromkeys(named))
        or [name for name in raw if reads({k: v for k, v in raw.items() if k != name})]
        or [name for name, value in raw.items() if not reads({**alone, name: value})]
    )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose ``config.json`` was read, and need not be read again.

    Attributes:
        source: folder or repository.
        raw: the content of ``config.json``.
        architecture: the architecture that reads the checkpoint.
        native: the checkpoint's native format; None for this library's own.
        whole: whether the head is required.
    """

    source: str
    raw: dict[str, Any]
    architecture: Architecture
    native: NativeFormat | None
    whole: bool = False

    def fields(self, config_class: type[PreTrainedConfig]) -> dict[str, Any]:
        """A copy of the config as fields of ``config_class``. Raises `ValueError` as `translate` does."""
        return _fields(copy.deepcopy(self.raw), config_class, self.source, self.native)

    def config(self) -> Any:
        """The config of the architecture. Raises as `fields` does, and as the config class does for a wrong value."""
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
        model_class: the model class that reads, of this library.
        source: folder or repository, as given to ``from_pretrained``.
        kwargs: the other arguments; ``key_mapping`` is set, and a native ``config`` translated.
        checkpoint: the checkpoint of ``source``, if the caller has it already.

    Returns:
        the checkpoint, or for an adapter its base model's; None if there is no config to read.

    Raises:
        ValueError: if the checkpoint is of another architecture.
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
        return None  # transformers reports files that cannot be reached or read
    if not raw:
        # either an adapter, whose base model is read, or weights without a config
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
    """Context manager: a pickled checkpoint, rewritten as safetensors in a temporary folder; None if not pickled.

    Args:
        checkpoint: the result of `prepare`.
        source, kwargs: the arguments of ``from_pretrained``. ``use_safetensors=False`` requests the pickle, and is
            removed together with ``subfolder``, because the temporary folder needs neither.

    Raises:
        ValueError: if the weights are a pickle that was not requested, or a pickle without weights.
    """
    if checkpoint is None or checkpoint.native is None or checkpoint.native.pickle is None or source is None:
        yield None
        return
    pickle = checkpoint.native.pickle
    where = {name: kwargs[name] for name in WHERE & kwargs.keys()}

    def find(name: str) -> str | None:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **where)  # type: ignore[call-arg]

    requested = kwargs.get("use_safetensors") is False
    safe = not requested and any(map(find, (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)))
    pickled = None if safe else find(pickle)
    if pickled is None:
        yield None
        return
    if not requested:
        raise ValueError(
            f"the weights of {source} are a pickle, {pickle}, which is read on request only: by "
            "from_pretrained(..., use_safetensors=False), or once by `hf-archs convert --pickle`; nothing that stands "
            "in the file is run"
        )
    check_downloads([pickled])
    with tempfile.TemporaryDirectory() as folder:
        NativeCheckpoint(checkpoint.raw, pickles.read_state_dict(pickled)).save_pretrained(folder)
        for name in ("use_safetensors", "subfolder"):
            kwargs.pop(name, None)
        try:
            yield replace(checkpoint, source=folder)
        except (ValueError, CheckpointMismatch) as error:  # the message names the temporary folder
            error.args = tuple(str(part).replace(folder, str(source)) for part in error.args)
            raise


@dataclass(frozen=True)
class Reading:
    """The check of a checkpoint that ``from_pretrained`` reads.

    Attributes:
        source: folder or repository.
        checkpoint: the result of `prepare`.
        any_shape: whether tensors of a wrong shape are initialised anew (``ignore_mismatched_sizes``).
        reported: whether the caller gets the missing and unexpected names, and decides (``output_loading_info``).
    """

    source: Any
    checkpoint: Checkpoint | None
    any_shape: bool
    reported: bool

    def pass_over_buffers(self, found: Any) -> None:
        """Remove buffers that follow from the config from the unexpected names in transformers' report."""
        form = None if self.checkpoint is None else self.checkpoint.native
        if form is not None:
            found.unexpected_keys -= {name for name in found.unexpected_keys if form.is_buffer(name)}

    def check(self, model: PreTrainedModel, found: Any) -> None:
        """Compare the names and shapes in the files with the model.

        The parameters below the heads must all be there, and no others. A missing head is initialised anew, unless
        `Checkpoint.whole` is set; the head of another model class is ignored. Tensors outside both are ignored in files
        of this library, and refused in native files.

        Args:
            found: transformers' report on the files.

        Raises:
            CheckpointMismatch: names one tensor, and the number of others.
        """
        native = self.checkpoint is not None and self.checkpoint.native is not None
        whole = self.checkpoint is not None and self.checkpoint.whole
        base = "" if model.base_model is model or whole else f"{OURS}."
        tied: Any = model.all_tied_weights_keys  # files hold tied tensors once
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
            names.clear()  # or transformers reports them too, in a table
        raise CheckpointMismatch(f"{wrong}; allowed is a checkpoint that fits its config")


def _and_others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
