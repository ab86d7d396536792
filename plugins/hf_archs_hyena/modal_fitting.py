"""Fit sums of few modes to trained filters, so that a model decodes with a state of constant size.

Massaroli et al. 2023, "Laughing Hyena Distillery", https://arxiv.org/abs/2310.18780, section 3.2, fit poles and
residues by gradient descent from random poles. Here the poles start from the filter's Hankel matrices (Kung 1978; Roy
and Kailath 1989, "ESPRIT") at several time scales, and Gauss-Newton steps finish in some tens of iterations.

Sums over taps of products of modes are geometric series, ``sum_t t^k (p q)^t``, evaluated in closed form. Only the sum
of the filter times powers of the poles runs over the taps, by matrix products. So a step costs little more for 131,072
taps than for 1,024.

Letters: c channels, l taps, n modes, k candidates.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_archs_hyena.ops.modal import modal_taps

ITERATIONS = 30  # of Gauss-Newton; HyenaDNA's filters gain a hundredth from more than 10
CHUNK_ELEMENTS = 2**22  # of the largest matrices in memory at once
# Relative to columns of length 1. Without it the residues of close poles grow with opposite signs, until float32 loses
# their difference.
RIDGE = 1e-9


def fit_modal_filters(taps: Tensor, modes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Poles and residues with ``taps_t`` close to ``Re sum_n R_n p_n^t`` in the least-squares sense.

    Computed in float64, some channels at a time, on the device of ``taps``.

    Args:
        taps: the filters, (channels, length), at least 2 taps.
        modes: modes per filter.

    Returns:
        ``log_decay`` and ``phase`` (channels, modes) and ``residues`` (channels, modes, 2), as `modal_conv` takes them,
        float64 if ``taps`` is and float32 otherwise; and the relative error of these rounded parameters, ``|fit - taps|
        / |taps|`` over all taps, (channels,), float64, 0 for a filter of zeros.

    Raises:
        ValueError: for taps that are not (channels, length) or not finite, or for less than one mode.
    """
    if taps.dim() != 2 or taps.shape[1] < 2:
        raise ValueError(f"fit_modal_filters: taps must be (channels, length), 2 taps or more, not {tuple(taps.shape)}")
    if modes < 1:
        raise ValueError(f"fit_modal_filters: modes must be at least 1, not {modes}")
    if not taps.isfinite().all():
        raise ValueError("fit_modal_filters: taps must be finite")
    dtype = torch.promote_types(taps.dtype, torch.float32)
    with torch.no_grad():
        side = 3 * (modes + 1) * (len(_scales(taps.shape[1], modes)) + 1)
        together = max(1, CHUNK_ELEMENTS // max(side**2, taps.shape[1]))
        parts = [_fit(part.double(), modes, dtype) for part in taps.split(together)]
    return tuple(torch.cat(each) for each in zip(*parts))  # type: ignore[return-value]


def _fit(taps: Tensor, modes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = taps.norm(dim=1, keepdim=True)
    unit = taps / torch.where(size > 0, size, 1)
    poles = _refine(unit, _first_poles(unit, modes))
    log_decay, phase = (-poles.real).log().to(dtype), poles.imag.to(dtype)
    residues, *_ = _residues(unit, torch.complex(-log_decay.double().exp(), phase.double()))  # of the rounded poles
    weights = torch.view_as_real(residues * size).to(dtype)
    found = modal_taps(log_decay.double(), phase.double(), weights.double(), taps.shape[1])
    error = (found - taps).norm(dim=1) / torch.where(size > 0, size, 1).squeeze(1)
    return log_decay, phase, weights, error


# Poles are stored as logarithms w = -rate + i phase, complex128, with rates in the range where the sums are accurate.


def _bounded(w: Tensor, length: int) -> Tensor:
    return torch.complex(w.real.clamp(-50.0, -0.01 / length), w.imag)


def _expm1(w: Tensor) -> Tensor:
    """``exp(w) - 1``, accurate near 0."""
    a, b = w.real, w.imag
    return torch.complex(torch.expm1(a) * b.cos() - 2 * (b / 2).sin().square(), a.exp() * b.sin())


def _geometric(w: Tensor, length: int, conjugate: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_t t^k exp((w_i + w_j) t)``, t = 0 to length - 1, for k = 0, 1 and 2, or with conj(w_j): (c, i, j) each."""

    def pairs(expm1: Tensor) -> Tensor:  # exp(a + b) - 1 from exp(a) - 1 and exp(b) - 1
        other = expm1.conj() if conjugate else expm1
        a, b = expm1.unsqueeze(2), other.unsqueeze(1)
        return a + b + a * b

    ratio, end = -pairs(_expm1(w)), pairs(_expm1(w * length))
    zeroth = -end / ratio
    last = end + 1
    first = (zeroth - 1 - (length - 1) * last) / ratio
    second = (2 * first - (zeroth - 1) - (length - 1) ** 2 * last) / ratio
    return zeroth, first, second


def _moments(taps: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_t t^k taps_t exp(w t)`` for k = 0 and 1: (c, k) each. t is split in two, for few exponentials."""
    l = taps.shape[1]
    stride = 2 ** math.ceil(math.log2(l) / 2)
    blocks = F.pad(taps, (0, -l % stride)).unflatten(1, (-1, stride))  # (c, q, r)
    t = torch.arange(stride, device=taps.device)
    fine = torch.view_as_real((w.unsqueeze(2) * t).exp())  # (c, k, r, 2)
    start = stride * torch.arange(blocks.shape[1], device=taps.device)
    coarse = (w.unsqueeze(2) * start).exp()  # (c, k, q)
    both = torch.stack([blocks, blocks * t], dim=1).flatten(1, 2)  # (c, 2 q, r)
    sums = torch.matmul(both, fine.permute(0, 2, 1, 3).flatten(2)).unflatten(2, (-1, 2))
    inner, inner_t = torch.view_as_complex(sums).unflatten(1, (2, -1)).transpose(2, 3).unbind(1)  # (c, k, q)
    return (inner * coarse).sum(2), ((inner_t + start * inner) * coarse).sum(2)


def _real(straight: Tensor, crossed: Tensor) -> Tensor:
    """The inner products of real columns, (c, 2 i, 2 j), from those of complex columns, (c, i, j).

    A complex column a equals two real ones, Re a and -Im a, which multiply Re and Im of its coefficient; ``straight``
    is ``sum a_i conj(a_j)`` and ``crossed`` is ``sum a_i a_j``.
    """
    top = torch.stack([crossed.real + straight.real, straight.imag - crossed.imag], dim=3)
    bottom = torch.stack([-crossed.imag - straight.imag, straight.real - crossed.real], dim=3)
    return torch.stack([top, bottom], dim=2).flatten(3, 4).flatten(1, 2) / 2


def _split(a: Tensor) -> Tensor:
    """The products ``sum h a_i``, complex, (c, i), with the real columns of `_real`, (c, 2 i)."""
    return torch.stack([a.real, -a.imag], dim=2).flatten(1)


def _gram(w: Tensor, length: int) -> Tensor:
    """The inner products of the real columns of all modes ``exp(w t)``, (c, 2 k, 2 k)."""
    return _real(_geometric(w, length, True)[0], _geometric(w, length, False)[0])


# -- first poles -------------------------------------------------------------------------------------------------------


def _scales(length: int, modes: int) -> list[int]:
    """The number of taps averaged into one point at each time scale; the widest scale covers the whole filter."""
    points = 2 * _rows(modes)
    scales = [1]
    while scales[-1] * points < length:
        scales.append(min(4 * scales[-1], -(-length // points)))
    return scales


def _rows(modes: int) -> int:
    """Rows of a Hankel matrix."""
    return 3 * modes + 16


def _first_poles(taps: Tensor, modes: int) -> Tensor:
    """Logarithms of initial poles, (c, n): the best set among one per time scale and one selected from all scales."""
    c, l = taps.shape
    place = torch.arange(modes, dtype=torch.float64, device=taps.device) / modes
    # candidates for any filter: slow and real to fast and rotating
    candidates = [torch.complex(-(l ** (place - 1.0)) * 2, math.pi * place.square()).expand(c, modes)]
    starts = []
    for scale in _scales(l, modes):
        count = 2 * _rows(modes)
        reach = taps[:, : count * scale]
        averaged = F.pad(reach, (0, count * scale - reach.shape[1])).unflatten(1, (count, scale)).mean(2)
        w = _bounded(_shift_poles(averaged, modes).log() / scale, l)
        candidates.append(w)
        # the strongest poles of one scale: exact for a sum of that many modes
        weights, *_ = _residues(taps, w)
        strength = weights.abs().square() / -torch.expm1(2 * w.real)
        starts.append(w.gather(1, strength.topk(modes, dim=1).indices))
    starts.append(_select(taps, _bounded(torch.cat(candidates, dim=1), l), modes))
    every = torch.stack(starts)  # (starts, c, n)
    best = torch.stack([_residues(taps, w)[1] for w in starts]).nan_to_num(math.inf).argmin(0)
    return every[best, torch.arange(c, device=taps.device)]


def _shift_poles(signal: Tensor, modes: int) -> Tensor:
    """ESPRIT: the poles of a signal's best state of size 2 n, in the upper half plane, (c, 3 n / 2 + 1)."""
    rows = signal.shape[1] // 2
    hankel = signal.unfold(1, rows, 1)[:, :rows]
    values, vectors = torch.linalg.eigh(hankel)  # symmetric, so its singular vectors are its eigenvectors
    order = values.abs().argsort(dim=1, descending=True)[:, : 2 * modes]
    states = vectors.gather(2, order.unsqueeze(1).expand(-1, rows, -1))
    before, after = states[:, :-1], states[:, 1:]
    gram = before.mT @ before
    gram.diagonal(dim1=1, dim2=2).add_(1e-12)
    poles = torch.linalg.eigvals(torch.linalg.solve(gram, before.mT @ after))
    # one of each conjugate pair, the slowest first: a finer time scale finds the faster ones
    upper = poles.imag >= 0
    rank = torch.where(upper, poles.abs(), -1.0).argsort(dim=1, descending=True)[:, : modes + modes // 2 + 1]
    poles = torch.where(upper & (poles.abs() > 1e-6), poles, 1e-6)
    return poles.gather(1, rank)


def _select(taps: Tensor, w: Tensor, modes: int) -> Tensor:
    """The candidates, (c, n), that one after the other reduce the remaining error most."""
    c, k = w.shape
    gram = _gram(w, taps.shape[1]).unflatten(2, (k, 2)).unflatten(1, (k, 2))  # (c, k, 2, k, 2)
    rest = _split(_moments(taps, w)[0]).unflatten(1, (k, 2))
    every, row = torch.arange(k, device=w.device), torch.arange(c, device=w.device)
    eye = torch.eye(2, dtype=torch.float64, device=w.device)
    floor = 1e-9 * gram[:, every, :, every, :].diagonal(dim1=2, dim2=3).sum(2).t()  # (c, k)
    chosen: list[Tensor] = []
    taken = torch.zeros(c, k, dtype=torch.bool, device=w.device)
    for _ in range(modes):
        blocks = gram[:, every, :, every, :].transpose(0, 1) + floor[..., None, None] * eye  # (c, k, 2, 2)
        gain = (rest * torch.linalg.solve(blocks, rest.unsqueeze(3)).squeeze(3)).sum(2)
        best = gain.masked_fill(taken, -math.inf).argmax(1)
        taken[row, best] = True
        chosen.append(w[row, best])
        columns = gram[row, :, :, best, :].flatten(1, 2)  # (c, 2 k, 2)
        scaled = torch.linalg.solve(blocks[row, best], columns.mT)  # (c, 2, 2 k)
        rest = rest - (scaled.mT @ rest[row, best].unsqueeze(2)).view(c, k, 2)
        gram.view(c, 2 * k, 2 * k).baddbmm_(columns, scaled, alpha=-1)
    return torch.stack(chosen, dim=1)


# -- refinement of the poles -------------------------------------------------------------------------------------------


def _solve(matrix: Tensor, right: Tensor, damping: Tensor | float) -> Tensor:
    """Solve ``matrix + damping``, with columns scaled to length 1, since their lengths differ by orders of magnitude.

    Both columns of a mode have one scale: for a nearly real pole, one of them is only rounding error.
    """
    size = matrix.diagonal(dim1=1, dim2=2).unflatten(1, (-1, 2)).sum(2)
    scale = size.clamp_min(1e-300).rsqrt().repeat_interleave(2, 1)
    matrix = matrix * scale.unsqueeze(1) * scale.unsqueeze(2)
    matrix.diagonal(dim1=1, dim2=2).add_(damping)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    step = torch.cholesky_solve((right * scale).unsqueeze(2), factor).squeeze(2) * scale
    return torch.where((failed == 0).unsqueeze(1) & step.isfinite(), step, 0)


def _residues(taps: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best residues of given poles, (c, n), their squared error with the ridge's part, (c,), and the taps' moments,
    (c, 2 n).
    """
    moments = torch.cat(_moments(taps, w), dim=1)
    right = _split(moments[:, : w.shape[1]])
    found = _solve(_gram(w, taps.shape[1]), right, RIDGE)
    error = taps.square().sum(1) - (found * right).sum(1)
    return torch.view_as_complex(found.unflatten(1, (-1, 2))), error, moments


def _refine(taps: Tensor, w: Tensor) -> Tensor:
    """Gauss-Newton steps in all parameters at once, damped as by Levenberg and Marquardt, each channel on its own.

    A step moves the poles, with their best residues, of the channels whose error it reduces.
    """
    l, n = taps.shape[1], w.shape[1]
    residues, error, moments = _residues(taps, w)
    damping = torch.full_like(error, 1e-2)
    for _ in range(ITERATIONS):
        # complex columns: exp(w t) for the residues, R t exp(w t) for the poles
        weights = torch.cat([torch.ones_like(residues), residues], dim=1)
        sums = (_geometric(w, l, conjugate) for conjugate in (True, False))
        straight, crossed = (torch.cat([torch.cat(t[:2], 2), torch.cat(t[1:], 2)], 1) for t in sums)
        straight = straight * weights.unsqueeze(2) * weights.conj().unsqueeze(1)
        matrix = _real(straight, crossed * weights.unsqueeze(2) * weights.unsqueeze(1))
        right = _split(moments * weights)
        now = F.pad(torch.view_as_real(residues).flatten(1), (0, 2 * n))
        right = right - (matrix @ now.unsqueeze(2)).squeeze(2)
        # parameters: log(rate), where d Re w = -rate d log(rate), and the phase in units of -rate, the mode's width
        chain = torch.ones_like(right).unflatten(1, (-1, 2))
        chain[:, n:] = w.real.unsqueeze(2)
        chain = chain.flatten(1)
        step = _solve(matrix * chain.unsqueeze(1) * chain.unsqueeze(2), right * chain, damping.unsqueeze(1))
        change = step.unflatten(1, (-1, 2))[:, n:].clamp(-2, 2)  # the linear model holds for small changes
        tried = _bounded(torch.complex(w.real * change[..., 0].exp(), w.imag + w.real * change[..., 1]), l)
        tried_residues, tried_error, tried_moments = _residues(taps, tried)
        better = tried_error < error
        error = torch.where(better, tried_error, error)
        w = torch.where(better.unsqueeze(1), tried, w)
        residues = torch.where(better.unsqueeze(1), tried_residues, residues)
        moments = torch.where(better.unsqueeze(1), tried_moments, moments)
        damping = torch.where(better, damping / 5, damping * 4).clamp(1e-10, 1e6)
    return w
