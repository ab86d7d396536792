"""The selective scan of Mamba-1 (Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
https://arxiv.org/abs/2312.00752, sections 3.2 and 3.3, algorithm 2).

Letters: b batch, l length, c channels, n state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_archs.kernels.arguments import check_shapes, some_boundaries
from hf_archs.kernels.backend import backend_for
from hf_archs.kernels.exporting import scan
from hf_archs.kernels.library import Op
from hf_archs.kernels.numerics import LOG2_E, cast, constant, wide
from hf_archs_mamba.ops import selective_scan_portable as portable


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A diagonal linear recurrence per channel, whose step, input map and output map depend on the token.

    ``delta = softplus(dt + dt_bias)``, ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t``,
    ``y_t = (C_t h_t + D x_t) silu(z_t)``.

    States, decays and sums are in float32, or in float64 if ``x`` is float64, also under autocast. Each tensor may have
    its own dtype, which its gradient has too.

    Args:
        x: input, (batch, length, channels).
        dt: step size before bias and softplus, (batch, length, channels).
        A: negative, (channels, state), float32 or wider.
        B: input map, (batch, length, state).
        C: output map, (batch, length, state).
        D: skip connection, (channels,), or None for no skip.
        z: gate, (batch, length, channels), or None for no gate.
        dt_bias: added to ``dt`` in float32 or wider, (channels,), or None.
        initial_state: the state to continue from, (batch, channels, state), or None for zeros.
        seq_idx: integer, (batch, length). A document begins where the value differs from that of the position before,
            with an empty state; position 0 always continues ``initial_state``.
        lengths: integer, (batch,), 0 to length: the tokens of each row. Later positions are pads, where delta is 0, so
            that they do not change the state.

    Returns:
        ``y``, (batch, length, channels) in the dtype of ``x``, and the final state, (batch, channels, state) in
        float32 or wider. Both can be differentiated once.

    Raises:
        ValueError: for a wrong shape; the message names the argument.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, lengths)
    backend = backend_for(x)
    if backend == "reference":
        return selective_scan_reference(
            x, dt, A, B, C, D, z, dt_bias, initial_state=initial_state, seq_idx=seq_idx, lengths=lengths
        )
    if backend == "portable" and x.shape[1] == 1:
        return _step(x, dt, A, B, C, D, z, dt_bias, initial_state, lengths)
    return _selective_scan(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, lengths)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
) -> None:
    if x.dim() != 3 or A.dim() != 2:
        raise ValueError(
            f"selective_scan: x must be (batch, length, channels) and A (channels, state), "
            f"not {tuple(x.shape)} and {tuple(A.shape)}"
        )
    (b, l, c), n = x.shape, A.shape[1]
    check_shapes(
        "selective_scan",
        dt=(dt, (b, l, c)),
        A=(A, (c, n)),
        B=(B, (b, l, n)),
        C=(C, (b, l, n)),
        D=(D, (c,)),
        z=(z, (b, l, c)),
        dt_bias=(dt_bias, (c,)),
        initial_state=(initial_state, (b, c, n)),
        seq_idx=(seq_idx, (b, l)),
        lengths=(lengths, (b,)),
    )


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` as the paper writes it, token by token: the oracle for the tests of the fast forms."""
    y_dtype, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
    delta = F.softplus(dt if dt_bias is None else dt + dt_bias.to(dtype))
    state = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(x.shape[1]):
        real = torch.ones_like(x[:, 0, 0], dtype=torch.bool) if lengths is None else t < lengths
        if seq_idx is not None and t > 0:
            begins = (seq_idx[:, t] != seq_idx[:, t - 1]) & real
            state = torch.where(begins[:, None, None], 0, state)
        delta_t = torch.where(real[:, None], delta[:, t], 0)
        state = (delta_t[:, :, None] * A).exp() * state + (delta_t * x[:, t])[:, :, None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(y_dtype), state


def _step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token, in a few PyTorch calls. The state has its channels innermost in memory."""
    y_dtype, x = x.dtype, wide(x)
    dtype = x.dtype
    # the addition widens dt by PyTorch's type promotion
    delta = F.softplus(cast(dt if dt_bias is None else dt + cast(dt_bias, dtype), dtype))
    if lengths is not None:
        delta = delta * (lengths > 0)[:, None, None]
    A, B, C = cast(A, dtype).t(), cast(B, dtype).transpose(1, 2), cast(C, dtype)
    before = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else cast(initial_state, dtype).transpose(1, 2)
    # exp2, because exp calls MKL on a CPU, which wakes every thread for it
    decay = torch.exp2(delta * constant(LOG2_E, delta) * A)
    state = torch.addcmul(decay * before, delta * x, B)
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):  # autocast rounds a bmm
        y = (state * C.transpose(1, 2)).sum(1, keepdim=True)
    else:
        y = torch.bmm(C, state.contiguous())  # contiguous: bits do not depend on strides
    if D is not None:
        y = torch.addcmul(y, cast(D, dtype), x)
    if z is not None:
        y = y * F.silu(cast(z, dtype))
    return cast(y, y_dtype), state.transpose(1, 2)


def _scan_by_token(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The scan in ordinary operators and a loop of the graph, for exporters, which support no others."""
    y_dtype, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
    reset, pad = portable.boundaries(seq_idx, lengths, x)
    delta = F.softplus(dt if dt_bias is None else dt + dt_bias.to(dtype))
    if pad is not None:
        delta = delta.masked_fill(pad.unsqueeze(2), 0)
    decay = (delta.unsqueeze(3) * A).exp()  # (b, l, c, n)
    if reset is not None:
        decay = decay.masked_fill(reset[:, :, None, None], 0)
    write = (delta * x).unsqueeze(3) * B.unsqueeze(2)

    # nothing else in the loop: exporters lose tensors from outside of it, and views inside it
    def step(state: Tensor, token: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        decay, write = token
        state = decay * state + write
        return state, state

    before = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.to(dtype)
    state, states = scan(step, before, (decay.transpose(0, 1), write.transpose(0, 1)))
    y = (states.transpose(0, 1) * C.unsqueeze(2)).sum(3)
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(y_dtype), state


def _fake(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, lengths, keep, backend):
    dtype = torch.promote_types(x.dtype, torch.float32)
    b, l, c = x.shape
    # flat: a dimension of blocks would be 1 for short sequences, and torch.compile compiles again for a size of 1
    kept = (l + portable.BLOCK - 1) // portable.BLOCK * b * A.shape[1] * c if keep else 0
    return x.new_empty(b, l, c), x.new_empty(b, *A.shape, dtype=dtype), x.new_empty(kept, dtype=dtype)


_selective_scan = Op(
    __name__,
    "selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_state, Tensor? seq_idx, Tensor? lengths, bool keep) -> (Tensor, Tensor, Tensor)",
    _fake,
    learnt=("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"),
    unread=("initial_state",),
    float64=False,
    plain=_scan_by_token,
)


def cases(device, dtype, batch=2, length=20, channels=12, state=4):
    """Arguments of `selective_scan` for tests and benchmarks: first the required ones, then all."""
    wide = torch.promote_types(dtype, torch.float32)
    x, dt, z = torch.randn(3, batch, length, channels, device=device, dtype=dtype)
    B, C = torch.randn(2, batch, length, state, device=device, dtype=dtype)
    A = -torch.rand(channels, state, device=device, dtype=wide)
    D, dt_bias = torch.randn(2, channels, device=device, dtype=wide)
    initial_state = torch.randn(batch, channels, state, device=device, dtype=wide)
    plain = {"x": x, "dt": dt, "A": A, "B": B, "C": C}
    yield plain
    optional = {"D": D, "z": z, "dt_bias": dt_bias, "initial_state": initial_state}
    yield plain | optional | some_boundaries(batch, length, device)


MODEL_SIZES = {"channels": 80, "state": 16}
