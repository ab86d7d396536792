"""Models of several kinds of layers: named instances of mixers and feed-forwards, each with a config of its own, and
the patterns that place them.
"""

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
from hf_archs.layers.side_by_side import ParallelConfig
from hf_archs.parts import PartConfig

# a registered name, and the config of the instance
Instance = tuple[str, PartConfig]


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
        plans = self.layer_plans()
        return max((plan.mixer_config.num_heads for plan in plans if plan.mixer_config is not None), default=1)

    def _attention(self) -> Any:
        """The config of attention, where every layer has it with heads of one shape; else an `AttributeError`."""
        configs: list[Any] = [plan.mixer_config for plan in self.layer_plans()]
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
        mixers = [mixer for plan in self.layer_plans() for mixer in plan.mixers()]
        windows = [entry.window(config) for entry, config in mixers if entry.window is not None]
        if not windows:
            raise AttributeError(f"{type(self).__name__}: no layer has a window")
        return max(windows)

    @property
    def base_model_ep_plan(self) -> dict[str, str]:  # type: ignore[override]
        """How experts are spread over processes."""
        plans = [plan.feed_forward_plan("ep_plan") for plan in self.layer_plans()]
        return {f"layers.*.{name}": style for plan in plans for name, style in plan.items()}

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:  # type: ignore[override]
        """The units of FSDP2: what layers share is one of its own."""
        plans = self.layer_plans()
        parts = [part for part in ("mixer", "feed_forward") if any(getattr(p, f"shared_{part}") for p in plans)]
        return {f"layers.*.{part}": "free_full_weight" for part in parts} | ArchConfig.base_model_fsdp_plan


def _copied(source: Any) -> Any:
    return {k: _copied(v) for k, v in source.items()} if isinstance(source, Mapping) else source


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
            raise ValueError(f"{what} has no field {field!r}; {near_or_all(field, allowed)}")
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
