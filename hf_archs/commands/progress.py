"""A line that lives: what is being done, how far it is, how long it will still take.

On a terminal it is a bar; elsewhere (a pipe, a log file) a line of its own every second or two. It goes to stderr, so
that stdout has the results alone. This module needs nothing of hf-archs, so that it can show how the rest is imported.
"""

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
    """The line of `working`: called with how much is done of how much, and perhaps a word beside it.

    Attributes:
        what: is being done.
    """

    def __init__(self, what: str, console: Console):
        columns = (TextColumn("{task.description}"), BarColumn(24), TaskProgressColumn(), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn())
        self.shown = Progress(SpinnerColumn(), *columns, *left, console=console, transient=True, refresh_per_second=4)
        self._start(what)

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """Show how much is done."""
        described = f"{self.what} ({note})" if note else self.what
        self.shown.update(self._task, completed=done, total=total, description=described)

    def next(self, what: str) -> None:
        """Something else is being done now."""
        self.say_end()
        before = self._task
        self._start(what)
        self.shown.remove_task(before)

    def _start(self, what: str) -> None:
        self.what = what
        self._task = self.shown.add_task(what, total=None)
        if not self.shown.console.is_terminal:
            self._say(f"{what} ...")

    def say(self) -> None:
        """The bar in words."""
        task = self.shown.tasks[-1]
        words = [task.description, f"{task.elapsed or 0:.0f} s"]
        if task.total:
            words.insert(1, f"{task.percentage:.0f} %")
        if task.time_remaining:
            words.append(f"about {task.time_remaining:.0f} s left")
        self._say(", ".join(words))

    def say_end(self) -> None:
        """Leave a line with the time that the present job took."""
        self._say(f"{self.what}: {self.shown.tasks[-1].elapsed or 0:.1f} s")

    def _say(self, line: str) -> None:
        self.shown.console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def working(what: str, console: Console | None = None) -> Iterator[Bar]:
    """Show that ``what`` is being done for as long as the block runs, and at its end how long it took.

    Args:
        what: a few words, as in "measuring".
        console: where it is shown; stderr without one.
    """
    bar = Bar(what, console or Console(stderr=True))
    if bar.shown.console.is_terminal:
        with bar.shown:
            yield bar
    else:
        over = threading.Event()

        def keep_saying() -> None:
            while not over.wait(EVERY):
                bar.say()

        thread = threading.Thread(target=keep_saying, name="progress", daemon=True)
        thread.start()
        try:
            yield bar
        finally:
            over.set()
            thread.join()
    bar.say_end()
