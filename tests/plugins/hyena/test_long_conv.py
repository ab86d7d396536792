"""`long_conv`: the reference against a direct sum, the fast form against the reference, and the op's promises."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hf_archs.kernels.backend import use_backend
from hf_archs.testing.ops import check_op, operators, outputs_and_gradients, relative_distance
from hf_archs_hyena.ops import long_conv_portable
from hf_archs_hyena.ops.long_conv import _exportable, long_conv, long_conv_reference, long_conv_step

B, C = 2, 3


def tensors(length, taps=None, past=0, dtype=torch.float32, without=()):
    """Random arguments; ``without`` names those that are None."""
    shapes = {
        "x": (B, length, C),
        "taps": (C, length + past if taps is None else taps),
        "bias": (C,),
        "gate_in": (B, length, C),
        "gate_out": (B, length, C),
        "initial_state": (B, C, past),
    }
    without = (*without, *(() if past else ("initial_state",)))
    return {name: None if name in without else torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def boundaries(length, packed=True, padded=True):
    found = {}
    if packed:
        found["seq_idx"] = (torch.rand(B, length) < 0.15).int().cumsum(1)
    if padded:
        found["lengths"] = torch.tensor([max(length - 3, 0), length // 2])
    return found


def direct(x, taps, bias=None, gate_in=None, gate_out=None, initial_state=None, seq_idx=None, lengths=None):
    """The paper's sum over all pairs of positions, without a loop over time or a Fourier transform."""
    length = x.shape[1]
    v = x if gate_in is None else x * gate_in
    seen = v if initial_state is None else torch.cat([initial_state.transpose(1, 2), v], 1)
    past = seen.shape[1] - length
    lag = torch.arange(past, past + length)[:, None] - torch.arange(past + length)
    weight = torch.where((lag >= 0) & (lag < taps.shape[1]), taps[:, lag.clamp(0, taps.shape[1] - 1)], 0)  # (c, t, s)
    document = torch.zeros(len(x), past + length, dtype=torch.long)
    if seq_idx is not None:
        document[:, past + 1 :] = (seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1)
    same = document[:, past:, None] == document[:, None]  # (b, t, s)
    y = torch.einsum("cts,bts,bsc->btc", weight, same.to(x.dtype), seen)
    if bias is not None:
        y = y + bias * v
    columns = min(past + length, taps.shape[1])
    states = []
    for row in range(len(x)):
        end = past + (length if lengths is None else int(lengths[row]))
        state = seen.new_zeros(x.shape[2], past + length)
        if end:
            mine = document[row, :end] == document[row, max(end - 1, 0)]
            kept = torch.where(mine[:, None], seen[row, :end], 0).t()
            state = torch.cat([state[:, end:], kept], 1)
        states.append(state[:, -columns:])
    return y if gate_out is None else y * gate_out, torch.stack(states)


CASES = [(1, 1, 0), (1, 9, 8), (2, 2, 0), (17, 17, 0), (17, 40, 23), (30, 5, 12), (64, 100, 0), (65, 65, 7)]


@pytest.mark.parametrize(("length", "taps", "past"), CASES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", [long_conv_reference, long_conv], ids=["reference", "fast"])
def test_equals_the_direct_sum(op, length, taps, past, packed):
    """Outputs, final state and every gradient, in float64 to its last digits and in float32 to 1e-5."""
    arguments = tensors(length, taps, past, torch.float64)
    options = boundaries(length, packed)
    exact = outputs_and_gradients(direct, arguments, options)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        narrow = {name: None if t is None else t.to(dtype) for name, t in arguments.items()}
        for name, found in outputs_and_gradients(op, narrow, options).items():
            assert found.dtype == dtype
            assert relative_distance(found, exact[name]) < tolerance, f"{name} in {dtype}"


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("length", "taps", "past"), [(1, 9, 8), (17, 17, 0), (130, 60, 40)])
@pytest.mark.parametrize("without", [(), ("bias", "gate_in"), ("gate_out",)], ids=str)
def test_against_the_reference(dtype, length, taps, past, without):
    for packed, padded in ((False, False), (True, True)):
        check_op(
            long_conv,
            long_conv_reference,
            tensors(length, taps, past, dtype, without),
            boundaries(length, packed, padded),
        )


