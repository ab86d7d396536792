"""``hf-archs bench``: the measures of the plugins, the description of the machine, and the file of results."""

import contextlib
import gc
import importlib
import importlib.util
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_archs import registry
from hf_archs.kernels.backend import backend_for
from hf_archs.testing.measuring import Measure, Result, compare, copy_bandwidth


def measures(kind: str, device: torch.device, names: list[str] | None = None) -> Iterator[Measure]:
    """The measures in the plugins' modules ``bench``: ``ops(device)`` or ``models(device)``.

    Args:
        kind: ``ops`` or ``models``.
        names: architectures; None takes all.
    """
    for name in names or registry.architectures():
        package = registry.get_architecture(name).config_class.__module__.partition(".")[0]
        if importlib.util.find_spec(f"{package}.bench") is not None:
            yield from getattr(importlib.import_module(f"{package}.bench"), kind)(device)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The hardware and the versions that the figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        if device.type == "cpu":
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "backend": backend_for(torch.empty(0, device=device)),
        "command": " ".join(sys.argv),
    }


def run(measures: Iterator[Measure], device: torch.device, report: Callable[[Result], None]) -> list[Result]:
    """Run the measures in order, and report each result at once."""
    bandwidth = copy_bandwidth(device)
    results = []
    for measure in measures:
        results.append(compare(measure, device, bandwidth))
        report(results[-1])
        gc.collect()
    return results


def write(results: list[Result], device: torch.device, path: Path) -> None:
    """Write the machine and the results as JSON."""
    text = json.dumps({"machine": describe_machine(device), "results": [asdict(r) for r in results]}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
