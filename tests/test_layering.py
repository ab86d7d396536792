"""The direction of imports: kernels -> layers -> blocks -> models -> commands; the core never imports a plugin."""

import ast
import sys
from pathlib import Path

import pytest

import hf_archs

ROOT = Path(hf_archs.__file__).parent
REPOSITORY = ROOT.parent
PLUGINS = sorted(path.name for path in (REPOSITORY / "plugins").iterdir() if (path / "__init__.py").exists())
CORE = sorted(ROOT.rglob("*.py"))
OURS = [*CORE, *sorted((REPOSITORY / "plugins").rglob("*.py"))]
# modules below the models, and the modules of the library that each may import
GROUND = ("hf_archs.errors", "hf_archs.parts")
BELOW = {
    "hf_archs.errors": (),
    "hf_archs.parts": (),
    "hf_archs.kernels": (),
    "hf_archs.cache.call": (),
    "hf_archs.cache": (*GROUND, "hf_archs.native.hub"),
    "hf_archs.registry": (*GROUND, "hf_archs.native.hosts"),
    "hf_archs.native.formats": ("hf_archs.parts",),
    "hf_archs.native.hub": ("hf_archs.errors",),
    "hf_archs.native.pickles": (),
    "hf_archs.native.hosts": (),
    "hf_archs.native.state_spaces": ("hf_archs.native.formats",),
    "hf_archs.native.stub": ("hf_archs.registry", "hf_archs.native.hosts"),
    "hf_archs.native.model_card": ("hf_archs.registry", "hf_archs.parts"),
    "hf_archs.native.disk": ("hf_archs.native.model_card",),
    "hf_archs.native.reading": (*GROUND, "hf_archs.registry", "hf_archs.native", "hf_archs.cache.call"),
    "hf_archs.native": (*GROUND, "hf_archs.registry", "hf_archs.cache.call"),
    "hf_archs.config.pattern": ("hf_archs.errors",),
    "hf_archs.config.model": (*GROUND, "hf_archs.registry", "hf_archs.native", "hf_archs.cache.call"),
    "hf_archs.layers.norm": ("hf_archs.kernels",),
    "hf_archs.layers.convolution": ("hf_archs.kernels", "hf_archs.cache"),  # it takes a slot of the cache
    "hf_archs.layers": (*GROUND, "hf_archs.registry", "hf_archs.kernels", "hf_archs.cache"),
    "hf_archs.config": (*GROUND, "hf_archs.registry", "hf_archs.native", "hf_archs.cache.call", "hf_archs.layers"),
    "hf_archs.data": (*GROUND, "hf_archs.native.disk"),
}
# models and their dependencies, which ops and kernels must not import
MODELS = ("hf_archs.config", "hf_archs.layers", "hf_archs.model", "hf_archs.cache", "hf_archs.native", "transformers")
# programs over the library, which name default architectures and measured peers
PROGRAMS = ("cli.py", "quickstart")
# a default of a foreign checkpoint format, and names of transformers
FOREIGN = {("state_spaces.py", "Mamba1"), ("model.py", "moe"), ("side_by_side.py", "hybrid")}
LONGEST = 450  # lines of a file that holds no kernels


def module_of(file: Path) -> str:
    root = REPOSITORY if file.is_relative_to(ROOT) else REPOSITORY / "plugins"
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in OURS}


def imports(file: Path) -> set[str]:
    """Every module that a file imports, wherever in the file but for types alone, as dotted names."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def needs(file: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports: those named, and the packages that they stand in and the file does not.

    (A package that the file stands in runs before it. Where the file names something in it, it needs it all the same.)
    """
    found = set()
    here = next(module for module, place in modules.items() if place == file)
    for name in imports(file):
        named = name if name in modules else name.rpartition(".")[0]
        if named in modules:
            parts = named.split(".")
            around = {".".join(parts[:count]) for count in range(1, len(parts))}
            found |= {named} | {package for package in around if not within(here, package)}
    return found


def circles(modules: dict[str, Path]) -> set[frozenset[str]]:
    """The largest sets of modules in which each imports each, by way of others or at once."""
    direct = {module: needs(file, modules) for module, file in modules.items()}
    reached: dict[str, set[str]] = {}
    for module in modules:
        found, waiting = set(), [module]
        while waiting:
            new = direct[waiting.pop()] - found
            found |= new
            waiting += new
        reached[module] = found
    return {frozenset(b for b in found if a in reached[b]) for a, found in reached.items() if a in found}


def test_there_are_plugins():
    assert {"hf_archs_mamba", "hf_archs_mamba2", "hf_archs_retnet", "hf_archs_hyena"} <= set(PLUGINS)
    assert len(CORE) > 10


