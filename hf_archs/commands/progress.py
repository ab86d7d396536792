"""A progress line: the present job, the part that is done, and the time left.

On a terminal it is a bar; elsewhere (a pipe, a log file) a new line every second or two. It goes to stderr, so that
stdout has the results alone. This module imports nothing of hf-archs, so that it can show the import of the rest.
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

EVERY = 1.5  # seconds between two lines without a terminal


class Bar:
    """The progress line of `working`; called with the amount done, the total, and an optional note.

    Attributes:
        what: the present job.
    """

    def __init__(self, what: str, console: Console):
        columns = (TextColumn("{task.description}"), BarColumn(24), TaskProgressColumn(), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn())
        self.shown = Progress(SpinnerColumn(), *columns, *left, console=console, transient=True, refresh_per_second=4)
        self._start(what)

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """Show the amount done."""
        described = f"{self.what} ({note})" if note else self.what
        self.shown.update(self._task, completed=done, total=total, description=described)

    def next(self, what: str) -> None:
        """End the present job and begin another."""
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
        """Print the progress as a line of words."""
        task = self.shown.tasks[-1]
        words = [task.description, f"{task.elapsed or 0:.0f} s"]
        if task.total:
            words.insert(1, f"{task.percentage:.0f} %")
        if task.time_remaining:
            words.append(f"about {task.time_remaining:.0f} s left")
        self._say(", ".join(words))

    def say_end(self) -> None:
        """Print a line with the time that the present job took."""
        self._say(f"{self.what}: {self.shown.tasks[-1].elapsed or 0:.1f} s")

    def _say(self, line: str) -> None:
        self.shown.console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def working(what: str, console: Console | None = None) -> Iterator[Bar]:
    """Context manager: a progress line for the job of the block, and at the end the time that it took.

    Args:
        what: the job in a few words, as in "measuring".
        console: the console to print to; stderr by default.
    """
    bar = Bar(what, console or Console(stderr=True))
    if bar.shown.console.is_terminal:
        with bar.shown:
            yield bar
    else:
        ended = threading.Event()

        def report() -> None:
            while not ended.wait(EVERY):
                bar.say()

        thread = threading.Thread(target=report, name="progress", daemon=True)
        thread.start()
        try:
            yield bar
        finally:
            ended.set()
            thread.join()
    bar.say_end()
