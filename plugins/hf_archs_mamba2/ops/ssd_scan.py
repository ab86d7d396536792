"""The scan of Mamba-2, state space duality (Dao and Gu 2024, "Transformers are SSMs: Generalized Models and Efficient
Algorithms Through Structured State Space Duality", https://arxiv.org/abs/2405.21060, section 6 and listing 1).

Letters: b batch, l length, h heads, g groups of heads that share B and C, n state, p head_dim.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_archs.kernels.arguments import some_boundaries
from hf_archs.kernels.decay_scan import decay_scan, decay_scan_reference
from hf_archs.kernels.numerics import cast


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A linear recurrence whose state decays by one number per head, and whose step, input and output depend on the
    token: ``delta = clamp(softplus(dt + dt_bias), *dt_limit)``, ``h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t^T``,
    ``y_t = h_t C_t + D x_t``.

    States, steps, decays and sums are in float32, or in float64 if ``x`` is float64, also under autocast. Each tensor
    may have its own dtype, which its gradient has too.

    Args:
        x: input, (batch, length, heads, head_dim).
        dt: step size before bias and softplus, (batch, length, heads).
        A: negative, (heads,).
        B: input map, (batch, length, groups, state); heads is a multiple of groups, and head ``h`` has the B and C of
            group ``h // (heads // groups)``.
        C: output map, (batch, length, groups, state).
        D: skip connection, (heads,), or None for no skip.
        dt_bias: (heads,), or None for 0.
        dt_limit: bounds of delta.
        initial_state: the state to continue from, (batch, heads, head_dim, state), or None for zeros.
        seq_idx: integer, (batch, length). A document begins where the value differs from that of the position before,
            with an empty state; position 0 always continues ``initial_state``.
        lengths: integer, (batch,), 0 to length: the tokens of each row. Later positions are pads, where delta counts as
            0, so that they do not change the state.

    Returns:
        ``y``, (batch, length, heads, head_dim) in the dtype of ``x``, and the final state, (batch, heads, head_dim,
        state) in float32 or wider. Both can be differentiated once.

    Raises:
        ValueError: for a wrong shape; the message names the argument of `decay_scan` (q is C, k is B, v is x, skip is
            D).
    """
    boundaries = {"initial_state": initial_state, "seq_idx": seq_idx, "lengths": lengths}
    return _ssd_scan(decay_scan, x, dt, A, B, C, D, dt_bias, dt_limit, boundaries)


def ssd_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd_scan` token by token: the oracle for the tests of the fast forms."""
    boundaries = {"initial_state": initial_state, "seq_idx": seq_idx, "lengths": lengths}
    return _ssd_scan(decay_scan_reference, x, dt, A, B, C, D, dt_bias, dt_limit, boundaries)


def _ssd_scan(
    scan: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    boundaries: dict[str, Tensor | None],
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    delta = cast(dt, dtype) if dt_bias is None else cast(dt, dtype) + cast(dt_bias, dtype)
    delta = F.softplus(delta)
    if tuple(dt_limit) != (0.0, math.inf):  # softplus is always within these
        low, high = dt_limit
        delta = delta.clamp(low, high if high < torch.finfo(delta.dtype).max else math.inf)  # some files have 1e308
    return scan(C, B, x, delta * cast(A, dtype), scale=delta, skip=D, **boundaries)


def cases(device, dtype, batch=2, length=70, heads=4, head_dim=12, groups=2, state=8):
    """Arguments of `ssd_scan` for tests and benchmarks: first the required ones, then all but dt_limit."""
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(batch, length, heads, head_dim, device=device, dtype=dtype)
    B, C = torch.randn(2, batch, length, groups, state, device=device, dtype=dtype)
    dt = torch.randn(batch, length, heads, device=device, dtype=dtype) - 2
    A = -8 * torch.rand(heads, device=device, dtype=wide)
    D, dt_bias = torch.randn(2, heads, device=device, dtype=wide)
    initial_state = torch.randn(batch, heads, head_dim, state, device=device, dtype=wide)
    plain = {"x": x, "dt": dt, "A": A, "B": B, "C": C}
    yield plain
    more = {"D": D, "dt_bias": dt_bias, "initial_state": initial_state}
    yield plain | more | some_boundaries(batch, length, device)


MODEL_SIZES = {"head_dim": 64, "state": 128}