@pytest.mark.parametrize("file", CORE, ids=lambda file: str(file.relative_to(ROOT)))
def test_core_imports_no_plugin(file):
    wrong = {name for name in imports(file) if name.partition(".")[0].startswith("hf_archs_")}
    assert not wrong


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_imports_no_plugin_and_no_package_root(plugin):
    """It imports submodules of the core: `from hf_archs import x` would go round in a circle when it comes first."""
    for file in sorted((REPOSITORY / "plugins" / plugin).rglob("*.py")):
        for name in imports(file):
            package = name.partition(".")[0]
            assert not package.startswith("hf_archs_") or package == plugin, f"{file}: {name}"
            if package == "hf_archs":
                assert ".".join(name.split(".")[:2]) in MODULES, f"{file}: {name} is no submodule"


@pytest.mark.parametrize("file", OURS, ids=module_of)
def test_only_the_program_imports_commands(file):
    if not within(module_of(file), "hf_archs.commands", "hf_archs_main"):
        assert not {name for name in imports(file) if within(name, "hf_archs.commands")}


def test_no_circle():
    assert not circles(MODULES)


def test_a_circle_is_found(tmp_path):
    """Inside functions too, and by way of a package that names what is in it; not for types alone."""
    code = {
        "p.__init__": "",
        "p.a": "def f():\n    import p.b",
        "p.b": "from p import c",
        "p.c": "from p.a import f\nimport p.d",
        "p.d": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.c import f",
        "p.e": "from q.x import y",
        "q.__init__": "from q import x",
        "q.x": "from q import z",
        "q.z": "import p.e",
    }
    modules = {name.removesuffix(".__init__"): tmp_path / f"{name}.py" for name in code}
    for name, text in code.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert circles(modules) == {frozenset({"p.a", "p.b", "p.c"}), frozenset({"p.e", "q", "q.x", "q.z"})}


@pytest.mark.parametrize("below", BELOW)
def test_nothing_imports_what_stands_above_it(below):
    allowed = (*BELOW[below], below)
    inner = [other for other in BELOW if other != below and within(other, below)]  # they have entries of their own
    modules = [module for module in MODULES if within(module, below) and not within(module, *inner)]
    assert modules
    for module in modules:
        for name in imports(MODULES[module]):
            assert not within(name, "hf_archs") or within(name, *allowed), f"{module}: {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if "ops" in m.split(".") or within(m, "hf_archs.kernels")])
def test_ops_import_no_models(module):
    """They import kernels, and ops of their own package."""
    plugin = module.partition(".")[0]
    for name in imports(MODULES[module]):
        assert not within(name, *MODELS), f"{module}: {name}"
        own = ("hf_archs.kernels",) if plugin == "hf_archs" else ("hf_archs.kernels", f"{plugin}.ops")
        assert not name.startswith("hf_archs") or within(name, *own), f"{module}: {name}"


def test_every_plugin_keeps_its_ops_in_a_folder():
    """An op that is outside would be held to nothing."""
    for module in MODULES:
        if module.endswith(("_portable", "_triton")):
            assert "ops" in module.split(".") or within(module, "hf_archs.kernels"), module


@pytest.mark.parametrize("file", OURS, ids=module_of)
def test_files_are_short(file):
    if not {"kernels", "ops"} & set(file.relative_to(REPOSITORY).parts):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_one_look_shows_the_core():
    entries = sorted(path.name for path in ROOT.iterdir() if path.name != "__pycache__")
    assert len(entries) <= 16, entries


@pytest.mark.parametrize("plugin", PLUGINS)
def test_models_of_a_plugin_are_declared(plugin):
    file = REPOSITORY / "plugins" / plugin / "modeling.py"
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 35


@pytest.mark.parametrize(
    "file",
    [file for file in CORE if not {file.name, *file.relative_to(ROOT).parts} & set(PROGRAMS)],
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_core_names_no_architecture(file):
    """Neither a name nor a string of the code; comments and docstrings may give examples."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    # lists of compiled shapes name the published models that have them
    shapes = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name == "aot_specs"]
    examples = {node for function in shapes for node in ast.walk(function)}
    names = {plugin.removeprefix("hf_archs_") for plugin in PLUGINS}
    for node in set(ast.walk(tree)) - examples:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            said = node.value
        elif isinstance(node, ast.Name):
            said = node.id
        elif isinstance(node, ast.Attribute):
            said = node.attr
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            said = node.name
        else:
            continue
        if (file.name, said) in FOREIGN:
            continue
        assert not any(name in said.lower() for name in names), f"{file}:{node.lineno}: {said}"


def test_the_program_stands_beside_the_plugins_and_imports_nothing():
    """Of hf-archs or from elsewhere: importing anything of the package imports torch, and takes seconds."""
    files = [path.name for path in (REPOSITORY / "plugins").iterdir() if path.is_file()]
    assert files == ["hf_archs_main.py"]
    found = {name.partition(".")[0] for name in imports(REPOSITORY / "plugins" / "hf_archs_main.py")}
    assert found <= sys.stdlib_module_names


def test_plugins_are_found_through_entry_points():
    """Every plugin folder has its entry point, which names the module, and nothing else loads it."""
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert sorted(project["entry-points"]["hf_archs.plugins"].values()) == PLUGINS
