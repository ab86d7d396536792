"""`modal_conv` in PyTorch: chunks of tokens, whose outputs are matrix products of their inputs and start states.

Within a chunk a channel's outputs are a Toeplitz matrix of its first taps times the chunk's inputs; what came before
the chunk enters through the state, which is passed on from chunk to chunk. Documents are laid out to begin at a chunk
each, so a chunk holds one document only and no product needs a mask.

The backward computes the states again: they are half as large as x, and cheap.

Letters: b batch, l length, c channels, n modes, m tokens of a chunk (i reads, j writes), q chunks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32


class _Chunks:
    """Where tokens lie in chunks, and the inputs there: ``x`` (c, q, b, m), zero where there is no token."""

    def __init__(self, x: Tensor, documents: Tensor | None, lengths: Tensor | None):
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        b, self.length = x.shape[:2]
        device = x.device
        self.rows = torch.arange(b, device=device)
        position = torch.arange(self.length, device=device).expand(b, -1)
        self.place = None
        self.count = -(-self.length // CHUNK)
        self.keep = None  # 0 where a chunk begins with an empty state, (q, 1, b, 1); None: nowhere
        last = position[:, -1] if lengths is None else (lengths.long() - 1).clamp(min=0)
        place = last.unsqueeze(1)
        if documents is not None:
            begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
            in_document = position - torch.where(begins, position, 0).cummax(1).values
            opens = in_document % CHUNK == 0
            self.place = (opens.cumsum(1) - 1) * CHUNK + in_document % CHUNK  # (b, l)
            self.count = int(self.place[:, -1].max()) // CHUNK + 1
            keep = torch.ones(self.count, b, dtype=self.dtype, device=device)
            row, at = begins.nonzero(as_tuple=True)
            keep[self.place[row, at] // CHUNK, row] = 0
            self.keep = keep[:, None, :, None]
            place = self.place.gather(1, place)
        # the last token's chunk in each row, and how many of its tokens count
        self.last = place.squeeze(1) // CHUNK  # (b,)
        self.partial = place.squeeze(1) % CHUNK + 1  # (b,)
        if lengths is not None:
            self.partial = torch.where(lengths > 0, self.partial, 0)
        # that chunk's tokens moved to its end: (b, m), negative where there is none
        self.moved = torch.arange(CHUNK, device=device) - (CHUNK - self.partial).unsqueeze(1)
        self.x = self.split(x)

    def split(self, t: Tensor) -> Tensor:
        """(b, l, c) to (c, q, b, m)."""
        b, l, c = t.shape
        if self.place is not None:
            laid = torch.zeros(b, self.count * CHUNK, c, dtype=self.dtype, device=t.device)
            laid[self.rows.unsqueeze(1), self.place] = t.to(self.dtype)
            t = laid
        elif l % CHUNK:
            t = F.pad(t, (0, 0, 0, -l % CHUNK))
        split = torch.empty(c, self.count, b, CHUNK, dtype=self.dtype, device=t.device)
        return split.copy_(t.unflatten(1, (self.count, CHUNK)).permute(3, 1, 0, 2))

    def join(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(c, q, b, m) to (b, l, c)."""
        joined = t.permute(2, 1, 3, 0)  # (b, q, m, c)
        if self.place is not None:
            return joined.flatten(1, 2)[self.rows.unsqueeze(1), self.place].to(dtype)
        out = torch.empty(joined.shape, dtype=dtype, device=t.device).copy_(joined).flatten(1, 2)
        return out[:, : self.length].contiguous()

    def at_end(self) -> Tensor:
        """The last chunks' tokens, moved to the end: (c, b, m)."""
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


def _start_states(chunks: _Chunks, write: Tensor, over: Tensor, initial_state: Tensor | None) -> Tensor:
    """The state before each chunk, (c, q, b, n, 2), from ``write`` (c, m, 2 n) and ``over`` (c, 1, n), complex."""
    c, q, b, m = chunks.x.shape
    states = torch.bmm(chunks.x.view(c, q * b, m), write).view(c, q, b, -1, 2)  # what each chunk adds
    views = torch.view_as_complex(states).unbind(1)
    state = torch.zeros_like(views[0])
    if initial_state is not None:
        state.copy_(torch.view_as_complex(initial_state.to(chunks.dtype).contiguous()).transpose(0, 1))
    for at, added in enumerate(views):
        if chunks.keep is not None:
            state = state * chunks.keep[at]
        before, state = state, torch.addcmul(added, over, state)
        added.copy_(before)
    return states


