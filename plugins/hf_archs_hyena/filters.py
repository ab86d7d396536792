"""The filters of a Hyena mixer: their parameters, taps and states.

Letters in shapes: b batch, l length, d hidden size, s convolutions (order - 1), c channels of all of them (s x d),
k taps, m modes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from hf_archs.cache import Once
from hf_archs.kernels.backend import backend_for
from hf_archs.kernels.exporting import any_length
from hf_archs.kernels.numerics import full_precision
from hf_archs_hyena.configuration import HyenaMixerConfig
from hf_archs_hyena.ops.long_conv import long_conv, long_conv_step
from hf_archs_hyena.ops.modal import modal_conv, modal_taps
from hf_archs_hyena.ops.toeplitz_conv import toeplitz_conv

LONG = 2**15  # taps from which on an implicit filter's network is checkpointed
WINDOW_END = 1e-2  # value of a window after `fast_decay` or `slow_decay`


class HyenaFilter(nn.Module, ABC):
    """The recurrence of gates and convolutions (Poli et al. 2023, definition 3.1).

    A separate module, so that the filters' parameters can be sharded, kept in float32 and, through
    ``modules_to_save=["ssm"]``, trained beside LoRA.
    """

    def __init__(self, config: HyenaMixerConfig):
        super().__init__()
        self.config = config

    @abstractmethod
    def taps(self, length: int) -> torch.Tensor:
        """The first ``length`` taps of every filter, ``(c, length)`` in float32 or wider."""

    def forward(
        self,
        v: torch.Tensor,  # (b, l, d)
        gates: Sequence[torch.Tensor],  # order gates (b, l, d), applied last to first
        state: torch.Tensor | None = None,  # (b, c, ...)
        lengths: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        need_state: bool = False,
        once: Once | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gated convolutions of ``v``, (b, l, d), and the state after them if needed, else None."""
        last, *others = gates
        with full_precision(v):
            filters = self._filters(v, state, once)
        size = self.config.hidden_size
        states = []
        for i, gate in enumerate(reversed(others)):
            part = slice(i * size, (i + 1) * size)
            v, after = self._convolve(
                filters,
                part,
                v,
                gate,
                last if i == len(others) - 1 else None,
                None if state is None else state[:, part],
                {"lengths": lengths, "seq_idx": seq_idx},
                need_state,
            )
            states.append(after)
        if not need_state:
            return v, None
        return v, states[0] if len(states) == 1 else torch.cat(states, dim=1)  # type: ignore[arg-type]

    @abstractmethod
    def _filters(self, v: torch.Tensor, state: torch.Tensor | None, once: Once | None) -> Any:
        """The filters of all convolutions of this forward, computed from the parameters.

        ``once`` (see `hf_archs.cache.Slot.once`) keeps them for a whole generation.
        """

    @abstractmethod
    def _convolve(
        self,
        filters: Any,
        part: slice,
        v: torch.Tensor,
        gate_in: torch.Tensor,
        gate_out: torch.Tensor | None,
        state: torch.Tensor | None,
        boundaries: dict[str, Any],  # lengths and seq_idx
        need_state: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One convolution of the channels ``part``, with the gates before and after it."""


class UngatedFilter(HyenaFilter):
    """A filter whose convolution is an op without gates."""

    def _convolve(
        self,
        filters: Any,
        part: slice,
        v: torch.Tensor,
        gate_in: torch.Tensor,
        gate_out: torch.Tensor | None,
        state: torch.Tensor | None,
        boundaries: dict[str, Any],
        need_state: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        y, after = self._filter(filters, part, v * gate_in, state, boundaries)
        return y if gate_out is None else y * gate_out, after

    @abstractmethod
    def _filter(
        self, filters: Any, part: slice, v: torch.Tensor, state: torch.Tensor | None, boundaries: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The convolution of the channels ``part``, and the state after it."""


class ImplicitFilter(HyenaFilter):
    """Taps from a network of the lag (Poli et al. 2023, section 3.3): ``FFN(features(t)) (exp(-t |delta|) + shift)``.

    A tap depends on its lag relative to ``max_positions``, not on the length of the input; from lag ``max_positions``
    on, taps are 0. The state is all past inputs.
    """

    def __init__(self, config: HyenaMixerConfig):
        super().__init__(config)
        self.bias = nn.Parameter(torch.empty(config.filter_channels))
        self.deltas = nn.Parameter(torch.empty(1, 1, config.filter_channels))
        features = 2 * config.position_bands + 1
        width = config.filter_size
        self.z = nn.Parameter(torch.empty(1, config.max_positions, features)) if config.learned_positions else None
        # shared by all sines, as in HyenaDNA
        self.freq = nn.Parameter(torch.empty(1, width)) if config.learned_frequency else None
        inputs = [features] + [width] * config.filter_layers
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in inputs)
        self.layers.append(nn.Linear(width, config.filter_channels, bias=False))

    def init_weights(self) -> None:
        """As in safari, but the network's weights have PyTorch's default for linear layers."""
        config, device = self.config, self.deltas.device
        init.normal_(self.bias)
        if self.freq is not None:
            init.constant_(self.freq, config.filter_frequency)
        slow, fast = (math.log(WINDOW_END) / part for part in (config.slow_decay, config.fast_decay))
        init.copy_(self.deltas, torch.linspace(slow, fast, config.filter_channels, device=device).expand(1, 1, -1))
        if self.z is not None:
            init.copy_(self.z, self._features(config.max_positions)[0].unsqueeze(0))
        for layer in self.layers:
            init.kaiming_uniform_(layer.weight, a=math.sqrt(5))  # type: ignore[arg-type]  # they are all linear

    def _features(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The features of each lag, (length, 2 bands + 1), and ``lag / (max_positions - 1)``, (length, 1)."""
        config, dtype = self.config, torch.promote_types(self.deltas.dtype, torch.float32)
        lag = torch.arange(length, device=self.deltas.device, dtype=dtype).unsqueeze(1)
        t = lag / (config.max_positions - 1)
        bands = torch.linspace(1e-4, config.position_bands - 1, config.position_bands, device=lag.device, dtype=dtype)
        angle = bands * (2 * math.pi * lag / config.max_positions)
        return torch.cat([t, torch.cos(angle), -torch.sin(angle)], dim=1), t

    def taps(self, length: int) -> torch.Tensor:
        """The filters at lags 0 to ``length - 1``, (c, length)."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or length < LONG:
            return self._taps(length)
        # recompute the network's activations in the backward: they would take more memory than the rest of the mixer
        taps = checkpoint(self._taps, length, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(taps, torch.Tensor)
        return taps

    def _taps(self, length: int) -> torch.Tensor:
        z, t = self._features(length)
        any_lag = any_length()  # in a graph for any length, taps beyond the last are masked, not cut off
        if self.z is not None:
            lag = torch.arange(length, device=t.device)
            z = self.z[0, lag.clamp(max=self.config.max_positions - 1)] if any_lag else self.z[0, :length]
        frequency = self.config.filter_frequency if self.freq is None else self.freq
        *hidden, last = self.layers
        for layer in hidden:
            z = torch.sin(frequency * layer(z.to(self.deltas.dtype)))
        window = torch.exp(t * -self.deltas[0].abs()) + self.config.filter_shift
        taps = (last(z) * window).t()
        return torch.where(t.squeeze(1) <= 1, taps, 0) if any_lag else taps

    def _filters(self, v: torch.Tensor, state: torch.Tensor | None, once: Once | None) -> tuple[torch.Tensor, bool]:
        """The taps, and whether they are in reversed order, lag 0 last."""
        past = 0 if state is None else state.shape[2]
        if any_length():
            return self.taps(past + v.shape[1]), False
        length = min(past + v.shape[1], self.config.max_positions)
        if state is None or once is None or torch.compiler.is_compiling():
            return self.taps(length), False
        # their number doubles, so that a generation computes a few times the taps that it needs
        enough = min(max(256, 2 ** (length - 1).bit_length()), self.config.max_positions)
        if v.shape[1] > 1 or backend_for(v) == "reference":
            return once(f"{enough} taps", lambda: self.taps(enough))[:, :length], False
        return once(f"{enough} taps reversed", lambda: self.taps(enough).flip(1))[:, enough - length :], True

    def _convolve(
        self,
        filters: tuple[torch.Tensor, bool],
        part: slice,
        v: torch.Tensor,
        gate_in: torch.Tensor,
        gate_out: torch.Tensor | None,
        state: torch.Tensor | None,
        boundaries: dict[str, Any],  # lengths and seq_idx
        need_state: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        taps, reversed_ = filters
        inputs = (v, taps[part], self.bias[part], gate_in, gate_out)
        if reversed_:
            return long_conv_step(*inputs, state, boundaries["lengths"], need_state)
        return long_conv(*inputs, initial_state=state, **boundaries, need_state=need_state)


class ExplicitFilter(UngatedFilter):
    """A few taps that are parameters (Ku et al. 2025, section 2), under a decaying window in a medium filter.

    The state is a window of past inputs.
    """

    def __init__(self, config: HyenaMixerConfig):
        super().__init__(config)
        count = config.short_taps if config.filter_type == "short" else config.medium_taps
        self.coefficients = nn.Parameter(torch.empty(config.filter_channels // config.filter_group_size, count))

    def init_weights(self) -> None:
        """As `nn.Conv1d` initialises its weight."""
        init.kaiming_uniform_(self.coefficients, a=math.sqrt(5))

    def taps(self, length: int) -> torch.Tensor:
        """The filters at lags 0 to ``length - 1``, (c, length), 0 beyond the last coefficient."""
        taps = self._windowed().repeat_interleave(self.config.filter_group_size, 0)
        return F.pad(taps, (0, max(length - taps.shape[1], 0)))[:, :length]

    def _filters(self, v: torch.Tensor, state: torch.Tensor | None, once: Once | None) -> torch.Tensor:
        return self._windowed()

    def _windowed(self) -> torch.Tensor:
        config = self.config
        taps = self.coefficients.to(torch.promote_types(self.coefficients.dtype, torch.float32))
        if config.filter_type == "short":
            return taps
        groups, count = taps.shape
        slow, fast = (-math.log(WINDOW_END) / part for part in (config.slow_decay, config.fast_decay))
        decay = torch.linspace(slow, fast, groups, device=taps.device, dtype=taps.dtype).unsqueeze(1)
        return taps * torch.exp(-decay * torch.arange(count, device=taps.device, dtype=taps.dtype) / count)

    def _filter(
        self,
        filters: torch.Tensor,
        part: slice,
        v: torch.Tensor,
        state: torch.Tensor | None,
        boundaries: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        groups = slice(*(end // self.config.filter_group_size for end in (part.start, part.stop)))
        return toeplitz_conv(v, filters[groups], initial_state=state, **boundaries)


class ModalFilter(UngatedFilter):
    """Taps that are a sum of decaying waves (Massaroli et al. 2023, "Laughing Hyena Distillery", section 3).

    The state is one complex number per mode and channel. The filter never ends: ``max_positions`` does not apply.
    """

    # range of the initial steps, in tokens, as in S4D (Gu et al. 2022, appendix B)
    STEPS = (1e-3, 1e-1)

    def __init__(self, config: HyenaMixerConfig):
        super().__init__(config)
        shape = (config.filter_channels, config.modes)
        self.bias = nn.Parameter(torch.empty(config.filter_channels))
        self.log_decay = nn.Parameter(torch.empty(shape))
        self.phase = nn.Parameter(torch.empty(shape))
        self.residues = nn.Parameter(torch.empty(*shape, 2))

    def init_weights(self) -> None:
        """The poles of S4D-Lin (Gu et al. 2022, section 4.3), ``exp(dt (-1/2 + i pi n))``, with random residues."""
        channels, modes = self.log_decay.shape
        low, high = map(math.log, self.STEPS)
        log_step = torch.rand(channels, 1, device=self.phase.device) * (high - low) + low
        init.normal_(self.bias)
        init.copy_(self.log_decay, (log_step - math.log(2)).expand(channels, modes))
        init.copy_(self.phase, math.pi * log_step.exp() * torch.arange(modes, device=self.phase.device))
        init.copy_(self.residues, torch.randn_like(self.residues) * log_step.exp().unsqueeze(2))

    def taps(self, length: int) -> torch.Tensor:
        """The filters at lags 0 to ``length - 1``, (c, length)."""
        return modal_taps(self.log_decay, self.phase, self.residues, length)

    def _filters(self, v: torch.Tensor, state: torch.Tensor | None, once: Once | None) -> None:
        """None: the recurrence uses the modes themselves."""

    def _filter(
        self, filters: None, part: slice, v: torch.Tensor, state: torch.Tensor | None, boundaries: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        modes = self.log_decay[part], self.phase[part], self.residues[part]
        return modal_conv(v, *modes, self.bias[part], initial_state=state, **boundaries)


FILTERS: dict[str, type[HyenaFilter]] = {
    "implicit": ImplicitFilter,
    "modal": ModalFilter,
    "medium": ExplicitFilter,
    "short": ExplicitFilter,
}
