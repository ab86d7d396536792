"""`toeplitz_conv` in PyTorch, for CPUs.

Filters of few taps are shifted multiply-adds over blocks of time that fit the processor's cache. For longer filters,
the forward and the gradient of x are a depthwise ``F.conv1d``, and the gradient of the taps is a sum of spectra, since
that of ``F.conv1d`` is eight times slower. (Toeplitz matrices and one spectrum per block were no faster forward.)

Rows and documents are laid out one after another, each after k - 1 zeros (or the initial state), so that no document
sees another.

Letters: b batch, l length, c channels, g groups of channels that share a filter, k taps; n positions of a layout.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MANY_TAPS = 17  # from here on conv1d and spectra are faster
BLOCK_ELEMENTS = 2**18  # elements of x per block: 1 MB in float32, and enough to outweigh the overhead of PyTorch calls
SPECTRUM = 512  # points of a block's spectrum
SPECTRA_ELEMENTS = 2**21  # elements of x whose spectra are in memory at once


class _Layout:
    """``rows``, (b', k - 1 + n, c): the inputs, each document after k - 1 zeros or the initial state.

    ``rows`` is the batch (b' = b), or with documents one long row (b' = 1). A layout has n outputs.
    """

    def __init__(self, x: Tensor, size: int, initial_state: Tensor | None, documents: Tensor | None):
        dtype = torch.promote_types(x.dtype, torch.float32)
        b, l, c = x.shape
        self.size = size
        # the tokens' positions in the layout, (b, l); each row's initial state is right before its first token
        self.place = None
        if documents is None:
            self.rows = torch.empty(b, size + l, c, dtype=dtype, device=x.device)
            self.rows[:, :size] = 0 if initial_state is None else initial_state.transpose(1, 2)
            self.rows[:, size:] = x
        else:
            shift = (documents.long() + 1) * size  # a gap of k - 1 before each document of the row
            ends = (shift[:, -1] + l).cumsum(0)
            starts = F.pad(ends, (1, 0))[:-1]
            self.place = shift + torch.arange(l, device=x.device) + starts.unsqueeze(1)
            self.before = self.place[:, :1] + torch.arange(-size, 0, device=x.device)  # (b, k - 1)
            self.rows = torch.zeros(1, int(ends[-1]), c, dtype=dtype, device=x.device)
            self.rows[0, self.place] = x.to(dtype)
            if initial_state is not None:
                self.rows[0, self.before] = initial_state.transpose(1, 2).to(dtype)

    def outputs(self, t: Tensor) -> Tensor:
        """The entries of ``t``, (b', n, c), that belong to tokens: (b, l, c)."""
        return t if self.place is None else t[0, self.place - self.size]

    def all_outputs(self, t: Tensor) -> Tensor:
        """The inverse of `outputs`, with zeros where there is no token: (b, l, c) to (b', n, c)."""
        t = t.to(self.rows.dtype)
        if self.place is None:
            return t
        found = t.new_zeros(1, self.rows.shape[1] - self.size, t.shape[2])
        found[0, self.place - self.size] = t
        return found

    def inputs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of ``t``, (b', k - 1 + n, c), of x, (b, l, c), and of the initial state, (b, c, k - 1)."""
        if self.place is None:
            x, before = t[:, self.size :], t[:, : self.size]
        else:
            x, before = t[0, self.place], t[0, self.before]
        return x, before.transpose(1, 2)


def _blocks(t: Tensor, elements: int) -> Iterator[tuple[int, int]]:
    step = max(1, elements // (t.shape[0] * t.shape[2]))
    for start in range(0, t.shape[1], step):
        yield start, min(start + step, t.shape[1])


def _per_channel(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """Each channel's filter with its bias in the first tap: (c, k)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    taps = taps.to(dtype).repeat_interleave(x.shape[2] // taps.shape[0], 0)
    if bias is not None:
        taps[:, 0] += bias
    return taps


def _convolve(rows: Tensor, taps: Tensor, elements: int) -> Tensor:
    """The outputs, (b', n, c), from the rows, (b', k - 1 + n, c), and the taps, (c, k)."""
    c, k = taps.shape
    if k >= MANY_TAPS:
        return F.conv1d(rows.transpose(1, 2), taps.flip(1).unsqueeze(1), groups=c).transpose(1, 2)
    y, by_tap = rows.new_empty(rows.shape[0], rows.shape[1] - k + 1, c), taps.t().contiguous()
    for start, end in _blocks(y, elements):
        block = torch.mul(rows[:, start + k - 1 : end + k - 1], by_tap[0], out=y[:, start:end])
        for back in range(1, k):
            block.addcmul_(rows[:, start + k - 1 - back : end + k - 1 - back], by_tap[back])
    return y


def _convolve_back(g: Tensor, taps: Tensor, elements: int) -> Tensor:
    """The gradient of the rows, (b', k - 1 + n, c), from that of the outputs, (b', n, c)."""
    c, k = taps.shape
    if k >= MANY_TAPS:
        padded = F.pad(g, (0, 0, k - 1, k - 1))
        return F.conv1d(padded.transpose(1, 2), taps.unsqueeze(1), groups=c).transpose(1, 2)
    grad, by_tap = g.new_zeros(g.shape[0], g.shape[1] + k - 1, c), taps.t().contiguous()
    for start, end in _blocks(g, elements):
        for back in range(k):
            grad[:, start + k - 1 - back : end + k - 1 - back].addcmul_(g[:, start:end], by_tap[back])
    return grad


def _grad_taps(g: Tensor, rows: Tensor, k: int, elements: int, spectra: int) -> Tensor:
    """``sum_t g_t rows_{t - m}``: (c, k)."""
    b, n, c = g.shape
    size = k - 1
    if k >= MANY_TAPS:
        step = SPECTRUM - size  # outputs of a block, which sees SPECTRUM inputs
        together = max(1, spectra // (b * c * step)) * step
        total = torch.zeros(c, SPECTRUM // 2 + 1, dtype=torch.promote_types(g.dtype, torch.complex64), device=g.device)
        for start in range(0, n, together):
            count = min(together, n - start)
            short = -count % step
            seen = F.pad(rows[:, start : start + count + size].transpose(1, 2), (0, short)).unfold(2, SPECTRUM, step)
            here = F.pad(g[:, start : start + count].transpose(1, 2), (0, short)).unflatten(2, (-1, step))
            spectrum = torch.fft.rfft(F.pad(here, (size, 0)))
            total += (spectrum * torch.fft.rfft(seen).conj()).sum((0, 2))
        return torch.fft.irfft(total, SPECTRUM)[:, :k]
    by_tap = g.new_zeros(k, c)
    for start, end in _blocks(g, elements):
        product = g.new_empty(b, end - start, c)
        for back in range(k):
            seen = rows[:, start + size - back : end + size - back]
            by_tap[back] += torch.mul(g[:, start:end], seen, out=product).sum((0, 1))
    return by_tap.t()


def toeplitz_conv_fwd(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    *,
    block: int = BLOCK_ELEMENTS,
) -> Tensor:
    """The output, (b, l, c), in the dtype of ``x``."""
    layout = _Layout(x, taps.shape[1] - 1, initial_state, documents)
    y = layout.outputs(_convolve(layout.rows, _per_channel(x, taps, bias), block))
    return y.to(x.dtype).contiguous()


def toeplitz_conv_bwd(
    grad_y: Tensor,
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    wanted: Sequence[bool] = (True,) * 4,
    *,
    block: int = BLOCK_ELEMENTS,
    spectra: int = SPECTRA_ELEMENTS,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, taps, bias and initial_state."""
    groups, k = taps.shape
    of_x, of_taps, of_bias, of_state = wanted
    grad_x = grad_state = grad_taps = grad_bias = None
    layout = _Layout(x, k - 1, initial_state, documents)
    g = layout.all_outputs(grad_y)
    if of_x or of_state:
        grad_x, grad_state = layout.inputs(_convolve_back(g, _per_channel(x, taps, bias), block))
    if of_taps:
        grad_channels = _grad_taps(g, layout.rows, k, block, spectra)
        grad_taps, grad_bias = grad_channels.unflatten(0, (groups, -1)).sum(1), grad_channels[:, 0]
    elif of_bias:
        grad_bias = (g * layout.rows[:, k - 1 :]).sum((0, 1))
    return grad_x, grad_taps, grad_bias, grad_state
