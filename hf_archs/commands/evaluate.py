"""``hf-archs evaluate``: the loss of a model on text."""

from collections.abc import Sequence

from rich.table import Table

from hf_archs.commands.loading import load_ready
from hf_archs.data import text


def losses(model: str, data: Sequence[str], adapter: str | None, tokenizer: str | None, chunk: int) -> Table:
    """A row for each data source, of which every document is read from its beginning to its end.

    Args:
        model, adapter, tokenizer: as for `load_ready`.
        data: see `text.read_documents`.
        chunk: tokens in one forward; the state is carried to the next, so that no figure depends on it.
    """
    corpora = {name: text.read_documents(name) for name in data}  # before the model, which takes longer
    loaded, encoder = load_ready(model, adapter, tokenizer)
    table = Table("data", "documents", "tokens", "bytes", "loss per token", "perplexity", "bits per byte")
    for name, corpus in corpora.items():
        found = text.measure(loaded, encoder, corpus.values(), chunk=chunk)
        figures = (f"{found.loss:.4f}", f"{found.perplexity:.3f}", f"{found.bits_per_byte:.4f}")
        table.add_row(name, *(f"{size:,}" for size in (len(corpus), found.tokens, found.bytes)), *figures)
    return table
