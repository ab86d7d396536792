"""The short causal depthwise convolution before the recurrence of most mixers."""

import math

import torch
from torch import nn
from transformers import initialization as init

from hf_archs.cache import Once
from hf_archs.kernels import causal_conv1d


class CausalConv1d(nn.Module):
    """Depthwise causal convolution with a state, the window of past inputs.

    It does not inherit from `nn.Conv1d`, whose adapters would silently drop the state.

    Args:
        channels: number of channels; each has its own filter.
        kernel_size: taps of each filter.
        bias: whether a bias is added before the activation.
        activation: ``"silu"``, or None.
    """

    def __init__(self, channels: int, kernel_size: int, bias: bool, activation: str | None = "silu"):
        super().__init__()
        self.activation = activation
        # the shape of nn.Conv1d's weight, as in checkpoints
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_weights(self) -> None:
        """Initialise the weight as `nn.Conv1d` does, and the bias with zeros."""
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

        ``once`` is `hf_archs.cache.Slot.once` of the mixer's slot, or None.
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
        return self.weight.squeeze(1).t().contiguous().t()  # taps outermost in memory, the order of a decode step

    def extra_repr(self) -> str:
        """Channels, taps and bias, as `print` shows them."""
        return f"{self.weight.shape[0]}, kernel_size={self.weight.shape[-1]}, bias={self.bias is not None}"
