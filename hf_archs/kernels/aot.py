"""Compile every Triton kernel ahead of time, also for chips that this machine lacks, and measure the machine code.

A module of kernels is named ``*_triton.py`` and has a function ``aot_specs() -> list[KernelSpec]`` with an entry for
every kernel and every config that it may be launched with. `check` compiles them all for `TARGETS`, and
``scripts/check_kernels`` shows the results. Triton must compile for that (not run under ``TRITON_INTERPRET``). Triton
may also be absent, so this file imports it inside functions.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import re
from collections import Counter
from collections.abc import Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_archs.kernels.machine_code import instructions_of, usage_of

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

# Compile a product and a sum to one fused multiply-add. Every launch passes this, since Triton's default is the
# opposite from 3.10 on, and 3.9 warns of that change.
FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class KernelSpec:
    """One kernel with one config, as it would be launched.

    Attributes:
        kernel: the ``@triton.jit`` function itself (not its autotuner).
        signature: the type of every argument by name: ``"*bf16"``, ``"*fp32"``, ``"*i32"``, ``"i32"``, ``"i64"``,
            ``"fp32"`` or ``"constexpr"``. Pointers are assumed to be divisible by 16, as torch's allocations are. An
            integer that is divisible by 16 is ``"i32:16"``, since Triton specialises a launch on that.
        constexprs: the value of every argument that is ``"constexpr"``, such as a pointer that is ``None`` or a stride
            of 1.
        num_warps: warps in a program.
        num_stages: stages of the software pipeline.
        label: tells this entry from the kernel's others. If the shape is a published model's, the label begins with the
            model's name.
    """

    kernel: JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    label: str = ""


@dataclass(frozen=True)
class Target:
    """A chip to compile for, with the shared memory that one program may use there, in bytes."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS = (
    Target("sm_80", "cuda", 80, 32, 163 * 1024),
    Target("sm_86", "cuda", 86, 32, 99 * 1024),
    Target("sm_90", "cuda", 90, 32, 227 * 1024),
    Target("sm_100", "cuda", 100, 32, 227 * 1024),
    Target("sm_120", "cuda", 120, 32, 99 * 1024),
    Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
)
COUNTED = ("sm_90",)  # targets whose instructions are counted: few, since disassembling takes as long as compiling


def targets_named(names: Iterable[str]) -> tuple[Target, ...]:
    """The entries of `TARGETS` with these names.

    Raises:
        ValueError: for another name, such as that of a chip before sm_80. Ops run in their portable form there, since
            Triton's kernels use no tensor instructions and spill kilobytes per thread (`hf_archs.kernels.backend`).
    """
    known = {target.name: target for target in TARGETS}
    for name in names:
        if name not in known:
            old = re.fullmatch(r"sm_[1-7]\d", name)
            why = "; below sm_80 ops run in their portable form, and no kernel is compiled" if old else ""
            raise ValueError(f"no target is called {name!r}: there are {', '.join(known)}{why}")
    return tuple(known[name] for name in names)


def kernel_modules() -> dict[str, Path]:
    """Every ``*_triton`` module of hf_archs and of the installed plugins: import name -> source file."""
    packages = {"hf_archs"} | {e.module for e in importlib.metadata.entry_points(group="hf_archs.plugins")}
    found = {}
    for package in sorted(packages):
        spec = importlib.util.find_spec(package)
        for root in map(Path, (spec and spec.submodule_search_locations) or ()):
            for file in sorted(root.rglob("*_triton.py")):
                found[".".join((package, *file.relative_to(root).with_suffix("").parts))] = file
    return found


