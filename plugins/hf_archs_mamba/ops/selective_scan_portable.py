"""The selective scan in plain PyTorch: blocks of tokens, with a sequential recurrence inside and a written backward.

Letters: b batch, l length, c channels, n state, m tokens of one block.

A block is laid out (m, b, n, c), channels innermost. Everything but the recurrence is computed for the whole block in a
few large calls; the recurrence is one in-place `addcmul_` per token, on views that are made once. Only the state at the
start of each block is kept for the backward, which recomputes the block from it: l / 128 states. (Measured on a CPU:
parallel scans with a logarithmic number of steps, scans in two levels and einsum are slower; the closed form
exp(cumsum) * cumsum(...) overflows.)
"""

import math
import threading
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_archs.kernels.numerics import LOG2_E

BLOCK = 128  # tokens between two kept states
# Elements of the state in a tile: at least enough to outweigh the overhead of a call, at most enough for the cache.
_SMALL, _LARGE = 8192, 32768


class _Workspace:
    """Buffers of one block, and their views by token."""

    def __init__(self, rows: int, state: int, channels: int, like: Tensor) -> None:
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.states = like.new_empty(BLOCK + 1, rows, state, channels)  # [0] is the state before the block
            self.decay = like.new_empty(BLOCK, rows, state, channels)
            self.grads = like.new_empty(BLOCK, rows, state, channels)
            self.state_at, self.decay_at, self.grad_at = self.states.unbind(), self.decay.unbind(), self.grads.unbind()


_local = threading.local()


def _workspace(rows: int, state: int, channels: int, like: Tensor) -> _Workspace:
    """This thread's workspace of that shape. Only two are kept (full tiles and the last ones), to bound the memory."""
    kept: dict[tuple, _Workspace] = _local.__dict__.setdefault("kept", {})
    key = (rows, state, channels, like.dtype, like.device)
    found = kept.pop(key, None) or _Workspace(rows, state, channels, like)
    kept[key] = found  # the latest is the last
    if len(kept) > 2:
        del kept[next(iter(kept))]
    return found


