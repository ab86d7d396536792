"""The Mamba mixer (Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces").

Letters in shapes: b batch, l length, d hidden size, c channels, n states per channel, r step rank.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from hf_archs.cache import Once, Slot, States
from hf_archs.kernels.numerics import wide
from hf_archs.layers.convolution import CausalConv1d
from hf_archs.layers.norm import ArchRMSNorm
from hf_archs_mamba.configuration import MambaMixerConfig
from hf_archs_mamba.ops.selective_scan import selective_scan


class SelectiveSSM(nn.Module):
    """The selective recurrence.

    Its parameters have a module of their own, which stays in float32, is a unit of FSDP2, and can be trained beside
    LoRA with ``modules_to_save=["ssm"]``.
    """

    def __init__(self, config: MambaMixerConfig):
        super().__init__()
        self.config = config
        self.A_log = nn.Parameter(torch.empty(config.channels, config.state_size))
        self.D = nn.Parameter(torch.empty(config.channels))
        self.dt_bias = nn.Parameter(torch.empty(config.channels))

    def init_weights(self) -> None:
        """S4D-real states (section 3.6); steps log-uniform between ``time_step_min`` and ``time_step_max``."""
        config = self.config
        A = torch.arange(1, config.state_size + 1, dtype=torch.float32, device=self.A_log.device)
        init.copy_(self.A_log, torch.log(A).expand_as(self.A_log))
        init.ones_(self.D)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        steps = torch.exp(torch.rand(config.channels, device=self.dt_bias.device) * (high - low) + low)
        steps = steps.clamp(min=config.time_step_floor)
        init.copy_(self.dt_bias, steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus

    def forward(
        self,
        x: torch.Tensor,  # (b, l, c)
        dt: torch.Tensor,  # (b, l, c)
        B: torch.Tensor,  # (b, l, n)
        C: torch.Tensor,  # (b, l, n)
        z: torch.Tensor | None = None,  # (b, l, c)
        state: torch.Tensor | None = None,  # (b, c, n)
        lengths: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        once: Once | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs, (b, l, c), and the state after them, (b, c, n)."""
        A = self._rates() if once is None else once("A", self._rates)
        boundaries = {"initial_state": state, "seq_idx": seq_idx, "lengths": lengths}
        return selective_scan(x, dt, A, B, C, self.D, z, self.dt_bias, **boundaries)

    def _rates(self) -> torch.Tensor:
        return -torch.exp(wide(self.A_log).t().contiguous()).t()  # channels innermost, as a decode step reads it


class PlainRMSNorm(nn.Module):
    """RMSNorm without a weight (FalconMamba, Zuo et al. 2024, section 3.2)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.shape, self.eps = (size,), eps

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """``(..., size)`` to the same."""
        return F.rms_norm(wide(t), self.shape, eps=self.eps).to(t.dtype)


class MambaMixer(nn.Module):
    """Projection, causal convolution, selective recurrence, gate, projection (figure 3)."""

    def __init__(self, config: MambaMixerConfig):
        super().__init__()
        self.config = config
        self.splits = [config.dt_rank, config.state_size, config.state_size]  # of x_proj: dt, B, C
        self.in_proj = nn.Linear(config.hidden_size, 2 * config.channels, bias=config.use_bias)
        self.conv1d = CausalConv1d(config.channels, config.conv_kernel, config.use_conv_bias)
        self.x_proj = nn.Linear(config.channels, config.dt_rank + 2 * config.state_size, bias=False)
        self.norms = None
        if config.bcdt_norm != "none":
            norm = ArchRMSNorm if config.bcdt_norm == "affine" else PlainRMSNorm
            self.norms = nn.ModuleDict(
                {name: norm(size, config.bcdt_norm_eps) for name, size in zip(("dt", "B", "C"), self.splits)}
            )
        self.dt_proj = nn.Linear(config.dt_rank, config.channels, bias=False)  # its bias is ssm.dt_bias
        self.ssm = SelectiveSSM(config)
        self.out_proj = nn.Linear(config.channels, config.hidden_size, bias=config.use_bias)

    def init_weights(self) -> None:
        """The initial ``dt_proj`` keeps the variance of the steps (section 3.6)."""
        std = self.config.dt_rank**-0.5 * self.config.time_step_scale
        if self.config.time_step_init_scheme == "constant":
            init.constant_(self.dt_proj.weight, std)
        else:
            init.uniform_(self.dt_proj.weight, -std, std)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (b, l, d)
        state: Slot | None = None,
        lengths: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mix the tokens, (b, l, d) to (b, l, d). States are read from ``state``, a slot of the cache, and updated."""
        conv, ssm, once = (None, None, None) if state is None else (state.get("conv"), state.get("ssm"), state.once)
        u, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        x, conv = self.conv1d(u, conv, lengths, seq_idx, once)
        dt, B, C = torch.split_with_sizes(self.x_proj(x), self.splits, -1)
        if self.norms is not None:
            dt, B, C = (norm(t) for norm, t in zip(self.norms.values(), (dt, B, C)))
        dt = self.dt_proj(dt)
        y, ssm = self.ssm(x, dt, B, C, z, ssm, lengths, seq_idx, once)
        if state is not None:
            inputs = {"u": u, "x": x, "dt": dt, "B": B, "seq_idx": seq_idx}
            state.update({"conv": conv, "ssm": ssm}, inputs, self._replay)
        return self.out_proj(y)

    def _replay(self, inputs: States, before: dict[str, torch.Tensor | None], lengths: torch.Tensor) -> States:
        """The states after the first ``lengths`` tokens of a recorded forward, for a cache that rolls back."""
        seq_idx = inputs.get("seq_idx")
        _, conv = self.conv1d(inputs["u"], before["conv"], lengths, seq_idx)
        B = inputs["B"]  # in place of C, which the state does not depend on
        _, ssm = self.ssm(inputs["x"], inputs["dt"], B, B, None, before["ssm"], lengths, seq_idx)
        return {"conv": conv, "ssm": ssm}
