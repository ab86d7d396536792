"""Retention (Sun et al. 2023, "Retentive Network: A Successor to Transformer for Large Language Models",
https://arxiv.org/abs/2307.08621, section 2.1): linear attention whose state decays by one constant per head.

Letters: b batch, l length, h heads, n key_dim, p value_dim.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_archs.kernels.arguments import some_boundaries
from hf_archs.kernels.decay_scan import decay_scan, decay_scan_reference


def multi_scale_log_decay(heads: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The logarithm of the paper's decays, ``gamma_h = 1 - 2^(-5 - h)`` (section 2.3): (heads,).

    From h = 20 on, float32 rounds gamma_h to 1, so the logarithm is taken by log1p of -2^(-5 - h).
    """
    return torch.log1p(-torch.logspace(-5, -4 - heads, heads, base=2, device=device, dtype=dtype))


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrent form of retention (equation 6), computed in chunks (equation 7).

    ``S_t = exp(log_decay) S_{t-1} + v_t k_t^T``, ``y_t = scale S_t q_t``.

    States, decays and sums are in float32, or in float64 if ``v`` is float64, also under autocast. Each tensor may have
    its own dtype, which its gradient has too.

    Args:
        q: queries, (batch, length, heads, key_dim), rotated already.
        k: keys, (batch, length, heads, key_dim), rotated already.
        v: values, (batch, length, heads, value_dim).
        log_decay: at most 0, (heads,), or None for the paper's `multi_scale_log_decay`.
        scale: multiplies the output; None for ``key_dim ** -0.5``.
        initial_state: the state to continue from, (batch, heads, value_dim, key_dim), or None for zeros.
        seq_idx: integer, (batch, length). A document begins where the value differs from that of the position before,
            with an empty state; position 0 always continues ``initial_state``.
        lengths: integer, (batch,), 0 to length: the tokens of each row. Later positions are pads, which do not change
            the state; their ``y`` reads the final state.

    Returns:
        ``y``, (batch, length, heads, value_dim) in the dtype of ``v``, and the final state, (batch, heads, value_dim,
        key_dim) in float32 or wider. Both can be differentiated once.

    Raises:
        ValueError: for a wrong shape; the message names the argument.
    """
    boundaries = {"initial_state": initial_state, "seq_idx": seq_idx, "lengths": lengths}
    return _retention(decay_scan, q, k, v, log_decay, scale, boundaries)


def retention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`retention` token by token: the oracle for the tests of the fast form."""
    boundaries = {"initial_state": initial_state, "seq_idx": seq_idx, "lengths": lengths}
    return _retention(decay_scan_reference, q, k, v, log_decay, scale, boundaries)


def _retention(
    scan: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float | None,
    boundaries: dict[str, Tensor | None],
) -> tuple[Tensor, Tensor]:
    log_decay = _checked(q, v, log_decay)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale != 1.0:
        q = q * scale
    # expanded, not copied: from the stride of 0 the scan knows that the decay is constant, and is faster
    return scan(q, k, v, log_decay.expand(v.shape[:3]), **boundaries)


def _checked(q: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    if q.dim() != 4 or v.dim() != 4 or q.shape[2] != v.shape[2]:
        raise ValueError(
            f"retention: q must be (batch, length, heads, key_dim) and v (batch, length, heads, value_dim), "
            f"not {tuple(q.shape)} and {tuple(v.shape)}"
        )
    heads = v.shape[2]
    if log_decay is None:
        return multi_scale_log_decay(heads, v.device, torch.promote_types(v.dtype, torch.float32))
    if log_decay.shape != (heads,):
        raise ValueError(f"retention: log_decay must have shape {(heads,)}, not {tuple(log_decay.shape)}")
    return log_decay


def retention_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The parallel form, ``(Q K^T * D) V`` with ``D_ij = gamma^(i - j)`` (equation 5): a second oracle.

    Same arguments and results as `retention`, but memory and time grow with the square of the length.
    """
    log_decay = _checked(q, v, log_decay)
    dtype = torch.promote_types(v.dtype, torch.float32)
    b, l, h, p = v.shape
    q = q.to(dtype) * (q.shape[-1] ** -0.5 if scale is None else scale)
    k, values, log_decay = k.to(dtype), v.to(dtype), log_decay.to(dtype)
    initial = v.new_zeros(b, h, p, q.shape[3], dtype=dtype) if initial_state is None else initial_state.to(dtype)

    position = torch.arange(l, device=v.device)
    ends = torch.full((b, 1), l, device=v.device) if lengths is None else lengths[:, None]
    real = position < ends  # (b, l)
    age = torch.minimum(position + 1, ends)  # real tokens up to each position; a pad does not decay the state
    document = torch.zeros_like(age)
    if seq_idx is not None:
        document = ((seq_idx != seq_idx.roll(1, 1)) & (position > 0) & real).cumsum(1)
    seen = (position[:, None] >= position) & (document[:, :, None] == document[:, None]) & real[:, None]
    steps = (age[:, :, None] - age[:, None]).clamp(min=0)
    decay = torch.where(seen[:, None], (log_decay[:, None, None] * steps[:, None]).exp(), 0)  # (b, h, i, j)
    from_start = torch.where(document[:, None] == 0, (log_decay[:, None] * age[:, None]).exp(), 0)  # (b, h, i)

    y = torch.einsum("bihn,bjhn,bhij,bjhp->bihp", q, k, decay, values)
    y = y + torch.einsum("bihn,bhpn,bhi->bihp", q, initial, from_start)
    state = torch.einsum("bjhp,bjhn,bhj->bhpn", values, k, decay[:, :, -1])
    return y.to(v.dtype), state + from_start[:, :, -1, None, None] * initial


def cases(device, dtype, batch=2, length=70, heads=4, key_dim=8, value_dim=12):
    """Arguments of `retention` for tests and benchmarks: first the required ones, then with state and boundaries."""
    q, k = torch.randn(2, batch, length, heads, key_dim, device=device, dtype=dtype)
    v = torch.randn(batch, length, heads, value_dim, device=device, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    initial_state = torch.randn(batch, heads, value_dim, key_dim, device=device, dtype=wide)
    yield {"q": q, "k": k, "v": v}
    yield {"q": q, "k": k, "v": v, "initial_state": initial_state, **some_boundaries(batch, length, device)}


MODEL_SIZES = {"batch": 1, "heads": 2, "key_dim": 256, "value_dim": 512}  # log_decay is None: not trained
