"""Multi-scale retention (Sun et al. 2023, "Retentive Network", section 2.3).

Letters in shapes: b batch, l length, d hidden size, h heads, n key channels per head, p value channels per head.
"""

import math

import torch
from torch import nn

from hf_archs.cache import Slot, States
from hf_archs.cache.call import once
from hf_archs.kernels.numerics import made_once
from hf_archs_retnet.configuration import RetNetMixerConfig
from hf_archs_retnet.ops.norm_gate import norm_gate
from hf_archs_retnet.ops.retention import multi_scale_log_decay, retention
from hf_archs_retnet.ops.rotate_qk import rotate_qk


class GatedHeadRMSNorm(nn.Module):
    """The paper's group norm, each head's output over its root mean square, and the gate after it.

    Of a head without its mean this is the LayerNorm of the head.

    Args:
        head_dim: channels of a head; all heads share one weight.
        eps: added to the mean square.
        gate_fn: activation of the gate, ``swish`` or ``gelu``.
        affine: whether there is a weight.
        centred: whether the mean of each head is subtracted first.
    """

    def __init__(self, head_dim: int, eps: float, gate_fn: str, affine: bool, centred: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim)) if affine else None
        self.head_dim, self.eps, self.gate_fn, self.centred = head_dim, eps, gate_fn, centred

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """``(b, l, h, p)`` and a gate ``(b, l, h * p)`` to the shape of the gate."""
        return norm_gate(hidden_states, gate, self.weight, eps=self.eps, gate_fn=self.gate_fn, centred=self.centred)

    def extra_repr(self) -> str:
        """Channels and options, as `print` shows them."""
        affine = self.weight is not None
        return f"{self.head_dim}, eps={self.eps}, gate_fn={self.gate_fn}, affine={affine}, centred={self.centred}"


def positions(
    length: int, before: torch.Tensor | None, seq_idx: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """The position of each token in its document: (b or 1, length), integer.

    Only differences of positions matter, but a document that begins at 0 is rotated as it is alone, to the last bit:
    where a query and a key are nearly at right angles, the norm after them would make a difference of the last one.

    Args:
        before: how many tokens of document 0 came before these, (b, 1), or None for none.
        seq_idx: the document of each token, (b, length), or None for one.
    """
    steps = torch.arange(length, device=device).unsqueeze(0)
    if seq_idx is None:
        return steps if before is None else steps + before
    begins = (seq_idx != seq_idx.roll(1, 1)) & (steps > 0)
    starts = torch.where(begins, steps, 0 if before is None else -before).cummax(1).values
    return steps - starts


def _after(
    position: torch.Tensor, before: torch.Tensor | None, lengths: torch.Tensor | None, batch: int
) -> torch.Tensor:
    """The number of tokens read of each row's last document, (b, 1); ``position`` is of `positions`."""
    position = position.expand(batch, -1)
    if lengths is None:
        return position[:, -1:] + 1
    last = position.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)) + 1
    return torch.where(lengths.unsqueeze(1) > 0, last, 0 if before is None else before)


def angles(position: torch.Tensor, key_dim: int, rotary: str, dtype: torch.dtype) -> torch.Tensor:
    """The angle by which each pair of channels of a head is rotated at each token.

    Angles are computed at each call: a buffer would be cast to bfloat16 with the model, and be empty after meta device.

    Args:
        position: integer, (b or 1, l).
        key_dim: channels of a head, a multiple of 2.
        rotary: ``half`` or ``interleaved``, see `RetNetMixerConfig`.
        dtype: of the result.

    Returns:
        (b or 1, l, key_dim / 2), from 0 to 2 pi.
    """
    # whole turns are removed in float64: in float32 an angle at token 10,000 has lost four digits
    wide = dtype if position.device.type == "mps" else torch.float64
    pairs = key_dim // 2
    last = pairs if rotary == "half" else max(pairs - 1, 1)  # the pair with exponent 1
    slowest = math.log10(2 * math.pi) + 4 * (pairs - 1) / last
    turns = made_once(
        ("turns", pairs, last, wide),
        position,
        lambda: torch.logspace(-math.log10(2 * math.pi), -slowest, pairs, dtype=wide, device=position.device),
    )
    return (turns * position.unsqueeze(2)).frac_().mul_(2 * math.pi).to(dtype)


