"""Retention: its three forms against each other, and the paper's decays."""

import functools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hf_archs.kernels.backend import use_backend
from hf_archs.testing.ops import check_op, operators, outputs_and_gradients, relative_distance
from hf_archs_retnet import multi_scale_log_decay, retention, retention_parallel, retention_reference


def on(backend):
    """`retention` on one backend."""

    def op(**arguments):
        with use_backend(backend):
            return retention(**arguments)

    return op


portable, triton = on("portable"), on("triton")


def make(b=2, l=70, h=3, n=8, p=12, dtype=torch.float32, state=True, decay=False):
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "q": torch.randn(b, l, h, n, dtype=dtype),
        "k": torch.randn(b, l, h, n, dtype=dtype),
        "v": torch.randn(b, l, h, p, dtype=dtype),
        "log_decay": -torch.rand(h, dtype=wide) if decay else None,
        "initial_state": torch.randn(b, h, p, n, dtype=wide) if state else None,
    }


def some_documents(b, l):
    return (torch.rand(b, l) < 0.06).cumsum(1) % 3


def boundaries(kind, b, l):
    """Of documents, of pads, of both, or none."""
    found = {}
    if kind in ("documents", "both"):
        found["seq_idx"] = some_documents(b, l)
    if kind in ("lengths", "both"):
        found["lengths"] = torch.tensor([0, l // 3, l][-b:])
    return found


def test_the_decays_of_the_paper():
    """gamma_h = 1 - 2^(-5 - h), to float32's precision at any number of heads."""
    found = multi_scale_log_decay(60)
    assert found.dtype == torch.float32
    for h, value in enumerate(found.tolist()):
        assert value == pytest.approx(math.log1p(-(2.0 ** (-5 - h))), rel=1e-6)
    assert found[0].exp() == 1 - 1 / 32
    assert multi_scale_log_decay(3, dtype=torch.float64)[2].item() == pytest.approx(math.log1p(-1 / 128), rel=1e-15)


def test_the_recurrence_of_the_paper():
    """Equation 6 with numbers small enough to do by hand: one head of one channel, gamma = 31/32."""
    ones = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    gamma = torch.tensor([31 / 32], dtype=torch.float64)
    y, state = retention_reference(ones, ones * 2, ones * 3, log_decay=gamma.log())
    expected = [6.0, 6 + 6 * 31 / 32, 6 + 6 * 31 / 32 + 6 * (31 / 32) ** 2]
    torch.testing.assert_close(y.flatten(), torch.tensor(expected, dtype=torch.float64))
    assert state.item() == pytest.approx(expected[2])


@pytest.mark.parametrize("kind", ["none", "documents", "lengths", "both"])
@pytest.mark.parametrize("decay", [False, True])
def test_reference_is_the_parallel_form(kind, decay):
    tensors, options = make(b=3, l=40, dtype=torch.float64, decay=decay), boundaries(kind, 3, 40)
    found = outputs_and_gradients(retention_reference, tensors, options)
    expected = outputs_and_gradients(retention_parallel, tensors, options)
    for name, value in expected.items():
        assert relative_distance(found[name], value) < 1e-12, name


def test_three_forms_at_4096_tokens():
    """The parallel, the recurrent and the chunkwise form, in float32."""
    tensors = make(b=1, l=4096, h=4, n=16, p=16, state=False)
    forms = [op(**tensors) for op in (retention_parallel, retention_reference, portable)]
    for other in forms[1:]:
        for a, b in zip(other, forms[0]):
            assert relative_distance(a, b) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("l", "kind", "decay"),
    [
        (1, "none", True),
        (1, "lengths", False),
        (2, "documents", False),
        (17, "none", True),
        (64, "lengths", False),
        (65, "none", False),
        (130, "both", True),
        (200, "none", True),
        (200, "documents", False),
    ],
)
def test_portable_is_the_reference(l, kind, decay, dtype, nan_filled_memory):
    tensors = make(l=l, dtype=dtype, decay=decay)
    check_op(portable, retention_reference, tensors, boundaries(kind, 2, l))


@pytest.mark.parametrize(
    ("l", "kind", "decay", "dtype"),
    [(1, "none", False, "float32"), (65, "lengths", True, "float16"), (130, "none", False, "float32")],
)
def test_triton_is_the_reference(l, kind, decay, dtype, nan_filled_memory):
    tensors = make(l=l, dtype=getattr(torch, dtype), decay=decay)
    check_op(triton, retention_reference, tensors, boundaries(kind, 2, l))


def test_a_scale_of_one():
    tensors = make(l=20)
    check_op(functools.partial(portable, scale=1.0), functools.partial(retention_reference, scale=1.0), tensors)
    torch.testing.assert_close(portable(**tensors, scale=1.0)[0], portable(**tensors)[0] * 8**0.5)


@pytest.mark.parametrize("at", [1, 63, 64, 99])
def test_split_and_continued_is_the_whole(at):
    tensors = make(l=100, dtype=torch.float64)
    state = tensors.pop("initial_state")
    del tensors["log_decay"]
    whole, final = portable(**tensors, initial_state=state)
    left, middle = portable(**{n: t[:, :at] for n, t in tensors.items()}, initial_state=state)
    right, end = portable(**{n: t[:, at:] for n, t in tensors.items()}, initial_state=middle)
    torch.testing.assert_close(torch.cat([left, right], 1), whole)
    torch.testing.assert_close(end, final)


@pytest.mark.parametrize("decay", [False, True])
def test_packed_documents_are_each_alone(decay):
    sizes = [3, 61, 1, 70, 64]
    tensors = make(b=1, l=sum(sizes), dtype=torch.float64, state=False, decay=decay)
    log_decay = tensors.pop("log_decay")
    del tensors["initial_state"]
    seq_idx = torch.repeat_interleave(torch.arange(len(sizes)) % 2, torch.tensor(sizes))[None]
    for t in tensors.values():
        t.requires_grad_()
    packed, final = portable(**tensors, log_decay=log_decay, seq_idx=seq_idx)
    pieces = zip(*(t.split(sizes, 1) for t in tensors.values()))
    alone = [portable(**dict(zip(tensors, part)), log_decay=log_decay) for part in pieces]
    torch.testing.assert_close(packed, torch.cat([y for y, _ in alone], 1))
    torch.testing.assert_close(final, alone[-1][1])
    cotangent = torch.randn_like(packed)
    found = torch.autograd.grad((packed * cotangent).sum(), list(tensors.values()))
    expected = torch.autograd.grad((torch.cat([y for y, _ in alone], 1) * cotangent).sum(), list(tensors.values()))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("decay", [False, True])
def test_gradcheck(decay):
    tensors = make(b=1, l=67, h=2, n=2, p=2, dtype=torch.float64, decay=decay)
    inputs = [t.requires_grad_() for t in tensors.values() if t is not None]
    names = [n for n, t in tensors.items() if t is not None]

    def op(*values):
        return portable(**dict(zip(names, values)))

    torch.autograd.gradcheck(op, inputs, fast_mode=True)


def test_far_heads_forget_nothing_in_bf16():
    """The decays of far heads are 1 in bfloat16 or worse; the state says otherwise after many tokens."""
    l, h = 600, 6
    tensors = {name: torch.ones(1, l, h, 1, dtype=torch.bfloat16) for name in "qkv"}
    _, state = retention(**tensors)
    gamma = 1 - 2.0 ** (-5 - torch.arange(h, dtype=torch.float64))
    torch.testing.assert_close(state.flatten().double(), (1 - gamma**l) / (1 - gamma), rtol=1e-5, atol=0)


def test_a_step_is_a_handful_of_operators():
    tensors = make(b=1, l=1, decay=True)
    found = operators(lambda: portable(**tensors, scale=1.0))
    assert len(found) <= 6, found


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_serves_every_length(dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(tensors):
        y, state = portable(**tensors)
        return y.square().sum() + state.square().sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=dynamic)
    for l in (40, 70, 133):
        tensors = {n: t if t is None else t.requires_grad_() for n, t in make(l=l).items()}
        wanted = [t for t in tensors.values() if t is not None]
        found, expected = compiled(tensors), loss(tensors)
        torch.testing.assert_close(found, expected)
        for a, b in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert counter.frame_count == (1 if dynamic else 2)  # by default the second length makes the length a symbol


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 70, 4, 8)}, "retention: q must be"),
        ({"v": torch.zeros(2, 70, 12)}, "retention: q must be"),
        ({"log_decay": torch.zeros(4)}, "log_decay must have shape"),
        ({"k": torch.zeros(2, 70, 3, 9)}, "k must have shape"),
        ({"initial_state": torch.zeros(2, 3, 8, 12)}, "initial_state must have shape"),
    ],
)
def test_a_wrong_shape_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        retention(**{**make(), **changes})
