"""Models of several kinds of layers: named instances of mixers and feed-forwards, each with a config of its own, and
the patterns that place them.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from hf_archs import registry
from hf_archs.configuration import ArchConfig, LayerPlan, MixerConfig
from hf_archs.parallel import ParallelConfig

NONE = "none"

# a registered name, and the config of the instance
Instance = tuple[str, MixerConfig]


@strict
class ComposedConfig(ArchConfig):
    """Base of the configs whose layers differ; a subclass says in ``layer_plan`` what stands where."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.validate_mixer_sizes()
        self.validate_sizes()
        self._instances: dict[tuple[str, str], tuple[Any, Instance]] = {}
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without the instances that were made from the fields."""
        output = super().to_dict()
        del output["_instances"]
        return output

    def instances(self) -> dict[str, Instance]:
        """Every named instance by its path in this config: ``mixers.local``, say."""
        raise NotImplementedError

    def _kept(self, key: tuple[str, str], source: Any, make: Callable[[], Instance]) -> Instance:
        """What ``make`` gives, made again where ``source`` or a shared size has changed.

        Layers of one instance have one config object: graphs are guarded by its identity, and a compiled forward
        makes caches but cannot make configs.
        """
        kept = self._instances.get(key)
        if kept is not None and (torch.compiler.is_compiling() or kept[0] == (source, self.hidden_size, self.norm_eps)):
            return kept[1]
        instance = make()
        self._keep(key, source, instance)
        return instance

    def _keep(self, key: tuple[str, str], source: Any, instance: Instance) -> None:
        self._instances[key] = ((_copied(source), self.hidden_size, self.norm_eps), instance)

    def mixer_instance(self, name: str, fields: Mapping[str, Any]) -> Instance:
        """The mixer that ``{"type": ..., ...}`` describes, checked by its own config. Raises as `make_instance`."""
        return self._kept(("mixer", name), fields, lambda: make_instance("mixer", name, fields, self))

    def feed_forward_instance(self, name: str, fields: Mapping[str, Any]) -> Instance:
        """The feed-forward that ``{"type": ..., ...}`` describes. Raises as `make_instance`."""
        return self._kept(("feed_forward", name), fields, lambda: make_instance("feed_forward", name, fields, self))

    def parallel_instance(self, parts: Mapping[str, Mapping[str, Any]]) -> Instance:
        """The mixers of one layer side by side, by the name of each; one alone is itself."""
        made = {name: self.mixer_instance(name, fields) for name, fields in parts.items()}
        if len(made) == 1:
            return next(iter(made.values()))

        def make() -> Instance:
            config = ParallelConfig(parts=made, hidden_size=self.hidden_size, norm_eps=self.norm_eps)
            return "parallel", config.belongs_to(self)

        return self._kept(("parallel", "+".join(parts)), parts, make)

    @property
    def num_heads(self) -> int:
        """The most heads that any mixer has."""
        plans = [self.layer_plan(i) for i in range(self.num_hidden_layers)]
        return max((plan.mixer_config.num_heads for plan in plans if plan.mixer_config is not None), default=1)

    def _attention(self) -> Any:
        """The config of attention, where every layer has it with heads of one shape; else an `AttributeError`."""
        configs: list[Any] = [self.layer_plan(i).mixer_config for i in range(self.num_hidden_layers)]
        full = set(self.layer_types) == {"full_attention"}
        if not full or len({(config.key_value_heads, config.head_size) for config in configs}) > 1:
            raise AttributeError(f"{type(self).__name__}: its layers have no keys of one shape")
        return configs[0]

    @property
    def num_key_value_heads(self) -> int:
        """Where all layers are attention; prefix tuning makes keys and values of that shape."""
        return self._attention().key_value_heads

    @property
    def head_dim(self) -> int:
        """Where all layers are attention, channels of a head."""
        return self._attention().head_size

    @property
    def sliding_window(self) -> int:
        """The widest window, where there is one: transformers' caches for ``sliding_attention`` look for it."""
        configs: list[Any] = [self.layer_plan(i).mixer_config for i in range(self.num_hidden_layers)]
        windows = [config.window for config in configs if hasattr(config, "window")]
        if not windows:
            raise AttributeError(f"{type(self).__name__}: no layer has a window")
        return max(windows)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # type: ignore[override]  # which depends on the fields
        """How the layers are sharded over processes: what every mixer and feed-forward of the pattern can be."""
        plan = self._feed_forward_plan("tp_plan")
        whole: set[str] = set()
        plans = [self.layer_plan(i) for i in range(self.num_hidden_layers)]
        for layer in {(id(p.mixer_config), id(p.feed_forward_config)): p for p in plans}.values():
            if layer.mixer is not None:
                own = _linear_layers("layers.*.mixer", registry.get_mixer(layer.mixer), layer.mixer_config)
                plan.update(own)
                if layer.shared_mixer is not None and layer.shared_mixer.site_rank:
                    whole.update(own)
            if layer.shared_feed_forward is not None and layer.shared_feed_forward.site_rank:
                whole.update(_feed_forward_names(layer, "tp_plan"))
        # a plan for a linear layer would shard its low-rank parts too, in dimensions that do not fit
        return {name: style for name, style in plan.items() if name not in whole}

    @property
    def base_model_ep_plan(self) -> dict[str, str]:  # type: ignore[override]
        """How experts are spread over processes."""
        return self._feed_forward_plan("ep_plan")

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:  # type: ignore[override]
        """The units of FSDP2: what layers share is one of its own."""
        plans = [self.layer_plan(i) for i in range(self.num_hidden_layers)]
        parts = [part for part in ("mixer", "feed_forward") if any(getattr(p, f"shared_{part}") for p in plans)]
        return {f"layers.*.{part}": "free_full_weight" for part in parts} | ArchConfig.base_model_fsdp_plan

    def _feed_forward_plan(self, kind: str) -> dict[str, str]:
        plan: dict[str, str] = {}
        for i in range(self.num_hidden_layers):
            plan.update(_feed_forward_names(self.layer_plan(i), kind))
        return plan


