"""Tables that never truncate a word."""

from rich.console import Console
from rich.measure import measure_renderables
from rich.table import Table


def show(table: Table, console: Console) -> None:
    """Print a table without truncating words: wider than the terminal if necessary, and in pipes at its full width."""
    measures = [
        measure_renderables(console, console.options.update_width(10**6), [column.header, *column.cells])
        for column in table.columns
    ]
    frame = 3 * len(measures) + 1  # a border before every column and one after all, a space on both sides of each
    widest = frame + sum(measure.maximum for measure in measures)
    spare = console.width - frame - sum(measure.minimum for measure in measures)
    narrow = console.is_terminal and widest > console.width
    if narrow:
        flexible = sum(measure.span for measure in measures)
        for column, measure in zip(table.columns, measures):
            column.width = measure.minimum + max(spare, 0) * measure.span // max(flexible, 1)
    wide = Console(file=console.file, width=max(console.width, widest if not narrow else console.width - spare))
    wide.print(table)
