"""The baseline of the kernels' figures, and the comparison of new figures with it.

A baseline is a JSON file with the toolchain that made it, and a line for each kernel and target. Another toolchain
makes other machine code, so only figures of the same toolchain are compared.
"""

import json
from typing import Any

SLACK = 1.03  # by this factor a count of instructions may grow; no other figure may
USAGE = ("registers", "spills", "shared")


def toolchain() -> dict[str, str]:
    """The versions of Triton (which holds AMD's compiler) and of both assemblers in its wheel."""
    import triton
    from triton import knobs

    assemblers = {"ptxas": knobs.nvidia.ptxas, "ptxas-blackwell": knobs.nvidia.ptxas_blackwell}
    return {"triton": triton.__version__} | {name: str(tool.version) for name, tool in assemblers.items()}


def figures(report: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The figures in a report of `hf_archs.kernels.aot.check`, by entry and target; kernels that failed have none."""
    return {
        f"{kernel['module']}.{kernel['kernel']}, {kernel['label']}": {
            target: found for target, found in kernel["targets"].items() if "error" not in found
        }
        for kernel in report["kernels"]
    }


def dumps(report: dict[str, Any]) -> str:
    """The figures of ``report`` as a baseline: JSON with a line for each kernel and target."""
    entries = []
    for entry, targets in figures(report).items():
        lines = [f"   {json.dumps(target)}: {json.dumps(found)}" for target, found in targets.items()]
        entries.append(f"  {json.dumps(entry)}: {{\n" + ",\n".join(lines) + "\n  }")
    head = f' "toolchain": {json.dumps(toolchain())},\n "kernels": {{\n'
    return "{\n" + head + ",\n".join(entries) + "\n }\n}\n"


def compare(report: dict[str, Any], baseline: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Compare the figures of ``report`` with those of ``baseline``, for each target and figure that both have.

    Returns:
        two lists of sentences: on figures that are worse and kernels that only one side has, and on figures that are
        better. A larger figure is worse: registers are compared in steps of 8 (the unit in which a thread gets them),
        counts of instructions only beyond `SLACK`. To lose all tensor instructions is worse, too.
    """
    worse, better = [], []
    now, before = figures(report), baseline["kernels"]
    modules = {kernel["module"] for kernel in report["kernels"]}
    for entry in before.keys() - now.keys():
        if entry.partition(",")[0].rpartition(".")[0] in modules:
            worse.append(f"{entry}: is in the baseline, but not in aot_specs()")
    for entry, targets in now.items():
        if entry not in before:
            worse.append(f"{entry}: is not in the baseline")
            continue
        for target, found in targets.items():
            for name, then in before[entry].get(target, {}).items():
                if name not in found:
                    continue
                cost, cost_then = _cost(name, found[name]), _cost(name, then)
                slack = SLACK if name in ("instructions", "loops") else 1
                lost = name == "tensor" and cost_then > cost == 0
                if cost > slack * cost_then or lost:
                    worse.append(f"{entry}, {target}: {name} {text(then)} -> {text(found[name])}")
                elif cost < cost_then:
                    better.append(f"{entry}, {target}: {name} {text(then)} -> {text(found[name])}")
    return sorted(worse), better


def _cost(name: str, figure: Any) -> int:
    if isinstance(figure, dict):
        return sum(figure.values())
    if isinstance(figure, list):
        return sum(figure)
    return -(-figure // 8) if name == "registers" else figure


def text(figure: Any) -> str:
    """A figure as text: counts with their widths or shapes, or the loops' counts one after the other."""
    if isinstance(figure, dict):
        return ", ".join(f"{count} x {what}" for what, count in figure.items()) or "none"
    if isinstance(figure, list):
        return " + ".join(map(str, figure)) or "none"
    return str(figure)
