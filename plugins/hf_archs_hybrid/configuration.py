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
        mixers: the token mixers by name. Each is a dict: ``type`` is the name of a registered mixer, the other keys are
            fields of its config, for example ``{"local": {"type": "sliding_attention", "window": 2048}}``. With
            ``"shared": True`` all layers of the mixer have the same weights; ``"site_rank": r`` then adds a low-rank
            adapter per layer to each linear layer.
        layer_pattern: the mixers of each layer, see `hf_archs.config.pattern.expand_pattern`.
        feed_forward: the feed-forwards by name, in the same form; None or empty for none.
        feed_forward_pattern: the feed-forward of each layer; None for the only one in ``feed_forward``, or for none.

    With a router in some layer the config also has transformers' ``output_router_logits`` (default True), and
    ``router_aux_loss_coef``, ``num_experts`` and ``num_experts_per_tok`` of the first feed-forward with a router.
    """

    model_type = "hf_archs_hybrid"
    mixers: dict[str, Any] | None = field(default_factory=lambda: {"ssm": {"type": "mamba2"}})
    layer_pattern: list[str] | str = "ssm"
    feed_forward: dict[str, Any] | None = None
    feed_forward_pattern: list[str] | str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.validate_names()  # first: the base class already reads the patterns, which consist of these names
        super().__post_init__(**kwargs)

    def validate_names(self) -> None:
        """Refuse instance names that are ``none`` or not identifiers."""
        for kind in ("mixers", "feed_forward"):
            for name in getattr(self, kind) or ():
                if not name.isidentifier() or name == NONE:
                    raise ValueError(f"{type(self).__name__}: {kind} has the name {name!r}; allowed are identifiers")

    def validate_layers(self) -> None:
        """Refuse patterns that are longer than the model or name unknown instances."""
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
        """All named mixers and feed-forwards by path, for example ``mixers.local``."""
        mixers = {f"mixers.{n}": self.mixer_instance(n, _own(fields)) for n, fields in (self.mixers or {}).items()}
        named = (self.feed_forward or {}).items()
        return mixers | {f"feed_forward.{n}": self.feed_forward_instance(n, _own(fields)) for n, fields in named}

    @property
    def _routed(self) -> tuple[str, Any]:
        """Name and config of the first feed-forward that has a router and is in some layer.

        Raises:
            AttributeError: if there is none. Other libraries recognise a model with experts by its config's attributes.
        """
        placed = {name for i in range(self.num_hidden_layers) for name in self.placed(i)}
        for name, fields in (self.feed_forward or {}).items():
            kind, config = self.feed_forward_instance(name, _own(fields))
            if name in placed and get_feed_forward(kind).routes:
                return name, config
        raise AttributeError(f"{type(self).__name__}: no feed-forward has a router")

    @property
    def output_router_logits(self) -> bool:
        """Whether a forward returns the routers' logits. Exists only with a router in some layer."""
        self._routed  # noqa: B018 - raises without a router
        return self.__dict__.get("output_router_logits", True)  # transformers saves it from there

    @output_router_logits.setter
    def output_router_logits(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"{type(self).__name__}: output_router_logits is {value!r}; allowed are true and false")
        self.__dict__["output_router_logits"] = value

    @property
    def router_aux_loss_coef(self) -> float:
        """Coefficient of the first router's load-balancing loss. Exists only with a router in some layer."""
        return self._routed[1].router_aux_loss_coef

    @router_aux_loss_coef.setter
    def router_aux_loss_coef(self, value: float) -> None:
        name, config = self._routed
        config.router_aux_loss_coef = value  # the layers hold this object
        fields = {**self.feed_forward[name], "router_aux_loss_coef": value}  # type: ignore[index]
        self.feed_forward = {**self.feed_forward, name: fields}  # type: ignore[dict-item]
        self._keep(("feed_forward", name), _own(fields), (fields["type"], config))

    @property
    def num_experts(self) -> int:
        """Experts of the first router. Exists only with a router in some layer."""
        return self._routed[1].num_experts

    @property
    def num_experts_per_tok(self) -> int:
        """Experts per token of the first router. Exists only with a router in some layer."""
        return self._routed[1].experts_per_token

    def placed_by_kind(self, layer_idx: int) -> tuple[list[str], list[str]]:
        """The names of a layer's mixers, and of its feed-forward (a list of one or none)."""
        pattern, named = self.feed_forward_pattern, self.feed_forward or {}
        if pattern is None:
            pattern = next(iter(named), NONE)
            if len(named) > 1:
                raise ValueError(
                    f"{type(self).__name__}: feed_forward_pattern is None; with {' and '.join(named)} in "
                    "feed_forward, allowed is a pattern"
                )
        prefix, layers = f"{type(self).__name__}: ", self.num_hidden_layers
        mixers = expand_pattern(f"{prefix}layer_pattern", self.layer_pattern, self.mixers or {}, layers)[layer_idx]
        feed_forwards = expand_pattern(f"{prefix}feed_forward_pattern", pattern, named, layers)[layer_idx]
        shared = [name for name in mixers if _shared(name, (self.mixers or {})[name]) is not None]
        if shared and len(mixers) > 1:
            raise ValueError(
                f"{prefix}layer {layer_idx} is {'+'.join(mixers)!r}, where {shared[0]!r} is shared; "
                "allowed for a shared mixer is a layer of its own"
            )
        if not mixers and not feed_forwards:
            raise ValueError(f"{prefix}layer {layer_idx} is empty; allowed is a mixer, a feed-forward, or both")
        if len(feed_forwards) > 1:
            raise ValueError(
                f"{prefix}feed_forward_pattern has {'+'.join(feed_forwards)!r}; allowed is one feed-forward in a layer"
            )
        return mixers, feed_forwards

    def placed(self, layer_idx: int) -> list[str]:
        """The names of a layer's mixers, then of its feed-forward."""
        mixers, feed_forwards = self.placed_by_kind(layer_idx)
        return mixers + feed_forwards

    def layer_plan(self, layer_idx: int) -> LayerPlan:
        """The plan of layer ``layer_idx``, from the patterns."""
        mixers, feed_forwards = self.placed_by_kind(layer_idx)
        plan = LayerPlan(None, None)
        if mixers:
            described = {name: (self.mixers or {})[name] for name in mixers}
            mixer, config = self.parallel_instance({name: _own(fields) for name, fields in described.items()})
            plan = LayerPlan(mixer, config, shared_mixer=_shared(mixers[0], described[mixers[0]]))
        for name in feed_forwards:
            fields = (self.feed_forward or {})[name]
            kind, config = self.feed_forward_instance(name, _own(fields))
            plan = replace(
                plan, feed_forward=kind, feed_forward_config=config, shared_feed_forward=_shared(name, fields)
            )
        return plan


def _shared(name: str, fields: Any) -> Shared | None:
    """The name and adapter rank of an instance whose layers share weights; None for any other.

    Raises:
        ValueError: for a ``shared`` or ``site_rank`` of the wrong type or out of range.
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
    """The fields of an instance's own config: all but those of sharing."""
    if not isinstance(fields, dict):
        return fields
    return {name: value for name, value in fields.items() if name not in ("shared", "site_rank")}
