"""Every public name in the list can be imported; the list has all names of packages and documents."""

import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import hf_archs
from hf_archs import registry

REPOSITORY = Path(hf_archs.__file__).parent.parent
NAMES = (Path(__file__).parent.parent / "data" / "public_names.txt").read_text().split()
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(REPOSITORY.glob("model_cards/*.md"))]
PLUGINS = sorted(path.parent.name for path in REPOSITORY.glob("plugins/*/__init__.py"))
COMMANDS = [
    *("list", "doctor", "init", "train", "generate", "chat", "serve", "convert", "describe"),
    *("evaluate", "inspect", "bench", "quickstart"),
]


def find(name: str) -> object:
    """The object of a dotted name: a member of a module, or a module."""
    module, _, last = name.rpartition(".")
    with warnings.catch_warnings():  # moved names work for one release, with a warning
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return getattr(importlib.import_module(module), last)
        except AttributeError:
            return importlib.import_module(name)


def test_each_is_there():
    failed = {}
    for name in NAMES:
        try:
            find(name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    assert not failed


def test_they_are_sorted_and_once():
    assert sorted(set(NAMES)) == NAMES


@pytest.mark.parametrize("module", ["hf_archs", "hf_archs.kernels", "hf_archs.testing.contract", *PLUGINS])
def test_the_names_of_a_package_are_written_down(module):
    assert {f"{module}.{name}" for name in importlib.import_module(module).__all__} <= set(NAMES)


@pytest.mark.parametrize("module", ["hf_archs.registry", "hf_archs.cache"])
def test_the_names_of_a_module_are_written_down(module):
    """Its own classes and functions without an underscore."""
    for name, value in vars(importlib.import_module(module)).items():
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module and name[0] != "_":
            assert f"{module}.{name}" in NAMES


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_is_written_down(document):
    """Names with a dotted path or in an import; methods count as their class, and modules by their members."""
    text = document.read_text(encoding="utf-8")
    named = {match.rstrip(".") for match in re.findall(r"\bhf_archs\w*(?:\.\w+)+", text)} - {registry.ENTRY_POINT_GROUP}
    for module, listed in re.findall(r"from (hf_archs[\w.]*) import ([\w, ]+)", text):
        named |= {f"{module}.{name.strip()}" for name in listed.split(",")}
    known = {*NAMES, *(name.rpartition(".")[0] for name in NAMES), "hf_archs.testing"}
    unknown = {name for name in named if name not in known and name.rpartition(".")[0] not in NAMES}
    assert not unknown


def test_plugins_come_by_this_group():
    assert registry.ENTRY_POINT_GROUP == "hf_archs.plugins"
    found = importlib.metadata.distribution("hf-archs").entry_points
    assert {point.value for point in found if point.group == "hf_archs.plugins"} == set(PLUGINS)
    assert [point.name for point in found if point.group == "console_scripts"] == ["hf-archs"]


def test_the_commands():
    """The help and README list the same commands."""
    code = "import hf_archs_main; hf_archs_main.main()"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.partition("Commands:")[2].strip().splitlines()] == COMMANDS
    named = re.search(r"`hf-archs --help`: ([^.]+)\.", (REPOSITORY / "README.md").read_text())
    assert set(re.findall(r"`(\w+)`", named[1])) == set(COMMANDS)


def test_every_package_brings_its_types():
    for package in (REPOSITORY / "hf_archs", *(REPOSITORY / "plugins" / plugin for plugin in PLUGINS)):
        assert (package / "py.typed").is_file()
