"""Rows to learn from: a text, a prompt with its completion, or messages. `hf_archs.data.sources` reads them.

A document of plain text is a row too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from json import JSONDecodeError
from typing import Any

from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowInvalid

from hf_archs.data import text
from hf_archs.errors import did_you_mean, reason, similar

Row = Mapping[str, Any]
# the kinds of rows, and their columns; the first kind whose columns are there is taken
FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
HELD_OUT = 2**20  # characters of a stream that are held out


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a source. Iteration gives the number of each row in the source, and the row.

    A row that is wrong ends the iteration with a `ValueError`, or is left out if ``skip_bad``.

    Attributes:
        source: the source, as the user named it.
        kind: one of `FORMS`, which decides the tokens to learn from (all of a text, the completion, the answers in
            messages), or of other forms of a trainer.
        columns: the columns that are read.
        raw: the rows with all their columns; an `IterableDataset` is a stream.
        place: the place of a row in the source, in words, by its number.
        skip_bad: whether a row that is wrong is left out.
        left_out: the places that were left out so far; the halves of a split share it.
        names: the names of the rows, by which some are held out (`text.is_held_out`); None for their numbers.
        numbers: the numbers of the rows of ``raw``; None if they count from 0.
        passed_over: whether a stream passes over the row of this number.
    """

    source: str
    kind: str
    columns: tuple[str, ...]
    raw: Collection[Row] | Dataset | IterableDataset
    place: Callable[[int], str]
    skip_bad: bool = False
    left_out: dict[str, None] = field(default_factory=dict)
    names: Sequence[str] | None = None
    numbers: Sequence[int] | None = None
    passed_over: Callable[[int], bool] | None = None

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        for number, row in zip(count() if self.numbers is None else self.numbers, self._read()):
            if self.passed_over is not None and self.passed_over(number):
                continue
            why = _fault(row, self.kind, self.columns)
            if why is None:
                yield number, row
            else:
                self.refuse(number, why)

    def _read(self) -> Iterator[Row]:
        with refusing(self.source):
            yield from self.raw

    @property
    def streamed(self) -> bool:
        """Whether the rows are a stream, whose length is not known."""
        return isinstance(self.raw, IterableDataset)

    @property
    def dataset(self) -> Dataset | IterableDataset:
        """The rows as a dataset with all their columns, without those that are left out."""
        if self.streamed:
            return IterableDataset.from_generator(self._alone)
        raw = self._picked([number for number, _ in self]).raw
        return raw if isinstance(raw, Dataset) else Dataset.from_list([*raw])

    def _alone(self) -> Iterator[Row]:
        for _, row in self:
            yield row

    def refuse(self, number: int, why: str) -> None:
        """Leave out the row of this number if ``skip_bad``. Raises `ValueError` with its place otherwise."""
        if not self.skip_bad:
            raise ValueError(f"{self.place(number)}: {why}; --skip-bad leaves such rows out, and counts them")
        self.left_out[self.place(number)] = None

    def texts(self) -> Iterator[str]:
        """The texts of all rows; of messages, the content of each."""
        for _, row in self:
            if self.kind == "messages":
                yield from (message["content"] for message in row["messages"])
            else:
                yield from (row[column] for column in self.columns)

    def split(self) -> tuple[Rows, Rows]:
        """The rows for training, and the held-out ones, by `text.split`.

        A stream is read until the held-out rows have `HELD_OUT` characters. The stream for training passes over all
        rows that the rule holds out.

        Raises:
            ValueError: if there are fewer than two rows.
        """
        if self.streamed:
            return self._split_stream()
        name = str if self.names is None else self.names.__getitem__
        training, held_out = text.split({name(number): number for number, _ in self})
        return self._picked([*training.values()]), self._picked([*held_out.values()])

    def _picked(self, numbers: Sequence[int]) -> Rows:
        """The rows of these numbers, of a source that is no stream."""
        place = {number: i for i, number in enumerate(self.numbers)} if self.numbers is not None else None
        chosen = [number if place is None else place[number] for number in numbers]
        if isinstance(self.raw, Dataset):
            return replace(self, raw=self.raw.select(chosen), numbers=numbers)
        listed = [*self.raw]
        return replace(self, raw=[listed[i] for i in chosen], numbers=numbers)

    def _split_stream(self) -> tuple[Rows, Rows]:
        seen: dict[str, int] = {}
        kept: dict[int, Row] = {}
        size = 0
        for number, row in self:
            seen[str(number)] = number
            if text.is_held_out(str(number)):
                kept[number] = row
                size += len(str([row[column] for column in self.columns]))
            if size >= HELD_OUT:
                training = replace(self, passed_over=_is_held_out)
                break
        else:  # the stream has ended: the rule for few rows
            held_out = {*text.split(seen)[1].values()}
            kept = {number: row for number, row in self if number in held_out}
            training = replace(self, passed_over=held_out.__contains__)
        return training, replace(self, raw=[*kept.values()], numbers=[*kept])


@contextmanager
def refusing(source: str) -> Iterator[None]:
    """Context manager: errors of `datasets` and Arrow, which do not name the source, as a `ValueError` that does."""
    try:
        yield
    except (DatasetGenerationError, ArrowInvalid, JSONDecodeError) as error:
        raise ValueError(f"data is {source!r}, which cannot be read: {reason(error.__cause__ or error)}") from error


def _is_held_out(number: int) -> bool:
    return text.is_held_out(str(number))


def kind_of(
    found: Sequence[str], source: str, column: str | None, forms: Mapping[str, tuple[str, ...]]
) -> tuple[str, tuple[str, ...]]:
    """The kind of rows with the columns ``found``, and the columns that are read: the first of ``forms`` that fits.

    Args:
        source: for the error.
        column: the column with the text, if it is named.

    Raises:
        ValueError: if the columns are missing.
    """
    if column is not None:
        if column in found:
            return "text", (column,)
        hint = did_you_mean(similar(column, found), f"the columns are {', '.join(found)}")
        raise ValueError(f"column is {column!r}, which {source!r} does not have; {hint}")
    for kind, columns in forms.items():
        if {*columns} <= {*found}:
            return kind, columns
    needed = ", or ".join(" and ".join(map(repr, columns)) for columns in forms.values())
    name = ", or the name of the column with the text: --column NAME" if "text" in forms else ""
    raise ValueError(f"{source!r} has the columns {', '.join(found)}; needed are {needed}{name}")


def _fault(row: Row, kind: str, columns: tuple[str, ...]) -> str | None:
    """The reason why there is nothing to learn from a row; None if there is."""
    if kind == "messages":
        return _fault_of_messages(row["messages"])
    for column in columns:
        value = row[column]
        if value is None or value == "" or value == []:
            return f"{column} is empty; allowed is text"
        if not isinstance(value, str) and kind in FORMS:
            return f"{column} is {value!r:.60}, of type {type(value).__name__}; allowed is text"
    return None


def _fault_of_messages(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        empty = messages is None or messages == []
        said = "is empty" if empty else f"is of type {type(messages).__name__}"
        return f"messages {said}; allowed is a list of messages with role and content"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            return f"message {number} is of type {type(message).__name__}; allowed is one with role and content"
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                return f"message {number} has no {name} that is text; allowed is one with role and content"
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers or "" in answers:
        return (
            f"messages hold {'an empty' if answers else 'no'} answer; allowed are some of the role assistant, with text"
        )
    return None
