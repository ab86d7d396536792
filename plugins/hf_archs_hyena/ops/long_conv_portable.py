"""`long_conv` by real Fourier transforms, on CPUs and GPUs alike.

Channels are cut into blocks, so that a block's spectra fit the processor's cache, and the memory for temporaries does
not grow with the number of channels. Inside a block time is innermost, as transforms need it.

Letters: b batch, l length, c channels of a block, k taps, p inputs before the first, t = p + l, d documents, n points
of a transform.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# elements of a block's transform: on a CPU 2 MB of float32 besides the spectrum, on a GPU enough for long launches
BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**25}


@dataclass
class Documents:
    """Documents of similar length: the columns of each in the flattened rows (b t), and a mask of the real ones."""

    columns: Tensor  # (d, longest)
    real: Tensor  # (d, longest)


def long_conv_fwd(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> Tensor:
    """The output, (b, l, c), in the dtype of ``x``."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    past = 0 if initial_state is None else initial_state.shape[2]
    groups = None if seq_idx is None else _documents(seq_idx, past)
    for block in _blocks(x, taps, past, groups):
        v = _gated(x, gate_in, block)
        out = _convolve(_seen(v, initial_state, block), _wide(taps[block], v), past, groups)
        if bias is not None:
            out.addcmul_(v, _wide(bias[block], v).unsqueeze(1))
        if gate_out is not None:
            out.mul_(gate_out[:, :, block].transpose(1, 2))
        y[:, :, block] = out.transpose(1, 2)
    return y


def long_conv_bwd(
    grad_y: Tensor,
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    wanted: Sequence[bool] = (True,) * 6,
) -> list[Tensor | None]:
    """The gradients of x, taps, bias, gate_in, gate_out and initial_state; the convolution is computed again."""
    of_x, of_taps, of_bias, of_in, of_out, of_state = wanted
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_in = None if not of_in else torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_out = None if not of_out else torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_taps = torch.empty(taps.shape, dtype=dtype, device=x.device)
    grad_bias = None if bias is None or not of_bias else torch.empty(bias.shape, dtype=dtype, device=x.device)
    grad_state = None if initial_state is None or not of_state else torch.empty_like(initial_state)
    past = 0 if initial_state is None else initial_state.shape[2]
    groups = None if seq_idx is None else _documents(seq_idx, past)
    for block in _blocks(x, taps, past, groups):
        v = _gated(x, gate_in, block)
        gy = grad_y[:, :, block].transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)
        g = gy if gate_out is None else gy * gate_out[:, :, block].transpose(1, 2)
        out, grad_seen, grad_block = _convolve_backward(
            g, _seen(v, initial_state, block), _wide(taps[block], v), past, groups, of_out, of_taps
        )
        if grad_block is not None:
            grad_taps[block] = grad_block
        grad_v = grad_seen[:, :, past:]
        if grad_bias is not None:
            grad_bias[block] = (g * v).sum((0, 2))
        if bias is not None:
            wide = _wide(bias[block], v).unsqueeze(1)
            if out is not None:
                out.addcmul_(v, wide)
            grad_v = grad_v.addcmul_(g, wide)
        if grad_out is not None and out is not None:
            grad_out[:, :, block] = out.mul_(gy).transpose(1, 2)
        if grad_state is not None:
            grad_state[:, block] = grad_seen[:, :, :past]
        if of_x:
            of_input = grad_v if gate_in is None else grad_v * gate_in[:, :, block].transpose(1, 2)
            grad_x[:, :, block] = of_input.transpose(1, 2)
        if grad_in is not None:
            grad_in[:, :, block] = grad_v.mul_(x[:, :, block].transpose(1, 2)).transpose(1, 2)
    return [grad_x, grad_taps, grad_bias, grad_in, grad_out, grad_state]


