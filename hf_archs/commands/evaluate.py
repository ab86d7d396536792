"""``hf-archs evaluate``: the loss of a model on text and on rows."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from hf_archs.commands.loading import load_ready
from hf_archs.data import examples
from hf_archs.data.sources import read_rows


def losses(
    model: str,
    data: Sequence[str],
    adapter: str | None,
    tokenizer: str | None,
    chunk: int,
    say: Callable[[str], object] = print,
    **reading: Any,
) -> Table:
    """A row for each data source, of which every document or row is read from its beginning to its end.

    Args:
        model, adapter, tokenizer: as for `load_ready`.
        data, reading: see `read_rows`; of rows, the tokens that training would learn are measured.
        chunk: tokens in one forward; the state is carried to the next, so that no figure depends on it.
        say: called with a line for each source of which something was left out.
    """
    sources = [read_rows(name, whole=True, **reading) for name in data]  # before the model, which takes longer
    loaded, encoder = load_ready(model, adapter, tokenizer)
    table = Table("data", "rows", "tokens", "bytes", "loss per token", "perplexity", "bits per byte")
    for rows in sources:
        sizes = examples.Found()
        found = examples.measure(loaded, encoder, rows, chunk=chunk, found=sizes)
        figures = (f"{found.loss:.4f}", f"{found.perplexity:.3f}", f"{found.bits_per_byte:.4f}")
        table.add_row(rows.source, *(f"{size:,}" for size in (sizes.rows, found.tokens, found.bytes)), *figures)
        if rows.left_out:
            say(f"{rows.source}: {examples.left_out(rows)}")
    return table