@pytest.mark.parametrize("elements", [1, 2**8, 2**19])
def test_blocks_of_channels(elements, monkeypatch):
    """The result does not depend on the block size."""
    monkeypatch.setitem(long_conv_portable.BLOCK_ELEMENTS, "cpu", elements)
    check_op(long_conv, long_conv_reference, tensors(40, None, 5), boundaries(40))


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_every_backend_has_it(backend):
    with use_backend(backend):
        check_op(long_conv, long_conv_reference, tensors(20, None, 5), boundaries(20))


def test_gradcheck():
    arguments = [t if t is None else t.requires_grad_() for t in tensors(4, 6, 3, torch.float64).values()]

    def op(*inputs):
        return long_conv(*inputs[:5], initial_state=inputs[5], **options)

    options = boundaries(4)
    assert torch.autograd.gradcheck(op, arguments)


@pytest.mark.parametrize("cut", [1, 7, 19])
def test_split_and_continued(cut):
    """Two calls, connected by the state, equal one call, also with pads after the first part."""
    arguments = tensors(20, 20)
    inputs = {name: arguments[name] for name in ("x", "gate_in", "gate_out")}
    filters = {name: arguments[name] for name in ("taps", "bias")}
    whole, final = long_conv(**inputs, **filters)
    first = {name: torch.cat([t[:, :cut], torch.randn(B, 3, C)], 1) for name, t in inputs.items()}
    y, state = long_conv(**first, **filters, lengths=torch.full((B,), cut))
    more, last = long_conv(**{n: t[:, cut:] for n, t in inputs.items()}, **filters, initial_state=state)
    assert relative_distance(torch.cat([y[:, :cut], more], 1), whole) < 1e-6
    assert relative_distance(last[:, :, -20:], final) < 1e-6


def test_a_row_without_a_token_keeps_its_state():
    arguments = tensors(6, 50, 9)
    _, state = long_conv(**arguments, lengths=torch.tensor([0, 6]))
    assert torch.equal(state[0, :, -9:], arguments["initial_state"][0])
    assert not state[0, :, :-9].any()


