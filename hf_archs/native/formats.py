"""Foreign checkpoint formats: a rename table for parameters and one for config fields, used in both directions.

A plugin declares a `NativeFormat` for every format that it can read; `hf_archs.native.reading` applies them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter

if TYPE_CHECKING:
    from hf_archs.registry import Architecture

MOST_LAYERS, MOST_LABELS = 2**12, 2**20
OURS = "model"  # `base_model_prefix` of every class of this library

# Fields that the config.json of any model may have and that change no result: those that transformers 4 wrote into
# every file (generation, head, encoder used as decoder), and the file's origin and tool.
IDLE = frozenset(GenerationConfig._get_default_generation_params()) | {
    "_commit_hash",
    "_name_or_path",
    "add_cross_attention",
    "architectures",
    "attn_implementation",
    "auto_map",
    "bad_words_ids",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "finetuning_task",
    "is_decoder",
    "model_type",
    "name_or_path",
    "prefix",
    "pruned_heads",
    "sep_token_id",
    "task_specific_params",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
}


@dataclass(frozen=True, kw_only=True)
class NativeFormat(ABC):
    """A foreign checkpoint format with the parameters of this library under other names.

    "Ours" are the names, config fields and parameters of this library; "theirs" are those of the format.

    Attributes:
        name: the ``model_type`` in ``config.json``.
        prefix: their prefix of the base model's parameters in a model with a head; ours is ``model``.
        file_prefixes: other prefixes in their files.
        renames: our name -> theirs, for parameters outside the layers, without the prefix. A name in no table is the
            same in both.
        layer_renames: our name -> theirs, for parameters of a layer, without ``layers.<i>.``.
        layer_aliases: another name of theirs -> ours, for parameters of a layer.
        layer_patterns: regular expression for their name -> ours, for parameters of a layer in files only.
        fields: our config field -> theirs. The field of a named instance has its path before it, as in
            ``mixer.num_heads``; see `ComposedConfig.instances`.
        constants: our config field -> the only value that the format can express.
        allowed: their config field -> the values that this library can represent.
        ignored: config fields of theirs that do not change the result, apart from `IDLE`.
        conversions: splits and joins of parameters between theirs and ours, for files; see `convert`.
        unused: config fields of ours that the format does not have and that do not change the result.
        assumed: such fields of ours that get a value when reading, with that value.
        pickle: file name of the pickle, if their repositories have one in place of safetensors; see
            `hf_archs.native.pickles`.
    """

    name: str
    prefix: str = "backbone"
    file_prefixes: Collection[str] = ()
    renames: Mapping[str, str] = field(default_factory=dict)
    layer_renames: Mapping[str, str] = field(default_factory=dict)
    layer_aliases: Mapping[str, str] = field(default_factory=dict)
    layer_patterns: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    allowed: Mapping[str, Collection[Any]] = field(default_factory=dict)
    ignored: Collection[str] = ()
    unused: Collection[str] = ()
    assumed: Mapping[str, Any] = field(default_factory=dict)
    pickle: str | None = None
    conversions: Collection[WeightConverter] = ()

    def __str__(self) -> str:
        return self.name

    def detect(self, raw: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is of this format."""
        return raw.get("model_type") == self.name

    @abstractmethod
    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """All config fields of theirs as one flat dict, and the default of each field that the format knows."""

    # -- names -------------------------------------------------------------------------------------------------

    def theirs(self, name: str) -> str:
        """Their name of our parameter; without a prefix if ``name`` has none."""
        return _rename(name, (OURS, self.prefix), self.renames, self.layer_renames)

    def names_for(self, config: Any) -> Callable[[str], str]:
        """The function `theirs` for a model with this config: layers of different kinds may need different names."""
        return self.theirs

    def ours(self, name: str) -> str:
        """Our name of their parameter; without a prefix if ``name`` has none."""
        backward = [{theirs: ours for ours, theirs in t.items()} for t in (self.renames, self.layer_renames)]
        return _rename(name, (self.prefix, OURS), backward[0], {**self.layer_aliases, **backward[1]})

    def key_mapping(self) -> dict[str, str]:
        """Their names to ours as a ``key_mapping`` of transformers, which applies the patterns in order."""
        mapping = {rf"^{re.escape(prefix)}\.": f"{OURS}." for prefix in (self.prefix, *self.file_prefixes)}
        layer_names = [*self.layer_renames.items(), *((ours, theirs) for theirs, ours in self.layer_aliases.items())]
        for within, names in (("", self.renames.items()), (r"layers\.\d+\.", layer_names)):
            for ours, theirs in names:
                mapping[rf"^((?:{OURS}\.)?{within}){re.escape(theirs)}$"] = rf"\1{ours}"
        for theirs, ours in self.layer_patterns.items():
            mapping[rf"^((?:{OURS}\.)?layers\.\d+\.){theirs}$"] = rf"\1{ours}"
        return mapping

    def convert(self, state: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """Convert their parameters, under our names already, to ours; ``conversions`` does the same for files."""
        return state

    # -- config ------------------------------------------------------------------------------------------------

    def read_config(self, raw: Mapping[str, Any], config_class: type[PreTrainedConfig]) -> dict[str, Any]:
        """A ``config.json`` of this format as the fields of ``config_class``.

        Raises:
            ValueError: for an option that this library cannot represent (the message names field, value and allowed
                values), a field known to neither the format nor `IDLE`, or quantised weights.
        """
        quantised = raw.get("quantization_config") or raw.get("quantization")
        if quantised:
            method = quantised.get("quant_method", quantised) if isinstance(quantised, Mapping) else quantised
            raise ValueError(
                f"quantization_config is {method!r} in this {self.name} checkpoint, and its weights are read as they "
                "stand; allowed are the weights before they were quantised (quantise them while loading: "
                "from_pretrained(..., quantization_config=...))"
            )
        layers = self.fields.get("num_hidden_layers", "")
        # transformers' config builds lists of these lengths before it checks them: too large a number fills the memory
        for name, least, most in ((layers, 1, MOST_LAYERS), ("num_labels", 0, MOST_LABELS)):
            value = raw.get(name)
            if isinstance(value, int) and value > most:
                raise ValueError(f"{name} is {value} in this {self.name} checkpoint; allowed are {least} to {most}")
        given, defaults = self.expand(raw)
        common = _common(given)
        fields = {ours: given[theirs] for ours, theirs in self.fields.items() if theirs in given}
        known = {*common, *self.fields.values(), *self.ignored, *IDLE, "quantization_config", "quantization"}
        unknown = []
        for name, value in given.items():
            if name in known:
                continue
            if name not in self.allowed and name not in defaults:
                unknown.append(name)
                continue
            allowed = self.allowed.get(name, (defaults.get(name),))
            if value not in allowed:
                raise ValueError(
                    f"{name} is {value!r} in this {self.name} checkpoint, which {config_class.__name__} cannot "
                    f"represent; allowed: {', '.join(map(repr, allowed))}"
                )
        if unknown:
            raise ValueError(
                f"{unknown[0]} is {given[unknown[0]]!r} in this {self.name} checkpoint, and no field of that format is "
                "known by this name: it may change the result; allowed is a file without it"
            )
        found = {**common, "model_type": config_class.model_type}
        for path, value in {**fields, **self.constants, **self.assumed}.items():
            *parents, name = path.split(".")
            place = found
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = value
        return found

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor of theirs is a buffer, which follows from the config."""
        return False

    def buffers(self, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
        """The buffers in their state dict, under their names."""
        return {}

    def write_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Our config as their config fields, for the entries of ``fields`` only.

        Raises:
            ValueError: if the format cannot represent our config; the message names field, value and allowed values.
        """
        values, defaults = _flat(config)
        skipped = {*self.fields, *self.unused, *self.assumed, *_common(config.to_dict())}
        for path in sorted({*values, *self.constants} - skipped):
            value, allowed = values.get(path), self.constants.get(path, defaults.get(path))
            if value != allowed:
                raise ValueError(
                    f"{type(config).__name__}: {path} is {value!r}, which a {self.name} model cannot represent; "
                    f"allowed: {allowed!r}"
                )
        written: dict[str, Any] = {}
        for ours, theirs in self.fields.items():
            if written.setdefault(theirs, values[ours]) != values[ours]:
                raise ValueError(
                    f"{type(config).__name__}: {ours} is {values[ours]!r}, which a {self.name} model cannot represent; "
                    f"allowed: {written[theirs]!r}, as {theirs} is elsewhere"
                )
        return written


@dataclass(frozen=True, kw_only=True)
class TransformersFormat(NativeFormat):
    """The format of an architecture in transformers, whose models can be converted in memory too.

    Attributes:
        config_name, model_name, causal_lm_name: names of transformers' classes.
        derived: config field of theirs -> the attribute of our config that gives its value when writing.
        nested: config fields of theirs that are dicts; the tables name their entries as in
            ``rope_parameters.rope_theta``.
        tiny: fields of a small config of theirs, for tests; empty if our tiny config can be written as one.
    """

    config_name: str
    model_name: str
    causal_lm_name: str
    derived: Mapping[str, str] = field(default_factory=dict)
    nested: Collection[str] = ()
    tiny: Mapping[str, Any] = field(default_factory=dict)

    def classes(self, architecture: Architecture) -> list[tuple[type[PreTrainedModel], type[PreTrainedModel]]]:
        """Pairs of our model class and theirs."""
        return [
            (architecture.model_class, getattr(transformers, self.model_name)),
            (architecture.causal_lm_class, getattr(transformers, self.causal_lm_name)),
        ]

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `NativeFormat.expand`, with the config class of transformers."""
        config_class = getattr(transformers, self.config_name)
        # a file may omit a field that has its default, and the class knows former names of its fields
        given = config_class.from_dict({k: v for k, v in raw.items() if k != "auto_map"}).to_dict()
        defaults = config_class().to_dict()
        fields = {f.name for f in dataclasses.fields(config_class)}
        for name, stored in config_class.attribute_map.items():  # files have some fields under another name
            if name in fields and stored not in fields:
                for config in (given, defaults):
                    config[name] = config.pop(stored)
        common = _common(given)
        declared = {f.name for f in dataclasses.fields(config_class)} - set(common) - {"architectures", "model_type"}
        defaults = {name: defaults[name] for name in declared & set(defaults)}
        for name in self.nested:
            for config in (given, defaults):
                config.update({f"{name}.{key}": value for key, value in (config.pop(name, None) or {}).items()})
        return given, defaults

    def write_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Our config as one of transformers'. Raises as `write_fields` does."""
        fields = self.write_fields(config)
        fields.update({theirs: getattr(config, attribute) for theirs, attribute in self.derived.items()})
        config_class = getattr(transformers, self.config_name)
        declared = {f.name for f in dataclasses.fields(config_class)}
        fields.update({name: only for name, (only, *more) in self.allowed.items() if name in declared and not more})
        for name in self.nested:
            inner = {path: path.removeprefix(f"{name}.") for path in fields if path.startswith(f"{name}.")}
            fields[name] = {key: fields.pop(path) for path, key in inner.items()}
        return config_class(**{**_common(config.to_dict()), **fields})


@dataclass
class NativeCheckpoint:
    """Config and state dict of a model of a package outside transformers, under that package's names.

    Attributes:
        config: the content of ``config.json``.
        state_dict: parameters and buffers.
    """

    config: dict[str, Any]
    state_dict: dict[str, torch.Tensor]

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
            json.dump(self.config, file, indent=2)
        state = {name: tensor.contiguous().clone() for name, tensor in self.state_dict.items()}  # shared tensors twice
        save_file(state, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})


