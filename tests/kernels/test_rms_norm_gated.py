"""`rms_norm_gated`: every implementation against the reference, and the reference against transformers' Mamba-2."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from hf_archs.kernels import rms_norm_gated_portable
from hf_archs.kernels.backend import use_backend
from hf_archs.kernels.rms_norm_gated import rms_norm_gated, rms_norm_gated_reference
from hf_archs.testing.ops import check_op, outputs_and_gradients, relative_distance

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def inputs(*shape, dtype=torch.float32):
    return {
        "x": torch.randn(shape).to(dtype),
        "weight": torch.randn(shape[-1]).to(dtype),
        "z": torch.randn(shape).to(dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [96, 32])
@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_is_transformers(backend, group_size, dtype):
    """In half precision within one rounding, since the sums before it may run in another order."""
    tensors = inputs(2, 9, 96, dtype=dtype)
    native = MambaRMSNormGated(96, group_size, eps=1e-5).to(dtype)
    native.weight.data.copy_(tensors["weight"])
    with use_backend(backend):
        y = rms_norm_gated(**tensors, eps=1e-5, group_size=group_size)
    assert y.dtype == dtype
    torch.testing.assert_close(y, native(tensors["x"], tensors["z"]), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_reference_is_the_formula():
    x, weight, z = (t.double() for t in inputs(3, 6).values())
    u = x * z / (1 + (-z).exp())
    expected = torch.empty_like(u)
    for row in range(3):
        for group in (slice(0, 3), slice(3, 6)):
            mean_square = sum(v * v for v in u[row, group]) / 3
            expected[row, group] = u[row, group] / (mean_square + 0.1) ** 0.5 * weight[group]
    y = rms_norm_gated_reference(x, weight, z, eps=0.1, group_size=3)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [None, 32, 1])
@pytest.mark.parametrize("shape", [(2, 17, 96), (1, 2, 96), (130, 96), (2, 1, 96), (96,)])
def test_portable(shape, group_size, dtype):
    with use_backend("portable"):
        check_op(
            rms_norm_gated,
            rms_norm_gated_reference,
            inputs(*shape, dtype=dtype),
            {"eps": 1e-5, "group_size": group_size},
        )


@pytest.mark.parametrize("block", [1, 1000, 96 * 34])
def test_portable_in_blocks(block):
    """Of one row, of several with a last one that is short, and of all rows."""
    x, weight, z = inputs(2, 17, 96, dtype=torch.float64).values()
    grad_y = torch.randn_like(x)
    whole, parts = (
        (
            rms_norm_gated_portable.rms_norm_gated_fwd(x, weight, z, 1e-5, 32, **chosen),
            *rms_norm_gated_portable.rms_norm_gated_bwd(grad_y, x, weight, z, 1e-5, 32, **chosen),
        )
        for chosen in ({}, {"block": block})
    )
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [((2, 17, 96), None), ((2, 17, 96), 32), ((3, 1, 96), 48), ((37, 6), 1), ((2, 9, 1200), 600)],
)
def test_triton(shape, group_size, dtype):
    with use_backend("triton"):
        check_op(
            rms_norm_gated,
            rms_norm_gated_reference,
            inputs(*shape, dtype=dtype),
            {"eps": 1e-5, "group_size": group_size},
        )


def test_every_triton_config():
    """Many rows, few, and one; a group in one tile and in several; few and many warps."""
    from hf_archs.kernels import rms_norm_gated_triton as triton_form

    configs = set()
    for group_size in (64, 200, 600, 1536, 2500, 4500):
        configs.add(tuple(triton_form._config(group_size, backward=True).items()))
        tensors = inputs(18, 2 * group_size)
        with use_backend("triton"):
            check_op(rms_norm_gated, rms_norm_gated_reference, tensors, {"eps": 1e-5, "group_size": group_size})
    assert len(configs) == 6
    for group_size in (1536, 2560, 4096, 5120, 8192):  # of published models
        for backward in (False, True):
            config = triton_form._config(group_size, backward)
            assert config["TILES"] * config["BLOCK"] == group_size  # no lane is idle


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_any_layout_of_the_inputs(backend):
    """Slices of a wider tensor, transposed ones, an expanded gradient."""
    tensors = inputs(2, 7, 96)
    wide = torch.cat([tensors["z"], tensors["x"], tensors["z"]], 2)
    turned = [tensors[k].transpose(1, 2).contiguous().transpose(1, 2) for k in ("x", "z")]
    with use_backend(backend):
        expected = rms_norm_gated(**tensors, eps=1e-5)
        weight = tensors["weight"]
        for x, z in ((wide[:, :, 96:192], wide[:, :, :96]), turned):
            torch.testing.assert_close(rms_norm_gated(x, weight, z, eps=1e-5), expected, rtol=0, atol=1e-6)
        leaf = tensors["x"].requires_grad_()
        y = rms_norm_gated(**tensors, eps=1e-5)
        (from_expanded,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
        (from_whole,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    torch.testing.assert_close(from_expanded, from_whole, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 3, 6), (2, 1, 6)])
def test_gradcheck(shape):
    tensors = [t.double().requires_grad_() for t in inputs(*shape).values()]
    assert torch.autograd.gradcheck(lambda *t: rms_norm_gated(*t, eps=1e-3, group_size=3), tensors)


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_float64_stays_float64(backend):
    tensors = {k: v.double() for k, v in inputs(2, 9, 48).items()}
    with use_backend(backend):
        got = outputs_and_gradients(rms_norm_gated, tensors, {"eps": 1e-5})
    expected = outputs_and_gradients(rms_norm_gated_reference, tensors, {"eps": 1e-5})
    for name in expected:
        assert got[name].dtype == torch.float64
        assert relative_distance(got[name], expected[name]) < 1e-14


@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
def test_half_precision_with_a_float32_weight(backend):
    """As under autocast; and large values, whose squares would overflow float16."""
    x, weight, z = inputs(2, 9, 48).values()
    x, z = (300 * x).half().requires_grad_(), z.half()
    weight.requires_grad_()
    with use_backend(backend):
        y = rms_norm_gated(x, weight, z, eps=1e-5)
        gradients = torch.autograd.grad(y.float().sum(), (x, weight))
    assert y.dtype == torch.float16
    assert y.isfinite().all()
    assert [g.dtype for g in gradients] == [torch.float16, torch.float32]
    assert all(g.isfinite().all() for g in gradients)


def test_gates_far_from_zero():
    x, weight, z = inputs(2, 9, 48).values()
    z = 100 * z
    for backend in ("portable", "triton"):
        with use_backend(backend):
            check_op(rms_norm_gated, rms_norm_gated_reference, {"x": x, "weight": weight, "z": z}, {"eps": 1e-5})


@pytest.mark.parametrize("backend", ["portable", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_gate_it_is_rms_norm(dtype, backend):
    x, weight, _ = (t.requires_grad_() for t in inputs(2, 9, 96, dtype=dtype).values())
    expected = F.rms_norm(x.float(), (96,), eps=1e-5).to(dtype) * weight
    cotangent = torch.randn_like(expected)
    with use_backend(backend):
        y = rms_norm_gated(x, weight, eps=1e-5)
        found = torch.autograd.grad(y, (x, weight), cotangent)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5 if dtype == torch.float32 else 0.05}
    torch.testing.assert_close(y, expected, **tolerance)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, weight), cotangent), **tolerance)


def test_only_the_inputs_are_saved():
    tensors = {k: v.requires_grad_() for k, v in inputs(2, 9, 48).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = rms_norm_gated(**tensors, eps=1e-5)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in tensors.values()}
    del y


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_opcheck(backend):
    tensors = [t.requires_grad_() for t in inputs(2, 5, 12).values()]
    torch.library.opcheck(torch.ops.hf_archs.rms_norm_gated.default, (*tensors, 1e-5, 4, backend))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_once_for_all_lengths(compiler):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)

    def layer(**tensors):
        return 2 * rms_norm_gated(**tensors, eps=1e-5, group_size=24)

    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for length in (10, 33, 18):
        tensors = {k: v.requires_grad_() for k, v in inputs(2, length, 48).items()}
        cotangent = torch.randn(2, length, 48)
        results = []
        for form in (compiled, layer):
            y = form(**tensors)
            results.append((y, *torch.autograd.grad(y, list(tensors.values()), cotangent)))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_exports_as_ordinary_operators():
    class Model(torch.nn.Module):
        def forward(self, x, weight, z):
            return rms_norm_gated(x, weight, z, eps=1e-5)

    length = torch.export.Dim("length", min=2, max=1000)
    shapes = ({1: length}, None, {1: length})
    program = torch.export.export(Model(), tuple(inputs(2, 12, 48).values()), dynamic_shapes=shapes)
    assert not any("hf_archs" in str(node.target) for node in program.graph.nodes)
    arguments = tuple(inputs(2, 30, 48).values())
    torch.testing.assert_close(program.module()(*arguments), Model()(*arguments))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight": torch.randn(47)}, "weight"),
        ({"z": torch.randn(2, 9, 47)}, "z must"),
        ({"group_size": 36}, "group_size must divide"),
        ({"group_size": 0}, "group_size must divide"),
    ],
)
def test_errors_name_the_argument(change, named):
    with pytest.raises(ValueError, match=named):
        rms_norm_gated(**{**inputs(2, 9, 48), "eps": 1e-5, **change})
