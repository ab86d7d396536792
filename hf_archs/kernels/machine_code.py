"""The figures of a compiled kernel, read from its machine code; no GPU is needed.

Instructions are counted as they stand in the code of a warp; the code does not tell how often a loop repeats them. A
smaller figure is better, except that tensor instructions must not vanish.
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", re.MULTILINE)
_AMD_INSTRUCTION = re.compile(r"^\t([a-z]\w+)(.*)$|^(\.LBB\w+):", re.MULTILINE)
_NOTHING = ("NOP", "s_nop")
_WAIT = 4  # instructions of a loop that only waits


def usage_of(compiled: Any) -> dict[str, int]:
    """``registers`` of a thread, ``spills`` (bytes of a thread's stack, on which registers are spilled), ``shared``
    (bytes of shared memory of a program).
    """
    asm = compiled.asm
    if "amdgcn" in asm:
        notes = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", asm["amdgcn"]))
        registers, spills = int(notes["vgpr_count"]), 4 * int(notes["vgpr_spill_count"])
    else:
        used = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump(asm["cubin"], "-res-usage"))
        assert used is not None
        registers, spills = int(used[1]), int(used[2])
    return {"registers": registers, "spills": spills, "shared": compiled.metadata.shared}


def instructions_of(compiled: Any) -> dict[str, Any]:
    """Counts of instructions: ``instructions`` (all), ``loops`` (of each loop, in the code's order, without the loops
    inside it), ``tensor`` (by the shape of a product on tensor cores), ``loads`` and ``stores`` (of device memory, by
    width in bits; below 32 the width names the type as well).
    """
    asm = compiled.asm
    code = _amd(asm["amdgcn"]) if "amdgcn" in asm else _nvidia(_cuobjdump(asm["cubin"], "-sass"))
    counts: dict[str, Counter[str]] = {"tensor": Counter(), "loads": Counter(), "stores": Counter()}
    for _, name, _ in code:
        if read := _read(name):
            counts[read[0]][read[1]] += 1
    return {"instructions": len(code), "loops": _loops(code)} | {
        kind: dict(sorted(found.items())) for kind, found in counts.items()
    }


def _cuobjdump(cubin: bytes, option: str) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, option, str(file)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _nvidia(sass: str) -> list[tuple[int, str, int | None]]:
    """For each instruction, its address, its name, and the address that it branches to, or None."""
    code: list[tuple[int, str, int | None]] = []
    for at, name, rest in _INSTRUCTION.findall(sass):
        to = re.search(r"\b0x([0-9a-f]+)\s*$", rest) if name.startswith("BRA") else None
        target = int(to[1], 16) if to else None
        if name not in _NOTHING and target != int(at, 16):  # not padding, nor the final branch to itself
            code.append((int(at, 16), name, target))
    return code


def _amd(assembly: str) -> list[tuple[int, str, int | None]]:
    lines = _AMD_INSTRUCTION.findall(assembly)
    labels = {label: place for place, (_, _, label) in enumerate(lines) if label}
    return [
        (place, name, labels.get(rest.strip()) if "branch" in name else None)
        for place, (name, rest, label) in enumerate(lines)
        if not label and name not in _NOTHING
    ]


def _loops(code: list[tuple[int, str, int | None]]) -> list[int]:
    """The number of instructions in each loop (closed by a backward branch), without those of loops inside it."""
    ends: dict[int, int] = {}  # from a loop's first address to that of the last branch back to it
    for at, _, target in code:
        if target is not None and target < at:
            ends[target] = at
    inside = dict.fromkeys(sorted(ends), 0)
    for at, _, _ in code:
        around = [begin for begin, end in ends.items() if begin <= at <= end]
        if around:
            inside[max(around)] += 1  # the innermost
    return [count for count in inside.values() if count > _WAIT]


def _read(name: str) -> tuple[str, str] | None:
    """The kind of an instruction (tensor, loads or stores) and its shape or width; None for most instructions."""
    parts = name.split(".")
    if parts[0].endswith("MMA") or name.startswith(("v_mfma", "v_smfmac")):
        return "tensor", name
    if parts[0].startswith("LDGSTS"):
        return "loads", f"{_width(parts)} to shared"
    if parts[0] in ("LDG", "LD"):
        return "loads", _width(parts)
    if parts[0] in ("STG", "ST", "RED", "REDG", "ATOMG"):
        return "stores", _width(parts)
    found = re.fullmatch(r"(?:global|buffer|flat)_(load|store)_(\w+)", name)
    if found:
        words = re.fullmatch(r"dword(?:x(\d))?", found[2])
        return f"{found[1]}s", str(32 * int(words[1] or 1)) if words else found[2]
    return None


def _width(parts: list[str]) -> str:
    return next((part for part in parts[1:] if re.fullmatch(r"[US]?(8|16|64|128|256)", part)), "32")
