"""Every Triton kernel compiles for every chip we name, and what is wrong with one is found."""

import ast
import copy
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_archs.kernels import aot, baseline

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "check_kernels"
# sm_80 has sm_86's code and more shared memory, and sm_120 has sm_80's tensor instructions; the script compiles for all
TARGETS = ("sm_86", "sm_90", "sm_100", "gfx942")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("kernels") / "report.json"
    command = [sys.executable, SCRIPT, "--json", file, "--targets", *TARGETS]
    # the script drops the variable itself
    run = subprocess.run(command, env={**ENVIRONMENT, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Warning" not in run.stderr, run.stderr
    return json.loads(file.read_text())


def test_every_kernel_compiles_for_every_target(report):
    assert report["errors"] == []
    assert {target.name for target in aot.TARGETS} == {*TARGETS, "sm_80", "sm_120"}
    limits = {target.name: target.shared_limit for target in aot.targets_named(TARGETS)}
    for kernel in report["kernels"]:
        assert set(kernel["targets"]) == set(limits)
        for name, figures in kernel["targets"].items():
            assert 0 < figures["registers"] <= 512
            assert 0 <= figures["shared"] <= limits[name]
            assert figures["spills"] >= 0


def test_the_committed_baseline_has_every_kernel(report):
    accepted = json.loads(SCRIPT.with_suffix(".json").read_text())
    assert accepted["kernels"].keys() == baseline.figures(report).keys()
    for targets in accepted["kernels"].values():
        assert targets.keys() == {target.name for target in aot.TARGETS}


def test_instructions_are_counted(report):
    """By another road: a sum over the code's own words."""
    kinds = {"tensor": r"(HMMA|HGMMA)\.\w+x?\w*\.F32(\.\w+)?", "loads": r"U?\d+( to shared)?", "stores": r"U?\d+"}
    for kernel in report["kernels"]:
        for target, figures in kernel["targets"].items():
            assert ("instructions" in figures) == (target in aot.COUNTED)
        figures = kernel["targets"]["sm_90"]
        assert figures["instructions"] > 20
        assert sum(figures["loops"]) < figures["instructions"]
        assert figures["stores"]
        for kind, pattern in kinds.items():
            assert all(re.fullmatch(pattern, what) and count > 0 for what, count in figures[kind].items())


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


def baseline_of(report):
    return json.loads(baseline.dumps(report))


def test_a_baseline_of_a_report_is_its_own_equal(report):
    made = baseline_of(report)
    assert made["toolchain"]["triton"] == triton.__version__
    assert len(made["kernels"]) == len(report["kernels"])
    assert baseline.compare(report, made) == ([], [])


@pytest.mark.parametrize(
    "name", ["registers", "spills", "shared", "instructions", "loops", "tensor", "loads", "stores"]
)
def test_a_figure_that_got_worse_is_named(report, name):
    made = baseline_of(report)
    for entry, targets in made["kernels"].items():
        figures = targets["sm_90"]
        then = figures[name]
        if isinstance(then, int):
            figures[name] = int(then / 1.04) - 8
        elif name == "loops":
            figures[name] = [count - 1 - count // 25 for count in then]
        else:
            figures[name] = {what: count - 1 for what, count in then.items()}
        if figures[name] == then:  # no loops, or no tensor instructions
            continue
        assert baseline.compare(report, made) == (
            [f"{entry}, sm_90: {name} {baseline.text(figures[name])} -> {baseline.text(then)}"],
            [],
        )
        figures[name] = then


def test_figures_that_got_better_are_named(report):
    made = baseline_of(report)
    for name in ("shared", "instructions"):
        entry = next(iter(made["kernels"]))
        made["kernels"][entry]["sm_90"][name] += 1
        worse, (better,) = baseline.compare(report, made)
        assert not worse
        assert better.startswith(f"{entry}, sm_90: {name} ")
        made["kernels"][entry]["sm_90"][name] -= 1


def test_tensor_instructions_that_are_gone_are_worse():
    def report(tensor):
        found = {"registers": 8, "spills": 0, "shared": 0, "tensor": tensor}
        return {"kernels": [{"module": "m", "kernel": "k", "label": "a", "targets": {"sm_90": found}}]}

    worse, better = baseline.compare(report({}), baseline_of(report({"HMMA.16816.F32": 4})))
    assert worse == ["m.k, a, sm_90: tensor 4 x HMMA.16816.F32 -> none"]
    assert not better
    # products of a quarter of the size are four times as many
    small, large = {"HGMMA.64x32x16.F32": 8}, {"HGMMA.64x128x16.F32": 2}
    assert baseline.compare(report(small), baseline_of(report(large)))[0]
    assert not baseline.compare(report(large), baseline_of(report(small)))[0]


def test_an_entry_without_a_counterpart_is_named(report):
    made = baseline_of(report)
    entry, figures = made["kernels"].popitem()
    assert baseline.compare(report, made) == ([f"{entry}: is not in the baseline"], [])
    made["kernels"] |= {entry: figures, f"{entry} too": figures, "another.module.kernel, a label": figures}
    assert baseline.compare(report, made) == ([f"{entry} too: is in the baseline, but not in aot_specs()"], [])


def check_kernels(*arguments):
    command = [sys.executable, SCRIPT, "--only", "modal", "--targets", "sm_90", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def test_the_script_fails_where_a_kernel_got_worse(report, tmp_path):
    accepted = baseline_of(report)
    file = tmp_path / "baseline.json"
    for toolchain, status in ((accepted["toolchain"], 1), ({"triton": "2.0"}, 0)):
        changed = copy.deepcopy(accepted) | {"toolchain": toolchain}
        next(f for entry, f in changed["kernels"].items() if "modal" in entry)["sm_90"]["instructions"] //= 2
        file.write_text(json.dumps(changed))
        run = check_kernels("--baseline", file)
        assert run.returncode == status, run.stdout + run.stderr
        said = re.findall("(?m)^error: worse than the baseline: .*modal.*instructions .*$", run.stdout)
        assert len(said) == status
        assert ("not compared with the baseline, which was made by triton 2.0; here are" in run.stdout) != bool(status)


def test_other_chips_are_refused():
    run = check_kernels("--targets", "sm_75")
    assert run.returncode == 2
    assert "below sm_80 ops run in their portable form" in run.stderr
    with pytest.raises(ValueError, match=r"no target is called 'sm_99': there are sm_80, .*gfx942$"):
        aot.targets_named(["sm_90", "sm_99"])


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
        KernelSpec(good, n, {"N": 256}, 4, 3, "twice"),
        KernelSpec(good, n, {"N": 512}, 4, 3, "twice"),
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
    assert re.findall("good.*", errors) == ["good has 2 entries labelled 'twice' in aot_specs()"]
    assert all(re.search(rf"(?s)wrong .* for {t.name} does not compile: .*no_such_name", errors) for t in aot.TARGETS)
    assert re.search(r"greedy .* for sm_80 wants \d+ bytes of shared memory; 166912 exist", errors)


def test_the_interpreter_is_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.check({})
