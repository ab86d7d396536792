"""The Hyena mixer (Poli et al. 2023, "Hyena Hierarchy: Towards Larger Convolutional Language Models").

Letters in shapes: b batch, l length, d hidden size, n order, c channels of the long convolutions ((n - 1) x d).
"""

import torch
from torch import nn

from hf_archs.cache import Once, Slot, States
from hf_archs.layers.convolution import CausalConv1d
from hf_archs_hyena.configuration import HyenaMixerConfig
from hf_archs_hyena.filters import FILTERS


class HyenaMixer(nn.Module):
    """Projection to a value and n gates, short convolution, gates and long convolutions in turn, output projection."""

    def __init__(self, config: HyenaMixerConfig):
        super().__init__()
        self.config = config
        width = (config.order + 1) * config.hidden_size
        self.in_proj = nn.Linear(config.hidden_size, width, bias=config.use_bias)
        self.conv1d = CausalConv1d(width, config.conv_kernel, bias=True, activation=None)
        self.ssm = FILTERS[config.filter_type](config)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (b, l, d)
        state: Slot | None = None,
        lengths: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map ``(b, l, d)`` to ``(b, l, d)``, continuing from ``state`` and storing the new states there."""
        u = self.in_proj(hidden_states)
        if state is None:
            return self.out_proj(self._mix(u, {}, lengths, seq_idx, need_state=False)[0])
        before = {name: state.get(name) for name in ("conv", "past")}
        y, after = self._mix(u, before, lengths, seq_idx, need_state=True, once=state.once)
        state.update(after, {"u": u, "seq_idx": seq_idx}, self._replay)
        return self.out_proj(y)

    def _mix(
        self,
        u: torch.Tensor,  # (b, l, (n + 1) d)
        before: dict[str, torch.Tensor | None],
        lengths: torch.Tensor | None,
        seq_idx: torch.Tensor | None,
        need_state: bool,
        once: Once | None = None,
    ) -> tuple[torch.Tensor, States]:
        u, conv = self.conv1d(u, before.get("conv"), lengths, seq_idx)
        *gates, v = u.split(self.config.hidden_size, dim=-1)
        y, past = self.ssm(v, gates, before.get("past"), lengths, seq_idx, need_state, once)
        return y, {"conv": conv, "past": past} if need_state else {}

    def _replay(self, inputs: States, before: dict[str, torch.Tensor | None], lengths: torch.Tensor) -> States:
        """The states after the first ``lengths`` tokens of a recorded forward, for a cache that rolls back."""
        return self._mix(inputs["u"], before, lengths, inputs.get("seq_idx"), need_state=True)[1]