@dataclass(frozen=True, kw_only=True)
class StateDictFormat(NativeFormat):
    """The format of a package outside transformers; in memory its checkpoints are `NativeCheckpoint`.

    Attributes:
        defaults: config fields of theirs that affect the model, with their defaults.
    """

    defaults: Mapping[str, Any]

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `NativeFormat.expand`, with the format's ``defaults``."""
        return {**self.defaults, **raw}, dict(self.defaults)

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Our config as their ``config.json``. Raises as `write_fields` does."""
        return {**self.defaults, **self.write_fields(config)}


def _flat(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values and the defaults of a config's fields; fields of named instances have their path before them."""
    fresh = type(config)()
    instances = config.instances()
    passed_over = {"architectures", "transformers_version", *(path.partition(".")[0] for path in instances)}
    names = [f.name for f in dataclasses.fields(config) if f.name not in passed_over and not f.name.startswith("_")]
    values = {name: getattr(config, name) for name in names}
    defaults = {name: getattr(fresh, name) for name in names}
    for path, (kind, part) in instances.items():
        values[f"{path}.type"] = kind
        own = {f.name: f.default for f in dataclasses.fields(part)}  # type: ignore[arg-type]
        own |= {name: getattr(config, name) for name in ("hidden_size", "norm_eps")}  # a mixer inherits these
        values.update({f"{path}.{name}": getattr(part, name) for name in own})
        defaults.update({f"{path}.{name}": default for name, default in own.items()})
    return values, defaults


def _rename(name: str, prefixes: tuple[str, str], table: Mapping[str, str], layer_table: Mapping[str, str]) -> str:
    match = re.fullmatch(rf"({re.escape(prefixes[0])}\.)?(layers\.\d+\.)?(.*)", name)
    assert match is not None  # every group may be empty
    prefix, layer, rest = match.groups(default="")
    return (prefix and f"{prefixes[1]}.") + layer + (layer_table if layer else table).get(rest, rest)


def _common(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every transformers config has: labels, dtype and the like."""
    names = {*PreTrainedConfig().to_dict(), "torch_dtype", "num_labels"}
    names -= {"architectures", "model_type", "transformers_version", "auto_map"}
    return {name: value for name, value in config.items() if name in names}
