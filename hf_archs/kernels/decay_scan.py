"""The recurrence of Mamba-2 and RetNet, whose state decays by one number per head and token.

Mamba-2: Dao and Gu 2024, "Transformers are SSMs", https://arxiv.org/abs/2405.21060, section 6 (the chunkwise form).
RetNet: Sun et al. 2023, "Retentive Network", https://arxiv.org/abs/2307.08621, section 2.

Letters: b batch, l length, h heads, g groups of heads that share q and k, r = h / g, n key_dim, p value_dim.
"""

import torch
from torch import Tensor

from hf_archs.kernels import decay_scan_portable as portable
from hf_archs.kernels.arguments import check_shapes, number_documents, some_boundaries
from hf_archs.kernels.backend import backend_for
from hf_archs.kernels.library import Op, form
from hf_archs.kernels.numerics import LOG2_E, cast, constant, wide


def decay_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A linear recurrence over outer products.

    ``S_t = exp(log_decay_t) S_{t-1} + scale_t v_t k_t^T``, ``y_t = S_t q_t + skip v_t``.

    States, decays and sums are in float32, or in float64 if ``v`` is float64, also under autocast. Each tensor may have
    its own dtype, which its gradient has too.

    Args:
        q: queries, which read the state, (batch, length, groups, key_dim).
        k: keys, under which values are written, (batch, length, groups, key_dim).
        v: values, (batch, length, heads, value_dim); heads is a multiple of groups, and head ``h`` has the q and k of
            group ``h // (heads // groups)``.
        log_decay: at most 0, (batch, length, heads), float32 or wider. If each head has one decay for all tokens, pass
            an expanded view, which a CPU can compute with faster.
        scale: multiplies the values that are written, (batch, length, heads), or None for 1.
        skip: weight of a token's value in its own output, added to the part from the state, (heads,), or None for 0.
        initial_state: the state to continue from, (batch, heads, value_dim, key_dim), or None for zeros.
        seq_idx: integer, (batch, length). A document begins where the value differs from that of the position before,
            with an empty state; position 0 always continues ``initial_state``.
        lengths: integer, (batch,), 0 to length: the tokens of each row. Later positions are pads, where ``log_decay``
            and ``scale`` count as 0, so that they do not change the state.

    Returns:
        ``y``, (batch, length, heads, value_dim) in the dtype of ``v``, and the final state, (batch, heads, value_dim,
        key_dim) in float32 or wider. Both can be differentiated once.

    Raises:
        ValueError: for a wrong shape (the message names the argument), and on a GPU above 8,388,480 tokens a row.
    """
    _check(q, k, v, log_decay, scale, skip, initial_state, seq_idx, lengths)
    backend = backend_for(v)
    if backend == "reference":
        return decay_scan_reference(
            q, k, v, log_decay, scale=scale, skip=skip, initial_state=initial_state, seq_idx=seq_idx, lengths=lengths
        )
    documents = number_documents(seq_idx, lengths)
    if lengths is not None:
        real = (torch.arange(v.shape[1], device=v.device) < lengths.unsqueeze(1)).unsqueeze(2)
        log_decay = torch.where(real, log_decay, 0)
        # by torch.where, the scale of a pad has the gradient 0 even if it is not finite
        scale = real.to(log_decay.dtype).expand(log_decay.shape) if scale is None else torch.where(real, scale, 0)
    if backend == "portable" and v.shape[1] == 1:
        return _step(q, k, v, log_decay, scale, skip, initial_state)
    return _decay_scan(q, k, v, log_decay, scale, skip, initial_state, documents)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
) -> None:
    if q.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"decay_scan: q must be (batch, length, groups, key_dim) and v (batch, length, heads, value_dim), "
            f"not {tuple(q.shape)} and {tuple(v.shape)}"
        )
    (b, l, h, p), (g, n) = v.shape, q.shape[2:]
    if h % g:
        raise ValueError(f"decay_scan: heads must be a multiple of groups, not {h} and {g}")
    check_shapes(
        "decay_scan",
        q=(q, (b, l, g, n)),
        k=(k, (b, l, g, n)),
        log_decay=(log_decay, (b, l, h)),
        scale=(scale, (b, l, h)),
        skip=(skip, (h,)),
        initial_state=(initial_state, (b, h, p, n)),
        seq_idx=(seq_idx, (b, l)),
        lengths=(lengths, (b,)),
    )


def decay_scan_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`decay_scan` as the papers write it, token by token: the oracle for the tests of the fast forms."""
    y_dtype, dtype = v.dtype, torch.promote_types(v.dtype, torch.float32)
    (b, l, h, p), (g, n) = v.shape, q.shape[2:]
    q, k = (t.to(dtype).repeat_interleave(h // g, dim=2) for t in (q, k))
    v, log_decay = v.to(dtype), log_decay.to(dtype)
    scale = torch.ones_like(log_decay) if scale is None else scale.to(dtype)
    state = v.new_zeros(b, h, p, n) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(l):
        real = torch.ones_like(v[:, 0, 0, 0], dtype=torch.bool) if lengths is None else t < lengths
        if seq_idx is not None and t > 0:
            begins = (seq_idx[:, t] != seq_idx[:, t - 1]) & real
            state = torch.where(begins[:, None, None, None], 0, state)
        decay = torch.where(real[:, None], log_decay[:, t], 0).exp()
        write = torch.where(real[:, None], scale[:, t], 0)[:, :, None] * v[:, t]
        state = decay[:, :, None, None] * state + write[:, :, :, None] * k[:, t, :, None, :]
        y = (state * q[:, t, :, None, :]).sum(-1)
        outputs.append(y if skip is None else y + skip.to(dtype)[:, None] * v[:, t])
    return torch.stack(outputs, dim=1).to(y_dtype), state


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token, in a few PyTorch calls."""
    (b, _, h, p), (g, n), y_dtype = v.shape, q.shape[2:], v.dtype
    v = wide(v)
    dtype = v.dtype
    write = v if scale is None else v * cast(scale, dtype).unsqueeze(3)
    q, k = cast(q, dtype).transpose(1, 2), cast(k, dtype).transpose(1, 2)  # (b, g, 1, n)
    if 1 < g < h:  # with one group or one head per group, broadcasting suffices
        q, k = q.repeat_interleave(h // g, 1), k.repeat_interleave(h // g, 1)
    # contiguous, so that the result's bits do not depend on the strides of the initial state
    before = v.new_zeros(b, h, p, n) if initial_state is None else cast(initial_state, dtype).contiguous()
    # exp2, because exp calls MKL on a CPU, which wakes every thread for it
    decay = torch.exp2(cast(log_decay, dtype) * constant(LOG2_E, v)).reshape(b, h, 1, 1)
    state = torch.addcmul(decay * before, write.permute(0, 2, 3, 1), k)
    y = (state * q).sum(3).unsqueeze(1)
    if skip is not None:
        y = torch.addcmul(y, cast(skip, dtype).unsqueeze(1), v)
    return cast(y, y_dtype), state


def _fake(q, k, v, log_decay, scale, skip, initial_state, documents, keep, backend):
    dtype = torch.promote_types(v.dtype, torch.float32)
    (b, l, h, p), n = v.shape, q.shape[3]
    # flat: a dimension of chunks would be 1 for short sequences, and torch.compile compiles again for a size of 1
    chunk = form(__name__, backend).CHUNK
    kept = (l + chunk - 1) // chunk * b * h * p * n if keep else 0
    return v.new_empty(b, l, h, p), v.new_empty(b, h, p, n, dtype=dtype), v.new_empty(kept, dtype=dtype)


_decay_scan = Op(
    __name__,
    "decay_scan(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? scale, Tensor? skip, Tensor? initial_state, "
    "Tensor? documents, bool keep) -> (Tensor, Tensor, Tensor)",
    _fake,
    learnt=("q", "k", "v", "log_decay", "scale", "skip", "initial_state"),
    unread=("initial_state",),
    float64=False,
    plain=portable.decay_scan_plain,
)


def cases(device, dtype, batch=2, length=70, groups=2, heads=4, key_dim=8, value_dim=12):
    """Arguments of `decay_scan` for tests and benchmarks: first constant decays, then all optional arguments."""
    wide = torch.promote_types(dtype, torch.float32)
    q, k = torch.randn(2, batch, length, groups, key_dim, device=device, dtype=dtype)
    v = torch.randn(batch, length, heads, value_dim, device=device, dtype=dtype)
    decays, scale = torch.rand(2, batch, length, heads, device=device, dtype=wide)
    state = torch.randn(batch, heads, value_dim, key_dim, device=device, dtype=wide)
    constant = torch.linspace(-0.5, -0.01, groups, device=device, dtype=wide).expand(batch, length, groups)
    yield {"q": q, "k": k, "v": v[:, :, :groups].contiguous(), "log_decay": constant}
    boundaries = some_boundaries(batch, length, device)
    optional = {"scale": scale, "skip": torch.randn(heads, device=device, dtype=wide), "initial_state": state}
    yield {"q": q, "k": k, "v": v, "log_decay": -decays, **optional, **boundaries}


MODEL_SIZES = {
    "batch": 1,
    "groups": 1,
    "heads": 2,
    "key_dim": 256,
    "value_dim": 512,
}  # heads as large as RetNet 6.7B's