def jit_kernels(source: str) -> set[str]:
    """The names of the ``@triton.jit`` functions in a module's source that are kernels.

    A function that another ``@triton.jit`` function of the module calls is part of the caller, and no kernel.
    """

    def is_jit(decorator: ast.expr) -> bool:
        if isinstance(decorator, ast.Call):
            decorator = decorator.func
        return ast.unparse(decorator) in ("triton.jit", "jit")

    functions = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and any(map(is_jit, node.decorator_list))
    ]
    called = {
        node.func.id
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return {function.name for function in functions} - called


@functools.cache
def _specs(module: str) -> list[KernelSpec]:
    return importlib.import_module(module).aot_specs()


def compile_spec(spec: KernelSpec, target: Target) -> Any:
    """Compile for ``target``; returns Triton's ``CompiledKernel`` (``.asm`` holds the code, ``.metadata.shared``)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for place, name in enumerate(spec.kernel.arg_names):
        kind, _, divisor = spec.signature[name].partition(":")
        signature[name] = kind
        if divisor or kind.startswith("*"):
            attributes[(place,)] = [["tt.divisibility", int(divisor or 16)]]
    source = ASTSource(spec.kernel, signature, spec.constexprs, attributes)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **FUSED}
    return triton.compile(source, GPUTarget(target.backend, target.arch, target.warp_size), options)


def _measure(module: str, index: int, target: Target, counted: bool) -> dict[str, Any]:
    try:
        compiled = compile_spec(_specs(module)[index], target)
        return usage_of(compiled) | (instructions_of(compiled) if counted else {})
    except Exception as error:  # any error is reported for this kernel, and the others are still compiled
        return {"error": f"{type(error).__name__}: {error}"}


def check(
    modules: dict[str, Path] | None = None,
    processes: int = 2,
    targets: tuple[Target, ...] = TARGETS,
    counted: Collection[str] = COUNTED,
) -> dict[str, Any]:
    """Compile every kernel and config of ``modules`` (default: `kernel_modules`) for every one of ``targets``.

    Returns:
        ``{"kernels": [...], "errors": [...]}``. A kernel has ``module, kernel, label, num_warps, num_stages, signature,
        constexprs`` and ``targets``, which maps a target's name to the figures of
        `hf_archs.kernels.machine_code`: ``registers``, ``spills``, ``shared``, and for those that are ``counted``
        ``instructions``, ``loops``, ``tensor``, ``loads`` and ``stores``. An error is a sentence: a kernel in the
        source that no entry of ``aot_specs()`` covers, two entries of one kernel with the same label, a kernel that
        does not compile, or a kernel that needs more shared memory than the chip has.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET``, where nothing compiles.
    """
    from triton import knobs

    if knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled in a process that has TRITON_INTERPRET set")
    kernels: list[dict[str, Any]] = []
    errors: list[str] = []
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = []
        for module, file in (kernel_modules() if modules is None else modules).items():
            specs = _specs(module)
            listed = Counter((spec.kernel.__name__, spec.label) for spec in specs)
            for name in sorted(jit_kernels(file.read_text()) - {name for name, _ in listed}):
                errors.append(f"{module}.{name} is a kernel in the source, but aot_specs() does not list it")
            for (name, label), count in listed.items():
                if count > 1:
                    errors.append(f"{module}.{name} has {count} entries labelled {label!r} in aot_specs()")
            for index, spec in enumerate(specs):
                entry = {
                    "module": module,
                    "kernel": spec.kernel.__name__,
                    "label": spec.label,
                    "num_warps": spec.num_warps,
                    "num_stages": spec.num_stages,
                    "signature": spec.signature,
                    "constexprs": spec.constexprs,
                    "targets": {},
                }
                kernels.append(entry)
                for target in targets:
                    job = pool.submit(_measure, module, index, target, target.name in counted)
                    pending.append((entry, target, job))
        for entry, target, job in pending:
            result = entry["targets"][target.name] = job.result()
            where = f"{entry['module']}.{entry['kernel']} ({entry['label']}) for {target.name}"
            if "error" in result:
                errors.append(f"{where} does not compile: {result['error']}")
            elif result["shared"] > target.shared_limit:
                errors.append(f"{where} wants {result['shared']} bytes of shared memory; {target.shared_limit} exist")
    return {"kernels": kernels, "errors": errors}
