"""Config of models whose layers follow a pattern."""

from __future__ import annotations

from dataclasses import field, replace
from typing import Any

from huggingface_hub.dataclasses import strict

from hf_archs.composition import NONE, ComposedConfig, Instance, expand_pattern
from hf_archs.configuration import LayerPlan


@strict
class ArchHybridConfig(ComposedConfig):
    """Config of a hybrid: the fields of `ArchConfig`, and these.

    Args:
        mixers: the token mixers by names of the user's choice, each a dict with ``type``, the name of a registered
            mixer, and fields of its config: ``{"local": {"type": "sliding_attention", "window": 2048}}``. The layers
            of one with ``"shared": True`` have the same weights.
        layer_pattern: which mixers stand in each layer, see `hf_archs.composition.expand_pattern`.
        feed_forward: the feed-forwards, likewise; empty for none.
        feed_forward_pattern: which of them stands in each layer; None for the only one there is, or none.
    """

    model_type = "hf_archs_hybrid"
    mixers: dict[str, Any] | None = field(default_factory=lambda: {"ssm": {"type": "mamba2"}})
    layer_pattern: list[str] | str = "ssm"
    feed_forward: dict[str, Any] | None = None
    feed_forward_pattern: list[str] | str | None = None

    def validate_layers(self) -> None:
        for kind in ("mixers", "feed_forward"):
            for name in getattr(self, kind) or ():
                if not name.isidentifier() or name == NONE:
                    raise ValueError(f"{type(self).__name__}: {kind} has the name {name!r}; allowed are identifiers")
        for i in range(self.num_hidden_layers):
            self.layer_plan(i)

    def instances(self) -> dict[str, Instance]:
        mixers = {f"mixers.{n}": self.mixer_instance(n, _own(fields)) for n, fields in (self.mixers or {}).items()}
        named = (self.feed_forward or {}).items()
        return mixers | {f"feed_forward.{n}": self.feed_forward_instance(n, _own(fields)) for n, fields in named}

    def layer_plan(self, layer_idx: int) -> LayerPlan:
        named, named_feed_forwards = self.mixers or {}, self.feed_forward or {}
        mixers = self._placed("layer_pattern", self.layer_pattern, named)[layer_idx]
        shared = [name for name in mixers if _is_shared(named[name])]
        if shared and len(mixers) > 1:
            raise ValueError(
                f"{type(self).__name__}: layer {layer_idx} is {'+'.join(mixers)!r}, where {shared[0]!r} is shared; "
                "allowed for a shared mixer is a layer of its own"
            )
        pattern = self.feed_forward_pattern
        if pattern is None:
            pattern = next(iter(named_feed_forwards), NONE)
            if len(named_feed_forwards) > 1:
                raise ValueError(
                    f"{type(self).__name__}: feed_forward_pattern is None; with {' and '.join(named_feed_forwards)} in "
                    "feed_forward, allowed is a pattern"
                )
        feed_forwards = self._placed("feed_forward_pattern", pattern, named_feed_forwards)[layer_idx]
        if len(feed_forwards) > 1:
            raise ValueError(
                f"{type(self).__name__}: feed_forward_pattern has {'+'.join(feed_forwards)!r}; "
                "allowed is one feed-forward in a layer"
            )
        plan = LayerPlan(None, None)
        if mixers:
            mixer, config = self.parallel_instance({name: _own(named[name]) for name in mixers})
            plan = LayerPlan(mixer, config, shared_mixer=shared[0] if shared else None)
        for name in feed_forwards:
            feed_forward, config = self.feed_forward_instance(name, _own(named_feed_forwards[name]))
            own = name if _is_shared(named_feed_forwards[name]) else None
            plan = replace(plan, feed_forward=feed_forward, feed_forward_config=config, shared_feed_forward=own)
        return plan

    def _placed(self, field: str, pattern: list[str] | str, names: dict[str, Any]) -> list[list[str]]:
        return expand_pattern(f"{type(self).__name__}: {field}", pattern, names, self.num_hidden_layers)


def _is_shared(fields: Any) -> bool:
    return isinstance(fields, dict) and bool(fields.get("shared", False))


def _own(fields: Any) -> Any:
    """What of an instance's fields is for its own config."""
    return {k: v for k, v in fields.items() if k != "shared"} if isinstance(fields, dict) else fields