def test_packed_documents_are_alone():
    """Forward and gradients of each packed document equal those of the document alone."""
    arguments = tensors(60)
    cuts = (1, 30, 2, 20, 7)
    seq_idx = torch.repeat_interleave(torch.arange(5), torch.tensor(cuts)).expand(B, -1)
    packed = outputs_and_gradients(lambda **a: long_conv(**a, seq_idx=seq_idx, need_state=False)[0], arguments, {})
    weights = torch.randn(B, 60, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = 0
    for n in cuts:
        part = slice(start, start + n)
        mine = {k: t[:, part] if t is not None and t.ndim == 3 else t for k, t in arguments.items()}
        leaves = {k: None if t is None else t.clone().requires_grad_() for k, t in mine.items()}
        y, _ = long_conv(**leaves)
        assert relative_distance(y, packed["output 0"][:, part]) < 2e-6
        (y.double() * weights[:, part]).sum().backward()
        for name in ("x", "gate_in", "gate_out"):
            assert relative_distance(leaves[name].grad, packed[f"gradient of {name}"][:, part]) < 2e-6, name
        start += n


def test_huge_neighbours_do_not_leak():
    """A Fourier transform spreads rounding errors over its whole length, so documents are transformed apart."""
    arguments = tensors(40, without=("gate_in", "gate_out"))
    seq_idx = (torch.arange(40) >= 20).int().expand(B, -1)
    expected, _ = long_conv(**arguments, seq_idx=seq_idx)
    arguments["x"][:, :20] *= 1e20
    found, _ = long_conv(**arguments, seq_idx=seq_idx)
    assert torch.equal(found[:, 20:], expected[:, 20:])


def test_half_precision_is_not_transformed_in_it():
    """Under autocast and with bfloat16 inputs, sums are float32: the error is that of rounding the result."""
    arguments = tensors(512, dtype=torch.bfloat16)
    exact, _ = long_conv(**{n: None if t is None else t.double() for n, t in arguments.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, state = long_conv(**arguments)
    assert found.dtype == state.dtype == torch.bfloat16
    assert relative_distance(found, exact) < 2 * torch.finfo(torch.bfloat16).eps


def test_a_step_transforms_nothing():
    """A decode step is a dot product with the past: no Fourier transform, no custom op, and few calls."""
    arguments = tensors(1, 200, 150)
    expected = long_conv_reference(**arguments)
    reversed_taps = arguments.pop("taps").flip(1)
    found = []
    calls = operators(lambda: found.append(long_conv_step(reversed_taps=reversed_taps, **arguments)))
    assert not [name for name in calls if "fft" in name or "hf_archs" in name]
    assert len(calls) < 20, calls
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)


def test_non_contiguous_inputs():
    arguments = tensors(20, 30, 6)
    options = boundaries(20)
    expected = outputs_and_gradients(long_conv, arguments, options)

    def strided(t):
        return None if t is None else torch.stack([t, t], -1)[..., 0]

    found = outputs_and_gradients(long_conv, {n: strided(t) for n, t in arguments.items()}, options)
    for name, tensor in expected.items():
        assert relative_distance(found[name], tensor) < 1e-6, name


def test_saves_its_inputs_only():
    kept = []
    arguments = {n: None if t is None else t.requires_grad_() for n, t in tensors(300).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        long_conv(**arguments, need_state=False)
    given = {t.data_ptr() for t in arguments.values() if t is not None}
    assert {t.data_ptr() for t in kept} <= given


class TestCompilers:
    @pytest.fixture(autouse=True)
    def _no_graphs_from_before(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_opcheck(self):
        for past, packed in ((0, False), (4, True)):
            arguments = {n: None if t is None else t.requires_grad_() for n, t in tensors(9, 12, past).items()}
            seq_idx = boundaries(9)["seq_idx"] if packed else None
            torch.library.opcheck(torch.ops.hf_archs.long_conv.default, (*arguments.values(), seq_idx, "portable"))

    def test_one_graph_for_every_length(self):
        counter = CompileCounterWithBackend("aot_eager")

        @torch.compile(backend=counter, fullgraph=True, dynamic=True)
        def run(**arguments):
            return long_conv(**arguments)

        counts = []
        for length in (20, 33, 47):
            arguments, options = tensors(length, 60, 10), boundaries(length)
            found = outputs_and_gradients(run, arguments, options)
            for name, expected in outputs_and_gradients(long_conv, arguments, options).items():
                assert relative_distance(found[name], expected) < 1e-6, name
            counts.append(counter.frame_count)
        assert counts[0] == counts[-1], counts

    def test_exported(self):
        """The exported form computes the same, in ordinary operators."""
        for past, packed in ((0, False), (6, True)):
            arguments = tensors(15, 20, past)
            seq_idx = boundaries(15)["seq_idx"] if packed else None
            expected, _ = long_conv(**arguments, seq_idx=seq_idx)
            assert relative_distance(_exportable(*arguments.values(), seq_idx), expected) < 1e-6

        class Module(torch.nn.Module):
            def forward(self, x, taps):
                return long_conv(x, taps, need_state=False)[0]

        inputs = tensors(15)["x"], tensors(15)["taps"]
        program = torch.export.export(Module(), inputs)
        assert "hf_archs" not in str(program.graph)
        assert relative_distance(program.module()(*inputs), Module()(*inputs)) < 1e-6


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (B, 0, C)),
        ("x", (B, C)),
        ("taps", (C + 1, 5)),
        ("taps", (C, 0)),
        ("bias", (C + 1,)),
        ("gate_in", (B, 4, C)),
        ("gate_out", (B, 5, 1)),
        ("initial_state", (B, C + 1, 3)),
    ],
)
def test_wrong_shapes(name, shape):
    with pytest.raises(ValueError, match=f"long_conv: {name} must"):
        long_conv(**{**tensors(5), name: torch.randn(shape)})


@pytest.mark.parametrize(("name", "shape"), [("seq_idx", (B, 4)), ("lengths", (B + 1,))])
def test_wrong_boundaries(name, shape):
    with pytest.raises(ValueError, match=f"long_conv: {name} must"):
        long_conv(**tensors(5), **{name: torch.zeros(shape, dtype=torch.int64)})
