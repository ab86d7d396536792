"""Files with a row on each line, CSV, TSV and JSONL: the lines of each row, and the reasons why lines are no row."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

DELIMITERS = {".csv": ",", ".tsv": "\t"}
LINES = frozenset([*DELIMITERS, ".json", ".jsonl", ".ndjson"])


class Record(NamedTuple):
    """The lines of a row, from ``first`` to ``last``, counted from 1, and the fault by which they are no row."""

    first: int
    last: int
    fault: str | None = None

    def __str__(self) -> str:
        return f"line {self.first}" if self.first == self.last else f"lines {self.first} to {self.last}"


def header(path: Path) -> list[str]:
    """The columns of a CSV or TSV file. Raises `ValueError` if there are none, or two of one name, or no UTF-8."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        names = next(csv.reader(file, delimiter=DELIMITERS[path.suffix.lower()]), [])
    if not names:
        raise ValueError(f"{str(path)!r} begins with an empty line; its first line must name the columns")
    if fault := _not_utf8(names):
        raise ValueError(f"line 1 of {str(path)!r}, which names the columns: {fault}")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"line 1 of {str(path)!r} names the column {min(twice)!r} twice; allowed are different names")
    return names


def is_array(path: Path) -> bool:
    """Whether a JSON file is one array, and not an object on each line."""
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def records(path: Path) -> Iterator[Record]:
    """The rows of a file with one of the suffixes `LINES`, in their order; of a JSON array, its fault alone.

    Empty lines at the end of the file are none.
    """
    if path.suffix.lower() in DELIMITERS:
        found = _csv_records(path)
    elif is_array(path):
        found = _array_fault(path)
    else:
        found = _json_records(path)
    empty: list[Record] = []
    for record in found:
        if record.fault == EMPTY:
            empty.append(record)
            continue
        yield from empty
        empty.clear()
        yield record


EMPTY = "it is empty"


def _csv_records(path: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # a field may be a long document
    columns = len(header(path))
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=DELIMITERS[path.suffix.lower()], strict=True)
        next(reader)
        while True:
            first = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield Record(first, max(first, reader.line_num), f"it is no CSV: {error}")
                continue
            if fields is None:
                return
            fault = _not_utf8(fields)
            if fault is None and len(fields) != columns:
                fault = f"it has {len(fields)} fields, and the header has {columns}" if fields else EMPTY
            yield Record(first, reader.line_num, fault)


def _not_utf8(fields: Iterable[str]) -> str | None:
    """The first byte that is not UTF-8 in fields read with ``surrogateescape``, in words."""
    wrong = next((letter for value in fields for letter in value if "\udc80" <= letter <= "\udcff"), None)
    return None if wrong is None else f"it is not UTF-8: it has the byte 0x{ord(wrong) - 0xDC00:02x}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it is no JSON: it has the number {name}")


def _parse(content: bytes) -> Any:
    value = json.loads(content.decode("utf-8-sig"), parse_constant=_refuse_constant)
    if b"\\ud" in content.lower():  # an escape of half a character, which JSON allows
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it is no Unicode: it has half a surrogate pair") from None
    return value


def _json_records(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            yield Record(number, number, _fault_of_json(line))


def _fault_of_json(line: bytes) -> str | None:
    if not line.strip():
        return EMPTY
    try:
        value = _parse(line.rstrip())
    except UnicodeDecodeError as error:
        return f"it is not UTF-8: it has the byte 0x{line[error.start]:02x}"
    except json.JSONDecodeError as error:
        return f"it is no JSON: {error.msg} at column {error.colno}"
    except ValueError as error:
        return str(error)
    return None if isinstance(value, dict) else f"it is a JSON {type(value).__name__}; allowed is an object"


def _array_fault(path: Path) -> Iterator[Record]:
    content = path.read_bytes()
    try:
        _parse(content)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield Record(line, line, f"it is not UTF-8: it has the byte 0x{content[error.start]:02x}")
    except json.JSONDecodeError as error:
        yield Record(error.lineno, error.lineno, f"it is no JSON: {error.msg} at column {error.colno}")
    except ValueError as error:
        yield Record(1, content.count(b"\n") + 1, str(error))


def copy_without(path: Path, left_out: Iterable[Record], copy: Path) -> None:
    """Write a copy of a file without the lines of these records."""
    lines = {number for record in left_out for number in range(record.first, record.last + 1)}
    # csv ends a line at a carriage return too, JSONL at a line feed only
    newline = "" if path.suffix.lower() in DELIMITERS else "\n"
    with (
        path.open(encoding="utf-8", errors="surrogateescape", newline=newline) as file,
        copy.open("w", encoding="utf-8", errors="surrogateescape", newline="") as new,
    ):
        new.writelines(line for number, line in enumerate(file, 1) if number not in lines)
