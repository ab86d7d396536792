"""The places where other libraries decide by a class name, a model type or an attribute of the config.

Their source is searched for the names in `lookups.toml`. Each line with such a name needs an entry there: the test that
shows its effect on our models, or the reason why it does not concern them. A release that adds such a line fails here
until it has an entry.
"""

import importlib.metadata
import importlib.util
import re
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
TABLE = tomllib.loads(Path(__file__).with_name("lookups.toml").read_text(encoding="utf-8"))
PACKAGES = ["transformers", "peft", "accelerate", "trl"]

Line = tuple[str, str]  # file, from its package on, and text; line numbers change with releases


def source_lines(package: str, root: Path) -> list[Line]:
    """The lines of a package that have one of the names, those of single models (`elsewhere`) left out."""
    has_name = re.compile("|".join(map(re.escape, TABLE["names"])))
    found = []
    for path in sorted(root.rglob("*.py")):
        file = f"{package}/{path.relative_to(root).as_posix()}"
        text = path.read_text(encoding="utf-8")
        if has_name.search(text) and not any(fnmatchcase(file, pattern) for pattern in TABLE["elsewhere"]):
            found += [(file, line.strip()) for line in text.splitlines() if has_name.search(line)]
    return found


def installed_lines() -> list[Line]:
    """Of every package that is installed."""
    found = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            found += source_lines(package, Path(spec.origin).parent)
    return found


def decides(entry: dict[str, Any], line: Line) -> bool:
    file, text = line
    if not any(fnmatchcase(file, pattern) for pattern in entry["files"]):
        return False
    return "text" not in entry or re.search(entry["text"], text) is not None


def decided(lines: list[Line], entries: list[dict[str, Any]]) -> tuple[list[list[Line]], list[Line]]:
    """The lines that each entry decides, the first that fits being the one; and those that none does."""
    by_entry: list[list[Line]] = [[] for _ in entries]
    rest = []
    for line in lines:
        first = next((i for i, entry in enumerate(entries) if decides(entry, line)), None)
        (rest if first is None else by_entry[first]).append(line)
    return by_entry, rest


def miscounted(lines: list[Line], entries: list[dict[str, Any]], release: str) -> list[str]:
    """Entries that decide fewer lines than somebody has read, or more."""
    found = []
    for entry, mine in zip(entries, decided(lines, entries)[0]):
        read = entry.get("lines")
        if isinstance(read, dict):  # by release of transformers; a newer release counts as the newest
            read = next((n for name, n in read.items() if release.startswith(name)), [*read.values()][-1])
        if len(mine) != read and (read is not None or not mine):
            found.append(f"{entry['files']} {entry.get('text', '')}: {len(mine)} lines, {read} were read: {mine}")
    return found


@pytest.fixture(scope="module")
def lines() -> list[Line]:
    return installed_lines()


def test_every_line_is_decided(lines):
    assert not decided(lines, TABLE["entry"])[1]


def test_every_entry_decides_as_many_lines_as_were_read(lines):
    here = {file.partition("/")[0] for file, _ in lines}  # TRL is needed by tests only, and may be missing
    entries = [e for e in TABLE["entry"] if any(f.startswith(("*", *here)) for f in e["files"])]
    assert not miscounted(lines, entries, importlib.metadata.version("transformers"))


@pytest.mark.parametrize("entry", TABLE["entry"], ids=lambda e: f"{e['files'][0]} {e.get('text', '')}".strip())
def test_an_entry_gives_a_test_that_exists_or_a_reason(entry):
    assert set(entry) <= {"files", "text", "lines", "tests", "irrelevant"}
    assert ("tests" in entry) != ("irrelevant" in entry)
    assert "irrelevant" not in entry or len(entry["irrelevant"].split()) > 2
    for test in entry.get("tests", ()):
        file, _, name = test.partition("::")
        assert re.search(rf"def {name.rpartition('::')[2]}\(", (REPOSITORY / file).read_text()), test


def test_a_new_line_is_found(tmp_path):
    """One that a release adds: where no entry fits, and where one does and was read before."""
    new = "if model._get_name() in MODEL_FOR_NEXT_YEAR_MAPPING_NAMES.values():"
    for file in ("trainer.py", "models/next/modeling_next.py"):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def loss(model):\n    {new}\n        return model.config.hidden_size\n")
    found = source_lines("transformers", tmp_path)
    assert found == [("transformers/trainer.py", new)]
    assert decided(found, TABLE["entry"])[1] == found

    entry = {"files": ["transformers/*"], "text": "NEXT_YEAR", "lines": 1}
    assert not miscounted(found, [entry], "5.24.0")
    assert "2 lines, 1 were read" in miscounted(2 * found, [entry], "5.24.0")[0]
    assert "0 lines, 1 were read" in miscounted([], [entry], "5.24.0")[0]
    by_release = entry | {"lines": {"5.23": 2, "5.24": 1}}
    for lines, release in ((2 * found, "5.23.0"), (found, "5.24.0"), (found, "5.25.0")):
        assert not miscounted(lines, [by_release], release)
    pattern = {"files": ["transformers/*"]}
    assert not miscounted(2 * found, [pattern], "5.24.0")
    assert miscounted([], [pattern], "5.24.0")
