"""The Mamba-2 mixer (Dao and Gu 2024, "Transformers are SSMs").

Letters in shapes: b batch, l length, d hidden size, c channels, h heads, p channels per head,
g groups, n state size.
"""

import math

import torch
from torch import nn
from transformers import initialization as init

from hf_archs.cache import Once, Slot, States
from hf_archs.kernels.numerics import wide
from hf_archs.layers.convolution import CausalConv1d
from hf_archs.layers.norm import ArchRMSNormGated
from hf_archs_mamba2.configuration import Mamba2MixerConfig
from hf_archs_mamba2.ops.ssd_scan import ssd_scan


class ScalarSSM(nn.Module):
    """The recurrence with one decay per head.

    Its parameters have a module of their own, which stays in float32, is a unit of FSDP2, and can be trained beside
    LoRA with ``modules_to_save=["ssm"]``.
    """

    def __init__(self, config: Mamba2MixerConfig):
        super().__init__()
        self.config = config
        low, high = config.time_step_limit
        self.dt_limit = (low, high)
        self.A_log = nn.Parameter(torch.empty(config.num_heads))
        self.D = nn.Parameter(torch.empty(config.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.num_heads))

    def init_weights(self) -> None:
        """Set the decay rates to 1, 2, ..., heads; steps log-uniform in ``time_step_min`` to ``time_step_max``."""
        config = self.config
        A = torch.arange(1, config.num_heads + 1, dtype=torch.float32, device=self.A_log.device)
        init.copy_(self.A_log, torch.log(A))
        init.ones_(self.D)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        steps = torch.exp(torch.rand(config.num_heads, device=self.dt_bias.device) * (high - low) + low)
        steps = steps.clamp(min=config.time_step_floor)
        init.copy_(self.dt_bias, steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus

    def forward(
        self,
        x: torch.Tensor,  # (b, l, h, p)
        dt: torch.Tensor,  # (b, l, h)
        B: torch.Tensor,  # (b, l, g, n)
        C: torch.Tensor,  # (b, l, g, n)
        state: torch.Tensor | None = None,  # (b, h, p, n)
        lengths: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        once: Once | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs, (b, l, h, p), and the state after them, (b, h, p, n)."""
        A = self._rates() if once is None else once("A", self._rates)
        return ssd_scan(
            x,
            dt,
            A,
            B,
            C,
            self.D,
            self.dt_bias,
            dt_limit=self.dt_limit,
            initial_state=state,
            seq_idx=seq_idx,
            lengths=lengths,
        )

    def _rates(self) -> torch.Tensor:
        return -torch.exp(wide(self.A_log))


class Mamba2Mixer(nn.Module):
    """One projection, causal convolution over x, B and C, recurrence, gated norm, projection (section 7.1)."""

    def __init__(self, config: Mamba2MixerConfig):
        super().__init__()
        self.config = config
        # sizes are read here, since reading a field of a transformers config is slow for a decode step
        shared = config.n_groups * config.state_size
        self.splits = [config.channels, config.conv_size, config.num_heads]  # of in_proj: z, xBC, dt
        self.conv_splits = [config.channels, shared, shared]  # of xBC
        self.head_dim, self.state_size = config.head_dim, config.state_size
        self.in_proj = nn.Linear(
            config.hidden_size, config.channels + config.conv_size + config.num_heads, bias=config.use_bias
        )
        self.conv1d = CausalConv1d(config.conv_size, config.conv_kernel, config.use_conv_bias)
        self.ssm = ScalarSSM(config)
        self.norm = ArchRMSNormGated(config.channels, config.norm_eps, config.channels // config.n_groups)
        self.out_proj = nn.Linear(config.channels, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (b, l, d)
        state: Slot | None = None,
        lengths: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mix the tokens, (b, l, d) to (b, l, d). States are read from ``state``, a slot of the cache, and updated."""
        conv, ssm, once = (None, None, None) if state is None else (state.get("conv"), state.get("ssm"), state.once)
        z, u, dt = torch.split_with_sizes(self.in_proj(hidden_states), self.splits, -1)
        xBC, conv = self.conv1d(u, conv, lengths, seq_idx, once)
        y, ssm = self._scan(xBC, dt, ssm, lengths, seq_idx, once)
        if state is not None:
            inputs = {"u": u, "xBC": xBC, "dt": dt, "seq_idx": seq_idx}
            state.update({"conv": conv, "ssm": ssm}, inputs, self._replay)
        return self.out_proj(self.norm(y.flatten(2), z))

    def _scan(
        self,
        xBC: torch.Tensor,
        dt: torch.Tensor,
        state: torch.Tensor | None,
        lengths: torch.Tensor | None,
        seq_idx: torch.Tensor | None,
        once: Once | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, B, C = torch.split_with_sizes(xBC, self.conv_splits, -1)
        b, l, _ = x.shape
        return self.ssm(
            x.view(b, l, -1, self.head_dim),
            dt,
            B.view(b, l, -1, self.state_size),
            C.view(b, l, -1, self.state_size),
            state,
            lengths,
            seq_idx,
            once,
        )

    def _replay(self, inputs: States, before: dict[str, torch.Tensor | None], lengths: torch.Tensor) -> States:
        """The states after the first ``lengths`` tokens of a recorded forward, for a cache that rolls back."""
        seq_idx = inputs.get("seq_idx")
        _, conv = self.conv1d(inputs["u"], before["conv"], lengths, seq_idx)
        _, ssm = self._scan(inputs["xBC"], inputs["dt"], before["ssm"], lengths, seq_idx)
        return {"conv": conv, "ssm": ssm}
