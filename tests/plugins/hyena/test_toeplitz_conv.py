"""`toeplitz_conv`: every implementation against the reference, and the reference against a Toeplitz matrix."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hf_archs.kernels.backend import use_backend
from hf_archs.testing.ops import check_op, operators, outputs_and_gradients, relative_distance
from hf_archs_hyena.ops import toeplitz_conv_portable, toeplitz_conv_triton
from hf_archs_hyena.ops.toeplitz_conv import toeplitz_conv, toeplitz_conv_reference

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def inputs(length, taps=7, batch=2, channels=12, groups=None, dtype=torch.float32, bias=True, state=True):
    return {
        "x": torch.randn(batch, length, channels).to(dtype),
        "taps": torch.randn(groups or channels, taps),
        "bias": torch.randn(channels) if bias else None,
        "initial_state": torch.randn(batch, channels, taps - 1).to(dtype) if state else None,
    }


def documents(length, batch=2):
    """Documents of a few tokens; their numbers recur."""
    return (torch.rand(batch, length) < 0.1).cumsum(1) % 3


def options(length, packed, padded, batch=2):
    chosen = {"seq_idx": documents(length, batch)} if packed else {}
    return chosen | ({"lengths": torch.tensor([length // 2, 0, length])[-batch:]} if padded else {})


def check(tensors, options):
    """Each result and its gradients separately, since autograd rounds the sum of both results' gradients."""
    check_op(
        lambda **t: toeplitz_conv(**t, **options)[0], lambda **t: toeplitz_conv_reference(**t, **options)[0], tensors
    )
    if tensors["taps"].shape[1] == 1:  # no state
        return
    filters = {"taps": tensors["taps"], "bias": tensors["bias"]}
    check_op(
        lambda **t: toeplitz_conv(**t, **filters, **options)[1],
        lambda **t: toeplitz_conv_reference(**t, **filters, **options)[1],
        {k: t for k, t in tensors.items() if k not in filters},
    )


