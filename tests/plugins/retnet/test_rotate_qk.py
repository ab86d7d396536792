"""The rotation of queries and keys: every form against the reference, and the reference against complex numbers."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hf_archs.kernels.backend import use_backend
from hf_archs.testing.ops import check_op, operators
from hf_archs_retnet.ops.rotate_qk import rotate_qk, rotate_qk_reference

LAYOUTS = pytest.mark.parametrize("interleaved", [False, True])


def make(b=2, l=9, h=3, n=8, dtype=torch.float32):
    return dict(zip("qk", torch.randn(2, b, l, h, n, dtype=dtype)))


def tables(b=2, l=9, h=3, n=8, rows=1, scaled=True, dtype=torch.float32):
    """Angles, and scales where ``scaled``, which differ between rows where there are ``rows`` of them."""
    angle = 6.28 * torch.rand(rows, l, n // 2, dtype=dtype)
    found = {"cos": angle.cos(), "sin": angle.sin(), "scale": 0.25}
    return found | {"q_scale": 0.5 + torch.rand(rows, l, h, dtype=dtype)} if scaled else found


def check(backend, tensors, **options):
    with use_backend(backend):  # around the backward too, which chooses anew
        check_op(rotate_qk, rotate_qk_reference, tensors, options)


@LAYOUTS
def test_the_reference_is_a_product_of_complex_numbers(interleaved):
    tensors, options = make(dtype=torch.float64), tables(dtype=torch.float64)
    turn = torch.complex(options["cos"], options["sin"]).unsqueeze(2)
    found = rotate_qk_reference(**tensors, **options, interleaved=interleaved)
    for x, y, by in zip(tensors.values(), found, (0.25 * options["q_scale"].unsqueeze(3), 1)):
        pairs = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :4], x[..., 4:])
        expected = torch.complex(*pairs) * turn * by
        torch.testing.assert_close(y, torch.cat([expected.real, expected.imag], -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@LAYOUTS
@pytest.mark.parametrize(("l", "rows", "scaled"), [(1, 1, False), (1, 2, True), (9, 2, True), (20, 1, False)])
def test_portable_is_the_reference(l, rows, scaled, interleaved, dtype):
    check("portable", make(l=l, dtype=dtype), **tables(l=l, rows=rows, scaled=scaled), interleaved=interleaved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@LAYOUTS
@pytest.mark.parametrize(
    ("sizes", "rows", "scaled"),
    [
        ({"l": 1}, 1, False),
        ({"l": 1}, 2, True),
        ({"l": 9, "n": 20}, 2, True),
        ({"l": 5, "n": 2}, 1, True),
        ({"l": 3, "h": 5, "n": 2050}, 1, False),  # a head is more than a tile holds of heads
    ],
)
def test_triton_is_the_reference(sizes, rows, scaled, interleaved, dtype, nan_filled_memory):
    options = tables(**sizes, rows=rows, scaled=scaled)
    check("triton", make(**sizes, dtype=dtype), **options, interleaved=interleaved)


def test_every_triton_config():
    """Heads that a tile holds all of, heads that it holds some of, and with few and many warps."""
    from hf_archs_retnet.ops import rotate_qk_triton

    configs = set()
    for h, n in ((2, 16), (5, 600), (3, 5000), (16, 256)):
        configs.add(tuple(rotate_qk_triton._config(h, n // 2).items()))
        check("triton", make(l=2, h=h, n=n), **tables(l=2, h=h, n=n), interleaved=True)
    assert len(configs) == 4


@pytest.mark.parametrize("read", [0, 1])
def test_only_one_of_both_is_read(read):
    """And the other one's gradient is zero."""
    tensors = {name: t.requires_grad_() for name, t in make().items()}
    options = {**tables(), "interleaved": True}
    with use_backend("triton"):
        found = torch.autograd.grad(rotate_qk(**tensors, **options)[read].sum(), list(tensors.values()))
    expected = torch.autograd.grad(rotate_qk_reference(**tensors, **options)[read].sum(), list(tensors.values())[read])
    torch.testing.assert_close(found[read], *expected)
    assert found[1 - read].shape == tensors["q"].shape
    assert not found[1 - read].any()


def test_neither_queries_nor_keys_are_saved():
    tensors, options, saved = make(b=4, l=64), tables(l=64), []
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = rotate_qk(**leaves, **options, interleaved=False)
    kept = {t.data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert sum(kept.values()) <= sum(t.nbytes for t in options.values() if isinstance(t, torch.Tensor)) + 64
    del found


@LAYOUTS
def test_a_step_is_a_handful_of_operators(interleaved):
    tensors, options = make(l=1), tables(l=1, scaled=False)
    found = operators(lambda: rotate_qk(**tensors, **options, interleaved=interleaved))
    assert len(found) <= 7, found


def test_one_graph_serves_every_length():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rotate_qk, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for l in (7, 9, 5):
        tensors, options = make(l=l), {**tables(l=l, rows=2), "interleaved": True}
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        with use_backend("triton"):
            found = compiled(**leaves, **options)
            gradients = torch.autograd.grad(found[0].sum() + found[1].square().sum(), list(leaves.values()))
        expected = rotate_qk_reference(**leaves, **options)
        torch.testing.assert_close(found, expected)
        wanted = torch.autograd.grad(expected[0].sum() + expected[1].square().sum(), list(leaves.values()))
        torch.testing.assert_close(gradients, wanted)
        graphs.append(counter.frame_count)  # dynamo may trace the first one twice
    assert graphs[0] == graphs[-1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": torch.randn(2, 9, 3, 6)}, "k must"),
        ({"cos": torch.randn(3, 9, 4)}, "cos must"),
        ({"sin": torch.randn(2, 9, 4)}, "sin must"),
        ({"q_scale": torch.randn(2, 8, 3)}, "q_scale must"),
    ],
)
def test_errors_name_the_argument(change, named):
    with pytest.raises(ValueError, match=named):
        rotate_qk(**{**make(), **tables(), **change, "interleaved": False})
