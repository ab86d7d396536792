"""The norm of each head with the gate after it: the blocked form against ordinary operators."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from hf_archs.kernels.backend import use_backend
from hf_archs.testing.ops import check_op, outputs_and_gradients, relative_distance
from hf_archs_retnet.ops import norm_gate_portable
from hf_archs_retnet.ops.norm_gate import _norm_gate, norm_gate, norm_gate_reference


def portable(**arguments):
    with use_backend("portable"):
        return norm_gate(**arguments)


def check(backend, tensors, **options):
    with use_backend(backend):  # around the backward too, which chooses anew
        check_op(norm_gate, norm_gate_reference, tensors, {"eps": 1e-5, **options})


def make(b=2, l=9, h=3, p=8, dtype=torch.float32, affine=True):
    return {
        "x": torch.randn(b, l, h, p, dtype=dtype),
        "gate": torch.randn(b, l, h * p, dtype=dtype),
        "weight": torch.rand(p, dtype=dtype) + 0.5 if affine else None,
    }


def test_the_reference_is_the_formula():
    tensors = make(dtype=torch.float64)
    x = tensors["x"]
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * tensors["weight"]
    expected = expected.reshape(2, 9, 24) * tensors["gate"] * tensors["gate"].sigmoid()
    torch.testing.assert_close(norm_gate_reference(**tensors, eps=1e-3, gate_fn="swish"), expected)
    normed = F.layer_norm(x, x.shape[-1:], tensors["weight"], None, 1e-3).reshape(2, 9, 24)
    centred = norm_gate_reference(**tensors, eps=1e-3, gate_fn="swish", centred=True)
    torch.testing.assert_close(centred, normed * F.silu(tensors["gate"]))
    half = norm_gate_reference(**make(affine=False), eps=1e-3, gate_fn="gelu")
    assert half.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gate_fn", ["swish", "gelu"])
@pytest.mark.parametrize(("l", "affine", "centred"), [(1, True, True), (9, True, False), (40, False, True)])
def test_portable_is_the_reference(l, affine, centred, gate_fn, dtype, monkeypatch, nan_filled_memory):
    monkeypatch.setattr(norm_gate_portable, "BLOCK", 7 * 24)  # several blocks, the last one shorter
    check("portable", make(l=l, dtype=dtype, affine=affine), gate_fn=gate_fn, centred=centred)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gate_fn", ["swish", "gelu"])
@pytest.mark.parametrize(
    ("l", "p", "affine", "centred"),
    [(1, 8, True, True), (9, 8, True, False), (17, 8, False, True), (3, 200, True, True), (7, 700, True, False)],
)
def test_triton_is_the_reference(l, p, affine, centred, gate_fn, dtype, nan_filled_memory):
    """Tiles of many rows, of some and of one; one program, and several of which the last has rows left over."""
    check("triton", make(l=l, p=p, dtype=dtype, affine=affine), gate_fn=gate_fn, centred=centred)


@pytest.mark.parametrize("backend", ["portable", "triton"])
@pytest.mark.parametrize("gate_fn", ["swish", "gelu"])
def test_gates_far_from_zero(gate_fn, backend):
    tensors = make()
    tensors["gate"] = 100 * tensors["gate"]
    check(backend, tensors, gate_fn=gate_fn)


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_only_the_inputs_are_saved(backend):
    tensors = {name: t.requires_grad_() for name, t in make(dtype=torch.float16).items()}
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks, use_backend(backend):
        y = norm_gate(**tensors, eps=1e-5, gate_fn="swish", centred=True)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in tensors.values()}
    del y


def test_mixed_dtypes_and_views():
    """Under autocast retention and gate come in half precision and the weight in float32; heads may be a view."""
    tensors = make(dtype=torch.bfloat16)
    tensors["weight"] = tensors["weight"].float()
    tensors["x"] = torch.randn(2, 3, 9, 8, dtype=torch.bfloat16).transpose(1, 2)
    options = {"eps": 1e-5, "gate_fn": "swish"}
    found, expected = (outputs_and_gradients(op, tensors, options) for op in (portable, norm_gate_reference))
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert relative_distance(found[name], value) < 2e-2, name


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("gate_fn", ["swish", "gelu"])
def test_gradcheck(gate_fn, centred):
    inputs = [t.requires_grad_() for t in make(dtype=torch.float64).values()]
    torch.autograd.gradcheck(lambda *t: _norm_gate(*t, 1e-3, gate_fn, centred), inputs, fast_mode=True)


@pytest.mark.parametrize("affine", [False, True])
def test_opcheck(affine):
    inputs = [None if t is None else t.requires_grad_() for t in make(affine=affine).values()]
    torch.library.opcheck(torch.ops.hf_archs.norm_gate.default, (*inputs, 1e-5, "swish", affine, "portable"))


def test_one_graph_serves_every_length():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(portable, backend=counter, fullgraph=True, dynamic=True)
    compiled_graphs = []
    for l in (9, 20, 31):
        tensors = {name: t.requires_grad_() for name, t in make(l=l).items()}
        options = {"eps": 1e-5, "gate_fn": "swish"}
        torch.testing.assert_close(compiled(**tensors, **options), portable(**tensors, **options))
        compiled_graphs.append(counter.frame_count)  # dynamo may trace the first one twice
    assert compiled_graphs[0] == compiled_graphs[-1]


def test_export_knows_no_custom_op():
    class Module(torch.nn.Module):
        def forward(self, x, gate, weight):
            return portable(x=x, gate=gate, weight=weight, eps=1e-5, gate_fn="swish")

    program = torch.export.export(Module(), tuple(make().values()))
    assert "hf_archs" not in program.graph_module.code


def test_one_token_is_in_ordinary_operators():
    tensors = make(l=1)
    normed = F.rms_norm(tensors["x"], (8,), tensors["weight"], 1e-5)
    torch.testing.assert_close(
        portable(**tensors, eps=1e-5, gate_fn="gelu"), normed.flatten(2) * F.gelu(tensors["gate"])
    )
