"""`modal_conv` in PyTorch: chunks of tokens, whose outputs are matrix products of their inputs and start states.

Within a chunk a channel's outputs are a Toeplitz matrix of its first taps times the chunk's inputs. Earlier inputs
enter through the state, which is passed from chunk to chunk. Each document begins at a new chunk, so that a chunk holds
only one document and no product needs a mask.

The backward computes the states again: they are half as large as x, and cheap.

Letters: b batch, l length, c channels, n modes, m tokens of a chunk (i reads, j writes), q chunks.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32

PassStates = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], None]
PassGradients = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class _Chunks:
    """The places of tokens in chunks, and the inputs by chunks: ``x`` (c, q, b, m), zero where there is no token."""

    def __init__(self, x: Tensor, chunk: int, documents: Tensor | None, lengths: Tensor | None):
        self.chunk = chunk
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        b, self.length = x.shape[:2]
        device = x.device
        self.rows = torch.arange(b, device=device)
        position = torch.arange(self.length, device=device).expand(b, -1)
        self.place = None
        self.count = -(-self.length // self.chunk)
        self.keep = None  # 0 where a chunk begins with an empty state, (q, b); None: nowhere
        last = position[:, -1] if lengths is None else (lengths.long() - 1).clamp(min=0)
        place = last.unsqueeze(1)
        if documents is not None:
            begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
            in_document = position - torch.where(begins, position, 0).cummax(1).values
            opens = in_document % self.chunk == 0
            self.place = (opens.cumsum(1) - 1) * self.chunk + in_document % self.chunk  # (b, l)
            self.count = int(self.place[:, -1].max()) // self.chunk + 1
            self.keep = torch.ones(self.count, b, dtype=self.dtype, device=device)
            row, at = begins.nonzero(as_tuple=True)
            self.keep[self.place[row, at] // self.chunk, row] = 0
            place = self.place.gather(1, place)
        # the chunk of each row's last token, and the number of real tokens in that chunk
        self.last = place.squeeze(1) // self.chunk  # (b,)
        self.partial = place.squeeze(1) % self.chunk + 1  # (b,)
        if lengths is not None:
            self.partial = torch.where(lengths > 0, self.partial, 0)
        # the index of each token of that chunk when its tokens are moved to its end: (b, m), negative if there is none
        self.moved = torch.arange(self.chunk, device=device) - (self.chunk - self.partial).unsqueeze(1)
        self.x = self.split(x)

    def split(self, t: Tensor) -> Tensor:
        """(b, l, c) to (c, q, b, m)."""
        b, l, c = t.shape
        if self.place is not None:
            laid = torch.zeros(b, self.count * self.chunk, c, dtype=self.dtype, device=t.device)
            laid[self.rows.unsqueeze(1), self.place] = t.to(self.dtype)
            t = laid
        elif l % self.chunk:
            t = F.pad(t, (0, 0, 0, -l % self.chunk))
        split = torch.empty(c, self.count, b, self.chunk, dtype=self.dtype, device=t.device)
        return split.copy_(t.unflatten(1, (self.count, self.chunk)).permute(3, 1, 0, 2))

    def join(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(c, q, b, m) to (b, l, c)."""
        joined = t.permute(2, 1, 3, 0)  # (b, q, m, c)
        if self.place is not None:
            return joined.flatten(1, 2)[self.rows.unsqueeze(1), self.place].to(dtype)
        out = torch.empty(joined.shape, dtype=dtype, device=t.device).copy_(joined).flatten(1, 2)
        return out[:, : self.length].contiguous()

    def at_end(self) -> Tensor:
        """The tokens of each row's last chunk, moved to the chunk's end: (c, b, m)."""
        there = self.x[:, self.last, self.rows]
        return there.gather(2, self.moved.clamp(min=0).expand_as(there)) * (self.moved >= 0)

    def add_at_end(self, out: Tensor, grad: Tensor) -> None:
        """Add the gradient of `at_end` to that of ``x``."""
        moved = torch.zeros_like(grad).scatter_add_(
            2, self.moved.clamp(min=0).expand_as(grad), grad * (self.moved >= 0)
        )
        out[:, self.last, self.rows] += moved