def _feed_forward_names(layer: LayerPlan, kind: str) -> dict[str, str]:
    """What the plan ``kind`` of a layer's feed-forward says, by the names in a model."""
    if layer.feed_forward is None:
        return {}
    own = getattr(registry.get_feed_forward(layer.feed_forward).module_class, kind, None)
    names = own(layer.feed_forward_config) if own else {}
    return {f"layers.*.feed_forward.{name}": style for name, style in names.items()}


def _copied(source: Any) -> Any:
    return {k: _copied(v) for k, v in source.items()} if isinstance(source, Mapping) else source


def _linear_layers(prefix: str, entry: registry.Mixer, config: Any) -> dict[str, str]:
    """Every linear layer is sharded; what is between them is short of parameters and runs on every rank."""
    with torch.device("meta"):
        module = entry.module_class(config)
    linear = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    return {f"{prefix}.{name}": "colwise_gather_output" for name in linear}


def make_instance(kind: str, name: str, fields: Mapping[str, Any], owner: ArchConfig) -> Instance:
    """A registered mixer or feed-forward by the dict that describes it.

    Args:
        kind: ``mixer`` or ``feed_forward``.
        name: what the instance is called, for errors.
        fields: ``type``, the registered name, and fields of its config; ``hidden_size`` is the model's.
        owner: the model's config.

    Raises:
        ValueError: naming the instance and what is wrong with it.
    """
    what = f"{type(owner).__name__}: {kind} {name!r}"
    if not isinstance(fields, Mapping) or "type" not in fields:
        raise ValueError(f"{what} is {fields!r}; allowed is a dict with a 'type', a registered {kind}")
    get: Callable[[str], Any] = registry.get_mixer if kind == "mixer" else registry.get_feed_forward
    try:
        entry = get(fields["type"])
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    given = {field: value for field, value in fields.items() if field != "type"}
    allowed = {field.name for field in dataclasses.fields(entry.config_class)} - {"hidden_size"}
    for field in given:
        if field not in allowed:
            raise ValueError(f"{what} has no field {field!r}; {_allowed(field, allowed)}")
    for f in dataclasses.fields(entry.config_class):  # files write whole numbers as such
        kinds = typing.get_args(f.type) or (f.type,)
        if float in kinds and int not in kinds and type(given.get(f.name)) is int:
            given[f.name] = float(given[f.name])
    try:
        config = entry.config_class(**{"norm_eps": owner.norm_eps, **given, "hidden_size": owner.hidden_size})
    except (ValueError, StrictDataclassError) as error:
        reason = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        raise ValueError(f"{what}: {reason}") from error
    return entry.name, config.belongs_to(owner)


def _allowed(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}allowed are {', '.join(sorted(names)) or 'none'}"


_RULE = re.compile(r"\s*(?P<entry>\S+)\s+every\s+(?P<step>\d+)(?:\s+from\s+(?P<start>\d+))?\s*")


def expand_pattern(field: str, pattern: str | list[str], names: Collection[str], layers: int) -> list[list[str]]:
    """The names of what stands in each layer; an empty list where nothing does.

    Args:
        field: the config field that holds the pattern, for errors.
        pattern: a list with an entry for each layer, or a text. An entry is a name, several names joined by ``+``
            (side by side in one layer), or ``none``. A text of entries is repeated over the layers, and ``name*3``
            stands for three; after semicolons rules follow, ``name every 8`` (the eighth layer, the sixteenth and so
            on) or ``name every 8 from 4`` (counted from 0: layers 4, 12, ...).
        names: the instances there are.
        layers: number of layers.

    Returns:
        an entry for each layer, or for each of those that a longer list has: a model that is cut has the first of them,
        as `assistant_early_exit` cuts it.

    Raises:
        ValueError: naming the entry and what is allowed, or the length that the list should have.
    """
    if isinstance(pattern, str):
        base, *rules = pattern.split(";")
        cycle: list[str] = []
        for entry in base.replace(",", " ").split():
            name, _, count = entry.partition("*")
            if count and not count.isdecimal():
                raise ValueError(f"{field} has {entry!r}; allowed after * is how often")
            cycle += [name] * int(count or 1)
        if not cycle:
            raise ValueError(f"{field} is {pattern!r}; allowed are entries such as {' '.join(sorted(names)) or NONE}")
        entries = [cycle[i % len(cycle)] for i in range(layers)]
        for rule in rules:
            match = _RULE.fullmatch(rule)
            if match is None or int(match["step"]) < 1:
                raise ValueError(f"{field} has the rule {rule.strip()!r}; allowed is 'name every 8' or with 'from 4'")
            step = int(match["step"])
            for i in range(int(match["start"] or step - 1), layers, step):
                entries[i] = match["entry"]
    else:
        entries = pattern
    if len(entries) < layers:
        raise ValueError(f"{field} has {len(entries)} entries; allowed are num_hidden_layers = {layers}")
    placed = []
    for entry in entries:
        parts = [] if entry == NONE else entry.split("+")
        for part in parts:
            if part not in names:
                raise ValueError(f"{field} has {part!r}; {_allowed(part, {*names, NONE})}")
        if len(set(parts)) < len(parts):
            raise ValueError(f"{field} has {entry!r}; allowed is each name once in a layer")
        placed.append(parts)
    return placed
