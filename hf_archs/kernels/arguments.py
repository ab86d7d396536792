"""Helpers for the arguments of ops over sequences: shapes, documents, and the last inputs.

Documents are sequences that are packed into one row; a token sees only its own document. Letters: b batch, l length,
c channels.
"""

import torch
from torch import Tensor


def check_shapes(op: str, **expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Check the shape of each argument that is not None.

    Raises:
        ValueError: for another shape; the message names op, argument and both shapes.
    """
    for name, (t, shape) in expected.items():
        if t is not None and t.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, not {tuple(t.shape)}")


def number_documents(seq_idx: Tensor | None, lengths: Tensor | None = None) -> Tensor | None:
    """The number of each position's document in its row, counted from 0: (b, l), int32.

    The initial state belongs to document 0. None if ``seq_idx`` is None or the length is 1: no other document begins.

    Args:
        lengths: if given, the pads (positions from there on) belong to their row's last document, whatever ``seq_idx``.
    """
    if seq_idx is None or seq_idx.shape[1] == 1:
        return None
    position = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    begins = (seq_idx != seq_idx.roll(1, 1)) & (position > 0)
    if lengths is not None:
        begins = begins & (position < lengths.unsqueeze(1))
    return begins.cumsum(1, dtype=torch.int32)


def last_inputs(
    x: Tensor, size: int, initial_state: Tensor | None, documents: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """The last ``size`` inputs of each row's last document, from which a convolution continues; zeros before fewer.

    Inputs are gathered by index, since torch.compile would compile a slice again for lengths below ``size``. All
    backends use this PyTorch form, since it touches few elements.

    Args:
        x: (b, l, c).
        initial_state: the inputs before the first, oldest first, (b, c, any number), or None; they belong to
            document 0.
        documents: see `number_documents`.
        lengths: integer, (b,), 0 to l: where each row ends.

    Returns:
        (b, c, size) in the dtype of ``x``, channels innermost in memory; a copy, so that a cache that holds it keeps no
        larger tensor alive.
    """
    b, l, c = x.shape
    ends = x.new_full((b,), l, dtype=torch.int64) if lengths is None else lengths.to(torch.int64)
    place = ends.unsqueeze(1) + torch.arange(-size, 0, device=x.device)  # in x, or if negative in the initial state
    inside, in_x = (place >= 0).unsqueeze(2), place.clamp(min=0)
    window = x.gather(1, in_x.unsqueeze(2).expand(b, size, c))
    past = 0 if initial_state is None else initial_state.shape[2]
    if initial_state is None or past == 0:
        window = torch.where(inside, window, 0)
    else:
        in_state = (place + past).clamp(0, past - 1).unsqueeze(2).expand(b, size, c)
        before = initial_state.transpose(1, 2).to(x.dtype).gather(1, in_state)
        window = torch.where(inside, window, torch.where((place + past >= 0).unsqueeze(2), before, 0))
    if documents is not None:
        last = documents.gather(1, (ends - 1).clamp(min=0).unsqueeze(1))
        visible = last == torch.where(inside.squeeze(2), documents.gather(1, in_x), 0)
        window = torch.where(visible.unsqueeze(2), window, 0)
    return window.transpose(1, 2)


def some_boundaries(batch: int, length: int, device: torch.device | str) -> dict[str, Tensor]:
    """``seq_idx`` and ``lengths`` for the ``cases`` of an op: documents of 1 to 24 tokens, rows shorter by 7 each."""
    position, row = torch.arange(length, device=device), torch.arange(batch, device=device)
    begins = (position == 5) | (position == 6) | (position % 24 == 23)
    return {"seq_idx": (begins.cumsum(0) % 3).repeat(batch, 1), "lengths": (length - 7 * row).clamp(min=0)}
