"""Which way the imports may point: kernels -> layers -> mixers -> blocks -> models; core never knows a plugin."""

import ast
import sys
from pathlib import Path

import pytest

import hf_archs

ROOT = Path(hf_archs.__file__).parent
REPOSITORY = ROOT.parent
PLUGINS = sorted(path.name for path in (REPOSITORY / "plugins").iterdir() if (path / "__init__.py").exists())
CORE = sorted(ROOT.rglob("*.py"))
# what stands below the models, and may not import them
BELOW = {
    "hf_archs.kernels.backend": (),
    "hf_archs.kernels": ("hf_archs.kernels.backend", "hf_archs.kernels"),
    # but for the errors, for types and inside functions
    "hf_archs.registry": ("hf_archs.config.model", "hf_archs.errors", "hf_archs.native.formats"),
    "hf_archs.layers.norm": ("hf_archs.kernels", "hf_archs.kernels.backend"),
    "hf_archs.layers.convolution": (
        "hf_archs.kernels",
        "hf_archs.kernels.backend",
        "hf_archs.cache",
    ),  # what a mixer hands it
    "hf_archs.cache.call": (),
    "hf_archs.cache": ("hf_archs.registry", "hf_archs.cache.call"),
    "hf_archs.native.stub": ("hf_archs.registry",),
    "hf_archs.config.model": (
        "hf_archs.registry",
        "hf_archs.native.stub",
        "hf_archs.native.reading",
        "hf_archs.cache.call",
        "hf_archs.errors",
        "hf_archs.native.formats",
        "hf_archs.__version__",
    ),
    "hf_archs.errors": (),
    "hf_archs.native.formats": ("hf_archs.registry",),
    "hf_archs.native.pickles": (),
    "hf_archs.native.reading": (
        "hf_archs.registry",
        "hf_archs.native.formats",
        "hf_archs.errors",
        "hf_archs.native.pickles",
    ),
}
# what of a plugin is about models: the rest are ops (filters are layers between the two, distillation makes models)
MODEL_FILES = ("__init__", "configuration", "mixer", "modeling", "conversion", "bench", "filters", "distillation")
MODEL_FILES += ("routing", "expert_layer", "feed_forward", "callbacks", "upcycling", "presets", "switch_layers")
MODEL_FILES += ("torchscale",)
# programs over the library: which architecture they take where none is named, and which peers they measure
PROGRAMS = {"cli.py", "quickstart"}
# a value that a foreign checkpoint format leaves out, and what transformers calls a layer
FOREIGN = {("formats.py", "Mamba1"), ("configuration.py", "moe"), ("parallel.py", "hybrid")}


def module_of(file: Path, root: Path) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> set[str]:
    """Every module that a file imports, wherever in the file, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


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
                module = ROOT.joinpath(*name.split(".")[1:2])
                assert module.is_dir() or module.with_suffix(".py").is_file(), f"{file}: {name} is no submodule"


@pytest.mark.parametrize("below", BELOW)
def test_nothing_imports_what_stands_above_it(below):
    allowed = (*BELOW[below], below)
    files = [file for file in CORE if within(module_of(file, REPOSITORY), below)]
    assert files
    for file in files:
        for name in imports(file):
            assert not within(name, "hf_archs") or within(name, *allowed), f"{file}: {name}"


@pytest.mark.parametrize("plugin", PLUGINS)
def test_ops_import_no_models(plugin):
    """The ops of a plugin can be used, and tested, without transformers."""
    for file in sorted((REPOSITORY / "plugins" / plugin).rglob("*.py")):
        if file.stem not in MODEL_FILES:
            for name in imports(file):
                assert not within(name, "transformers", "hf_archs.model.backbone", "hf_archs.cache"), f"{file}: {name}"
                assert not within(name, *(f"{plugin}.{x}" for x in ("configuration", "mixer", "modeling"))), file


@pytest.mark.parametrize(
    "file",
    [file for file in CORE if file.relative_to(ROOT).parts[0] not in PROGRAMS],
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
    names = {plugin.removeprefix("hf_archs_") for plugin in PLUGINS}
    for node in ast.walk(tree):
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
