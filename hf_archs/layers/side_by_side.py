"""Several mixers in parallel in one layer, registered as the mixer ``parallel``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from hf_archs.cache import Slot
from hf_archs.parts import PartConfig, StateSpec
from hf_archs.registry import get_mixer, register_mixer


@strict
@dataclass(kw_only=True)
class ParallelConfig(PartConfig):
    """Fields of a layer with several mixers.

    Args:
        parts: registered name and config of each mixer, by its name in the layer.
    """

    parts: dict[str, Any] = field(default_factory=dict)

    def validate_parts(self) -> None:
        """Raise a `ValueError` for fewer than two mixers."""
        if len(self.parts) < 2:
            raise ValueError(f"ParallelConfig: parts is {[*self.parts]}; allowed are two mixers or more")

    @property
    def num_heads(self) -> int:
        """The largest number of heads of any mixer."""
        return max(config.num_heads for _, config in self.parts.values())


class ParallelMixer(nn.Module):
    """The sum of several mixers' outputs on the same input (Falcon-H1; Hymba, Dong et al. 2024, section 2.1)."""

    def __init__(self, config: ParallelConfig):
        super().__init__()
        self.parts = nn.ModuleDict({n: get_mixer(kind).module_class(part) for n, (kind, part) in config.parts.items()})

    def forward(
        self,
        hidden_states: torch.Tensor,  # (b, l, d)
        state: Slot | None = None,
        lengths: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``(b, l, d)`` to the same; see `hf_archs.parts.TokenMixer`."""
        slots: Mapping[str, Slot | None] = {n: None if state is None else state.part(n) for n in self.parts}
        mixed = [part(hidden_states, slots[n], lengths, seq_idx) for n, part in self.parts.items()]
        return sum(mixed[1:], start=mixed[0])


def parallel_state(config: ParallelConfig) -> dict[str, StateSpec]:
    """The states of all parts, named ``<part>.<state>``."""
    return {
        f"{name}.{state}": spec
        for name, (kind, part) in config.parts.items()
        for state, spec in get_mixer(kind).state(part).items()
    }


def parallel_layer_type(config: ParallelConfig) -> str:
    """The layer type of all parts, or ``hybrid`` if they differ."""
    kinds = {get_mixer(kind).layer_type(part) for kind, part in config.parts.values()}
    return kinds.pop() if len(kinds) == 1 else "hybrid"


register_mixer(
    "parallel",
    ParallelMixer,
    ParallelConfig,
    state=parallel_state,
    layer_type=parallel_layer_type,
    parts=lambda config: config.parts.values(),
)
