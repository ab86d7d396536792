"""A line that lives: what is being done, how far it is, how long it will still take.

On a terminal it is a bar; elsewhere (a pipe, a log file) a line of its own every second or two. It goes to stderr, so
that stdout has the results alone. This module needs nothing of hf-archs, so that it can show how the rest is imported.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVERY = 1.5  # seconds between two lines where there is no terminal


class Bar:
    """What `working` gives: called with how much is done of how much, and perhaps a word beside it."""

    def __init__(self, what: str, console: Console):
        columns = (TextColumn("{task.description}"), BarColumn(24), TaskProgressColumn(), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn())
        self._what = what
        self._shown = Progress(SpinnerColumn(), *columns, *left, console=console, transient=True, refresh_per_second=4)
        self._task = self._shown.add_task(what, total=None)

    def __call__(self, done: float, total: float, note: str = "") -> None:
        described = f"{self._what} ({note})" if note else self._what
        self._shown.update(self._task, completed=done, total=total, description=described)

    def line(self) -> str:
        """The same in words."""
        task = self._shown.tasks[0]
        words = [task.description, f"{task.elapsed or 0:.0f} s"]
        if task.total:
            words.insert(1, f"{task.percentage:.0f} %")
        if task.time_remaining:
            words.append(f"about {task.time_remaining:.0f} s left")
        return ", ".join(words)


@contextmanager
def working(what: str, console: Console | None = None) -> Iterator[Bar]:
    """Show that ``what`` is being done for as long as the block runs, and at its end how long it took.

    Args:
        what: a few words, as in "measuring".
        console: where it is shown; stderr without one.
    """
    console = console or Console(stderr=True)
    bar = Bar(what, console)

    def say(line: str) -> None:
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)

    if console.is_terminal:
        with bar._shown:
            yield bar
    else:
        over = threading.Event()

        def keep_saying() -> None:
            while not over.wait(EVERY):
                say(bar.line())

        thread = threading.Thread(target=keep_saying, name="progress", daemon=True)
        say(f"{what} ...")
        thread.start()
        try:
            yield bar
        finally:
            over.set()
            thread.join()
    say(f"{what}: {bar._shown.tasks[0].elapsed or 0:.1f} s")
