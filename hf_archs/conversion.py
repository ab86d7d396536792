"""Foreign checkpoints of the same mathematics: a rename table for the parameters and one for the config, both ways.

A plugin declares a `NativeFormat` for every format it can read; `from_native` and `to_native` convert models of
transformers in memory, and `from_pretrained` of every model class reads the formats from disk.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils.peft_utils import find_adapter_config_file

from hf_archs import registry
from hf_archs.registry import Architecture

OURS = "model"  # `base_model_prefix` of every class of this library


@dataclass(frozen=True, kw_only=True)
class NativeFormat(ABC):
    """A checkpoint format other than ours whose parameters are ours under other names.

    Attributes:
        name: the ``model_type`` in its ``config.json``.
        prefix: what stands before the base model's parameters where it has a head; ours is ``model``.
        renames: our names and theirs, of parameters outside the layers, without the prefix. Names that are in no
            table are the same in both.
        layer_renames: the same for parameters in a layer, without ``layers.<i>.``.
        layer_aliases: other names of theirs for parameters in a layer, and ours.
        fields: our config fields and theirs.
        constants: our config fields and the only value that the format stands for.
        allowed: their config fields that must have one of these values, or the checkpoint is no such model.
        ignored: their config fields that do not change the result.
        unused: our config fields that the format does not have and that do not change the result.
        assumed: the same, with the values that they get when reading.
    """

    name: str
    prefix: str = "backbone"
    renames: Mapping[str, str] = field(default_factory=dict)
    layer_renames: Mapping[str, str] = field(default_factory=dict)
    layer_aliases: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    allowed: Mapping[str, Collection[Any]] = field(default_factory=dict)
    ignored: Collection[str] = ()
    unused: Collection[str] = ()
    assumed: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def detect(self, raw: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is of this format."""
        return raw.get("model_type") == self.name

    @abstractmethod
    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """All their config fields as one flat dict, and the default of each that the format knows."""

    # -- names -------------------------------------------------------------------------------------------------

    def theirs(self, name: str) -> str:
        """Their name of our parameter, with or without prefix as it came."""
        return _rename(name, (OURS, self.prefix), self.renames, self.layer_renames)

    def ours(self, name: str) -> str:
        """Our name of their parameter, with or without prefix as it came."""
        backward = [{theirs: ours for ours, theirs in t.items()} for t in (self.renames, self.layer_renames)]
        return _rename(name, (self.prefix, OURS), backward[0], {**self.layer_aliases, **backward[1]})

    def key_mapping(self) -> dict[str, str]:
        """Their names to ours in the form of transformers' ``key_mapping``: applied one after another."""
        mapping = {rf"^{re.escape(self.prefix)}\.": f"{OURS}."}
        layer_names = [*self.layer_renames.items(), *((ours, theirs) for theirs, ours in self.layer_aliases.items())]
        for within, names in (("", self.renames.items()), (r"layers\.\d+\.", layer_names)):
            for ours, theirs in names:
                mapping[rf"^((?:{OURS}\.)?{within}){re.escape(theirs)}$"] = rf"\1{ours}"
        return mapping

    # -- config ------------------------------------------------------------------------------------------------

    def read_config(self, raw: Mapping[str, Any], config_class: type[PreTrainedConfig]) -> dict[str, Any]:
        """A ``config.json`` of this format as the fields of ``config_class``.

        Raises:
            ValueError: for an option that ours cannot represent, naming field, value and what is allowed.
        """
        given, defaults = self.expand(raw)
        common = _common(given)
        fields = {ours: given[theirs] for ours, theirs in self.fields.items() if theirs in given}
        known = {*common, *self.fields.values(), *self.ignored, "architectures", "transformers_version"}
        for name, value in given.items():
            if name in known or (name not in self.allowed and name not in defaults):
                continue
            allowed = self.allowed.get(name, (defaults.get(name),))
            if value not in allowed:
                raise ValueError(
                    f"{name} is {value!r} in this {self.name} checkpoint, which {config_class.__name__} cannot "
                    f"represent; allowed: {', '.join(map(repr, allowed))}"
                )
        return {**common, **fields, **self.constants, **self.assumed, "model_type": config_class.model_type}

    def write_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Our config in their fields, as far as they have other names only.

        Raises:
            ValueError: where ours says something that theirs cannot, naming field, value and what is allowed.
        """
        defaults = type(config)()
        common = _common(config.to_dict())
        for f in dataclasses.fields(config):  # type: ignore[arg-type]
            if f.name in {*self.fields, *self.unused, *self.assumed, *common} or f.name.startswith("_"):
                continue
            value, allowed = getattr(config, f.name), self.constants.get(f.name, getattr(defaults, f.name))
            if value != allowed and f.name not in ("architectures", "transformers_version"):
                raise ValueError(
                    f"{type(config).__name__}: {f.name} is {value!r}, which a {self.name} model cannot represent; "
                    f"allowed: {allowed!r}"
                )
        return {theirs: getattr(config, ours) for ours, theirs in self.fields.items()}


@dataclass(frozen=True, kw_only=True)
class TransformersFormat(NativeFormat):
    """The checkpoints of an architecture in transformers itself, which exist as models in memory too.

    Attributes:
        config_name, model_name, causal_lm_name: transformers' classes.
        derived: their config fields and the attribute of our config that gives the value when writing.
    """

    config_name: str
    model_name: str
    causal_lm_name: str
    derived: Mapping[str, str] = field(default_factory=dict)

    def classes(self, architecture: Architecture) -> list[tuple[type[PreTrainedModel], type[PreTrainedModel]]]:
        """Pairs of our class and theirs."""
        return [
            (architecture.model_class, getattr(transformers, self.model_name)),
            (architecture.causal_lm_class, getattr(transformers, self.causal_lm_name)),
        ]

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        config_class = getattr(transformers, self.config_name)
        # a file may leave out what has its class's default, and the class knows older names of its fields
        given = config_class.from_dict({k: v for k, v in raw.items() if k != "auto_map"}).to_dict()
        common = _common(given)
        defaults = config_class().to_dict()
        declared = {f.name for f in dataclasses.fields(config_class)} - set(common) - {"architectures", "model_type"}
        return given, {name: defaults[name] for name in declared & set(defaults)}

    def write_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Our config as one of transformers'. Raises as `write_fields` does."""
        fields = self.write_fields(config)
        fields.update({theirs: getattr(config, attribute) for theirs, attribute in self.derived.items()})
        return getattr(transformers, self.config_name)(**{**_common(config.to_dict()), **fields})


