"""Every Triton kernel compiles for every chip we name, and what is wrong with one is found."""

import ast
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_archs.kernels import aot

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("kernels") / "report.json"
    command = [sys.executable, ROOT / "scripts" / "check_kernels", "--json", file]
    # the script drops the variable itself
    run = subprocess.run(command, env={**ENVIRONMENT, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Warning" not in run.stderr, run.stderr
    return json.loads(file.read_text())


def test_every_kernel_compiles_for_every_target(report):
    assert report["errors"] == []
    limits = {target.name: target.shared_limit for target in aot.TARGETS}
    assert set(limits) == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for kernel in report["kernels"]:
        assert set(kernel["targets"]) == set(limits)
        for name, figures in kernel["targets"].items():
            assert 0 < figures["registers"] <= 512
            assert 0 <= figures["shared"] <= limits[name]
            assert figures["spills"] >= 0


def test_every_kernel_in_the_source_is_there(report):
    """Found by another road than the library's: every launch in the source names a kernel."""
    listed = {kernel["kernel"] for kernel in report["kernels"]}
    files = [*(ROOT / "hf_archs").rglob("*_triton.py"), *(ROOT / "plugins").rglob("*_triton.py")]
    assert len(files) >= 4
    for file in files:
        launched = set(re.findall(r"(\w+_kernel)\[", file.read_text()))
        assert launched, file
        assert launched <= listed


def test_every_launch_says_that_multiply_adds_are_fused():
    """As every compilation ahead of time does; Triton's own default changes with 3.10."""
    for file in aot.kernel_modules().values():
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript):
                given = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None]
                assert "FUSED" in given, f"{file.name}:{call.lineno}"


def test_every_config_is_there(report):
    """Each dictionary in a module's ``*CONFIGS`` is, as far as a kernel has its names, the config of some entry."""
    for module in aot.kernel_modules():
        kernels = [kernel for kernel in report["kernels"] if kernel["module"] == module]
        entries = [k["constexprs"] | {"num_warps": k["num_warps"], "num_stages": k["num_stages"]} for k in kernels]
        tables = [v for n, v in vars(importlib.import_module(module)).items() if n.endswith("CONFIGS")]
        for config in itertools.chain(*tables):
            assert any(all(entry.get(name, value) == value for name, value in config.items()) for entry in entries), (
                module,
                config,
            )


BROKEN = """
import triton
import triton.language as tl
from hf_archs.kernels.aot import KernelSpec

@triton.jit
def helper(x):
    return x + 1

@triton.jit
def good(p, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(p + i, helper(tl.load(p + i)))

@triton.jit(do_not_specialize=["n"])
def forgotten(p, n):
    tl.store(p, n)

@triton.jit
def wrong(p):
    tl.store(p, no_such_name)

@triton.jit
def greedy(p, N: tl.constexpr):
    i = tl.arange(0, N)
    at = p + i[:, None] * N + i[None, :]
    total = tl.zeros((N, N), tl.float32)
    for _ in range(100):  # num_stages of both operands are in flight
        total = tl.dot(tl.load(at), tl.load(at + N), total)
        at += N * N
    tl.store(at, total)

def aot_specs():
    n = {"p": "*fp16", "N": "constexpr"}
    return [
        KernelSpec(good, n, {"N": 128}, 4, 3, "a label"),
        KernelSpec(wrong, {"p": "*fp16"}, {}, 4, 3),
        KernelSpec(greedy, n, {"N": 128}, 4, 4),
    ]
"""


def test_what_is_wrong_is_an_error(tmp_path):
    (tmp_path / "broken_triton.py").write_text(BROKEN)
    code = (
        "import json; from pathlib import Path; from hf_archs.kernels import aot; "
        f"print(json.dumps(aot.check({{'broken_triton': Path({str(tmp_path / 'broken_triton.py')!r})}})))"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    good = report["kernels"][0]
    assert (good["module"], good["kernel"], good["label"]) == ("broken_triton", "good", "a label")
    assert all(figures["registers"] > 0 and figures["spills"] == 0 for figures in good["targets"].values())
    errors = "\n".join(report["errors"])
    assert "broken_triton.forgotten is a kernel in the source, but aot_specs() does not list it" in errors
    assert "helper" not in errors
    assert "good" not in errors
    assert all(re.search(rf"(?s)wrong .* for {t.name} does not compile: .*no_such_name", errors) for t in aot.TARGETS)
    assert re.search(r"greedy .* for sm_80 wants \d+ bytes of shared memory; 166912 exist", errors)


def test_the_interpreter_is_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.check({})