def _toeplitz(taps: Tensor) -> Tensor:
    """(c, m) to (c, i, j), ``taps[i - j]`` where i >= j."""
    m = taps.shape[1]
    back = torch.arange(m, device=taps.device).unsqueeze(1) - torch.arange(m, device=taps.device)
    return taps[:, back.clamp(min=0)] * (back >= 0)


def _diagonals(products: Tensor) -> Tensor:
    """(c, i, j) to (c, m): the sums where i - j is 0 to m - 1."""
    m = products.shape[1]
    skewed = F.pad(products.flip(2), (0, m)).flatten(1)[:, :-m].unflatten(1, (m, 2 * m - 1))
    return skewed.sum(1)[:, m - 1 :]


def pass_states(states: Tensor, over: Tensor, initial_state: Tensor | None, keep: Tensor | None) -> None:
    """Replace the contribution of each chunk to the state by the state before the chunk, in place.

    Args:
        states: (c, q, b, n, 2), contiguous.
        over: the factor of a state over a chunk, (c, n, 2).
        initial_state: (c, b, n, 2), or None for zeros.
        keep: 0 where a chunk begins with an empty state, else 1, (q, b), or None.
    """
    before, factor = torch.view_as_complex(states).unbind(1), torch.view_as_complex(over).unsqueeze(1)
    state = torch.zeros_like(before[0]) if initial_state is None else torch.view_as_complex(initial_state)
    for at, added in enumerate(before):
        if keep is not None:
            state = state * keep[at].unsqueeze(1)
        start, state = state, torch.addcmul(added, factor, state)
        added.copy_(start)


def pass_gradients(grads: Tensor, over: Tensor, keep: Tensor | None) -> Tensor:
    """Replace the gradients of the states before the chunks, as far as the chunks' outputs read them, by the gradients
    of the states after the chunks, in place.

    Shapes as for `pass_states`; returns the gradient of the initial state, (c, b, n, 2).
    """
    reads, factor = torch.view_as_complex(grads).unbind(1), torch.view_as_complex(over).unsqueeze(1).conj()
    state = torch.zeros_like(reads[0])
    for at, read in reversed(list(enumerate(reads))):
        after, state = state, torch.addcmul(read, factor, state)
        if keep is not None:
            state = state * keep[at].unsqueeze(1)
        read.copy_(after)
    return torch.view_as_real(state)


class _Tables:
    """The chunks, the tables in the layout of the products, and the states before the chunks."""

    def __init__(self, x, taps, powers, initial_state, documents, lengths, passing: PassStates):
        chunks = self.chunks = _Chunks(x, taps.shape[1], documents, lengths)
        c, q, b, m = chunks.x.shape
        self.inputs = chunks.x.view(c, q * b, m)
        self.matrix = _toeplitz(taps)  # (c, i, j)
        self.write = powers[:, :, :m].flip(2).transpose(1, 2).reshape(c, m, -1)  # (c, m, 2 n)
        self.over = powers[:, :, m].contiguous()  # (c, n, 2)
        # the factor of a state over the tokens of each row's last chunk, (c, b, n)
        self.partial = torch.view_as_complex(powers[:, :, chunks.partial].transpose(1, 2).contiguous())
        self.states = torch.bmm(self.inputs, self.write).view(c, q, b, -1, 2)  # each chunk's contribution
        if initial_state is not None:
            initial_state = initial_state.to(chunks.dtype).transpose(0, 1).contiguous()
        passing(self.states, self.over, initial_state, chunks.keep)

    def before_last(self) -> Tensor:
        """The states before the rows' last chunks, (c, b, n), complex."""
        return torch.view_as_complex(self.states[:, self.chunks.last, self.chunks.rows].contiguous())