def _tiles(batch: int, channels: int, state: int) -> Iterator[tuple[slice, slice]]:
    """Cut (batch, channels) into tiles, which are independent and scanned one after the other."""
    width = math.ceil(channels / math.ceil(channels * state / _LARGE))
    rows = math.ceil(batch / math.ceil(batch / max(1, _SMALL // (width * state))))
    for c in range(0, channels, width):
        for b in range(0, batch, rows):
            yield slice(b, min(b + rows, batch)), slice(c, min(c + width, channels))


class _Part:
    """The inputs of one tile, time first and in the working dtype: (l, b, c), and (l, b, n) for B and C.

    Values that need no state are computed here for the whole length, since the calls would be too small on a block.
    """

    def __init__(
        self,
        rows: slice,
        cols: slice,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        reset: Tensor | None,
        pad: Tensor | None,
    ) -> None:
        x, dt, A, B, C = inputs
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.x, dt = self.time_first(x[rows, :, cols]), self.time_first(dt[rows, :, cols])
        self.minus_dt = -dt if dt_bias is None else torch.sub(-dt_bias[cols].to(self.dtype), dt)
        self.B, self.C = self.time_first(B[rows]).contiguous(), self.time_first(C[rows]).contiguous()
        self.z = None if z is None else self.time_first(z[rows, :, cols])
        self.A = A[cols].t().to(self.dtype).contiguous()
        self.A_log2e = self.A * LOG2_E  # exp2 is several times faster than exp
        self.D = None if D is None else D[cols].to(self.dtype)
        self.reset = None if reset is None else reset[rows].t()
        self.pad = None if pad is None else pad[rows].t().unsqueeze(-1)
        self.delta = F.logsigmoid(self.minus_dt).neg_()  # softplus, in half the time of F.softplus
        if self.pad is not None:
            self.delta.masked_fill_(self.pad, 0)
        self.input = self.delta * self.x
        self.workspace = _workspace(self.x.shape[1], A.shape[1], self.x.shape[2], self.A)

    def time_first(self, t: Tensor) -> Tensor:
        """(b, l, k) -> (l, b, k)."""
        return t.transpose(0, 1).to(self.dtype)

    def scan(self, block: slice) -> int:
        """Fill the workspace's decays and states for one block, and return the number of its tokens."""
        w = self.workspace
        delta = self.delta[block]
        m = delta.shape[0]
        decay = torch.mul(delta.unsqueeze(2), self.A_log2e, out=w.decay[:m]).exp2_()
        if self.reset is not None:
            decay.masked_fill_(self.reset[block][:, :, None, None], 0)
        torch.mul(self.input[block].unsqueeze(2), self.B[block].unsqueeze(3), out=w.states[1 : m + 1])
        _recur(w.state_at[1 : m + 1], w.decay_at[:m], w.state_at[:m])
        return m

    def outputs(self, block: slice, to: Tensor) -> None:
        """Write C h of a block, from the states in the workspace, into its part of ``to``, (l, b, c)."""
        m, b, n = self.C[block].shape
        states = self.workspace.states[1 : m + 1].view(m * b, n, -1)
        torch.bmm(self.C[block].view(m * b, 1, n), states, out=to[block].view(m * b, 1, -1))


def boundaries(seq_idx: Tensor | None, lengths: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Two masks, (b, l) or None: the tokens at which a document begins (no pads, never position 0), and the pads."""
    reset = pad = None
    if lengths is not None:
        pad = torch.arange(x.shape[1], device=x.device) >= lengths.unsqueeze(1)
    if seq_idx is not None:
        reset = (seq_idx != seq_idx.roll(1, 1)) & (torch.arange(x.shape[1], device=x.device) > 0)
        if pad is not None:
            reset &= ~pad
    return reset, pad


def _recur(to: tuple[Tensor, ...], decay: tuple[Tensor, ...], before: tuple[Tensor, ...]) -> None:
    """``to[i] += decay[i] * before[i]``, one after the other: ``before[i + 1]`` is ``to[i]``."""
    if not to:
        return
    if to[0].device.type == "cpu":
        # On a CPU this loops over the lists in order, in C++: half the time of one call from Python per token.
        torch._foreach_addcmul_(to, decay, before)
    else:
        for h, d, b in zip(to, decay, before):
            h.addcmul_(d, b)


def _over_channels(of_state: Tensor, of_channel: Tensor) -> Tensor:
    """(m, b, n, c) times (m, b, c), summed over c. The vector is the left factor, which is six times faster."""
    m, b, n, c = of_state.shape
    return torch.bmm(of_channel.reshape(m * b, 1, c), of_state.view(m * b, n, c).transpose(1, 2)).view(m, b, n)


def selective_scan_fwd(
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
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, (b, c, n), and the states before the blocks, (l / BLOCK, b, n, c) flattened, or nothing
    unless ``keep_states``."""
    (b, l, c), n = x.shape, A.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    reset, pad = boundaries(seq_idx, lengths, x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final_state = x.new_empty(b, c, n, dtype=dtype)
    kept = x.new_empty((math.ceil(l / BLOCK), b, n, c) if keep_states else 0, dtype=dtype)
    for rows, cols in _tiles(b, c, n):
        part = _Part(rows, cols, (x, dt, A, B, C), D, z, dt_bias, reset, pad)
        w = part.workspace
        carried = w.state_at[0]
        if initial_state is None:
            carried.zero_()
        else:
            carried.copy_(initial_state[rows, cols].transpose(1, 2))
        out = torch.empty_like(part.delta, memory_format=torch.contiguous_format)
        for i, start in enumerate(range(0, l, BLOCK)):
            if keep_states:
                kept[i, rows, :, cols] = carried
            block = slice(start, start + BLOCK)
            m = part.scan(block)
            part.outputs(block, out)
            carried.copy_(w.state_at[m])
        if part.D is not None:
            out.addcmul_(part.D, part.x)
        if part.z is not None:
            out *= F.silu(part.z)
        y[rows, :, cols] = out.transpose(0, 1)
        final_state[rows, cols] = carried.transpose(1, 2)
    return y, final_state, kept.flatten()


def selective_scan_bwd(
    grad_y: Tensor | None,
    grad_final_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
    kept: Tensor,
    wanted: Sequence[bool] = (True,) * 9,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, dt, A, B, C, D, z, dt_bias and the initial state, in the working dtype or the tensor's.

    The value of a gradient that is not ``wanted`` is undefined.
    """
    of_x, of_dt, of_A, of_B, of_C, of_D, of_z, of_bias, _ = wanted
    of_step = of_dt or of_bias
    (b, l, c), n = x.shape, A.shape[1]
    kept = kept.view(-1, b, n, c)
    dtype = torch.promote_types(x.dtype, torch.float32)
    reset, pad = boundaries(seq_idx, lengths, x)
    dx, ddt = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt))
    dz = None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    dA, dD, d_bias = (x.new_zeros(shape, dtype=dtype) for shape in ((n, c), c, c))
    dB, dC = (x.new_zeros(l, b, n, dtype=dtype) for _ in range(2))  # sums over the tiles of channels
    d_initial = x.new_empty(b, c, n, dtype=dtype)
    for rows, cols in _tiles(b, c, n):
        part = _Part(rows, cols, (x, dt, A, B, C), D, z, dt_bias, reset, pad)
        w = part.workspace
        carried = torch.zeros_like(w.state_at[0])  # the gradient of the state after the block
        if grad_final_state is not None:
            carried.copy_(grad_final_state[rows, cols].transpose(1, 2))
        out, d_input, d_delta = (torch.empty_like(part.delta, memory_format=torch.contiguous_format) for _ in range(3))
        dy = torch.zeros_like(part.delta) if grad_y is None else part.time_first(grad_y[rows, :, cols])
        if part.z is not None:
            gate, s = part.z, part.z.sigmoid()
            d_gate = dy * s * (1 + gate * (1 - s))  # without the factor C h + D x
            dy = dy * gate * s
        for i in reversed(range(kept.shape[0])):
            block = slice(i * BLOCK, (i + 1) * BLOCK)
            w.state_at[0].copy_(kept[i, rows, :, cols])
            m = part.scan(block)
            r = part.x.shape[1]
            states, decay, grads = w.states[: m + 1], w.decay[:m], w.grads[:m]
            if of_z:
                part.outputs(block, out)

            # g_t = C_t dy_t + decay_{t+1} g_{t+1}
            torch.mul(dy[block].unsqueeze(2), part.C[block].unsqueeze(3), out=grads)
            w.grad_at[m - 1].add_(carried)
            back = slice(m - 1, 0, -1)
            _recur(w.grad_at[:m][-2::-1], w.decay_at[back], w.grad_at[back])
            torch.mul(w.grad_at[0], w.decay_at[0], out=carried)

            if of_C:
                dC[block, rows] += _over_channels(states[1:], dy[block])
            if of_B:
                dB[block, rows] += _over_channels(grads, part.input[block])
            if of_x or of_step:
                by_input = d_input[block].view(m * r, 1, -1)
                torch.bmm(part.B[block].view(m * r, 1, n), grads.view(m * r, n, -1), out=by_input)
            if of_step or of_A:
                d_delta_A = grads.mul_(states[:m]).mul_(decay)  # the gradient of delta * A: g h_{t-1} decay
            if of_step:
                torch.sum(torch.mul(d_delta_A, part.A, out=decay), 2, out=d_delta[block])
            if of_A:
                dA[:, cols] += d_delta_A.mul_(part.delta[block].unsqueeze(2)).sum((0, 1))
        if of_z and dz is not None:
            if part.D is not None:
                out.addcmul_(part.D, part.x)
            dz[rows, :, cols] = d_gate.mul_(out).transpose(0, 1)
        if of_step:
            d_delta.addcmul_(d_input, part.x).mul_(part.minus_dt.neg_().sigmoid_())
            if part.pad is not None:
                d_delta.masked_fill_(part.pad, 0)
            ddt[rows, :, cols] = d_delta.transpose(0, 1)
            if of_bias:
                d_bias[cols] += d_delta.sum((0, 1))
        if of_D:
            dD[cols] += (dy * part.x).sum((0, 1))
        if of_x:
            d_x = d_input.mul_(part.delta)
            if part.D is not None:
                d_x.addcmul_(part.D, dy)
            dx[rows, :, cols] = d_x.transpose(0, 1)
        d_initial[rows, cols] = carried.transpose(1, 2)
    return dx, ddt, dA.t(), dB.transpose(0, 1), dC.transpose(0, 1), dD, dz, d_bias, d_initial
