"""The state of an installation: versions, the device, the ops and the plugins."""

import importlib.metadata
import importlib.util
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import hf_archs
from hf_archs import registry
from hf_archs.commands import tables, versions
from hf_archs.kernels import backend


def examine(console: Console) -> bool:
    """Print the state of this installation. False if a version is missing or not allowed, or a plugin failed."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    table = Table("component", "found", "compared with tested", title="hf-archs doctor", title_justify="left")
    table.add_row("hf-archs", hf_archs.__version__)
    table.add_row("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    comparisons = versions.compare()
    for c in comparisons:
        table.add_row(c.name, c.found or "not installed", c.verdict if c.allowed else f"[red]{c.verdict}[/]")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    table.add_row("device", f"{device.type} ({name})")
    table.add_row("architectures", ", ".join(registry.architectures()))
    table.add_section()
    chosen = backend.backend_for(torch.empty(0, device=device))
    for op, forms in _implementations().items():
        table.add_row(f"op {op}", chosen if chosen in forms else "portable")
    table.add_section()
    failed = registry.failed_plugins()
    for plugin, why in failed.items():
        table.add_row(f"plugin {plugin}", f"[red]failed:[/] {escape(why)}")
    if not failed:
        table.add_row("plugins", "all loaded")
    tables.show(table, console)
    return not failed and all(c.allowed for c in comparisons)


def _implementations() -> dict[str, set[str]]:
    """The ops of hf_archs and the plugins with their forms, from the files: ``x_portable.py``, ``x_triton.py``."""
    plugins = importlib.metadata.entry_points(group=registry.ENTRY_POINT_GROUP)
    ops: dict[str, set[str]] = {}
    for package in sorted({"hf_archs", *(plugin.module.partition(".")[0] for plugin in plugins)}):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for form in ("portable", "triton"):
                for file in sorted(Path(folder).rglob(f"*_{form}.py")):
                    ops.setdefault(file.stem.removesuffix(f"_{form}"), {"reference"}).add(form)
    return ops