def modal_conv_fwd(
    x: Tensor,
    taps: Tensor,
    powers: Tensor,
    read: Tensor,
    initial_state: Tensor | None,
    documents: Tensor | None,
    lengths: Tensor | None,
    passing: PassStates = pass_states,
) -> tuple[Tensor, Tensor]:
    """y and the final state. `hf_archs_hyena.ops.modal` makes ``taps``, ``powers`` and ``read``."""
    tables = _Tables(x, taps, powers, initial_state, documents, lengths, passing)
    chunks, states = tables.chunks, tables.states
    c, _, b, n, _ = states.shape
    y = torch.bmm(tables.inputs, tables.matrix.transpose(1, 2))
    y.baddbmm_(states.view(c, -1, 2 * n), read)
    decayed = torch.view_as_real(tables.before_last() * tables.partial)
    final_state = torch.bmm(chunks.at_end(), tables.write).view(c, b, n, 2) + decayed
    return chunks.join(y.view_as(chunks.x), x.dtype), final_state.transpose(0, 1).contiguous()


def modal_conv_bwd(
    grad_y: Tensor | None,
    grad_final_state: Tensor | None,
    x: Tensor,
    taps: Tensor,
    powers: Tensor,
    read: Tensor,
    initial_state: Tensor | None,
    documents: Tensor | None,
    lengths: Tensor | None,
    wanted: Sequence[bool] = (True,) * 5,
    passing: PassStates = pass_states,
    passing_gradients: PassGradients = pass_gradients,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, taps, powers, read and initial_state."""
    of_x, of_taps, of_powers, of_read, _ = wanted
    tables = _Tables(x, taps, powers, initial_state, documents, lengths, passing)
    chunks, inputs, states = tables.chunks, tables.inputs, tables.states
    (c, _, b, m), n = chunks.x.shape, powers.shape[1]
    grad_out = chunks.split(torch.zeros_like(x) if grad_y is None else grad_y).view_as(inputs)
    grad_powers = torch.zeros_like(powers)
    grad_end = None
    ends = torch.bmm(grad_out, read.transpose(1, 2)).view_as(states)  # from the outputs; passed on below
    if grad_final_state is not None:
        grad_end = grad_final_state.to(chunks.dtype).transpose(0, 1).contiguous()  # (c, b, n, 2)
        wide = torch.view_as_complex(grad_end)
        ends[:, chunks.last, chunks.rows] += torch.view_as_real(tables.partial.conj() * wide)
        grad_partial = torch.view_as_real(tables.before_last().conj() * wide).transpose(1, 2)  # (c, n, b, 2)
        grad_powers.index_add_(2, chunks.partial, grad_partial)
    grad_state = passing_gradients(ends, tables.over, chunks.keep)
    passed = (torch.view_as_complex(states).conj() * torch.view_as_complex(ends)).sum((1, 2))
    grad_powers[:, :, m] += torch.view_as_real(passed)

    states, ends = states.view(c, -1, 2 * n), ends.view(c, -1, 2 * n)
    grad_end = None if grad_end is None else grad_end.view(c, b, 2 * n)
    grad_x = grad_taps = grad_read = None
    if of_read:
        grad_read = torch.bmm(states.transpose(1, 2), grad_out)
    if of_taps:
        grad_taps = _diagonals(torch.bmm(grad_out.transpose(1, 2), inputs))
    if of_powers:
        grad_write = torch.bmm(inputs.transpose(1, 2), ends)
        if grad_end is not None:
            grad_write.baddbmm_(chunks.at_end().transpose(1, 2), grad_end)
        grad_powers[:, :, :m] += grad_write.view(c, m, n, 2).flip(1).transpose(1, 2)
    if of_x:
        split = torch.bmm(grad_out, tables.matrix)
        split = split.baddbmm_(ends, tables.write.transpose(1, 2)).view_as(chunks.x)
        if grad_end is not None:
            chunks.add_at_end(split, torch.bmm(grad_end, tables.write.transpose(1, 2)))
        grad_x = chunks.join(split, x.dtype)
    return grad_x, grad_taps, grad_powers, grad_read, grad_state.transpose(0, 1)
