"""A GPU is never waited for in a decode step: no value of a tensor is asked for, no tensor made of Python's numbers.

(The latter is copied from pageable memory, which waits for all that was launched before.) On a CPU this is seen in the
operators, on the routes that a GPU would take.
"""

import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hf_archs
from hf_archs.kernels import library
from hf_archs.kernels.backend import use_backend
from hf_archs.testing.contract.models import lively

aten = torch.ops.aten
# operators whose result, or its shape, the host needs
ASKING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.repeat_interleave,
    aten.equal,
    aten.lift_fresh,  # of torch.tensor and new_tensor, which copy
}
ASKING_FUNCTIONS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}


class _Functions(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in ASKING_FUNCTIONS:
            self.found.add(function.__name__)
        return function(*args, **kwargs or {})


class _Operators(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        by_mask = operator.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)
        )
        if by_mask or operator.overloadpacket in ASKING:
            self.found.add(str(operator))
        return operator(*args, **kwargs or {})


class Synchronisations:
    """In a ``with`` block, collects in ``found`` who waits for the device where, but for Triton's interpreter."""

    def __init__(self):
        self.found = []

    def add(self, name):
        frame, places = sys._getframe(2), []
        while frame is not None:
            file = frame.f_code.co_filename
            if "/triton/" in file or frame.f_code.co_name == "constant":  # which is a number but on a CPU
                return
            if "hf_archs" in file:
                places.append(f"{file.rpartition('/')[2]}:{frame.f_lineno}")
            frame = frame.f_back
        self.found.append(f"{name} at {' < '.join(places[:3])}")

    def __enter__(self):
        self.modes = _Functions(self), _Operators(self)
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)


def on_a_gpu(monkeypatch):
    """Every op runs its Triton form, in sight of the modes above: they do not look into an operator of the library."""
    monkeypatch.setattr(
        library.Op,
        "__call__",
        lambda op, *given: _results(op, op.run(*given, *[False] * op.keeps, op.backend(*given[: op.tensors]))),
    )
    return use_backend("triton")


def _results(op, results):
    return results if not op.keeps else results[0] if op.results == 1 else results[:-1]


def forwards(model, monkeypatch, **options):
    """How `generate` waits in each of its forwards: the prompt's, and those of two tokens."""
    found, forward = [], model.forward

    def counted(*args, **kwargs):
        with Synchronisations() as counting:
            outputs = forward(*args, **kwargs)
        found.append(counting.found)
        return outputs

    monkeypatch.setattr(model, "forward", counted)
    ids, length = torch.randint(3, 60, (2, 9)), {"max_new_tokens": 3, "min_new_tokens": 3}
    with on_a_gpu(monkeypatch):
        model.generate(ids, **length, do_sample=False, **options)
    return found


@pytest.mark.parametrize(("padded", "cache"), [(True, "dynamic"), (False, "static")])
@pytest.mark.parametrize("name", hf_archs.architectures())
def test_no_decode_step_waits(name, padded, cache, monkeypatch):
    architecture = hf_archs.get_architecture(name)
    model = lively(architecture.causal_lm_class, architecture.tiny_config())
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0 if padded else 1
    prefill, *steps = forwards(model, monkeypatch, attention_mask=mask, cache_implementation=cache)
    # whether all tokens are real, whether the mask numbers documents, and how much a static cache has in it
    asked = {name.partition(" at ")[2].partition(":")[0] for name in prefill}
    assert asked <= {"masks.py", "recurrent.py"}, prefill
    assert len(prefill) <= 3, prefill
    assert steps == [[], []]


def test_an_op_that_waits_says_so(monkeypatch):
    """In the forward and in the backward of every op, with documents and without."""
    monkeypatch.setattr(
        library.Op,
        "__call__",
        lambda op, *given: _results(op, op.run(*given, *[True] * op.keeps, op.backend(*given[: op.tensors]))),
    )
    for name, op in library.OPS.items():
        module = sys.modules[op.fake.__module__]
        waits = {}
        for case in module.cases("cpu", torch.float32):
            with use_backend("triton"), torch.no_grad(), Synchronisations() as counting:
                getattr(module, name.removeprefix("hf_archs::"))(**case)
            waits |= dict.fromkeys(counting.found)
        for overload in (op.op, op.backward_op):
            assert (torch.Tag.cudagraph_unsafe in overload.tags) == bool(waits), (name, list(waits))
