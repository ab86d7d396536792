"""`causal_conv1d`: every implementation against the reference, and the reference against PyTorch's own convolution."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from hf_archs.kernels import causal_conv1d, conv_portable
from hf_archs.kernels.backend import use_backend
from hf_archs.kernels.conv import _reach, causal_conv1d_reference
from hf_archs.testing.ops import check_op, operators, outputs_and_gradients, relative_distance

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def inputs(length, width=4, batch=2, channels=72, dtype=torch.float32, bias=True, state=True):
    return {
        "x": torch.randn(batch, length, channels).to(dtype),
        "weight": torch.randn(channels, width).to(dtype),
        "bias": torch.randn(channels).to(dtype) if bias else None,
        "initial_state": torch.randn(batch, channels, width - 1).to(dtype) if state else None,
    }


def documents(length, batch=2):
    """Documents of 1 to 6 tokens; numbers return, as they do where a row wraps around."""
    starts = torch.rand(batch, length) < 0.3
    return starts.cumsum(1) % 3


OPTIONS = {
    "plain": {},
    "silu": {"activation": "silu"},
    "documents": {"activation": "silu", "seq_idx": True},
    "lengths": {"activation": "silu", "lengths": True},
    "all": {"activation": "silu", "seq_idx": True, "lengths": True},
}


def options(name, length, batch=2):
    chosen = dict(OPTIONS[name])
    if "seq_idx" in chosen:
        chosen["seq_idx"] = documents(length, batch)
    if "lengths" in chosen:
        chosen["lengths"] = torch.tensor([0, length, (length + 1) // 2, 1])[:batch]
    return chosen


def check(tensors, options):
    """Each result and its gradients on its own: what autograd adds up of the two is rounded by autograd."""
    check_op(
        lambda **t: causal_conv1d(**t, **options)[0],
        lambda **t: causal_conv1d_reference(**t, **options)[0],
        tensors,
    )
    filters = {"weight": tensors["weight"], "bias": tensors["bias"]}
    check_op(
        lambda **t: causal_conv1d(**t, **filters, **options)[1],
        lambda **t: causal_conv1d_reference(**t, **filters, **options)[1],
        {k: t for k, t in tensors.items() if k not in filters},
    )


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("length", [1, 3, 20])
def test_reference_is_torchs_convolution(length, width):
    tensors = {k: v.double() for k, v in inputs(length, width).items()}
    padded = torch.cat([tensors["initial_state"], tensors["x"].transpose(1, 2)], 2)
    expected = F.silu(F.conv1d(padded, tensors["weight"].unsqueeze(1), tensors["bias"], groups=72)).transpose(1, 2)
    y, state = causal_conv1d_reference(**tensors, activation="silu")
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, padded[:, :, length:], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
def test_a_packed_row_is_its_documents_alone(backend):
    """Values and gradients, each document through PyTorch's own convolution; the first continues the state."""
    sizes = [5, 1, 2, 9, 3]
    tensors = {k: v.double().requires_grad_() for k, v in inputs(20, batch=1).items()}
    seq_idx = torch.tensor([0, 1, 0, 2, 7]).repeat_interleave(torch.tensor(sizes)).unsqueeze(0)
    alone, before = [], tensors["initial_state"]
    for document in tensors["x"].split(sizes, 1):
        padded = torch.cat([before, document.transpose(1, 2)], 2)
        convolved = F.conv1d(padded, tensors["weight"].unsqueeze(1), tensors["bias"], groups=72)
        alone.append(F.silu(convolved).transpose(1, 2))
        before = torch.zeros_like(before)
    expected = (torch.cat(alone, 1), padded[:, :, -3:])
    cotangents = [torch.randn_like(t) for t in expected]
    expected += torch.autograd.grad(expected, list(tensors.values()), cotangents)
    with use_backend(backend):
        got = causal_conv1d(**tensors, activation="silu", seq_idx=seq_idx)
        got += torch.autograd.grad(got, list(tensors.values()), cotangents)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("length", [1, 2, 17, 64, 65, 130])
