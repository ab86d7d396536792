"""The short causal depthwise convolution that most recurrent mixers put before their recurrence."""

import math

import torch
from torch import nn
from transformers import initialization as init

from hf_archs.cache import Once
from hf_archs.kernels import causal_conv1d


class CausalConv1d(nn.Module):
    """Depthwise causal convolution, whose window of past inputs is a state.

    It is no `nn.Conv1d`: it takes and returns a state, which adapters for `nn.Conv1d` would drop without a word.

    Args:
        channels: number of channels; each has its own filter.
        kernel_size: taps of each filter.
        bias: whether a bias is added before the activation.
        activation: ``"silu"``, or None.
    """

    def __init__(self, channels: int, kernel_size: int, bias: bool, activation: str | None = "silu"):
        super().__init__()
        self.activation = activation
        # the shape of nn.Conv1d's weight, so that checkpoints fit
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_weights(self) -> None:
        """As `nn.Conv1d` initialises its weight, and a bias of zero."""
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        state: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        once: Once | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(batch, length, channels)`` to the same, and the state ``(batch, channels, kernel_size - 1)``.

        ``once`` is that of the slot that is continued, see `hf_archs.cache.Slot`.
        """
        return causal_conv1d(
            hidden_states,
            self._filters() if once is None else once("filters", self._filters),
            self.bias,
            activation=self.activation,
            initial_state=state,
            lengths=lengths,
            seq_idx=seq_idx,
        )

    def _filters(self) -> torch.Tensor:
        return self.weight.squeeze(1).t().contiguous().t()  # taps outermost in memory, as a decode step reads them

    def extra_repr(self) -> str:
        """Channels, taps and bias, as `print` shows them."""
        return f"{self.weight.shape[0]}, kernel_size={self.weight.shape[-1]}, bias={self.bias is not None}"
