"""Long filters as sums of decaying oscillations, ``h_t = Re sum_n R_n p_n^t``: a convolution whose state is constant.

Massaroli et al. 2023, "Laughing Hyena Distillery", https://arxiv.org/abs/2310.18780, section 3 (the modal form).

The poles are ``p = exp(-exp(log_decay) + i phase)``, as in Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks
for Long Sequences", https://arxiv.org/abs/2303.06349, section 3.3. So ``|p| < 1`` for any ``log_decay`` and ``phase``
(or 1, to which float32 rounds it if ``exp(log_decay)`` is tiny), and no gradient step can make a filter that grows.
``exp(-log_decay)`` is the number of tokens in which a mode falls to 1/e. Arguments and results hold a complex number as
a last dimension of size 2, its real and imaginary part.

Letters: b batch, l length, c channels, n modes, m tokens of a chunk, q chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_archs.kernels.arguments import check_shapes, number_documents, some_boundaries
from hf_archs.kernels.backend import backend_for
from hf_archs.kernels.library import Op, form
from hf_archs.kernels.numerics import full_precision

# tokens between two entries of the coarse table of powers; constant, so that a longer filter begins with the same taps
_STRIDE = 256


def _blocks(length: int) -> int:
    """Blocks of _STRIDE that hold ``length``; at least two, since torch.compile compiles again for a size of 1."""
    return (length - 1) // _STRIDE + 2


def modal_powers(log_decay: Tensor, phase: Tensor, exponents: Tensor) -> Tensor:
    """``p^e`` for every pole and exponent.

    The angle is computed in float64, since in float32 a large ``phase * e`` has no digits left after the point.

    Args:
        log_decay: logarithm of the poles' decay rates, (channels, modes).
        phase: the poles' angles in radians per token, (channels, modes).
        exponents: 0 or more, (k,).

    Returns:
        (channels, modes, k, 2), in float32 or wider.
    """
    dtype = torch.promote_types(log_decay.dtype, torch.float32)
    wide = dtype if log_decay.device.type == "mps" else torch.float64  # MPS has no float64
    exponents = exponents.to(wide)
    size = torch.exp(-log_decay.to(wide).exp().unsqueeze(2) * exponents)
    angle = phase.to(wide).unsqueeze(2) * exponents
    return torch.stack([size * angle.cos(), size * angle.sin()], dim=3).to(dtype)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """The product of complex numbers, (..., 2)."""
    (ar, ai), (br, bi) = a.unbind(-1), b.unbind(-1)
    return torch.stack([ar * br - ai * bi, ar * bi + ai * br], dim=-1)


def _conjugate(a: Tensor) -> Tensor:
    """The conjugate of complex numbers, (..., 2)."""
    real, imaginary = a.unbind(-1)
    return torch.stack([real, -imaginary], dim=-1)


def modal_taps(log_decay: Tensor, phase: Tensor, residues: Tensor, length: int) -> Tensor:
    """The filter itself, ``h_t = Re sum_n R_n p_n^t`` for t = 0 to length - 1.

    It takes little more memory than its result. A longer filter begins with the shorter one.

    Args:
        log_decay, phase: the poles, (channels, modes); see the module's docstring.
        residues: the modes' weights, (channels, modes, 2).
        length: the number of taps.

    Returns:
        (channels, length), in float32 or wider.
    """
    # t = coarse * _STRIDE + fine, and p^t the product of both powers
    device = log_decay.device
    fine = modal_powers(log_decay, phase, torch.arange(_STRIDE, device=device))
    coarse = modal_powers(log_decay, phase, _STRIDE * torch.arange(_blocks(length), device=device))
    coarse = _times(coarse, residues.to(coarse.dtype).unsqueeze(2))
    with full_precision(log_decay):
        taps = torch.einsum("cnqz,cnrz->cqr", _conjugate(coarse), fine)
    # not a slice: exporters cannot prove that the tables are long enough for every length
    return taps.flatten(1).index_select(1, torch.arange(length, device=device))


def modal_state(
    x: Tensor,
    log_decay: Tensor,
    phase: Tensor,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The state after a sequence, ``s_t = p s_{t-1} + x_t``, without outputs: for a prefill whose outputs come from a
    long convolution with `modal_taps`.

    Arguments and result as in `modal_conv`; the state can be differentiated.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    b, l = x.shape[:2]
    documents, last = number_documents(seq_idx), None
    ends = x.new_full((b,), l, dtype=torch.int64) if lengths is None else lengths.to(torch.int64)
    # x backwards from the row's end, so that its j-th entry has the weight p^j in every row, in blocks of _STRIDE
    exporting = torch.compiler.is_exporting()  # exporters cannot cut a symbolic length into blocks
    fine_exponents = torch.arange(l if exporting else _STRIDE, device=x.device)
    coarse_exponents = _STRIDE * torch.arange(1 if exporting else _blocks(l), device=x.device)
    place = ends[:, None, None] - 1 - (coarse_exponents.unsqueeze(1) + fine_exponents)  # (b, blocks, _STRIDE)
    row = torch.arange(b, device=x.device)[:, None, None]
    seen, place = place >= 0, place.clamp(min=0)
    if documents is not None:
        last = documents.gather(1, (ends - 1).clamp(min=0).unsqueeze(1))  # (b, 1)
        seen = seen & (documents[row, place] == last.unsqueeze(2))
    backwards = torch.where(seen.unsqueeze(3), x[row, place], 0).to(dtype)  # (b, blocks, _STRIDE, c)
    fine, coarse = (modal_powers(log_decay, phase, e).to(dtype) for e in (fine_exponents, coarse_exponents))
    with full_precision(x):
        sums = torch.einsum("bqrc,cnrz->qbcnz", backwards, fine)
    state = _times(coarse.permute(2, 0, 1, 3).unsqueeze(1), sums).sum(0)
    if initial_state is not None:
        over = modal_powers(log_decay, phase, ends).permute(2, 0, 1, 3).to(dtype)  # (b, c, n, 2)
        before = _times(over, initial_state.to(dtype))
        state = state + (before if last is None else torch.where((last == 0)[:, :, None, None], before, 0))
    return state


def modal_conv(
    x: Tensor,
    log_decay: Tensor,
    phase: Tensor,
    residues: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Filter each channel with its own sum of modes: ``s_t = p s_{t-1} + x_t``, ``y_t = Re sum_n R_n s_{t,n} + bias
    x_t``.

    States and sums are in float32, or in float64 if ``x`` is float64, also under autocast. Each tensor may have its own
    dtype, which its gradient has too.

    Args:
        x: input, (batch, length, channels).
        log_decay: logarithm of the poles' decay rates, (channels, modes).
        phase: the poles' angles in radians per token, (channels, modes).
        residues: the modes' weights, (channels, modes, 2).
        bias: weight of an input in its own output, added to that of the modes, (channels,), or None.
        initial_state: the state to continue from, (batch, channels, modes, 2), or None for zeros.
        seq_idx: integer, (batch, length). A document begins where the value differs from that of the position before,
            with an empty state; position 0 always continues ``initial_state``.
        lengths: integer, (batch,), 0 to length: the tokens of each row. Later positions are pads, which do not change
            the state and whose output is 0.

    Returns:
        ``y``, (batch, length, channels) in the dtype of ``x``, and the final state, (batch, channels, modes, 2) in
        float32 or wider. Both can be differentiated once.

    Raises:
        ValueError: for a wrong shape; the message names the argument.
    """
    _check(x, log_decay, phase, residues, bias, initial_state, seq_idx, lengths)
    backend = backend_for(x)
    if backend == "reference":
        return modal_conv_reference(
            x,
            log_decay,
            phase,
            residues,
            bias,
            initial_state=initial_state,
            seq_idx=seq_idx,
            lengths=lengths,
        )
    if x.shape[1] == 1:
        return _step(x, log_decay, phase, residues, bias, initial_state, lengths)
    real = None
    if lengths is not None:
        real = (torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)).unsqueeze(2)
        x = torch.where(real, x, 0)
    if torch.compiler.is_exporting():
        with full_precision(x):
            y = _plain(x, log_decay, phase, residues, bias, initial_state, seq_idx)
            final_state = modal_state(
                x, log_decay, phase, initial_state=initial_state, seq_idx=seq_idx, lengths=lengths
            )
    else:
        y, final_state = _by_chunks(
            x, log_decay, phase, residues, bias, initial_state, number_documents(seq_idx), lengths
        )
    return (y if real is None else torch.where(real, y, 0)), final_state


