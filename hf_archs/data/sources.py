"""Sources of rows, read by `datasets`: files and folders, folders of `save_to_disk`, and datasets of the Hub."""

from __future__ import annotations

import glob
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, concatenate_datasets, load_dataset
from datasets.data_files import DataFilesDict, get_data_patterns

from hf_archs.data import lines, text
from hf_archs.data.rows import FORMS, Rows, kind_of, refusing
from hf_archs.errors import did_you_mean, similar
from hf_archs.native.disk import looks_local

BUILDERS = {suffix: "json" for suffix in (".json", ".jsonl", ".ndjson")}
BUILDERS |= {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
SAVED = ("dataset_dict.json", "state.json")  # in a folder of `save_to_disk`


class Part(NamedTuple):
    """The rows of one file or dataset, and the place of each by its number there."""

    dataset: Dataset | IterableDataset
    place: Callable[[int], str]


def read_rows(
    data: str,
    *,
    column: str | None = None,
    streaming: bool = False,
    skip_bad: bool = False,
    whole: bool = False,
    forms: Mapping[str, tuple[str, ...]] = FORMS,
) -> Rows:
    """Read a source of rows, or of plain text.

    Args:
        data: a CSV, TSV, JSON, JSONL, Parquet or Arrow file; a folder of such files, or of `save_to_disk`; the name
            of a dataset on the Hub, ``owner/name``; or plain text, as in `text.read_documents`. ``:config`` may follow
            a name, and ``:config:split`` a name or a folder; by default the split is ``train``.
        column: the column with the text; None looks for the columns of ``forms``.
        streaming: read each row when it is needed.
        skip_bad: leave out the lines and rows that are wrong.
        whole: a single document of plain text stays whole, and is not cut into pieces.
        forms: the kinds of rows that are allowed, and their columns, which hold text or, of other kinds than those of
            `FORMS`, messages.

    Raises:
        FileNotFoundError: if a path or a dataset does not exist.
        ValueError: if a column is missing, a line is wrong, or there are no rows.
    """
    left_out: dict[str, None] = {}
    name, config, split = _parts_of(data)
    path = Path(name).expanduser()
    with _quiet(), refusing(data):
        if config is not None and (path.exists() or name in text.OURS):
            raise ValueError(f"{name!r} has no config {config!r}, which datasets of the Hub have alone")
        if path.is_dir() and any((path / file).exists() for file in SAVED):
            parts = [Part(_saved(path, split, streaming), partial(_row, data))]
        elif files := _files_of_rows(path, split):
            parts = [_file(file, streaming, skip_bad, left_out) for file in files]
        elif path.exists() or name in text.OURS:
            kind_of(["text"], data, column and "text", forms)
            return _of_text(name, split, column, streaming, whole)
        else:
            _check_name(name)
            parts = [Part(load_dataset(name, config, split=split, streaming=streaming), partial(_row, data))]
        raw = concatenate_datasets([part.dataset for part in parts]) if len(parts) > 1 else parts[0].dataset
        found = raw.column_names or [*next(iter(raw), {})]
    if not found or (isinstance(raw, Dataset) and not len(raw)):
        raise ValueError(f"data is {data!r}, which holds no rows; allowed is one row or more")
    kind, columns = kind_of(found, data, column, forms)
    place = _place(parts) if isinstance(raw, Dataset) or len(parts) == 1 else partial(_row, data)
    return Rows(source=data, kind=kind, columns=columns, raw=raw, place=place, skip_bad=skip_bad, left_out=left_out)


def read_corpus(data: str) -> text.Corpus:
    """The texts of a source by their names; see `read_rows`. Raises `ValueError` if its rows are no text."""
    rows = read_rows(data)
    if rows.kind != "text":
        raise ValueError(
            f"data is {data!r}, rows with {' and '.join(rows.columns)}; needed is text, or a column 'text'"
        )
    texts = {number: row[rows.columns[0]] for number, row in rows}
    return {str(number) if rows.names is None else rows.names[number]: text for number, text in texts.items()}


def _parts_of(data: str) -> tuple[str, str | None, str]:
    """Name or path, config and split."""
    if Path(data).expanduser().exists():
        return data, None, "train"
    name, _, rest = data.partition(":")
    config, _, split = rest.partition(":")
    return name, config or None, split or "train"


def _check_name(name: str) -> None:
    """Refuse the name of a dataset that is meant for a path, or for one of `text.OURS`."""
    if Path(name).suffix.lower() in {".txt", *BUILDERS} or looks_local(name):
        raise FileNotFoundError(f"data is {name!r}, which does not exist; allowed is a file, a folder or a dataset")
    if near := similar(name, text.OURS, most=1, cutoff=0.7):
        raise FileNotFoundError(f"data is {name!r}, which does not exist; {did_you_mean(near)}")


def _of_text(name: str, split: str, column: str | None, streaming: bool, whole: bool) -> Rows:
    for option, given in (("column", column), ("streaming", streaming), ("split", split != "train" and split)):
        if given:
            raise ValueError(f"{option} is {given!r}, and data = {name!r} is plain text; allowed with rows only")
    left_out: dict[str, None] = {}
    corpus = text.read_documents(name, left_out) if whole else text.read_corpus(name, left_out)
    names = [*corpus]
    return Rows(
        source=name,
        kind="text",
        columns=("text",),
        raw=[{"text": document} for document in corpus.values()],
        place=lambda i: repr(names[i]),
        left_out=left_out,
        names=names,
    )


def _files_of_rows(path: Path, split: str) -> list[Path]:
    """The files of rows of a split, if the path is one, or a folder with more bytes in such files than in others."""
    if path.is_file():
        if path.suffix.lower() not in BUILDERS:
            return []
        if split != "train":
            raise ValueError(f"{str(path)!r} is a file, and has no split {split!r}; allowed is a split of a folder")
        return [path]
    sizes = {file: file.stat().st_size for file in path.rglob("*") if file.is_file()}
    rows = sum(size for file, size in sizes.items() if file.suffix.lower() in BUILDERS)
    if 2 * rows <= sum(sizes.values()):
        return []
    base = str(path.resolve())
    found = {
        str(name): [file for file in map(Path, files) if file.suffix.lower() in BUILDERS]
        for name, files in DataFilesDict.from_patterns(get_data_patterns(base), base_path=base).items()
    }
    if not found.get(split):
        splits = ", ".join(name for name, files in found.items() if files)
        raise ValueError(f"{str(path)!r} has no split {split!r}; it has {splits}, which '{path}::SPLIT' names")
    return found[split]


def _saved(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    saved = datasets.load_from_disk(path)
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    if split not in splits:
        raise ValueError(f"{str(path)!r} has no split {split!r}; it has {', '.join(splits)}, which ::SPLIT names")
    chosen = splits[split]
    return chosen.to_iterable_dataset() if streaming else chosen


def _file(path: Path, streaming: bool, skip_bad: bool, left_out: dict[str, None]) -> Part:
    """The rows of a file, of which each line was looked at first: `datasets` does not name the line that is wrong."""
    suffix = path.suffix.lower()
    place: Callable[[int], str] = partial(_row, str(path))
    read = path
    options: dict[str, Any] = {}
    if suffix in lines.DELIMITERS:  # text as it stands: "NA" is no missing value, and "007" no number
        features = Features({name: Value("string") for name in lines.header(path)})
        options = {"sep": lines.DELIMITERS[suffix], "keep_default_na": False, "features": features}
    if suffix in lines.LINES:
        starts, wrong = array("q"), []
        for record in lines.records(path):
            if record.fault is None:
                starts.append(record.first)
            elif not skip_bad or lines.is_array(path):
                hint = "" if lines.is_array(path) else "; --skip-bad leaves such lines out, and counts them"
                raise ValueError(f"{record} of {str(path)!r}: {record.fault}{hint}")
            else:
                wrong.append(record)
        if not lines.is_array(path):
            if not starts:
                raise ValueError(f"data is {str(path)!r}, which holds no rows; allowed is one row or more")
            place = partial(_line, str(path), starts)
        left_out |= {f"{record} of {str(path)!r}": None for record in wrong}
        if wrong:
            read = Path(tempfile.mkdtemp(dir=_copies().name)) / path.name
            lines.copy_without(path, wrong, read)
    files = glob.escape(str(read.resolve()))
    return Part(load_dataset(BUILDERS[suffix], data_files=files, split="train", streaming=streaming, **options), place)


@cache
def _copies() -> tempfile.TemporaryDirectory[str]:
    """The folder of files without their wrong lines, which goes with the process: a stream reads them later."""
    return tempfile.TemporaryDirectory(prefix="hf-archs-")


def _row(source: str, number: int) -> str:
    return f"row {number + 1} of {source!r}"


def _line(source: str, starts: array[int], number: int) -> str:
    return f"line {starts[number]} of {source!r}"


def _place(parts: list[Part]) -> Callable[[int], str]:
    if len(parts) == 1:
        return parts[0].place
    ends = [*accumulate(len(part.dataset) for part in parts)]

    def place(number: int) -> str:
        i = bisect_right(ends, number)
        return parts[i].place(number - (ends[i - 1] if i else 0))

    return place


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager: `datasets` shows no progress and logs no error, which this module puts in a sentence."""
    shown, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not shown:
            datasets.enable_progress_bars()