def _blocks(x: Tensor, taps: Tensor, past: int, groups: list[Documents] | None) -> Iterator[slice]:
    b, l, c = x.shape
    if groups is None:
        rows, points = b, _points(past + l, taps.shape[1], past)
    else:
        rows, points = max(((g.columns.shape[0], 2 * g.columns.shape[1]) for g in groups), key=lambda s: s[0] * s[1])
    step = max(1, BLOCK_ELEMENTS.get(x.device.type, BLOCK_ELEMENTS["cpu"]) // (rows * points))
    for start in range(0, c, step):
        yield slice(start, min(start + step, c))


def _wide(parameter: Tensor, like: Tensor) -> Tensor:
    return parameter.to(like.dtype)


def _gated(x: Tensor, gate_in: Tensor | None, block: slice) -> Tensor:
    """The block's inputs (b, c, l), time innermost."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    v = x[:, :, block].transpose(1, 2)
    if gate_in is None:
        return v.to(dtype, memory_format=torch.contiguous_format)
    # rounded to the dtype of x, like the gated inputs in a cache, so that both convolve the same numbers
    gated = torch.empty(v.shape, dtype=x.dtype, device=x.device)
    return torch.mul(v, gate_in[:, :, block].transpose(1, 2), out=gated).to(dtype)


def _seen(v: Tensor, initial_state: Tensor | None, block: slice) -> Tensor:
    return v if initial_state is None else torch.cat([initial_state[:, block].to(v.dtype), v], dim=2)


def _convolve(seen: Tensor, taps: Tensor, past: int, groups: list[Documents] | None) -> Tensor:
    """The outputs after the first ``past`` positions of ``seen``: (b, c, t) to (b, c, l)."""
    if groups is None:
        return _forward(seen, taps, past)
    out = torch.empty_like(seen)
    for group in groups:
        _scatter(out, group, _forward(_gather(seen, group), taps, 0))
    return out[:, :, past:]


def _convolve_backward(
    g: Tensor, seen: Tensor, taps: Tensor, past: int, groups: list[Documents] | None, again: bool, of_taps: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """The outputs (None unless ``again``), and the gradients of seen and taps (None unless ``of_taps``), given ``g``,
    the gradient of the outputs."""
    if groups is None:
        return _backward(g, seen, taps, past, again, of_taps)
    g = F.pad(g, (past, 0))
    out, grad_seen, grad_taps = torch.empty_like(seen), torch.empty_like(seen), torch.zeros_like(taps)
    for group in groups:
        part, grad_part, more = _backward(_gather(g, group), _gather(seen, group), taps, 0, again, of_taps)
        _scatter(grad_seen, group, grad_part)
        if more is not None:
            grad_taps += more
        if part is not None:
            _scatter(out, group, part)
    return out[:, :, past:] if again else None, grad_seen, grad_taps


# -- documents ---------------------------------------------------------------------------------------------------


def _documents(seq_idx: Tensor, past: int) -> list[Documents]:
    """The documents of all rows, in groups; the longest of a group is at most twice as long as its shortest."""
    b, l = seq_idx.shape
    begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)
    starts = F.pad(begins, (past, 0))  # the first document of a row begins with the past
    starts[:, 0], starts[:, past] = True, past == 0
    first = starts.flatten().nonzero().squeeze(1)
    sizes = torch.diff(first, append=first.new_tensor([b * (past + l)]))
    groups = []
    for exponent in torch.unique((sizes - 1).clamp(min=1).log2().floor()).tolist():
        low, high = (0 if exponent == 0 else 2**exponent), 2 ** (exponent + 1)
        chosen = (sizes > low) & (sizes <= high)
        columns = torch.arange(int(sizes[chosen].max()), device=first.device)
        real = columns < sizes[chosen].unsqueeze(1)
        groups.append(Documents(torch.where(real, first[chosen].unsqueeze(1) + columns, 0), real))
    return groups


def _gather(rows: Tensor, group: Documents) -> Tensor:
    """The group's documents, one in a row, with zeros after the end: (b, c, t) to (d, c, longest)."""
    return rows.transpose(0, 1).flatten(1)[:, group.columns].masked_fill_(~group.real, 0).transpose(0, 1)


def _scatter(rows: Tensor, group: Documents, documents: Tensor) -> None:
    """The inverse of `_gather`: write ``documents`` into ``rows``, which is contiguous."""
    t, columns = rows.shape[2], group.columns[group.real]
    rows[columns // t, :, columns % t] = documents.transpose(1, 2)[group.real]


# -- transforms --------------------------------------------------------------------------------------------------


def _points(t: int, k: int, past: int) -> int:
    """The points of a circular convolution that make its outputs right, except for the first ``past``."""
    k = min(k, t)
    return _fast(max(t, t + k - 1 - past))


@lru_cache(maxsize=4096)
def _fast(least: int) -> int:
    """The smallest even number from ``least`` on with no prime factors but 2, 3 and 5: transforms of it are fast."""
    best = 2 ** max(1, (least - 1).bit_length())
    five = 1
    while five < best:
        three = five
        while three < best:
            even = max(2, 2 ** (-(-least // three) - 1).bit_length())
            best = min(best, three * even)
            three *= 3
        five *= 5
    return best


def _trimmed(seen: Tensor, taps: Tensor, past: int) -> tuple[Tensor, Tensor, int]:
    """``seen``, ``taps`` and ``past`` without the inputs that no tap reaches, and the taps that reach before all
    inputs."""
    unseen = max(past - taps.shape[1] + 1, 0)
    seen = seen[:, :, unseen:]
    return seen, taps[:, : seen.shape[2]], past - unseen


def _forward(seen: Tensor, taps: Tensor, past: int) -> Tensor:
    seen, taps, past = _trimmed(seen, taps, past)
    n = _points(seen.shape[2], taps.shape[1], past)
    spectrum = torch.fft.rfft(seen, n).mul_(torch.fft.rfft(taps, n))
    return torch.fft.irfft(spectrum, n)[:, :, past : seen.shape[2]]


def _backward(
    g: Tensor, seen: Tensor, taps: Tensor, past: int, again: bool, of_taps: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    whole, length = taps.shape[1], seen.shape[2]
    seen, taps, past = _trimmed(seen, taps, past)
    t, k = seen.shape[2], taps.shape[1]
    n = _points(t, k, past)
    out, grad_taps, taps_f = None, None, torch.fft.rfft(taps, n)
    g_f = torch.fft.rfft(F.pad(g, (past, 0)) if past else g, n)
    if of_taps or again:
        seen_f = torch.fft.rfft(seen, n)
    if of_taps:
        grad_taps_f = torch.einsum("bcn,bcn->cn", g_f, seen_f.conj()) if g.shape[0] > 1 else (g_f * seen_f.conj())[0]
        grad_taps = F.pad(torch.fft.irfft(grad_taps_f, n)[:, :k], (0, whole - k))
    if again:
        out = torch.fft.irfft(seen_f.mul_(taps_f), n)[:, :, past:t]
    grad_seen = torch.fft.irfft(g_f.mul_(taps_f.conj()), n)[:, :, :t]
    return out, F.pad(grad_seen, (length - t, 0)) if length > t else grad_seen, grad_taps