def matrix_form(x, taps, bias=None, initial_state=None, seq_idx=None, lengths=None):
    """All pairs of positions, (b, c, outputs, inputs), independent of any recurrence."""
    (b, l, c), (g, k) = x.shape, taps.shape
    taps = taps.repeat_interleave(c // g, 0)
    before = x.new_zeros(b, c, k - 1) if initial_state is None else initial_state
    seen = torch.cat([before, x.transpose(1, 2)], 2)
    begins = torch.zeros(b, l, dtype=torch.long)
    if seq_idx is not None:
        begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    number = torch.cat([torch.zeros(b, k - 1, dtype=torch.long), begins.cumsum(1)], 1)
    back = torch.arange(k - 1, k - 1 + l)[:, None] - torch.arange(k - 1 + l)
    matrix = torch.where((back >= 0) & (back < k), taps[:, back.clamp(0, k - 1)], 0)
    same = number[:, k - 1 :, None] == number[:, None, :]
    y = torch.einsum("cij,bij,bcj->bic", matrix, same.to(x.dtype), seen)
    ends = torch.full((b,), l) if lengths is None else lengths
    rows = []
    for row in range(b):
        end = int(ends[row])
        last = number[row, k - 1 + end - 1] if end else 0
        keep = number[row, end : end + k - 1] == last
        rows.append(seen[row, :, end : end + k - 1] * keep)
    return y + (0 if bias is None else bias * x), torch.stack(rows)


@pytest.mark.parametrize(("packed", "padded"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("taps", [2, 9, 40])
def test_reference_is_the_matrix_form(taps, packed, padded):
    tensors = {k: v.double() for k, v in inputs(30, taps, groups=4).items()}
    chosen = options(30, packed, padded)
    found = outputs_and_gradients(toeplitz_conv_reference, tensors, chosen)
    expected = outputs_and_gradients(matrix_form, tensors, chosen)
    for name, value in expected.items():
        assert relative_distance(found[name], value) < 1e-12, name


# length, taps, channels, groups, bias, state, packed, padded
CASES = [
    (1, 1, 6, 6, True, False, False, False),
    (1, 7, 6, 3, True, True, True, True),
    (2, 128, 6, 6, False, True, True, True),
    (17, 1, 6, 2, True, False, False, True),
    (17, 40, 6, 6, True, True, False, True),
    (64, 7, 6, 6, False, False, False, False),
    (65, 16, 6, 1, True, True, True, False),
    (130, 17, 6, 2, True, False, True, True),
    (130, 128, 6, 6, False, True, False, True),
    (900, 128, 6, 3, True, True, True, True),
]


def arguments(case, dtype):
    length, taps, channels, groups, bias, state, packed, padded = case
    tensors = inputs(length, taps, 3, channels, groups, dtype, bias, state and taps > 1)
    return tensors, options(length, packed, padded, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_portable(case, dtype):
    with use_backend("portable"):
        check(*arguments(case, dtype))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("taps", [7, 128])
@pytest.mark.parametrize(("block", "spectra"), [(1, 1), (500, 8000)])
def test_portable_in_blocks(block, spectra, taps, packed):
    """Of one position or spectrum, and of several with a last one that is short."""
    tensors = [*inputs(900, taps, 3, 6, 3, torch.float64).values()]
    tensors.append(documents(900, 3).cumsum(1, dtype=torch.int32) if packed else None)
    grad_y = torch.randn_like(tensors[0])
    expected = toeplitz_conv_portable.toeplitz_conv_fwd(*tensors)
    gradients = toeplitz_conv_portable.toeplitz_conv_bwd(grad_y, *tensors)
    found = toeplitz_conv_portable.toeplitz_conv_fwd(*tensors, block=block)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    found = toeplitz_conv_portable.toeplitz_conv_bwd(grad_y, *tensors, block=block, spectra=spectra)
    torch.testing.assert_close(found, gradients, rtol=1e-11, atol=1e-11)


# length, taps, channels, groups, bias, state, packed, padded; from 16 channels a group as products of tiles
TRITON_CASES = [
    ("float32", (2, 20, 6, 6, False, True, True, True)),
    ("float16", (35, 9, 6, 1, True, True, True, False)),
    ("float32", (40, 7, 6, 3, True, False, False, False)),
    ("float32", (50, 2, 4, 4, True, True, True, True)),
    ("float16", (2, 5, 16, 1, True, True, True, True)),
    ("float32", (65, 40, 40, 2, False, True, True, False)),
    ("float16", (130, 128, 16, 1, True, False, False, True)),
    ("float32", (150, 1, 90, 1, True, False, False, False)),
]


@pytest.mark.parametrize(("dtype", "case"), TRITON_CASES, ids=str)
def test_triton(dtype, case, monkeypatch):
    monkeypatch.setattr(toeplitz_conv_triton, "SPAN", 64)  # several in a row
    with use_backend("triton"):
        check(*arguments(case, getattr(torch, dtype)))


@pytest.mark.parametrize("packed", [False, True])
def test_every_triton_config(packed):
    """Several tiles in every direction, none of which divides a size."""
    for channels, taps, configs, sum_configs in (
        (70, 10, toeplitz_conv_triton.SHIFT_CONFIGS, toeplitz_conv_triton.SUM_CONFIGS),
        (140, 40, toeplitz_conv_triton.MATRIX_CONFIGS, toeplitz_conv_triton.MATRIX_CONFIGS),
    ):
        tensors = inputs(70, taps, 1, channels, groups=2 if channels == 140 else 14)
        number = documents(70, 1).cumsum(1, dtype=torch.int32) if packed else None
        grad_y = torch.randn_like(tensors["x"])
        expected = toeplitz_conv_portable.toeplitz_conv_fwd(*tensors.values(), number)
        gradients = toeplitz_conv_portable.toeplitz_conv_bwd(grad_y, *tensors.values(), number)
        for config, sum_config in zip(configs, sum_configs, strict=True):
            found = toeplitz_conv_triton.toeplitz_conv_fwd(*tensors.values(), number, config)
            assert relative_distance(found, expected) < 1e-6
            found = toeplitz_conv_triton.toeplitz_conv_bwd(
                grad_y, *tensors.values(), number, config=config, sum_config=sum_config
            )
            for a, b in zip(found, gradients, strict=True):
                assert relative_distance(a, b) < 2e-6


def test_spans_cover_the_length_and_stay_few():
    for length, programs in itertools.product((1, 255, 257, 4000, 131072), (1, 100, 5000)):
        span = toeplitz_conv_triton._span(length, programs)
        spans = -(-length // span)
        assert span % toeplitz_conv_triton.SPAN == 0
        assert spans == 1 or (spans - 1) * programs < toeplitz_conv_triton.PROGRAMS


def test_triton_hands_float64_on():
    tensors = {k: v.double() for k, v in inputs(9).items()}
    with use_backend("triton"):
        found = toeplitz_conv(**tensors)
    assert torch.equal(found[0], toeplitz_conv(**tensors)[0])


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("taps", [5, 30])
def test_a_packed_row_is_its_documents_alone(taps, backend):
    sizes = [5, 1, 32, 9, 3]
    tensors = {k: v.double().requires_grad_() for k, v in inputs(50, taps, batch=1, groups=4).items()}
    state, filters = tensors["initial_state"], {k: tensors[k] for k in ("taps", "bias")}
    seq_idx = torch.tensor([0, 1, 0, 2, 7]).repeat_interleave(torch.tensor(sizes)).unsqueeze(0)
    with use_backend(backend):
        alone = [
            toeplitz_conv(x, **filters, initial_state=None if i else state)
            for i, x in enumerate(tensors["x"].split(sizes, 1))
        ]
        packed = toeplitz_conv(**tensors, seq_idx=seq_idx)
    expected = (torch.cat([y for y, _ in alone], 1), alone[-1][1])
    cotangents = [torch.randn_like(t) for t in expected]
    expected += torch.autograd.grad(expected, list(tensors.values()), cotangents)
    packed += torch.autograd.grad(packed, list(tensors.values()), cotangents)
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-11)


def test_documents_do_not_see_each_other_even_where_they_are_not_finite():
    tensors = inputs(60, 40)
    seq_idx = torch.arange(60).expand(2, 60) // 30
    tensors["x"][:, :30] = torch.inf
    y, state = toeplitz_conv(**tensors, seq_idx=seq_idx)
    assert y[:, 30:].isfinite().all()
    assert state.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("at", [1, 2, 3, 39])
@pytest.mark.parametrize("taps", [4, 25])
def test_a_split_continues(taps, at, backend):
    tensors = inputs(40, taps)
    seq_idx = documents(40)
    seq_idx[:, at] = seq_idx[:, at - 1]  # position 0 of the second part continues the state
    with use_backend(backend):
        whole = toeplitz_conv(**tensors, seq_idx=seq_idx)
        first, state = toeplitz_conv(**{**tensors, "x": tensors["x"][:, :at]}, seq_idx=seq_idx[:, :at])
        rest = {**tensors, "x": tensors["x"][:, at:], "initial_state": state}
        second = toeplitz_conv(**rest, seq_idx=seq_idx[:, at:])
    torch.testing.assert_close((torch.cat([first, second[0]], 1), second[1]), whole, rtol=0, atol=1e-5)


def test_pads_leave_the_state():
    tensors = inputs(7, 20, batch=8)
    tensors["x"][torch.arange(7) >= torch.arange(8)[:, None]] = 9.0
    y, state = toeplitz_conv(**tensors, lengths=torch.arange(8))
    assert torch.equal(state[0], tensors["initial_state"][0])
    assert y.isfinite().all()
    for row in range(1, 8):
        alone = {**tensors, "x": tensors["x"][row : row + 1, :row]}
        alone["initial_state"] = tensors["initial_state"][row : row + 1]
        y_alone, state_alone = toeplitz_conv(**alone)
        torch.testing.assert_close(y[row : row + 1, :row], y_alone, rtol=0, atol=1e-5)
        assert torch.equal(state[row : row + 1], state_alone)


@pytest.mark.parametrize(("length", "taps"), [(1, 3), (6, 1), (6, 3), (30, 20)])
def test_gradcheck(length, taps):
    tensors = {k: v.double().requires_grad_() for k, v in inputs(length, taps, channels=2, groups=1).items()}
    seq_idx, lengths = documents(length), torch.tensor([length, length // 2])

    def op(*args):
        y, state = toeplitz_conv(*args[:3], initial_state=args[3], seq_idx=seq_idx, lengths=lengths)
        return (y, state) if taps > 1 else y

    assert torch.autograd.gradcheck(op, list(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("taps", [5, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_any_layout_of_the_inputs(packed, taps):
    """A slice of a wider tensor, a transposed tensor, an expanded gradient."""
    tensors = inputs(19, taps)
    chosen = options(19, packed, False)
    wide = torch.randn(2, 19, 50)
    wide[:, :, 30:42] = tensors["x"]
    transposed = tensors["x"].transpose(1, 2).contiguous().transpose(1, 2)
    expected = toeplitz_conv(**tensors, **chosen)
    for x in (wide[:, :, 30:42], transposed):
        got = toeplitz_conv(**{**tensors, "x": x, "taps": tensors["taps"].t().contiguous().t()}, **chosen)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        assert got[0].is_contiguous()
    leaf = tensors["x"].requires_grad_()
    y, _ = toeplitz_conv(**tensors, **chosen)
    (from_expanded,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
    (from_whole,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    torch.testing.assert_close(from_expanded, from_whole, rtol=0, atol=1e-6)


def test_every_argument_may_have_its_own_dtype():
    """As under autocast: activations in bfloat16, parameters in float32."""
    for length in (1, 9):
        tensors = inputs(length)
        tensors["x"] = tensors["x"].bfloat16().requires_grad_()
        tensors["taps"].requires_grad_()
        y, state = toeplitz_conv(**tensors)
        assert y.dtype == state.dtype == torch.bfloat16
        gradients = torch.autograd.grad(y.float().sum(), (tensors["x"], tensors["taps"]))
        assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32]


def test_only_the_inputs_are_saved():
    tensors = {k: v.requires_grad_() for k, v in inputs(50).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, _ = toeplitz_conv(**tensors)
    own = {t.data_ptr() for t in tensors.values()}
    assert {t.data_ptr() for t in saved if t.numel() > 2 * 12 * 6} <= own
    del y


@pytest.mark.parametrize("length", [1, 2, 9])
def test_the_state_does_not_keep_the_input_alive(length):
    tensors = inputs(length, 4)
    _, state = toeplitz_conv(**tensors)
    assert state.is_contiguous()
    assert state.untyped_storage().nbytes() == 2 * 12 * 3 * 4


def test_a_step_is_a_handful_of_operators():
    tensors = inputs(1)
    found = operators(lambda: toeplitz_conv(**tensors))
    assert len(found) <= 6, found


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    tensors = {k: v.requires_grad_() for k, v in inputs(6, channels=3).items()}
    number = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]], dtype=torch.int32) if packed else None
    torch.library.opcheck(torch.ops.hf_archs.toeplitz_conv.default, (*tensors.values(), number, "portable"))
    torch.library.opcheck(
        torch.ops.hf_archs.toeplitz_conv.default, (tensors["x"], tensors["taps"], None, None, number, "portable")
    )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_once_for_all_lengths(compiler):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)

    def layer(seq_idx, lengths, **tensors):
        y, state = toeplitz_conv(**tensors, seq_idx=seq_idx, lengths=lengths)
        return 2 * y, state.tanh()

    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for length in (10, 33, 18):  # shorter and longer than a filter
        tensors = {k: v.requires_grad_() for k, v in inputs(length, 20).items()}
        extra = (documents(length), torch.tensor([length, 3]))
        cotangents = [torch.randn(2, length, 12), torch.randn(2, 12, 19)]
        results = []
        for form in (compiled, layer):
            outputs = form(*extra, **tensors)
            results.append((*outputs, *torch.autograd.grad(outputs, list(tensors.values()), cotangents)))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_step_compiles_into_one_graph():
    torch._dynamo.reset()
    step = torch.compile(toeplitz_conv, backend="aot_eager", fullgraph=True)
    tensors = inputs(1)
    torch.testing.assert_close(step(**tensors), toeplitz_conv(**tensors))
    torch._dynamo.reset()


@pytest.mark.parametrize("packed", [False, True])
def test_exports_as_ordinary_operators(packed):
    class Model(torch.nn.Module):
        def forward(self, x, taps, bias, state, seq_idx, lengths):
            return toeplitz_conv(x, taps, bias, initial_state=state, seq_idx=seq_idx, lengths=lengths)

    def example(length):
        return (*inputs(length).values(), documents(length) if packed else None, torch.tensor([length, 5]))

    length = torch.export.Dim("length", min=2, max=1000)
    shapes = ({1: length}, None, None, None, {1: length} if packed else None, None)
    program = torch.export.export(Model(), example(12), dynamic_shapes=shapes)
    assert not any("hf_archs" in str(node.target) for node in program.graph.nodes)
    arguments = example(30)
    torch.testing.assert_close(program.module()(*arguments), Model()(*arguments))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.randn(4, 12)}, "x must"),
        ({"x": torch.randn(2, 0, 12)}, "length at least 1"),
        ({"taps": torch.randn(12, 129)}, "1 to 128"),
        ({"taps": torch.randn(12, 0)}, "1 to 128"),
        ({"taps": torch.randn(5, 7)}, "multiple of the groups"),
        ({"bias": torch.randn(11)}, "bias"),
        ({"initial_state": torch.randn(2, 12, 4)}, "initial_state"),
        ({"seq_idx": torch.zeros(2, 4)}, "seq_idx"),
        ({"lengths": torch.zeros(3)}, "lengths"),
    ],
)
def test_errors_name_the_argument(change, named):
    with pytest.raises(ValueError, match=named):
        toeplitz_conv(**{**inputs(5), **change})
