"""The decaying recurrence in plain PyTorch: chunks of tokens, matrix products inside and between them.

Letters: b batch, l length, h heads, g groups of heads that share q and k, r = h / g, n key_dim, p value_dim,
c chunks, m tokens of one chunk (i reads, j writes).

Within a chunk, token i reads the value of token j <= i with the weight ``(q_i . k_j) exp(a_{j+1} + ... + a_i)``, where
a is the log decay, and it reads earlier chunks through the chunk's start state; both are matrix products. States are
laid out (c, b, g, n, r, p), so that heads that share q and k share one product with the state. Only the chunks' start
states are kept for the backward. A sequence is processed in spans of a few chunks, whose temporaries fit the
processor's cache.

Decays are powers of two (``exp2`` is twice as fast as ``exp`` on a CPU) of differences of sums over the chunk. The sums
are in float64, since in float32 a strong decay early in a chunk would cost the digits of a weak one later. Differences
are positive only above the diagonal, where they are clamped and not used, so nothing overflows.

If a head has one decay for all tokens, as in RetNet, the factors of all chunks are equal: `_Constant` computes them
once. Its backward has no gradient of the decays.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_archs.kernels.exporting import in_chunks, out_of_chunks, scan
from hf_archs.kernels.numerics import LOG2_E

CHUNK = 64  # tokens between two kept states
LEAST = -1100.0  # of a log2 decay: 2 to it is 0 in every dtype, and differences of infinities would be no numbers
_SPAN = 2**17  # entries of the decay masks of a span
_CONSTANT_SPAN = 2**17  # entries of a span's largest tensor, with constant decays


def _spans(length: int, size: int, entries: int) -> list[tuple[int, int, int]]:
    """Cut the length into spans (start, chunks, tokens of a chunk). The remainder of the length is a shorter chunk.

    Args:
        size: entries of a chunk's largest tensor.
        entries: the most entries of this tensor in a span.
    """
    full = length // CHUNK
    together = max(1, entries // size)
    spans = [(c * CHUNK, min(together, full - c), CHUNK) for c in range(0, full, together)]
    return spans + [(full * CHUNK, 1, length % CHUNK)] * (length % CHUNK > 0)


class _Span:
    """The chunks of a span: views of their inputs, their decays, and the values that forward and backward both need."""

    def __init__(self, span, q, k, v, log_decay, scale, documents):
        start, c, m = span
        self.dtype = torch.promote_types(v.dtype, torch.float32)
        self.groups, self.r = q.shape[2], v.shape[2] // q.shape[2]
        self.at = slice(start, start + c * m)
        self.chunks, self.tokens = c, m
        self.q, self.k = (self.split(t).to(self.dtype).contiguous() for t in (q, k))  # (c, b, g, m, n)
        self.v = self.split_heads(v)  # (c, b, g, r, m, p), a view
        self.scale = None if scale is None else self.split_heads(scale)  # (c, b, g, r, m)
        # (c, b, g, r, m, p), contiguous
        self.write = torch.empty(self.v.shape, dtype=self.dtype, device=v.device)
        if self.scale is None:
            self.write.copy_(self.v)
        else:
            torch.mul(self.v, self.scale.unsqueeze(5).to(self.dtype), out=self.write)

        self.wide = self.dtype if v.device.type == "mps" else torch.float64
        summed = (self.split_heads(log_decay).to(self.wide) * LOG2_E).clamp_min_(LEAST).cumsum(4)
        last = summed[..., -1:]
        self.to_end = torch.exp2((last - summed).to(self.dtype))  # (c, b, g, r, m)
        self.from_start = torch.exp2(summed.to(self.dtype))  # (c, b, g, r, m)
        self.over = self.from_start[..., -1]  # (c, b, g, r)
        self.decay = torch.empty(*summed.shape, m, dtype=self.dtype, device=v.device)  # (c, b, g, r, i, j)
        torch.sub(summed.unsqueeze(5), summed.unsqueeze(4), out=self.decay)
        self.decay.clamp_max_(0).exp2_()  # 1 above the diagonal, where `scores` is 0
        seen = torch.ones(m, m, dtype=torch.bool, device=v.device).tril_()  # (i, j)
        if documents is not None:
            here = self.split(documents)  # (c, b, m)
            first = documents[:, max(start - 1, 0)]  # 0 at the first span, as the initial state
            before = torch.cat([first[None, :, None], here[:-1, :, -1:]])
            end = here[..., -1:]
            seen = (seen & (here.unsqueeze(3) == here.unsqueeze(2)))[:, :, None]
            self.to_end = self.to_end * (here == end)[:, :, None, None]
            self.from_start = self.from_start * (here == before)[:, :, None, None]
            self.over = self.over * (before == end)[:, :, None]
        self.unseen = ~seen  # broadcasts to (c, b, g, i, j)
        self.scores = torch.matmul(self.q, self.k.transpose(3, 4)).masked_fill_(self.unseen, 0)  # (c, b, g, i, j)

    def split(self, t: Tensor) -> Tensor:
        """A view of the span of a (b, l, ...) tensor, chunks first: (c, b, [g,] m, ...)."""
        t = t[:, self.at].unflatten(1, (self.chunks, self.tokens)).transpose(0, 1)
        return t.transpose(2, 3) if t.dim() == 5 else t

    def split_heads(self, t: Tensor) -> Tensor:
        """A view of the span of a (b, l, h, ...) tensor: (c, b, g, r, m, ...)."""
        t = t[:, self.at].unflatten(1, (self.chunks, self.tokens)).transpose(0, 1)  # (c, b, m, h, ...)
        return t.transpose(2, 3).unflatten(2, (self.groups, self.r))

    def written(self) -> Tensor:
        """The contribution of each chunk to its end state: (c, b, g, n, r, p)."""
        self.write_to_end = torch.empty_like(self.rows_first(self.write), memory_format=torch.contiguous_format)
        torch.mul(self.rows_first(self.write), self.rows_first(self.to_end).unsqueeze(5), out=self.write_to_end)
        return torch.matmul(self.k.transpose(3, 4), self.write_to_end.flatten(4)).unflatten(4, (self.r, -1))

    @staticmethod
    def rows_first(t: Tensor) -> Tensor:
        """(c, b, g, r, m, ...) seen as (c, b, g, m, r, ...), or the other way round."""
        return t.transpose(3, 4)


def decay_scan_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the chunks' start states, (c, b, g, n, r * p) flattened, or nothing unless
    ``keep_states``."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    (b, l, h, p), (g, n) = v.shape, q.shape[2:]
    if _is_constant(q, v, log_decay, scale, skip, documents):
        return _constant_fwd(q, k, v, log_decay, initial_state, keep_states)
    r = h // g
    skip = None if skip is None else skip.to(dtype).view(g, 1, r, 1)
    y = v.new_empty(b, l, h, p)
    state = v.new_zeros(b, g, n, r, p, dtype=dtype)
    if initial_state is not None:
        state.copy_(initial_state.unflatten(1, (g, r)).permute(0, 1, 4, 2, 3))
    kept = v.new_empty(-(-l // CHUNK), b, g, n, r * p, dtype=dtype) if keep_states else None
    for span in _spans(l, b * h * CHUNK * CHUNK, _SPAN):
        s = _Span(span, q, k, v, log_decay, scale, documents)
        first = span[0] // CHUNK
        if kept is None:
            starts = v.new_empty(s.chunks, b, g, n, r * p, dtype=dtype)
        else:
            starts = kept[first : first + s.chunks]
        for start, written, over in zip(starts, s.written(), s.over):
            start.copy_(state.flatten(3))
            torch.addcmul(written, over[:, :, None, :, None], state, out=state)
        inside = torch.matmul(s.decay.mul_(s.scores.unsqueeze(3)), s.write)  # (c, b, g, r, m, p)
        before = torch.matmul(s.q, starts).unflatten(4, (r, p))  # (c, b, g, m, r, p)
        total = before.mul_(s.rows_first(s.from_start).unsqueeze(5)).add_(s.rows_first(inside))
        if skip is not None:
            total.addcmul_(skip, s.rows_first(s.v.to(dtype)))
        s.split_heads(y).copy_(s.rows_first(total))
    return (
        y,
        state.permute(0, 1, 3, 4, 2).reshape(b, h, p, n).contiguous(),  # a view if h = g
        v.new_empty(0, dtype=dtype) if kept is None else kept.flatten(),
    )


def decay_scan_bwd(
    grad_y: Tensor | None,
    grad_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    documents: Tensor | None,
    kept: Tensor,
    wanted: Sequence[bool] = (True,) * 7,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """The gradients of q, k, v, log_decay, scale, skip and the initial state.

    The gradients of log_decay, scale and skip may be None if they are not ``wanted``; the values of those of q, k and v
    are then undefined.
    """
    of_q, of_k, of_v, of_decay, of_scale, of_skip, _ = wanted
    factors = of_decay or of_scale
    dtype = torch.promote_types(v.dtype, torch.float32)
    (b, l, h, p), (g, n) = v.shape, q.shape[2:]
    if not factors and _is_constant(q, v, log_decay, scale, skip, documents):
        return _constant_bwd(grad_y, grad_final_state, q, k, v, log_decay, kept)
    r = h // g
    kept = kept.view(-1, b, g, n, r * p)
    grad_y = torch.zeros_like(v) if grad_y is None else grad_y
    grad_q, grad_k, grad_v = (t.new_empty(t.shape) for t in (q, k, v))
    grad_decay = v.new_empty(b, l, h, dtype=dtype) if factors else None
    grad_scale = v.new_empty(b, l, h, dtype=dtype) if of_scale else None
    by_head = None if skip is None else skip.to(dtype).view(g, r, 1, 1)
    grad_skip = v.new_zeros(h, dtype=dtype) if of_skip else None
    grad_state = v.new_zeros(b, g, n, r, p, dtype=dtype)  # of the state after the current chunk
    if grad_final_state is not None:
        grad_state.copy_(grad_final_state.unflatten(1, (g, r)).permute(0, 1, 4, 2, 3))
    for span in reversed(_spans(l, b * h * CHUNK * CHUNK, _SPAN)):
        s = _Span(span, q, k, v, log_decay, scale, documents)
        first = span[0] // CHUNK
        starts = kept[first : first + s.chunks]  # (c, b, g, n, r * p)
        s.written()
        grad_out = torch.empty_like(s.write).copy_(s.split_heads(grad_y))  # (c, b, g, r, m, p)
        grad_before = torch.empty_like(s.write_to_end)  # (c, b, g, m, r, p)
        torch.mul(s.rows_first(grad_out), s.rows_first(s.from_start).unsqueeze(5), out=grad_before)

        # between chunks
        read = torch.matmul(s.q.transpose(3, 4), grad_before.flatten(4)).unflatten(4, (r, p))
        ends = torch.empty_like(read)  # the gradient of each chunk's end state, (c, b, g, n, r, p)
        for end, reads, over in zip(reversed(ends.unbind()), reversed(read.unbind()), reversed(s.over.unbind())):
            end.copy_(grad_state)
            torch.addcmul(reads, over[:, :, None, :, None], grad_state, out=grad_state)
        to_end = torch.matmul(s.k, ends.flatten(4)).unflatten(4, (r, p))  # (c, b, g, m, r, p)
        if grad_decay is not None:
            across = (ends * starts.view_as(ends)).sum((3, 5)) * s.over  # (c, b, g, r)
            reads_before = (torch.matmul(s.q, starts).unflatten(4, (r, p)) * grad_before).sum(5)  # (c, b, g, m, r)
            writes_after = (to_end * s.write_to_end).sum(5)

        # inside chunks
        grad_weight = torch.matmul(grad_out, s.write.transpose(4, 5))  # (c, b, g, r, i, j)
        weight = s.decay * s.scores.unsqueeze(3)
        if of_v or of_scale:
            grad_write = torch.matmul(weight.transpose(4, 5), grad_out)  # (c, b, g, r, m, p)
            grad_write += s.rows_first(to_end.mul_(s.rows_first(s.to_end).unsqueeze(5)))
        if of_q or of_k:
            grad_scores = s.decay.mul_(grad_weight).sum(3).masked_fill_(s.unseen, 0)  # (c, b, g, i, j)
        if of_q:
            grad_of_q = torch.matmul(grad_before.flatten(4), starts.transpose(3, 4))
            s.split(grad_q).copy_(grad_of_q.add_(torch.matmul(grad_scores, s.k)))
        if of_k:
            grad_of_k = torch.matmul(s.write_to_end.flatten(4), ends.flatten(4).transpose(3, 4))
            s.split(grad_k).copy_(grad_of_k.add_(torch.matmul(grad_scores.transpose(3, 4), s.q)))

        if grad_decay is not None:
            # The log decay of token t is a term in the decay of each pair j < t <= i. Its gradient is the sum over
            # these pairs. Where a difference of sums is taken, the sums are in float64.
            weight.mul_(grad_weight).diagonal(dim1=4, dim2=5).zero_()  # d loss / d log decay of each pair
            later = (weight.sum(5, dtype=s.wide) - weight.sum(4, dtype=s.wide)).add_(s.rows_first(reads_before))
            earlier = s.rows_first(writes_after).to(s.wide)
            grad_log = later.flip(4).cumsum(4).flip(4) + (earlier.cumsum(4) - earlier) + across.unsqueeze(4)
            s.split_heads(grad_decay).copy_(grad_log)

        if grad_scale is not None:
            s.split_heads(grad_scale).copy_((grad_write * s.v).sum(5))
        if of_v:
            if s.scale is not None:
                grad_write.mul_(s.scale.unsqueeze(5).to(dtype))
            if by_head is not None:
                grad_write.addcmul_(by_head, grad_out)
            s.split_heads(grad_v).copy_(grad_write)
        if grad_skip is not None:
            grad_skip += (grad_out * s.v).sum(5).sum((0, 1, 4), dtype=s.wide).flatten()
    grad_state = grad_state.permute(0, 1, 3, 4, 2).reshape(b, h, p, n)
    return grad_q, grad_k, grad_v, grad_decay, grad_scale, grad_skip, grad_state


def _is_constant(
    q: Tensor, v: Tensor, log_decay: Tensor, scale: Tensor | None, skip: Tensor | None, documents: Tensor | None
) -> bool:
    """Whether log_decay is an expanded view, so that each head has one decay, and q, k and v are the only other inputs
    (besides the initial state), without groups."""
    if scale is not None or skip is not None or documents is not None or q.shape[2] != v.shape[2]:
        return False
    return all(stride == 0 or size == 1 for stride, size in zip(log_decay.stride()[:2], log_decay.shape))


class _Constant:
    """The decays in every chunk of m tokens, and views and copies of tensors by chunks.

    Attributes:
        between: the decay from token j to token i, 0 above the diagonal, (h, m, m).
        from_start, to_end: the decays from the chunk's start to each token, and from there to its end, (h, m, 1).
        over: the decay over the whole chunk, (h, 1, 1).
    """

    def __init__(self, log_decay: Tensor, dtype: torch.dtype, tokens: int):
        wide = dtype if log_decay.device.type == "mps" else torch.float64
        log = (log_decay[0, 0].to(wide)[:, None, None] * LOG2_E).clamp_min_(LEAST)
        at = torch.arange(tokens, device=log.device)[:, None]
        self.dtype, self.tokens = dtype, tokens
        self.between = torch.exp2(log * (at - at.T).clamp_(min=0)).tril_().to(dtype)
        self.from_start = torch.exp2(log * (at + 1)).to(dtype)
        self.to_end = torch.exp2(log * (tokens - 1 - at)).to(dtype)
        self.over = torch.exp2(log * tokens).to(dtype)

    def view(self, t: Tensor, start: int, chunks: int) -> Tensor:
        """A view of a few chunks of a (b, l, h, ...) tensor: (c, b, h, m, ...)."""
        at = slice(start, start + chunks * self.tokens)
        return t[:, at].unflatten(1, (chunks, self.tokens)).transpose(0, 1).transpose(2, 3)

    def copy(self, t: Tensor, start: int, chunks: int) -> Tensor:
        view = self.view(t, start, chunks)
        return torch.empty(view.shape, dtype=self.dtype, device=t.device).copy_(view)


def _constants(log_decay: Tensor, dtype: torch.dtype, length: int) -> dict[int, _Constant]:
    """The factors by the number of tokens in a chunk: of full chunks, and of a shorter last one."""
    sizes = {CHUNK} if length >= CHUNK else set()
    return {m: _Constant(log_decay, dtype, m) for m in sizes | ({length % CHUNK} - {0})}


def _bmm(a: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
    """``a @ b`` over (c, b, h), added in place to ``onto`` if given."""
    if onto is None:
        return torch.bmm(a.flatten(0, 2), b.flatten(0, 2)).unflatten(0, a.shape[:3])
    onto.view(-1, *onto.shape[3:]).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))
    return onto


def _constant_fwd(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`decay_scan_fwd` where `_is_constant`."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    (b, l, h, p), n = v.shape, q.shape[3]
    y = v.new_empty(b, l, h, p)
    state = v.new_zeros(b, h, n, p, dtype=dtype)
    if initial_state is not None:
        state.copy_(initial_state.transpose(2, 3))
    kept = v.new_empty(-(-l // CHUNK) if keep_states else 0, b, h, n, p, dtype=dtype)
    constants = _constants(log_decay, dtype, l)
    for start, c, m in _spans(l, b * h * CHUNK * max(CHUNK, n, p), _CONSTANT_SPAN):
        x = constants[m]
        reads, keys, values = (x.copy(t, start, c) for t in (q, k, v))
        out = _bmm(_bmm(reads, keys.transpose(3, 4)).mul_(x.between), values)
        written = _bmm(keys.mul_(x.to_end).transpose(3, 4), values)  # (c, b, h, n, p)
        starts = kept[start // CHUNK :][:c] if keep_states else torch.empty_like(written)
        for before, new in zip(starts, written):
            before.copy_(state)
            torch.addcmul(new, x.over, state, out=state)
        _bmm(reads.mul_(x.from_start), starts, onto=out)
        x.view(y, start, c).copy_(out)
    return y, state.transpose(2, 3).contiguous(), kept.flatten()


def _constant_bwd(
    grad_y: Tensor | None,
    grad_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, None, None, None, Tensor]:
    """`decay_scan_bwd` where `_is_constant`, without the gradient of the decays."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    (b, l, h, p), n = v.shape, q.shape[3]
    kept = kept.view(-1, b, h, n, p)
    grad_y = torch.zeros_like(v) if grad_y is None else grad_y
    grad_q, grad_k, grad_v = (t.new_empty(t.shape) for t in (q, k, v))
    grad_state = v.new_zeros(b, h, n, p, dtype=dtype)  # of the state after the current chunk
    if grad_final_state is not None:
        grad_state.copy_(grad_final_state.transpose(2, 3))
    constants = _constants(log_decay, dtype, l)
    for start, c, m in reversed(_spans(l, b * h * CHUNK * max(CHUNK, n, p), _CONSTANT_SPAN)):
        x = constants[m]
        reads, keys, values, grad_out = (x.copy(t, start, c) for t in (q, k, v, grad_y))
        weight = _bmm(reads, keys.transpose(3, 4)).mul_(x.between)
        of_values = _bmm(weight.transpose(3, 4), grad_out)
        of_scores = _bmm(grad_out, values.transpose(3, 4)).mul_(x.between)
        of_reads, of_keys = _bmm(of_scores, keys), _bmm(of_scores.transpose(3, 4), reads)

        read = _bmm(reads.mul_(x.from_start).transpose(3, 4), grad_out)  # (c, b, h, n, p)
        ends = torch.empty_like(read)  # the gradient of each chunk's end state
        for end, new in zip(reversed(ends.unbind()), reversed(read.unbind())):
            end.copy_(grad_state)
            torch.addcmul(new, x.over, grad_state, out=grad_state)
        starts = kept[start // CHUNK :][:c]
        of_reads.addcmul_(_bmm(grad_out, starts.transpose(3, 4)), x.from_start)
        of_keys.addcmul_(_bmm(values, ends.transpose(3, 4)), x.to_end)
        _bmm(keys.mul_(x.to_end), ends, onto=of_values)
        for gradient, part in ((grad_q, of_reads), (grad_k, of_keys), (grad_v, of_values)):
            x.view(gradient, start, c).copy_(part)
    return grad_q, grad_k, grad_v, None, None, None, grad_state.transpose(2, 3)


def decay_scan_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`decay_scan` in ordinary operators and a loop of the graph over chunks, for exporters, which support no others.

    Within a chunk, all pairs of tokens are computed at once, as in attention (Dao and Gu, section 5).
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    (b, l, h, p), (g, n) = v.shape, q.shape[2:]
    r = h // g
    write = v.to(dtype) if scale is None else v * scale.to(dtype).unsqueeze(3)
    # the zeros that fill the last chunk write nothing and decay nothing
    reads, keys = (in_chunks(t.to(dtype), CHUNK).transpose(2, 3) for t in (q, k))  # (b, c, g, m, n)
    write = in_chunks(write, CHUNK).transpose(2, 3).unflatten(2, (g, r))  # (b, c, g, r, m, p)
    logs = in_chunks(log_decay.to(dtype), CHUNK).transpose(2, 3).unflatten(2, (g, r))  # (b, c, g, r, m)

    lower = seen = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=v.device).tril()  # (i, j)
    sums = torch.where(lower.tril(-1), logs.unsqueeze(5), 0).cumsum(4)  # sums from j + 1 to i, not differences of sums
    from_start = logs.cumsum(4).exp()  # (b, c, g, r, i)
    if documents is not None:
        here = in_chunks(documents + 1, CHUNK)  # (b, c, m)
        here = torch.where(here == 0, documents[:, -1:, None] + 1, here)  # no document begins in the fill
        first = torch.arange(here.shape[1], device=here.device).unsqueeze(1) == 0
        before = torch.where(first, 1, here[:, :, -1:].roll(1, 1))
        seen = lower & (here.unsqueeze(3) == here.unsqueeze(2))[:, :, None, None]
        from_start = from_start * (here == before)[:, :, None, None]
    between = torch.where(seen, sums, -torch.inf).exp()  # (b, c, g, r, i, j)
    written = torch.matmul((write * between[..., -1, :].unsqueeze(5)).mT, keys.unsqueeze(3))  # (b, c, g, r, p, n)

    def step(state: Tensor, chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        over, written = chunk
        return over * state + written, state

    state = write.new_zeros(b, h, p, n) if initial_state is None else initial_state.to(dtype)
    over = from_start[..., -1, None, None]
    state, starts = scan(step, state.unflatten(1, (g, r)), (over.transpose(0, 1), written.transpose(0, 1)))
    y = torch.matmul(between * torch.matmul(reads, keys.mT).unsqueeze(3), write)  # (b, c, g, r, m, p)
    y = y + from_start.unsqueeze(5) * torch.matmul(reads.unsqueeze(3), starts.transpose(0, 1).mT)
    y = out_of_chunks(y.flatten(2, 3).transpose(2, 3), l)
    if skip is not None:
        y = y + skip.to(dtype).unsqueeze(1) * v
    return y.to(v.dtype), state.flatten(1, 2)