def test_portable(length, option, dtype):
    for width, (bias, state) in zip((4, 2, 7), ((True, True), (False, False), (True, False))):
        tensors = inputs(length, width, batch=4, channels=256, dtype=dtype, bias=bias, state=state)
        with use_backend("portable"):
            check(tensors, options(option, length, batch=4))


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("block", [1, 1000, 72 * 130 * 2])
def test_portable_in_blocks(block, packed, silu):
    """Of one position after the first block, of several with a last one that is short, and of all."""
    tensors = [*inputs(130, dtype=torch.float64).values(), _reach(documents(130), 3) if packed else None, silu]
    grad_y = torch.randn(2, 130, 72, dtype=torch.float64)
    whole, parts = (
        (
            conv_portable.causal_conv1d_fwd(*tensors, **chosen),
            *conv_portable.causal_conv1d_bwd(grad_y, *tensors, **chosen),
        )
        for chosen in ({}, {"block": block})
    )
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("length", "width", "option", "state"),
    [
        (1, 4, "silu", True),
        (1, 4, "all", False),
        (2, 8, "all", True),
        (17, 2, "plain", False),
        (64, 4, "silu", False),
        (65, 4, "all", True),
        (130, 3, "lengths", True),
        (130, 4, "documents", False),
    ],
)
def test_triton(length, width, option, state, dtype):
    tensors = inputs(length, width, dtype=dtype, bias=state, state=state)
    with use_backend("triton"):
        check(tensors, options(option, length))


