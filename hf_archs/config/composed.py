"""Configs of models with several kinds of layers, made of named mixers and feed-forwards with configs of their own."""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from hf_archs import registry
from hf_archs.config.model import ArchConfig
from hf_archs.config.pattern import near_or_all
from hf_archs.errors import reason
from hf_archs.layers.side_by_side import ParallelConfig
from hf_archs.parts import PartConfig

# a registered name and a config
Instance = tuple[str, PartConfig]


@strict
class ComposedConfig(ArchConfig):
    """Base of configs whose layers differ; a subclass defines ``layer_plan``."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.validate_mixer_sizes()
        self.validate_sizes()
        self._instances: dict[tuple[str, str], tuple[Any, Instance]] = {}
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without the instances, which follow from the fields."""
        output = super().to_dict()
        del output["_instances"]
        return output

    def instances(self) -> dict[str, Instance]:
        """Every named mixer and feed-forward by its path in this config, such as ``mixers.local``."""
        raise NotImplementedError

    def _kept(self, key: tuple[str, str], source: Any, make: Callable[[], Instance]) -> Instance:
        """The instance under ``key``, made again if ``source`` or a shared size has changed.

        The config of an instance stays one object, since compiled graphs are guarded by its identity. While compiling,
        it is never made again: a compiled forward makes caches, but cannot make configs.
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
        """The mixer described by ``{"type": ..., ...}``. Raises as `make_instance`."""
        return self._kept(("mixer", name), fields, lambda: make_instance("mixer", name, fields, self))

    def feed_forward_instance(self, name: str, fields: Mapping[str, Any]) -> Instance:
        """The feed-forward described by ``{"type": ..., ...}``. Raises as `make_instance`."""
        return self._kept(("feed_forward", name), fields, lambda: make_instance("feed_forward", name, fields, self))

    def parallel_instance(self, parts: Mapping[str, Mapping[str, Any]]) -> Instance:
        """The mixers of one layer, by name, as one ``parallel`` mixer; a single mixer is returned itself."""
        made = {name: self.mixer_instance(name, fields) for name, fields in parts.items()}
        if len(made) == 1:
            return next(iter(made.values()))

        def make() -> Instance:
            config = ParallelConfig(parts=made, hidden_size=self.hidden_size, norm_eps=self.norm_eps)
            return "parallel", config.belongs_to(self)

        return self._kept(("parallel", "+".join(parts)), parts, make)

    @property
    def num_heads(self) -> int:
        """The largest number of heads of any mixer."""
        plans = self.layer_plans()
        return max((plan.mixer_config.num_heads for plan in plans if plan.mixer_config is not None), default=1)

    def _attention(self) -> Any:
        """The attention config, if all layers are full attention with equal heads; else an `AttributeError`."""
        configs: list[Any] = [plan.mixer_config for plan in self.layer_plans()]
        full = set(self.layer_types) == {"full_attention"}
        if not full or len({(config.key_value_heads, config.head_size) for config in configs}) > 1:
            raise AttributeError(f"{type(self).__name__}: its layers have no keys of one shape")
        return configs[0]

    @property
    def num_key_value_heads(self) -> int:
        """Number of key-value heads, if all layers are full attention; prefix tuning reads it."""
        return self._attention().key_value_heads

    @property
    def head_dim(self) -> int:
        """Channels per head, if all layers are full attention."""
        return self._attention().head_size

    @property
    def sliding_window(self) -> int:
        """The widest window, if any layer has one; transformers' caches for ``sliding_attention`` read it."""
        mixers = [mixer for plan in self.layer_plans() for mixer in plan.mixers()]
        windows = [entry.window(config) for entry, config in mixers if entry.window is not None]
        if not windows:
            raise AttributeError(f"{type(self).__name__}: no layer has a window")
        return max(windows)

    @property
    def base_model_ep_plan(self) -> dict[str, str]:  # type: ignore[override]
        """Expert-parallel styles of the layers, by name."""
        plans = [plan.feed_forward_plan("ep_plan") for plan in self.layer_plans()]
        return {f"layers.*.{name}": style for plan in plans for name, style in plan.items()}

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:  # type: ignore[override]
        """The units of FSDP2: a part that layers share is a unit of its own."""
        plans = self.layer_plans()
        parts = [part for part in ("mixer", "feed_forward") if any(getattr(p, f"shared_{part}") for p in plans)]
        return {f"layers.*.{part}": "free_full_weight" for part in parts} | ArchConfig.base_model_fsdp_plan


def _copied(source: Any) -> Any:
    return {k: _copied(v) for k, v in source.items()} if isinstance(source, Mapping) else source


def make_instance(kind: str, name: str, fields: Mapping[str, Any], owner: ArchConfig) -> Instance:
    """Make the mixer or feed-forward that a dict describes.

    Args:
        kind: ``mixer`` or ``feed_forward``.
        name: name of the instance, for errors.
        fields: ``type``, the registered name, and fields of its config except ``hidden_size``, which is the model's.
        owner: the model's config.

    Raises:
        ValueError: for an unknown type, and for unknown or invalid fields; it names the instance.
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
            raise ValueError(f"{what} has no field {field!r}; {near_or_all(field, allowed)}")
    for f in dataclasses.fields(entry.config_class):  # JSON may have an integer for a float
        kinds = typing.get_args(f.type) or (f.type,)
        if float in kinds and int not in kinds and type(given.get(f.name)) is int:
            given[f.name] = float(given[f.name])
    try:
        config = entry.config_class(**{"norm_eps": owner.norm_eps, **given, "hidden_size": owner.hidden_size})
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{what}: {reason(error)}") from error
    return entry.name, config.belongs_to(owner)