def _check(
    x: Tensor,
    log_decay: Tensor,
    phase: Tensor,
    residues: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
) -> None:
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"modal_conv: x must be (batch, length, channels), length at least 1, not {tuple(x.shape)}")
    if log_decay.dim() != 2:
        raise ValueError(f"modal_conv: log_decay must be (channels, modes), not {tuple(log_decay.shape)}")
    (b, l, c), n = x.shape, log_decay.shape[1]
    check_shapes(
        "modal_conv",
        log_decay=(log_decay, (c, n)),
        phase=(phase, (c, n)),
        residues=(residues, (c, n, 2)),
        bias=(bias, (c,)),
        initial_state=(initial_state, (b, c, n, 2)),
        seq_idx=(seq_idx, (b, l)),
        lengths=(lengths, (b,)),
    )


def modal_conv_reference(
    x: Tensor,
    log_decay: Tensor,
    phase: Tensor,
    residues: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`modal_conv` token by token: the oracle for the tests of the fast forms."""
    y_dtype, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    (b, l, c), n = x.shape, log_decay.shape[1]
    x = x.to(dtype)
    poles = torch.polar(torch.exp(-log_decay.to(dtype).exp()), phase.to(dtype))
    weights = torch.view_as_complex(residues.to(dtype).contiguous())
    state = x.new_zeros(b, c, n, 2) if initial_state is None else initial_state.to(dtype)
    state = torch.view_as_complex(state.contiguous())
    outputs = []
    for t in range(l):
        real = torch.ones_like(x[:, 0, 0], dtype=torch.bool) if lengths is None else t < lengths
        real = real[:, None, None]
        if seq_idx is not None and t > 0:
            begins = (seq_idx[:, t] != seq_idx[:, t - 1])[:, None, None]
            state = torch.where(begins & real, 0, state)
        state = torch.where(real, poles * state + x[:, t, :, None], state)
        y = (weights * state).real.sum(2)
        if bias is not None:
            y = y + bias.to(dtype) * x[:, t]
        outputs.append(torch.where(real[:, :, 0], y, 0))
    return torch.stack(outputs, dim=1).to(y_dtype), torch.view_as_real(state)


def _step(
    x: Tensor,
    log_decay: Tensor,
    phase: Tensor,
    residues: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token, in a few PyTorch calls, on every device."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    now = x.to(dtype).transpose(1, 2)  # (b, c, 1)
    if initial_state is None:
        initial_state = now.new_zeros(*residues.shape).expand(x.shape[0], -1, -1, -1)
    size, phase = torch.exp(-log_decay.to(dtype).exp()), phase.to(dtype)
    pole_r, pole_i = size * phase.cos(), size * phase.sin()
    before = initial_state.to(dtype)
    state_r = torch.addcmul(torch.addcmul(now, pole_r, before[..., 0]), pole_i, before[..., 1], value=-1)
    state_i = torch.addcmul(pole_r * before[..., 1], pole_i, before[..., 0])
    state = torch.stack([state_r, state_i], dim=3)
    weighted = residues.to(dtype) * state
    y = (weighted[..., 0] - weighted[..., 1]).sum(2)
    if bias is not None:
        y = torch.addcmul(y, now.squeeze(2), bias.to(dtype))
    if lengths is not None:
        real = lengths > 0
        y = torch.where(real[:, None], y, 0)
        state = torch.where(real[:, None, None, None], state, before)
    return y.to(x.dtype).unsqueeze(1), state


def _plain(
    x: Tensor,
    log_decay: Tensor,
    phase: Tensor,
    residues: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> Tensor:
    """The outputs in ordinary operators, for exporters, which support no others: the filter has full length."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    l, c = x.shape[1:]
    wide, documents = x.to(dtype), number_documents(seq_idx)
    taps = modal_taps(log_decay, phase, residues, l).to(dtype)
    if documents is None:
        padded = F.pad(wide.transpose(1, 2), (l - 1, 0))
        y = F.conv1d(padded, taps.flip(1).unsqueeze(1), groups=c).transpose(1, 2)
    else:
        back = torch.arange(l, device=x.device).unsqueeze(1) - torch.arange(l, device=x.device)  # (i, j)
        seen = (documents.unsqueeze(2) == documents.unsqueeze(1)) & (back >= 0)
        y = torch.einsum("cij,bij,bjc->bic", taps[:, back.clamp(min=0)], seen.to(dtype), wide)
    if initial_state is not None:
        powers = modal_powers(log_decay, phase, torch.arange(1, l + 1, device=x.device)).to(dtype)
        before = _conjugate(_times(residues.to(dtype), initial_state.to(dtype)))
        from_state = torch.einsum("cnlz,bcnz->blc", powers, before)
        y = y + (from_state if documents is None else torch.where((documents == 0).unsqueeze(2), from_state, 0))
    if bias is not None:
        y = y + wide * bias.to(dtype)
    return y.to(x.dtype)


def _by_chunks(
    x: Tensor,
    log_decay: Tensor,
    phase: Tensor,
    residues: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute three small tables from the parameters, which PyTorch differentiates, and call the op with them."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if dtype == torch.float64:
        log_decay, phase = log_decay.double(), phase.double()
    m = form(__name__, _modal_conv.backend(x, log_decay, phase, residues, bias, initial_state)).CHUNK
    powers = modal_powers(log_decay, phase, torch.arange(m + 1, device=x.device))  # (c, n, m + 1, 2)
    weighted = _times(powers, residues.to(powers.dtype).unsqueeze(2))
    taps = weighted[:, :, :m, 0].sum(1)
    if bias is not None:
        taps = torch.cat([taps[:, :1] + bias.to(taps.dtype).unsqueeze(1), taps[:, 1:]], dim=1)
    # the weights with which a chunk's tokens read the state before it
    read = _conjugate(weighted[:, :, 1:]).transpose(2, 3).flatten(1, 2)
    return _modal_conv(x, taps, powers, read, initial_state, documents, lengths)


def _fake(x, taps, powers, *_):
    (b, l, c), n = x.shape, powers.shape[1]
    return x.new_empty(b, l, c), x.new_empty(b, c, n, 2, dtype=torch.promote_types(x.dtype, torch.float32))


# the first taps are (c, m), the poles' powers 0 to m (c, n, m + 1, 2), and ``read``, with which a chunk's tokens read
# the state before it, (c, 2 n, m)
_modal_conv = Op(
    __name__,
    "modal_conv(Tensor x, Tensor taps, Tensor powers, Tensor read, Tensor? initial_state, Tensor? documents, "
    "Tensor? lengths) -> (Tensor, Tensor)",
    _fake,
    learnt=("x", "taps", "powers", "read", "initial_state"),
    float64=False,
    waits=True,  # for the number of chunks, where there are documents
)


def cases(device, dtype, batch=2, length=70, channels=6, modes=4):
    """Arguments of `modal_conv` for tests and benchmarks: without and with all that is optional."""
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(batch, length, channels, device=device, dtype=dtype)
    log_decay, phase = torch.randn(2, channels, modes, device=device, dtype=wide)
    residues = torch.randn(channels, modes, 2, device=device, dtype=wide)
    bias = torch.randn(channels, device=device, dtype=wide)
    state = torch.randn(batch, channels, modes, 2, device=device, dtype=wide)
    filters = {"log_decay": log_decay, "phase": phase, "residues": residues}
    yield {"x": x, **filters}
    yield {"x": x, **filters, "bias": bias, "initial_state": state, **some_boundaries(batch, length, device)}


MODEL_SIZES = {"channels": 100, "modes": 16}
