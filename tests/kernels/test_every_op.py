"""Every op of the library, found by asking torch, on the ``cases`` that stand beside it."""

import importlib.util
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hf_archs
from hf_archs.kernels import library
from hf_archs.kernels.backend import use_backend
from hf_archs.kernels.numerics import allowed
from hf_archs.testing.ops import ops_with_cases

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
assert hf_archs  # which loads the plugins, and they their ops
REGISTERED = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("hf_archs::")}
OPS = sorted(name for name in REGISTERED if not name.endswith("_backward"))
# as the papers call what a decay is made of; of A, times a step that may be 0, nothing may be infinite
DECAYS = {"log_decay": -torch.inf, "dt": -torch.inf, "A": -1e30}
NEEDS_A_TOKEN = "length at least 1"
every_op = pytest.mark.parametrize("name", OPS)
every_form = pytest.mark.parametrize("backend", ["portable", pytest.param("triton", marks=pytest.mark.interpreted)])


def function(name):
    return getattr(module(name), name.removeprefix("hf_archs::"))


def reference(name):
    return getattr(module(name), f"{name.removeprefix('hf_archs::')}_reference")


def module(name):
    return sys.modules[library.OPS[name].fake.__module__]


def cases(name, dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    return list(module(name).cases("cpu", dtype, **sizes))


def tensors(case):
    return {k: t for k, t in case.items() if isinstance(t, torch.Tensor)}


def results_of(op, arguments, cotangents=None, needed=None):
    """The results of ``op`` by keyword, and the gradients of all (or the needed) floating arguments by name, None for
    constants, such as angles.
    """
    learnt = {k: t.detach().requires_grad_() for k, t in tensors(arguments).items() if t.is_floating_point()}
    learnt = learnt if needed is None else {needed: learnt[needed]}
    results = op(**arguments | learnt)
    results = [results] if isinstance(results, torch.Tensor) else [t for t in results if t is not None]
    if cotangents is None:
        torch.manual_seed(1)
        cotangents = [torch.randn(t.shape, dtype=t.dtype) for t in results]
    gradients = torch.autograd.grad(results, list(learnt.values()), cotangents, allow_unused=True)
    return [t.detach() for t in results], dict(zip(learnt, gradients))


def there(gradients):
    return {argument: gradient for argument, gradient in gradients.items() if gradient is not None}


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


class Reached(Exception):
    """The public function handed its arguments to the op."""


def call_of(name, case, monkeypatch):
    """The op, and what the public function hands to it, by place: `results_of` takes it with `by_place`."""

    def stop(op, *arguments):
        raise Reached(op, dict(zip(map(str, range(len(arguments))), arguments)))

    learnt = {k: t.detach().requires_grad_() for k, t in tensors(case).items() if t.is_floating_point()}

    def both_ways():
        function(name)(**case | learnt)
        with use_backend("triton"):  # where the portable form is no op
            function(name)(**case | learnt)

    with monkeypatch.context() as patch:
        patch.setattr(library.Op, "__call__", stop)
        with pytest.raises(Reached) as reached:
            both_ways()
    op, arguments = reached.value.args
    assert op is library.OPS[name]
    return op, {place: t.detach() if isinstance(t, torch.Tensor) else t for place, t in arguments.items()}


def by_place(op):
    return lambda **given: op(*(given[str(place)] for place in range(len(given))))


def test_every_op_is_wrapped_by_the_helper_and_has_cases():
    assert {*library.OPS, *(f"{name}_backward" for name in library.OPS)} == REGISTERED
    assert OPS
    for name in OPS:
        assert cases(name)
    # the list of the tests on a GPU; some functions there are made of other ops
    listed = {op.name: op for op in ops_with_cases()}
    assert listed.keys() == {*(name.removeprefix("hf_archs::") for name in OPS), "retention", "ssd_scan"}
    for op in listed.values():
        assert op.cases("cpu", torch.float32, **op.model_sizes | {"length": 1})


@every_form
@every_op
def test_cases_are_the_reference(name, backend):
    for case in cases(name):
        expected = results_of(reference(name), case)
        with use_backend(backend):
            close(results_of(function(name), case), expected)


@every_op
def test_autocast_changes_nothing(name, monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        for case in cases(name, dtype):
            op, arguments = call_of(name, case, monkeypatch)
            expected = results_of(by_place(op), arguments)
            with torch.autocast("cpu", torch.bfloat16):
                close(results_of(by_place(op), arguments), expected, 0)
                assert torch.is_autocast_enabled("cpu")


@every_form
@every_op
def test_bfloat16_is_the_same_inside_autocast(name, backend):
    for case in cases(name, torch.bfloat16):
        with use_backend(backend):
            expected = results_of(function(name), case)
            with torch.autocast("cpu", torch.bfloat16):
                close(results_of(function(name), case), expected, 0)


class Work(TorchDispatchMode):
    """Counts the elements that operators write."""

    elements = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        results = operator(*args, **kwargs or {})
        if not operator.is_view:
            self.elements += sum(t.numel() for t in tree_leaves(results) if isinstance(t, torch.Tensor))
        return results


@every_form
@every_op
def test_gradients_that_nobody_needs_are_not_formed(name, backend, monkeypatch):
    work = {}
    for number, case in enumerate(cases(name)):
        op, arguments = call_of(name, case, monkeypatch)
        backward = op.backward

        def counted(*given, backward=backward):
            with Work() as counting:
                gradients = backward(*given)
            work[tuple(given[-1])] = counting.elements
            return gradients

        with monkeypatch.context() as patch, use_backend(backend):
            patch.setattr(op, "backward", counted)
            _, everything = results_of(by_place(op), arguments)
            whole = max(work.values())
            for place in there(everything):
                work.clear()
                _, alone = results_of(by_place(op), arguments, needed=place)
                close(alone[place], everything[place], 1e-5)
                (wanted,) = work
                assert [op.learnt[i] for i, asked in enumerate(wanted) if asked] == [int(place)]
                assert work[wanted] < whole, (number, place)
            work.clear()


@every_op
def test_a_backward_has_the_form_of_its_forward(name, monkeypatch):
    """Also where `use_backend` has ended by then. The forward is computed by the portable form, where there is one."""
    op, chosen, form = library.OPS[name], [], library.form

    def recorded(module, backend):
        chosen.append(backend)
        computing = form(module, op.only or "portable")
        none = {f"{op.short}_bwd": lambda *given: [None] * len(given[-1])}
        return SimpleNamespace(**vars(computing) | none)

    monkeypatch.setattr(library, "form", recorded)
    for case in cases(name):
        inputs = {k: t.detach().requires_grad_() for k, t in tensors(case).items() if t.is_floating_point()}
        with use_backend("triton"):
            results = function(name)(**case | inputs)
        results = [results] if isinstance(results, torch.Tensor) else results
        sum(t.sum() for t in results if t is not None and t.requires_grad).backward()
        assert chosen == [op.only or "triton"] * 2
        chosen.clear()


@every_op
def test_a_grid_has_room_for_any_number_of_rows(name, monkeypatch):
    """CUDA takes 2^31 - 1 programs in a grid's first dimension, and 65,535 in the others. Nothing is launched here."""
    jit = pytest.importorskip("triton.runtime.jit")
    grids = []
    monkeypatch.setattr(jit.KernelInterface, "__getitem__", lambda kernel, grid: lambda *_, **__: grids.append(grid))
    with use_backend("triton"):
        for case in cases(name, batch=70_000, length=2):
            results_of(function(name), case)
    assert grids or importlib.util.find_spec(f"{module(name).__name__}_triton") is None
    assert max((size for grid in grids for size in grid[1:]), default=0) < 65_536


class Fails(TorchFunctionMode):
    """Raises at one of the calls of torch's functions that are made inside."""

    def __init__(self, at=-1):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count - 1 == self.at:
            raise ZeroDivisionError("on purpose")
        return function(*args, **kwargs or {})


@every_op
def test_a_call_after_a_failed_one_is_right(name):
    case = cases(name)[-1]
    expected = results_of(function(name), case)
    with Fails() as counting:
        results_of(function(name), case)
    for at in range(0, counting.count, max(1, counting.count // 12)):
        with torch.autocast("cpu", enabled=False), pytest.raises(ZeroDivisionError), Fails(at):
            results_of(function(name), case)
        assert not torch.is_autocast_enabled("cpu")
        close(results_of(function(name), case), expected, 0)


def strided(t):
    return t.repeat_interleave(2, -1)[..., ::2]


def transposed(t):
    return t.mT.contiguous().mT if t.dim() > 1 else t


def offset(t):
    whole = t.new_zeros(t.numel() + 1)  # one element off: no vector load may rely on the address
    whole[1:] = t.flatten()
    return whole[1:].view(t.shape)


def rows_apart(t):
    return t.repeat_interleave(3, 0)[::3]


def slice_of_wider(t):
    return torch.cat([t, t.new_ones(*t.shape[:-1], 3)], -1)[..., : t.shape[-1]] if t.dim() > 1 else t


def broadcast(t):
    return t[:1].expand_as(t)


def inner_broadcast(t):
    return t[..., :1].expand_as(t)


def copy(t):
    return t.clone(memory_format=torch.contiguous_format)


VIEWS = (strided, transposed, offset, rows_apart, slice_of_wider, broadcast, inner_broadcast)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
@every_form
@every_op
def test_views_give_what_contiguous_tensors_give(name, backend, view):
    case = cases(name, length=9)[-1]
    seen = {argument: view(t) for argument, t in tensors(case).items()}
    copied = {argument: copy(t) for argument, t in seen.items()}
    with use_backend(backend):
        results, _ = results_of(function(name), case | copied)
        cotangents = [view(torch.randn_like(t)) for t in results]
        expected = results_of(function(name), case | copied, [copy(t) for t in cotangents])
        close(results_of(function(name), case | seen, cotangents), expected, 1e-5)


@every_form
@every_op
def test_infinite_decays_and_zeros_give_what_the_reference_gives(name, backend):
    for case in cases(name):
        changed = {k: torch.zeros_like(t) for k, t in tensors(case).items() if t.is_floating_point()}
        for argument in DECAYS.keys() & case.keys():
            gone = case[argument].clone()
            gone[:, 1::3] = DECAYS[argument]
            changed[f"{argument} "] = gone
        for argument, t in changed.items():
            other = case | {argument.strip(): t}
            expected = results_of(reference(name), other)
            with use_backend(backend):
                close(results_of(function(name), other), expected)


@every_form
@every_op
def test_no_rows_and_no_tokens(name, backend):
    for sizes in ({"batch": 0}, {"length": 0}):
        for case in cases(name, **sizes):
            with use_backend(backend):
                if "length" in sizes and NEEDS_A_TOKEN in inspect.getsource(module(name)):
                    with pytest.raises(ValueError, match=NEEDS_A_TOKEN):
                        function(name)(**case)
                    continue
                results, gradients = results_of(function(name), case)
            assert results[0].numel() == 0
            for argument, gradient in there(gradients).items():
                assert gradient.shape == case[argument].shape
                assert argument == "initial_state" or not gradient.any(), argument
            if "length" in sizes and "initial_state" in gradients:
                close(results[1], case["initial_state"])


@every_form
@every_op
def test_float64_stays_float64(name, backend):
    for case in cases(name, torch.float64):
        expected = results_of(reference(name), case)
        with use_backend(backend):
            results, gradients = results_of(function(name), case)
        assert {t.dtype for t in (*results, *there(gradients).values())} == {torch.float64}
        close((results, gradients), expected, 1e-10)


@every_op
def test_opcheck(name, monkeypatch):
    for case in cases(name):
        op, arguments = call_of(name, case, monkeypatch)
        for grad in (False, True):
            given = [
                t.detach().requires_grad_(grad and t.is_floating_point()) if isinstance(t, torch.Tensor) else t
                for t in arguments.values()
            ]
            torch.library.opcheck(op.op, (*given, *[grad] * op.keeps, op.backend(*given[: op.tensors])))


@every_op
def test_products_of_float32_are_not_rounded(name, monkeypatch):
    """A program's setting for products of float32 has no effect in an op, and is restored after it, failed or not."""
    torch.set_float32_matmul_precision("medium")
    try:
        before = {kind: allowed("mkldnn", kind) for kind in ("matmul", "conv")}
        assert before["matmul"] == "bf16"
        for case in cases(name):
            op, arguments = call_of(name, case, monkeypatch)
            found = []

            def recorded(run, found=found):
                return lambda *given: found.append(allowed("mkldnn", "matmul")) or run(*given)

            with monkeypatch.context() as patch:
                patch.setattr(op, "forward", recorded(op.forward))
                patch.setattr(op, "backward", recorded(op.backward))
                results_of(by_place(op), arguments)
                assert set(found) == {"ieee"}
                assert len(found) == 2
                patch.setattr(op, "forward", lambda *given: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    by_place(op)(**arguments)
            assert {kind: allowed("mkldnn", kind) for kind in before} == before
    finally:
        torch.set_float32_matmul_precision("highest")