def modal_conv_fwd(
    x: Tensor,
    taps: Tensor,
    powers: Tensor,
    read: Tensor,
    initial_state: Tensor | None,
    documents: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the final state; the tables are described at `hf_archs_hyena.modal._modal_conv`."""
    chunks = _Chunks(x, documents, lengths)
    (c, q, b, m), n = chunks.x.shape, powers.shape[1]
    write = powers[:, :, :m].flip(2).transpose(1, 2).reshape(c, m, 2 * n)
    over = torch.view_as_complex(powers[:, :, m].contiguous()).unsqueeze(1)
    states = _start_states(chunks, write, over, initial_state)
    y = torch.bmm(chunks.x.view(c, q * b, m), _toeplitz(taps).transpose(1, 2))
    y.baddbmm_(states.view(c, q * b, 2 * n), read)

    decayed = torch.view_as_complex(states[:, chunks.last, chunks.rows].contiguous())  # (c, b, n)
    decayed = decayed * torch.view_as_complex(powers[:, :, chunks.partial].transpose(1, 2).contiguous())
    final_state = torch.bmm(chunks.at_end(), write).view(c, b, n, 2) + torch.view_as_real(decayed)
    return chunks.join(y.view(c, q, b, m), x.dtype), final_state.transpose(0, 1).contiguous()


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, taps, powers, read and initial_state."""
    chunks = _Chunks(x, documents, lengths)
    (c, q, b, m), n = chunks.x.shape, powers.shape[1]
    write = powers[:, :, :m].flip(2).transpose(1, 2).reshape(c, m, 2 * n)
    over = torch.view_as_complex(powers[:, :, m].contiguous()).unsqueeze(1)
    states = _start_states(chunks, write, over, initial_state)
    inputs, states = chunks.x.view(c, q * b, m), states.view(c, q * b, 2 * n)
    grad_out = chunks.split(torch.zeros_like(x) if grad_y is None else grad_y).view(c, q * b, m)

    grad_states = torch.bmm(grad_out, read.transpose(1, 2)).view(c, q, b, n, 2)  # of the start states
    grad_powers = torch.zeros_like(powers)
    if grad_final_state is not None:
        grad_end = grad_final_state.to(chunks.dtype).transpose(0, 1).contiguous()  # (c, b, n, 2)
        wide = torch.view_as_complex(grad_end)
        partial = torch.view_as_complex(powers[:, :, chunks.partial].transpose(1, 2).contiguous())
        before = torch.view_as_complex(states.view(c, q, b, n, 2)[:, chunks.last, chunks.rows].contiguous())
        grad_states[:, chunks.last, chunks.rows] += torch.view_as_real(partial.conj() * wide)
        grad_partial = torch.view_as_real(before.conj() * wide).transpose(1, 2)  # (c, n, b, 2)
        grad_powers.index_add_(2, chunks.partial, grad_partial)
    state = torch.zeros_like(over).expand(-1, b, -1)
    for at, grad in reversed(list(enumerate(torch.view_as_complex(grad_states).unbind(1)))):
        after, state = state, torch.addcmul(grad, over.conj(), state)
        if chunks.keep is not None:
            state = state * chunks.keep[at]
        grad.copy_(after)  # from here on that of the end states
    ends = grad_states.view(c, q * b, 2 * n)

    wide = torch.view_as_complex(ends.view(c, q * b, n, 2))
    passed = (torch.view_as_complex(states.view(c, q * b, n, 2)).conj() * wide).sum(1)
    grad_powers[:, :, m] += torch.view_as_real(passed)
    grad_read = torch.bmm(states.transpose(1, 2), grad_out)
    grad_taps = _diagonals(torch.bmm(grad_out.transpose(1, 2), inputs))
    grad_write = torch.bmm(inputs.transpose(1, 2), ends)
    grad_x = torch.bmm(grad_out, _toeplitz(taps))
    grad_x.baddbmm_(ends, write.transpose(1, 2))
    grad_x = grad_x.view(c, q, b, m)
    if grad_final_state is not None:
        grad_end = grad_end.view(c, b, 2 * n)
        grad_write.baddbmm_(chunks.at_end().transpose(1, 2), grad_end)
        chunks.add_at_end(grad_x, torch.bmm(grad_end, write.transpose(1, 2)))
    grad_powers[:, :, :m] += grad_write.view(c, m, n, 2).flip(1).transpose(1, 2)
    return (
        chunks.join(grad_x, x.dtype),
        grad_taps,
        grad_powers,
        grad_read,
        torch.view_as_real(state.transpose(0, 1).resolve_conj().contiguous()),
    )