@dataclass
class NativeCheckpoint:
    """A model of a package that transformers does not know: its config and its parameters, under its names.

    Attributes:
        config: what stands in its ``config.json``.
        state_dict: its parameters.
    """

    config: dict[str, Any]
    state_dict: dict[str, torch.Tensor]

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
            json.dump(self.config, file, indent=2)
        state = {name: tensor.contiguous().clone() for name, tensor in self.state_dict.items()}  # shared ones twice
        save_file(state, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})


@dataclass(frozen=True, kw_only=True)
class StateDictFormat(NativeFormat):
    """The checkpoints of a package outside of transformers, which exist as a `NativeCheckpoint` here.

    Attributes:
        defaults: their config fields that mean something to a model, with the default of each.
    """

    defaults: Mapping[str, Any]

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return {**self.defaults, **raw}, dict(self.defaults)

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Our config as their ``config.json``. Raises as `write_fields` does."""
        return {**self.defaults, **self.write_fields(config)}

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor of theirs is no parameter, and follows from the config."""
        return False

    def buffers(self, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
        """What their state dict holds beside parameters."""
        return {}


@dataclass(frozen=True, kw_only=True)
class StateSpacesFormat(NativeFormat):
    """The checkpoints of the package mamba_ssm (github.com/state-spaces/mamba), as published under ``state-spaces/``.

    Attributes:
        layer: the kind of layer, as ``ssm_cfg["layer"]`` has it.
        layer_defaults: every option of such a layer, with the default it has where ``ssm_cfg`` leaves it out. In the
            tables its name is ``ssm_cfg.<option>``.
    """

    name: str = "state-spaces"
    layer: str
    layer_defaults: Mapping[str, Any]

    def __str__(self) -> str:
        return "the state-spaces layout"

    def detect(self, raw: Mapping[str, Any]) -> bool:
        return is_state_spaces(raw) and raw["ssm_cfg"].get("layer", "Mamba1") == self.layer

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        # options of mamba_ssm.models.config_mamba.MambaConfig beside the sizes, and the value that a stack of
        # nothing but such layers has
        defaults = {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True}
        options = {"vocab_size": 50277, "residual_in_fp32": True, "pad_vocab_size_multiple": 8, "tie_embeddings": True}
        given = {**defaults, **options, **{k: v for k, v in raw.items() if k != "ssm_cfg"}}
        multiple = given.pop("pad_vocab_size_multiple")
        given["vocab_size"] = -(-given["vocab_size"] // multiple) * multiple
        given.pop("fused_add_norm", None)  # the same result in another kernel
        layer = {**self.layer_defaults, **{k: v for k, v in raw["ssm_cfg"].items() if k != "layer"}}
        # "auto" is what ours calls None: it follows from the width
        given.update({f"ssm_cfg.{name}": None if value == "auto" else value for name, value in layer.items()})
        # an option that nobody knows has no default: whatever it says cannot be represented
        return given, {name: defaults.get(name, self.layer_defaults.get(name.partition(".")[2])) for name in given}


def is_state_spaces(raw: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of the package mamba_ssm, whatever its layers are."""
    return "model_type" not in raw and {"d_model", "n_layer", "ssm_cfg"} <= set(raw)


def _rename(name: str, prefixes: tuple[str, str], table: Mapping[str, str], layer_table: Mapping[str, str]) -> str:
    match = re.fullmatch(rf"({re.escape(prefixes[0])}\.)?(layers\.\d+\.)?(.*)", name)
    assert match is not None  # every group may be empty
    prefix, layer, rest = match.groups(default="")
    return (prefix and f"{prefixes[1]}.") + layer + (layer_table if layer else table).get(rest, rest)


def _common(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every config of transformers has: labels, dtype, quantisation and the like."""
    names = {*PreTrainedConfig().to_dict(), "quantization_config"}
    names -= {"architectures", "model_type", "transformers_version", "auto_map"}
    return {name: value for name, value in config.items() if name in names}


def find_format(
    raw: Mapping[str, Any], config_class: type[PreTrainedConfig], source: object, reader: str | None = None
) -> NativeFormat | None:
    """The native format of a ``config.json``; None where it is ours, or says nothing of its type.

    Args:
        raw: the content of ``config.json``.
        config_class: one of ours; its architecture's formats are tried.
        source: where the checkpoint is, for the error.
        reader: the class that reads it, for the error.

    Raises:
        ValueError: where the checkpoint is of another architecture.
    """
    architecture = registry.find_architecture(config_class)
    if architecture is None or raw.get("model_type") == config_class.model_type:
        return None
    for candidate in architecture.native_formats:
        if candidate.detect(raw):
            return candidate
    kind = raw.get("model_type")
    if kind is None and is_state_spaces(raw):
        kind = f"state-spaces {raw['ssm_cfg'].get('layer', 'Mamba1')}"
    if kind is None:
        return None
    *others, last = [config_class.model_type, *map(str, architecture.native_formats)]
    readable = f"{', '.join(others)} and {last}" if others else last
    raise ValueError(f"{source} is a {kind!r} checkpoint; {reader or config_class.__name__} reads {readable}")


def read_config(
    raw: dict[str, Any], config_class: type[PreTrainedConfig], source: object, reader: str | None = None
) -> dict[str, Any]:
    """A ``config.json`` in the fields of ``config_class``: as it is, or translated. Raises as `find_format` does."""
    native = find_format(raw, config_class, source, reader)
    if native is None:
        return raw
    try:
        return native.read_config(raw, config_class)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


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
    config = config_class(**form.read_config(model.config.to_dict(), config_class))
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
    config = config_class(**form.read_config(checkpoint.config, config_class))
    state = {
        form.ours(name): tensor
        for name, tensor in checkpoint.state_dict.items()
        if not (isinstance(form, StateDictFormat) and form.is_buffer(name))
    }
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
            return NativeCheckpoint(config, {**state, **form.buffers(model.config)})
        return _take_over(_build(theirs, config, state, model.device, model.dtype), model)
    raise ValueError("; ".join(refusals))


def _narrow(form: NativeFormat, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters under their names, in the model's dtype where no value of any of them changes by that."""
    state = {form.theirs(name): tensor.clone() for name, tensor in model.state_dict().items()}
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