def test_every_triton_config():
    from hf_archs.kernels import conv_triton

    tensors = inputs(40, 4)
    arguments = (*tensors.values(), None, True)
    grad_y = torch.randn_like(tensors["x"])
    expected = conv_portable.causal_conv1d_fwd(*arguments)
    for config in conv_triton.FORWARD_CONFIGS:
        assert relative_distance(conv_triton.causal_conv1d_fwd(*arguments, config=config), expected) < 1e-6
    expected = conv_portable.causal_conv1d_bwd(grad_y, *arguments)
    for config in conv_triton.BACKWARD_CONFIGS:
        for got, wanted in zip(conv_triton.causal_conv1d_bwd(grad_y, *arguments, config=config), expected):
            assert relative_distance(got, wanted) < 2e-6


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_activations_far_from_zero(backend):
    tensors = inputs(9)
    tensors["x"] *= 300
    with use_backend(backend):
        check_op(causal_conv1d, causal_conv1d_reference, tensors, {"activation": "silu"})


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_any_layout_of_the_inputs(backend):
    """A slice of a wider tensor, a transposed one, an expanded gradient."""
    tensors = inputs(19)
    wide = torch.randn(2, 19, 200)
    wide[:, :, 50:122] = tensors["x"]
    transposed = tensors["x"].transpose(1, 2).contiguous().transpose(1, 2)
    column = tensors["weight"].t().contiguous().t()
    with use_backend(backend):
        expected, state = causal_conv1d(**tensors, activation="silu")
        for x in (wide[:, :, 50:122], transposed):
            got = causal_conv1d(**{**tensors, "x": x, "weight": column}, activation="silu")
            torch.testing.assert_close(got, (expected, state), rtol=0, atol=1e-6)
        leaf = tensors["x"].requires_grad_()
        y, _ = causal_conv1d(**tensors, activation="silu")
        (from_expanded,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
        (from_whole,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    torch.testing.assert_close(from_expanded, from_whole, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
@pytest.mark.parametrize("at", [1, 2, 3, 11])
def test_a_split_continues(at, backend):
    tensors = inputs(12)
    seq_idx = documents(12)
    with use_backend(backend):
        whole = causal_conv1d(**tensors, activation="silu", seq_idx=seq_idx)
        first, state = causal_conv1d(
            **{**tensors, "x": tensors["x"][:, :at]}, activation="silu", seq_idx=seq_idx[:, :at]
        )
        # position 0 of the second part continues the state, so a document that begins there gets an empty one
        begins = (seq_idx[:, at] != seq_idx[:, at - 1])[:, None, None]
        tensors = {**tensors, "x": tensors["x"][:, at:], "initial_state": torch.where(begins, 0, state)}
        second = causal_conv1d(**tensors, activation="silu", seq_idx=seq_idx[:, at:])
    torch.testing.assert_close((torch.cat([first, second[0]], 1), second[1]), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
def test_pads_leave_the_state(backend):
    """A row of any length, down to 0, ends in the state that it has alone."""
    tensors = inputs(7, batch=8)
    lengths = torch.arange(8)
    with use_backend(backend):
        y, state = causal_conv1d(**tensors, lengths=lengths)
        assert torch.equal(state[0], tensors["initial_state"][0])
        for row in range(1, 8):
            alone = {**tensors, "x": tensors["x"][row : row + 1, :row]}
            alone["initial_state"] = tensors["initial_state"][row : row + 1]
            y_alone, state_alone = causal_conv1d(**alone)
            torch.testing.assert_close(y[row : row + 1, :row], y_alone, rtol=0, atol=1e-6)
            assert torch.equal(state[row : row + 1], state_alone)
    assert y.isfinite().all()


@pytest.mark.parametrize("length", [1, 2, 6])
def test_gradcheck(length):
    tensors = {k: v.double().requires_grad_() for k, v in inputs(length, 3, channels=2).items()}
    seq_idx, lengths = documents(length), torch.tensor([length, length // 2])

    def op(*args):
        return causal_conv1d(*args[:3], activation="silu", initial_state=args[3], seq_idx=seq_idx, lengths=lengths)

    assert torch.autograd.gradcheck(op, list(tensors.values()))


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_float64_stays_float64(backend):
    tensors = {k: v.double() for k, v in inputs(9).items()}
    with use_backend(backend):
        got = outputs_and_gradients(causal_conv1d, tensors, {"activation": "silu"})
    expected = outputs_and_gradients(causal_conv1d_reference, tensors, {"activation": "silu"})
    for name in expected:
        assert got[name].dtype == torch.float64
        assert relative_distance(got[name], expected[name]) < 1e-14


@pytest.mark.parametrize("length", [1, 9])
def test_every_argument_may_have_its_own_dtype(length):
    """As under autocast: activations in bfloat16, parameters in float32."""
    tensors = inputs(length)
    tensors["x"] = tensors["x"].bfloat16().requires_grad_()
    tensors["weight"].requires_grad_()
    y, state = causal_conv1d(**tensors, activation="silu")
    assert y.dtype == state.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().sum(), (tensors["x"], tensors["weight"]))
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32]


def test_only_the_inputs_are_saved():
    tensors = {k: v.requires_grad_() for k, v in inputs(50).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, _ = causal_conv1d(**tensors, activation="silu")
    own = {t.data_ptr() for t in tensors.values()}
    assert {t.data_ptr() for t in saved if t.numel() > 2 * 72 * 3} <= own
    del y


@pytest.mark.parametrize("length", [1, 2, 9])
def test_the_state_does_not_keep_the_input_alive(length):
    for width in (2, 4):
        tensors = inputs(length, width, batch=1)
        _, state = causal_conv1d(**tensors)
        assert state.untyped_storage().nbytes() == state.numel() * state.element_size()
        assert state.untyped_storage().nbytes() == 72 * (width - 1) * 4
        assert state.untyped_storage().data_ptr() != tensors["x"].untyped_storage().data_ptr()


def test_a_step_is_a_handful_of_operators():
    tensors = inputs(1)
    found = operators(lambda: causal_conv1d(**tensors, activation="silu"))
    assert len(found) <= 6, found


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_opcheck(backend):
    tensors = {k: v.requires_grad_() for k, v in inputs(6, channels=3).items()}
    reach = torch.tensor([[3, 3, 0, 1, 2, 3], [3, 0, 0, 1, 0, 1]], dtype=torch.int32)
    torch.library.opcheck(torch.ops.hf_archs.causal_conv1d.default, (*tensors.values(), reach, True, backend))
    plain = (tensors["x"], tensors["weight"], None, None, None, False, backend)
    torch.library.opcheck(torch.ops.hf_archs.causal_conv1d.default, plain)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_once_for_all_lengths(compiler):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)

    def layer(seq_idx, lengths, **tensors):
        y, state = causal_conv1d(**tensors, activation="silu", seq_idx=seq_idx, lengths=lengths)
        return 2 * y, state.tanh()

    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for length in (10, 33, 18):
        tensors = {k: v.requires_grad_() for k, v in inputs(length).items()}
        arguments = (documents(length), torch.tensor([length, 3]))
        cotangents = [torch.randn(2, length, 72), torch.randn(2, 72, 3)]
        results = []
        for form in (compiled, layer):
            outputs = form(*arguments, **tensors)
            results.append((*outputs, *torch.autograd.grad(outputs, list(tensors.values()), cotangents)))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_step_compiles_into_one_graph():
    torch._dynamo.reset()
    step = torch.compile(lambda **t: causal_conv1d(**t, activation="silu"), backend="aot_eager", fullgraph=True)
    tensors = inputs(1)
    torch.testing.assert_close(step(**tensors), causal_conv1d(**tensors, activation="silu"))
    torch._dynamo.reset()


def test_exports_as_ordinary_operators():
    class Model(torch.nn.Module):
        def forward(self, x, weight, bias, state, seq_idx, lengths):
            return causal_conv1d(
                x, weight, bias, activation="silu", initial_state=state, seq_idx=seq_idx, lengths=lengths
            )

    length = torch.export.Dim("length", min=4, max=1000)
    arguments = (*inputs(12).values(), documents(12), torch.tensor([12, 5]))
    shapes = ({1: length}, None, None, None, {1: length}, None)
    program = torch.export.export(Model(), arguments, dynamic_shapes=shapes)
    assert not any("hf_archs" in str(node.target) for node in program.graph.nodes)
    arguments = (*inputs(30).values(), documents(30), torch.tensor([0, 30]))
    torch.testing.assert_close(program.module()(*arguments), Model()(*arguments))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.randn(4, 72)}, "x must"),
        ({"x": torch.randn(2, 0, 72)}, "length at least 1"),
        ({"weight": torch.randn(72, 1)}, "width of 2 to 8"),
        ({"weight": torch.randn(72, 9)}, "width of 2 to 8"),
        ({"weight": torch.randn(71, 4)}, "weight"),
        ({"bias": torch.randn(71)}, "bias"),
        ({"initial_state": torch.randn(2, 72, 4)}, "initial_state"),
        ({"seq_idx": torch.zeros(2, 4)}, "seq_idx"),
        ({"lengths": torch.zeros(3)}, "lengths"),
        ({"activation": "relu"}, "'relu'"),
    ],
)
def test_errors_name_the_argument(change, named):
    with pytest.raises(ValueError, match=named):
        causal_conv1d(**{**inputs(5), **change})


def test_the_name_is_the_function_whatever_is_imported_first():
    import hf_archs.kernels
    import hf_archs.kernels.conv

    assert callable(hf_archs.kernels.causal_conv1d)
    assert hf_archs.kernels.causal_conv1d is hf_archs.kernels.conv.causal_conv1d


def test_backends_agree_on_every_combination():
    """The flags meet in the kernels in ways of their own; one length, all combinations, values only."""
    for bias, state, packed, silu in itertools.product((False, True), repeat=4):
        tensors = inputs(9, 3, channels=5, bias=bias, state=state)
        chosen = {"activation": "silu" if silu else None, "seq_idx": documents(9) if packed else None}
        with use_backend("triton"):
            got = causal_conv1d(**tensors, **chosen)
        torch.testing.assert_close(got, causal_conv1d_reference(**tensors, **chosen), rtol=0, atol=1e-5)
