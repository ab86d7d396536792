"""Private names of other packages that the library leans on: each is written down, is there, and fits our methods.

A line of ``tests/data/host_names.txt`` is a name, the modules of ours that lean on it and, for a name that only some
releases have, the first of them ("since transformers 5.24"). After a dot stands an attribute. After a colon stands a
name in the code of its owner: an attribute of instances, a parameter, a mark on objects of other classes.
"""

import ast
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch
from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedModel, Trainer

import hf_archs
from hf_archs.model.pretrained import ArchPreTrainedModel

CORE = Path(hf_archs.__file__).parent
PLUGINS = CORE.parent / "plugins"
MODULES = {
    ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
    for root, files in ((CORE.parent, CORE.rglob("*.py")), (PLUGINS, PLUGINS.rglob("*.py")))
    for file in sorted(files)
}
TABLE = Path(__file__).parent.parent / "data" / "host_names.txt"
LINE = re.compile(r"(?P<name>\S+)  (?P<modules>\S+(?:, \S+)*)(?:  since (?P<package>\S+) (?P<version>\S+))?")
LINES = [LINE.fullmatch(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
LISTED = {(line["name"], module) for line in LINES for module in line["modules"].split(", ")}
LAST = {re.split("[.:]", name)[-1] for name, _ in LISTED}
HOSTS = {"accelerate", "datasets", "huggingface_hub", "peft", "torch", "transformers", "triton"}
SELF = {"self", "cls"}
PUBLIC = {"_replace", "_MODULES_MAPPING", "_reference"}  # a method that Python documents; ends of public names


def is_private(name: str) -> bool:
    """A part of it begins with one underscore. (Strings such as ``_b`` and ``_of_`` are affixes.)"""
    return any(re.fullmatch(r"_[a-zA-Z]\w*[a-zA-Z0-9]", part) for part in {*name.split(".")} - PUBLIC)


# --- what the host has


def is_there(name: str) -> bool:
    owner, _, inner = name.partition(":")
    try:
        found = pkgutil.resolve_name(owner)
    except (ImportError, AttributeError):
        return False
    return not inner or re.search(rf"\b{inner}\b", inspect.getsource(found)) is not None


@functools.cache
def stored(cls: type) -> set[str]:
    """The attributes that a class sets on its instances."""
    try:
        return set(re.findall(r"\bself\.(_\w+)(?:: [^=\n]+)? = ", inspect.getsource(cls)))
    except (OSError, TypeError):  # written in C, or made by a call
        return set()


@functools.cache
def bases(cls: type) -> list[type]:
    """The host's classes that a class of ours has for bases, and that a mixin has beside it in subclasses of ours; and
    those that configs and models are handed on for without inheriting.
    """
    heirs = [cls]
    for heir in heirs:
        heirs += [child for child in type.__subclasses__(heir) if child.__module__.startswith("hf_archs")]
    every = [base for heir in (*heirs, PreTrainedConfig, PreTrainedModel) for base in heir.__mro__]
    return [base for base in dict.fromkeys(every) if base.__module__.partition(".")[0] in HOSTS]


def giver(cls: type, name: str) -> type | None:
    """The host's class that has a name which a class of ours has too, or takes from itself."""
    return next((base for base in bases(cls) if name in vars(base) or name in stored(base)), None)


def fits(ours: Callable, theirs: Callable) -> bool:
    """Whether ours can be called as theirs: by place, by name (unless it hands on ``*args``), without defaults."""
    own, host = inspect.signature(ours), inspect.signature(theirs).parameters.values()
    plain = [p.name for p in host if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p.name for p in host if p.name in plain and p.default is p.empty]
    named = {p.name: p.name for p in host if p.kind == p.KEYWORD_ONLY}
    named |= {"another": "another"} if any(p.kind == p.VAR_KEYWORD for p in host) else {}
    try:
        placed = own.bind(*plain, **named).arguments
        own.bind(*needed, **named)
        if all(p.kind != p.VAR_POSITIONAL for p in own.parameters.values()):
            own.bind(plain[0], **{name: name for name in plain[1:]}, **named)
    except TypeError:
        return False
    return all(value == name for name, value in placed.items() if isinstance(value, str) and value != plain[0])


# --- what our code takes


def imports(tree: ast.Module) -> dict[str, str]:
    """The names that a file imports, and where each comes from."""
    found = {}
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            first = alias.name if alias.asname or isinstance(node, ast.ImportFrom) else alias.name.partition(".")[0]
            found[alias.asname or first] = f"{node.module}.{first}" if isinstance(node, ast.ImportFrom) else first
    return found


def chain(node: ast.expr) -> tuple[str, list[str]]:
    """``a.b.c`` as ``a`` and the rest, ``f().b.c`` as nothing and the rest."""
    attributes: list[str] = []
    while isinstance(node, ast.Attribute):
        attributes.insert(0, node.attr)
        node = node.value
    return (node.id if isinstance(node, ast.Name) else ""), attributes


def members(node: ast.ClassDef) -> Iterator[str]:
    """The names that a class defines, and those that it takes from ``self``."""
    for part in node.body:
        for target in getattr(part, "targets", [getattr(part, "target", part)]):
            yield getattr(target, "id", getattr(target, "name", ""))
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id in SELF:
            yield part.attr


def hidden(tree: ast.Module) -> set[ast.stmt]:
    """The classes inside functions, whose bases nothing here can look up."""
    inside = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node not in tree.body]
    return {part for node in inside for part in node.body}


def definitions(tree: ast.Module) -> Iterator[str]:
    """Functions, classes, variables, attributes of ``self`` and keys, but for ``_x = other._x``."""
    copies = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute)]
    copied = {target for node in copies for target in node.targets if getattr(target, "id", "") == node.value.attr}
    passed = copied | hidden(tree)
    for node in ast.walk(tree):
        keys = node.keys if isinstance(node, ast.Dict) else []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node not in passed:
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node not in passed:
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and chain(node.value)[0] in SELF:
            yield node.attr
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            keys = [node.slice]
        yield from (key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def uses(tree: ast.Module) -> Iterator[str]:
    """Names that a file takes: whole ones of imports and of reads from them; other attributes, keywords, strings."""
    imported = imports(tree)
    yield from imported.values()
    yield from (part.name for part in hidden(tree) if isinstance(part, ast.FunctionDef))
    inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    formatted = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node not in inner:
            root, attributes = chain(node)
            yield from [".".join((imported[root], *attributes))] if root in imported else attributes
        elif isinstance(node, ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in formatted:
            yield node.value.strip(".") if re.fullmatch(r"[\w.]+", node.value) else ""


def places(module: ModuleType) -> set[str]:
    """The modules that all that a module names comes from, bases of classes included."""
    named = [base for value in vars(module).values() for base in getattr(value, "__mro__", [value])]
    return {module.__name__, *(str(getattr(value, "__module__", getattr(value, "__name__", ""))) for value in named)}


def search(files: Mapping[str, Path]) -> tuple[set[tuple[str, str]], list[tuple[type, str]]]:
    """The host's private names, each with the module of ours that leans on it; our methods in the place of its own.

    An attribute of something unknown is ours where a file that `places` names defines it and the table lacks it.
    """
    modules = {module: importlib.import_module(module) for module in files}
    trees = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in files.items()}
    leans, methods, ours = set(), [], {}
    for module, tree in trees.items():
        taken = set()
        for node in tree.body:
            cls = getattr(modules[module], getattr(node, "name", ""), None)
            if isinstance(node, ast.ClassDef) and isinstance(cls, type):
                taken |= {name for name in members(node) if is_private(name) and giver(cls, name)}
                methods += [(cls, part.name) for part in node.body if getattr(part, "name", "") in taken]
        leans |= {(name, module) for name in taken}
        ours[module] = {*definitions(tree)} - taken
    for module, tree in trees.items():
        own = set().union(*(ours.get(place, ()) for place in places(modules[module]))) - LAST
        for name in filter(is_private, uses(tree)):
            root, _, rest = name.partition(".")
            if rest and not root.startswith("hf_archs"):
                leans.add((name, module))
            else:
                leans |= {(part, module) for part in name.split(".") if is_private(part) and part not in own}
    return leans, methods


@functools.cache
def found() -> tuple[set[tuple[str, str]], list[tuple[type, str]]]:
    return search(MODULES)


# --- the tests


def is_line(name: str, line: str) -> bool:
    """Whether a line is that of a name, which is whole where the code has it from an import."""
    return line == name if "." in name else re.split("[.:]", line)[-1] == name


def missing() -> list[str]:
    """The names that the installed host should have."""
    there = {line["name"] for line in LINES if not line["package"] or since(line["package"], line["version"])}
    return sorted(name for name in there if not is_there(name))


def since(package: str, version: str) -> bool:
    return Version(importlib.metadata.version(package)) >= Version(version)


def unfit(methods: list[tuple[type, str]]) -> list[str]:
    """Methods of ours that cannot be called as the host's."""
    wrong = []
    for cls, name in methods:
        host = giver(cls, name) or object
        ours, theirs = inspect.getattr_static(cls, name), vars(host).get(name)
        if isinstance(theirs, FunctionType | classmethod | staticmethod):
            plain = [getattr(method, "__func__", method) for method in (ours, theirs)]
            if type(ours) is not type(theirs) or not fits(*plain):
                wrong.append(
                    f"{host.__module__}.{host.__qualname__}.{name} (ours: {cls.__module__}.{cls.__qualname__})"
                )
    return wrong


def test_the_table_is_in_order():
    names = [line["name"] for line in LINES]
    assert names == sorted(set(names))
    for line in LINES:
        assert line["modules"].split(", ") == sorted(set(line["modules"].split(", ")))


def test_every_name_is_written_down():
    lines = {module: [name for name, place in LISTED if place == module] for module in MODULES}
    assert not {(name, module) for name, module in found()[0] if not any(is_line(name, line) for line in lines[module])}


def test_every_line_is_needed():
    names = {module: [name for name, place in found()[0] if place == module] for module in MODULES}
    assert not {(line, module) for line, module in LISTED if not any(is_line(name, line) for name in names[module])}


def test_every_name_is_there():
    assert not missing()


def test_methods_fit():
    assert len(found()[1]) >= 12
    assert not unfit(found()[1])


def test_a_name_that_is_gone_is_named(monkeypatch):
    """An attribute, and a parameter."""

    def save_model(self, output_dir=None):
        pass

    monkeypatch.delattr(PreTrainedModel, "_init_weights")
    monkeypatch.setattr(Trainer, "save_model", save_model)
    monkeypatch.delattr(torch._dynamo, "mark_static_address")
    gone = ["PreTrainedModel._init_weights", "Trainer.save_model:_internal_call"]
    assert missing() == ["torch._dynamo.mark_static_address", *(f"transformers.{name}" for name in gone)]


@pytest.mark.parametrize(
    "method",
    [
        lambda self, module, scale: None,
        lambda self, module, scale=1.0: None,
        lambda self, part: None,
        lambda self, module, **options: None,
        lambda self: None,
        classmethod(lambda cls, module: None),
    ],
)
def test_a_method_that_has_changed_is_named(monkeypatch, method):
    monkeypatch.setattr(PreTrainedModel, "_init_weights", method)
    (name,) = unfit([(ArchPreTrainedModel, "_init_weights")])
    assert name.startswith("transformers.modeling_utils.PreTrainedModel._init_weights ")


def test_what_is_found(monkeypatch, tmp_path):
    """Each way to lean on the host; ``_own``, ``_is_mine``, ``_mine`` and ``_kept`` are ours."""
    file = tmp_path / "hf_archs_made.py"
    file.write_text(
        "import torch._dynamo as dynamo\n"
        "from torch import nn\n"
        "def _own(x): return x._by_attribute or getattr(x, '_by_string') or f'{x}_affix'\n"
        "class Mixin:\n"
        "    _is_mine = False\n"
        "    def _apply(self, fn): return self._buffers, fn(_by_keyword=dynamo.config.verbose)\n"
        "class Made(Mixin, nn.Module):\n"
        "    def f(self):\n"
        "        class Inside(nn.Module):\n"
        "            def _named_members(self): pass\n"
        "    def _mine(self): self._kept = _own(self); return self._kept._mine\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names, methods = search({"hf_archs_made": file})
    taken = {"_by_attribute", "_by_string", "_by_keyword", "_apply", "_buffers", "_named_members"}
    assert {name for name, _ in names} == taken | {"torch._dynamo", "torch._dynamo.config.verbose"}
    assert [name for _, name in methods] == ["_apply"]
    assert unfit(methods)  # it takes no recurse
