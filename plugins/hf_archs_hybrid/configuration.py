"""Config of models whose layers follow a pattern."""

from dataclasses import field, replace
from typing import Any

from huggingface_hub.dataclasses import strict

from hf_archs.config.composed import ComposedConfig, Instance
from hf_archs.config.model import LayerPlan, Shared
from hf_archs.config.pattern import NONE, expand_pattern
from hf_archs.registry import get_feed_forward


@strict
class ArchHybridConfig(ComposedConfig):
    """Config of a hybrid: the fields of `ArchConfig`, and these.

    Args:
        mixers: the token mixers by names of the user's choice, each a dict with ``type``, the name of a registered
            mixer, and fields of its config: ``{"local": {"type": "sliding_attention", "window": 2048}}``. The layers
            of one with ``"shared": True`` have the same weights, and with ``"site_rank": r`` a low-rank part of their
            own beside each linear layer.
        layer_pattern: which mixers stand in each layer, see `hf_archs.config.pattern.expand_pattern`.
        feed_forward: the feed-forwards, likewise; empty for none.
        feed_forward_pattern: which of them stands in each layer; None for the only one there is, or none.

    Where a feed-forward has a router there are, under their names in transformers, ``output_router_logits`` (True
    unless told otherwise), ``router_aux_loss_coef``, ``num_experts`` and ``num_experts_per_tok``, those of the first.
    """

    model_type = "hf_archs_hybrid"
    mixers: dict[str, Any] | None = field(default_factory=lambda: {"ssm": {"type": "mamba2"}})
    layer_pattern: list[str] | str = "ssm"
    feed_forward: dict[str, Any] | None = None
    feed_forward_pattern: list[str] | str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.validate_names()  # patterns are read with them, and transformers asks for those at once
        super().__post_init__(**kwargs)

    def validate_names(self) -> None:
        """Refuse names of instances that are no identifiers."""
        for kind in ("mixers", "feed_forward"):
            for name in getattr(self, kind) or ():
                if not name.isidentifier() or name == NONE:
                    raise ValueError(f"{type(self).__name__}: {kind} has the name {name!r}; allowed are identifiers")

    def validate_layers(self) -> None:
        """Refuse patterns that are too long or name something that there is not."""
        for field_name in ("layer_pattern", "feed_forward_pattern"):
            pattern, layers = getattr(self, field_name), self.num_hidden_layers
            if isinstance(pattern, list) and len(pattern) > layers:
                raise ValueError(
                    f"{type(self).__name__}: {field_name} has {len(pattern)} entries; "
                    f"allowed are num_hidden_layers = {layers}"
                )
        for i in range(self.num_hidden_layers):
            self.layer_plan(i)

    def instances(self) -> dict[str, Instance]:
        """Every named mixer and feed-forward by its path, ``mixers.local``, say."""
        mixers = {f"mixers.{n}": self.mixer_instance(n, _own(fields)) for n, fields in (self.mixers or {}).items()}
        named = (self.feed_forward or {}).items()
        return mixers | {f"feed_forward.{n}": self.feed_forward_instance(n, _own(fields)) for n, fields in named}

    @property
    def _routed(self) -> tuple[str, Any]:
        """The name and the config of the first feed-forward with a router in some layer; `AttributeError` where there
        is none, since other libraries tell a model with experts by what its config has.
        """
        placed = {name for i in range(self.num_hidden_layers) for name in self.placed(i)}
        for name, fields in (self.feed_forward or {}).items():
            kind, config = self.feed_forward_instance(name, _own(fields))
            if name in placed and get_feed_forward(kind).routes:
                return name, config
        raise AttributeError(f"{type(self).__name__}: no feed-forward has a router")

    @property
    def output_router_logits(self) -> bool:
        """Whether a forward gives the routers' logits; there only with a router in some layer."""
        self._routed  # noqa: B018 - raises where there is none
        return self.__dict__.get("output_router_logits", True)

    @output_router_logits.setter
    def output_router_logits(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"{type(self).__name__}: output_router_logits is {value!r}; allowed are true and false")
        self.__dict__["output_router_logits"] = value

    @property
    def router_aux_loss_coef(self) -> float:
        """That of the routed feed-forward; there only with a router in some layer."""
        return self._routed[1].router_aux_loss_coef

    @router_aux_loss_coef.setter
    def router_aux_loss_coef(self, value: float) -> None:
        name, config = self._routed
        config.router_aux_loss_coef = value  # layers hold this very object
        fields = {**self.feed_forward[name], "router_aux_loss_coef": value}  # type: ignore[index]
        self.feed_forward = {**self.feed_forward, name: fields}  # type: ignore[dict-item]
        self._keep(("feed_forward", name), _own(fields), (fields["type"], config))

    @property
    def num_experts(self) -> int:
        """That of the routed feed-forward; there only with a router in some layer."""
        return self._routed[1].num_experts

    @property
    def num_experts_per_tok(self) -> int:
        """That of the routed feed-forward; there only with a router in some layer."""
        return self._routed[1].experts_per_token

    def placed_by_kind(self, layer_idx: int) -> tuple[list[str], list[str]]:
        """The names of the mixers and of the feed-forward that stand in a layer."""
        pattern, named = self.feed_forward_pattern, self.feed_forward or {}
        if pattern is None:
            pattern = next(iter(named), NONE)
            if len(named) > 1:
                raise ValueError(
                    f"{type(self).__name__}: feed_forward_pattern is None; with {' and '.join(named)} in "
                    "feed_forward, allowed is a pattern"
                )
        what, layers = f"{type(self).__name__}: ", self.num_hidden_layers
        mixers = expand_pattern(f"{what}layer_pattern", self.layer_pattern, self.mixers or {}, layers)[layer_idx]
        feed_forwards = expand_pattern(f"{what}feed_forward_pattern", pattern, named, layers)[layer_idx]
        shared = [name for name in mixers if _shared(name, (self.mixers or {})[name]) is not None]
        if shared and len(mixers) > 1:
            raise ValueError(
                f"{what}layer {layer_idx} is {'+'.join(mixers)!r}, where {shared[0]!r} is shared; "
                "allowed for a shared mixer is a layer of its own"
            )
        if not mixers and not feed_forwards:
            raise ValueError(f"{what}layer {layer_idx} is empty; allowed is a mixer, a feed-forward, or both")
        if len(feed_forwards) > 1:
            raise ValueError(
                f"{what}feed_forward_pattern has {'+'.join(feed_forwards)!r}; allowed is one feed-forward in a layer"
            )
        return mixers, feed_forwards

    def placed(self, layer_idx: int) -> list[str]:
        """The names of all that stands in a layer."""
        mixers, feed_forwards = self.placed_by_kind(layer_idx)
        return mixers + feed_forwards

    def layer_plan(self, layer_idx: int) -> LayerPlan:
        """The plan of layer ``layer_idx``, as the patterns have it."""
        mixers, feed_forwards = self.placed_by_kind(layer_idx)
        plan = LayerPlan(None, None)
        if mixers:
            described = {name: (self.mixers or {})[name] for name in mixers}
            mixer, config = self.parallel_instance({name: _own(fields) for name, fields in described.items()})
            plan = LayerPlan(mixer, config, shared_mixer=_shared(mixers[0], described[mixers[0]]))
        for name in feed_forwards:
            fields = (self.feed_forward or {})[name]
            feed_forward, config = self.feed_forward_instance(name, _own(fields))
            own: Any = {"feed_forward": feed_forward, "feed_forward_config": config}
            plan = replace(plan, **own, shared_feed_forward=_shared(name, fields))
        return plan


def _shared(name: str, fields: Any) -> Shared | None:
    """Whether an instance is shared by its layers, and what each of them adds.

    Raises:
        ValueError: for values of the wrong kind.
    """
    if not isinstance(fields, dict):
        return None
    shared, rank = fields.get("shared", False), fields.get("site_rank", 0)
    if not isinstance(shared, bool):
        raise ValueError(f"{name!r}: shared is {shared!r}; allowed are true and false")
    if not isinstance(rank, int) or not 0 <= rank <= 2**12 or (rank and not shared):
        raise ValueError(f"{name!r}: site_rank is {rank!r}; allowed are 0 to {2**12}, and 0 where it is not shared")
    return Shared(name, rank) if shared else None


def _own(fields: Any) -> Any:
    """What of an instance's fields is for its own config."""
    if not isinstance(fields, dict):
        return fields
    return {name: value for name, value in fields.items() if name not in ("shared", "site_rank")}
