"""The gated long convolution of Hyena (Poli et al. 2023, "Hyena Hierarchy: Towards Larger Convolutional Language
Models", https://arxiv.org/abs/2302.10866, section 3).

Letters: b batch, l length, c channels, k taps of a filter, p inputs before the first, t = p + l.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_archs.kernels.arguments import check_shapes, last_inputs, number_documents, some_boundaries
from hf_archs.kernels.backend import backend_for
from hf_archs.kernels.library import Op
from hf_archs.kernels.numerics import full_precision


def long_conv(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None = None,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
    need_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """A causal convolution of each channel with a filter as long as the sequence, gated before and after:
    ``v = gate_in x``, ``y_t = gate_out_t (sum_j taps_j v_{t-j} + bias v_t)``.

    It takes O(l log l) time by FFT in float32, or in float64 if ``x`` is float64; half precision never enters a
    transform. Only the inputs are kept for the backward. A single token is a dot product with the inputs before it.
    Packed documents are separated and convolved in batches of similar length, so that no document sees another; a
    packed row costs at most about twice as much as an ordinary one of the same length.

    The same code runs on a CPU and, through cuFFT, on a GPU.

    Args:
        x: input, (batch, length, channels).
        taps: the filters, newest input first, (channels, taps). Inputs before the last tap have no effect.
        bias: the skip connection, (channels,), or None for 0.
        gate_in: (batch, length, channels), or None for 1.
        gate_out: (batch, length, channels), or None for 1.
        initial_state: gated inputs ``v`` before the first, oldest first, (batch, channels, past), with any past; zeros
            before a row's first input. None for no past.
        seq_idx: integer, (batch, length). A document begins where the value differs from that of the position before,
            and does not see earlier inputs; position 0 always continues ``initial_state``.
        lengths: integer, (batch,), 0 to length: the tokens of each row. Later positions are pads, which the final state
            leaves out.
        need_state: whether the final state is returned; if not, None is returned instead.

    Returns:
        ``y``, (batch, length, channels), and the final state, (batch, channels, min(past + length, taps)): the gated
        inputs of the row's last document, oldest first, after zeros if there are fewer. Both are in the dtype of ``x``
        and can be differentiated once.

    Raises:
        ValueError: for a wrong shape; the message names the argument.
    """
    _check(x, taps, bias, gate_in, gate_out, initial_state, seq_idx, lengths)
    if backend_for(x) == "reference":
        return long_conv_reference(
            x,
            taps,
            bias,
            gate_in,
            gate_out,
            initial_state=initial_state,
            seq_idx=seq_idx,
            lengths=lengths,
            need_state=need_state,
        )
    if x.shape[1] == 1:
        return long_conv_step(x, taps.flip(1), bias, gate_in, gate_out, initial_state, lengths, need_state)
    y = _long_conv(x, taps, bias, gate_in, gate_out, initial_state, seq_idx)
    if not need_state:
        return y, None
    return y, _past_inputs(x if gate_in is None else x * gate_in, taps.shape[1], initial_state, seq_idx, lengths)


def _check(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
) -> None:
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"long_conv: x must be (batch, length, channels), length at least 1, not {tuple(x.shape)}")
    b, l, c = x.shape
    if taps.dim() != 2 or taps.shape[0] != c or taps.shape[1] == 0:
        raise ValueError(f"long_conv: taps must be ({c}, taps), at least one, not {tuple(taps.shape)}")
    past = initial_state.shape[-1] if initial_state is not None else 0
    check_shapes(
        "long_conv",
        bias=(bias, (c,)),
        gate_in=(gate_in, (b, l, c)),
        gate_out=(gate_out, (b, l, c)),
        initial_state=(initial_state, (b, c, past)),
        seq_idx=(seq_idx, (b, l)),
        lengths=(lengths, (b,)),
    )


def long_conv_reference(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None = None,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
    need_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`long_conv` token by token: the oracle for the tests of the fast form."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    b, l, c = x.shape
    past = x.new_zeros(b, c, 0) if initial_state is None else initial_state.to(x.dtype)
    columns = past.shape[2] + l
    taps, bias = taps.to(dtype), None if bias is None else bias.to(dtype)
    final_state, outputs = F.pad(past, (l, 0)), []
    for t in range(l):
        v = x[:, t] if gate_in is None else x[:, t] * gate_in[:, t]
        if seq_idx is not None and t > 0:
            past = torch.where((seq_idx[:, t] != seq_idx[:, t - 1])[:, None, None], 0, past)
        past = torch.cat([past, v.unsqueeze(2)], dim=2)
        reach = min(past.shape[2], taps.shape[1])
        y = (past[:, :, -reach:].to(dtype) * taps[:, :reach].flip(1)).sum(2)
        if bias is not None:
            y = y + bias * v.to(dtype)
        outputs.append(y if gate_out is None else y * gate_out[:, t].to(dtype))
        padded = F.pad(past, (columns - past.shape[2], 0))
        final_state = padded if lengths is None else torch.where((t < lengths)[:, None, None], padded, final_state)
    y = torch.stack(outputs, dim=1).to(x.dtype)
    return y, final_state[:, :, -min(columns, taps.shape[1]) :] if need_state else None


def long_conv_step(
    x: Tensor,
    reversed_taps: Tensor,
    bias: Tensor | None = None,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    need_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`long_conv` of a single token, (batch, 1, channels), as one dot product; taps have the newest input last."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    v = (x if gate_in is None else x * gate_in).transpose(1, 2)
    seen = v if initial_state is None else torch.cat([initial_state.to(v.dtype), v], dim=2)
    reach = min(seen.shape[2], reversed_taps.shape[1])
    window = seen[:, :, seen.shape[2] - reach :]
    taps = reversed_taps[:, reversed_taps.shape[1] - reach :].to(dtype)
    with full_precision(x):
        y = torch.linalg.vecdot(window.to(dtype), taps).unsqueeze(1)
    if bias is not None:
        y = torch.addcmul(y, v.transpose(1, 2).to(dtype), bias.to(dtype))
    if gate_out is not None:
        y = y * gate_out
    if not need_state:
        return y.to(x.dtype), None
    if lengths is not None:
        before = F.pad(seen[:, :, :-1], (1, 0))[:, :, seen.shape[2] - reach :]
        window = torch.where((lengths > 0)[:, None, None], window, before)
    return y.to(x.dtype), window.contiguous()


def _past_inputs(
    v: Tensor, taps: int, initial_state: Tensor | None, seq_idx: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """The state after gated inputs ``v``, (batch, length, channels): (batch, channels, min(past + length, taps))."""
    past = 0 if initial_state is None else initial_state.shape[2]
    kept = min(past + v.shape[1], taps)
    if seq_idx is None and lengths is None:
        seen = v.transpose(1, 2)
        if initial_state is not None:
            seen = torch.cat([initial_state.to(v.dtype), seen], dim=2)
        return seen[:, :, seen.shape[2] - kept :].contiguous()
    return last_inputs(v, kept, initial_state, number_documents(seq_idx), lengths).contiguous()


def _exportable(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> Tensor:
    """The convolution in ordinary operators, for exporters, since few runtimes have a Fourier transform.

    With documents, it is a product with the matrix of each channel's taps, masked by document.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    v = (x if gate_in is None else x * gate_in).to(dtype)
    seen = v.transpose(1, 2) if initial_state is None else torch.cat([initial_state.to(dtype), v.transpose(1, 2)], 2)
    l, t, k, taps = x.shape[1], seen.shape[2], taps.shape[1], taps.to(dtype)
    if seq_idx is None:
        y = F.conv1d(F.pad(seen, (k - 1, 0)), taps.flip(1).unsqueeze(1), groups=taps.shape[0])[:, :, t - l :]
        y = y.transpose(1, 2)
    else:
        lag = torch.arange(t - l, t, device=x.device).unsqueeze(1) - torch.arange(t, device=x.device)  # (l, t)
        matrix = torch.where((lag >= 0) & (lag < k), taps[:, lag.clamp(0, k - 1)], 0)
        documents = number_documents(seq_idx)
        assert documents is not None  # since there is more than one token
        document = F.pad(documents, (t - l, 0))  # (b, t)
        same = document[:, t - l :].unsqueeze(2) == document.unsqueeze(1)
        y = torch.einsum("bct,clt,blt->blc", seen, matrix, same.to(dtype))
    if bias is not None:
        y = y + v * bias.to(dtype)
    return (y if gate_out is None else y * gate_out).to(x.dtype)


_long_conv = Op(
    __name__,
    "long_conv(Tensor x, Tensor taps, Tensor? bias, Tensor? gate_in, Tensor? gate_out, Tensor? initial_state, "
    "Tensor? seq_idx) -> Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
    learnt=("x", "taps", "bias", "gate_in", "gate_out", "initial_state"),
    only="portable",  # with cuFFT on a GPU
    waits=True,  # for the lengths of documents, with seq_idx
    plain=_exportable,
)


def cases(device, dtype, batch=2, length=40, channels=6, past=9):
    """Arguments of `long_conv` for tests and benchmarks: first the required ones, then all."""
    x, gate_in, gate_out = torch.randn(3, batch, length, channels, device=device, dtype=dtype)
    taps, bias, state = (
        torch.randn(shape, device=device, dtype=dtype)
        for shape in ((channels, length + past), (channels,), (batch, channels, past))
    )
    yield {"x": x, "taps": taps}
    gates = {"gate_in": gate_in, "gate_out": gate_out, "initial_state": state}
    yield {"x": x, "taps": taps, "bias": bias, **gates, **some_boundaries(batch, length, device)}


MODEL_SIZES = {"channels": 100, "past": 40}