def decay_norm(position: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """One over the root of the sum of token t's decays, ``sqrt((1 - gamma) / (1 - gamma^t))`` (section 2.4).

    Args:
        position: integer, (b or 1, l), from 0; t is one more.
        heads: each has its own gamma, see `multi_scale_log_decay`.
        dtype: of the result.

    Returns:
        (b or 1, l, heads), from 1 downwards.
    """
    # a decay that float32 rounds to 1 has a sum of t; so has the smallest log decay allowed here
    log_decay = multi_scale_log_decay(heads, position.device, dtype).clamp(max=-1e-30)
    # exp(x) - 1 = 2 tanh(x / 2) / (1 - tanh(x / 2)), which keeps its digits where an exporter has no expm1
    all_decays, last = ((x / 2).tanh() for x in (log_decay * (position + 1).unsqueeze(-1), log_decay))
    return (all_decays / (1 - all_decays) * ((1 - last) / last)).rsqrt()


class RetNetMixer(nn.Module):
    """Projections, rotation, retention, norm of each head, gate, projection (equation 8)."""

    def __init__(self, config: RetNetMixerConfig):
        super().__init__()
        self.config = config
        bias = config.projection_bias
        self.q_proj = nn.Linear(config.hidden_size, config.key_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.key_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.value_size, bias=bias)
        self.g_proj = nn.Linear(config.hidden_size, config.value_size, bias=bias)
        self.norm = GatedHeadRMSNorm(
            config.value_size // config.num_heads,
            config.norm_eps if config.head_norm_eps is None else config.head_norm_eps,
            config.gate_fn,
            config.elementwise_affine,
            config.head_norm == "layer_norm",
        )
        self.out_proj = nn.Linear(config.value_size, config.hidden_size, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (b, l, d)
        state: Slot | None = None,
        lengths: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mix the tokens, (b, l, d) to (b, l, d). States are read from ``state``, a slot of the cache, and updated."""
        before = {name: None if state is None else state.get(name) for name in ("position", "retention")}
        q, k, v = (
            projection(hidden_states).view(*hidden_states.shape[:2], self.config.num_heads, -1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        position = positions(k.shape[1], before["position"], seq_idx, k.device)
        q, k = self._rotate(q, k, position)
        y, after = retention(q, k, v, scale=1.0, initial_state=before["retention"], lengths=lengths, seq_idx=seq_idx)
        if state is not None:
            states = {"position": _after(position, before["position"], lengths, k.shape[0]), "retention": after}
            state.update(states, {"k": k, "v": v, "seq_idx": seq_idx}, self._replay)
        return self.out_proj(self.norm(y, self.g_proj(hidden_states)))

    def _rotate(self, q: torch.Tensor, k: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, the queries scaled."""
        rotary, dtype, n = self.config.rotary, torch.promote_types(q.dtype, torch.float32), q.shape[-1]
        heads = self.config.num_heads if self.config.normalize_decay else None

        def compute() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
            by = angles(position, n, rotary, dtype)
            return by.cos(), by.sin(), None if heads is None else decay_norm(position, heads, dtype)

        cos, sin, norm = once(("retention", n, rotary, heads, dtype, q.device), compute)
        return rotate_qk(q, k, cos, sin, interleaved=rotary == "interleaved", q_scale=norm, scale=n**-0.5)

    def _replay(self, inputs: States, before: dict[str, torch.Tensor | None], lengths: torch.Tensor) -> States:
        """The states after the first ``lengths`` tokens of a recorded forward, for a cache that rolls back."""
        k, v, seq_idx = inputs["k"], inputs["v"], inputs.get("seq_idx")
        _, after = retention(  # the state does not depend on q
            k, k, v, scale=1.0, initial_state=before["retention"], lengths=lengths, seq_idx=seq_idx
        )
        position = positions(k.shape[1], before["position"], seq_idx, k.device)
        return {"position": _after(position, before["position"], lengths, k.shape[0]), "retention": after}
