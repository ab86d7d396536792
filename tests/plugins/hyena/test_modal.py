"""`modal_conv`: every implementation against the reference, and the reference against the filter's taps."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hf_archs.kernels.backend import use_backend
from hf_archs.testing.ops import check_op, operators, outputs_and_gradients, relative_distance
from hf_archs_hyena.ops import modal_triton
from hf_archs_hyena.ops.modal import modal_conv, modal_conv_reference, modal_powers, modal_state, modal_taps

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def on(backend):
    def op(**arguments):
        with use_backend(backend):
            return modal_conv(**arguments)

    return op


portable = on("portable")


def make(b=2, l=65, c=5, n=4, dtype=torch.float32, bias=True, state=True):
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "x": torch.randn(b, l, c, dtype=dtype),
        "log_decay": torch.rand(c, n, dtype=wide) * 8 - 6,  # from half a token to 400 tokens
        "phase": torch.rand(c, n, dtype=wide) * 3.1,
        "residues": torch.randn(c, n, 2, dtype=wide),
        "bias": torch.randn(c, dtype=wide) if bias else None,
        "initial_state": torch.randn(b, c, n, 2, dtype=wide) if state else None,
    }


def some_documents(b, l):
    """Document numbers of random rows; one number is used for two separate documents."""
    return (torch.rand(b, l) < 0.06).cumsum(1) % 3


def by_taps(x, log_decay, phase, residues, bias=None, initial_state=None, seq_idx=None, lengths=None):
    """A sum over all pairs of positions, with complex powers, independent of any recurrence."""
    (b, l, c), n = x.shape, log_decay.shape[1]
    poles = torch.exp(torch.complex(-log_decay.exp(), phase))
    weights = torch.complex(residues[..., 0], residues[..., 1])
    real = torch.ones(b, l, dtype=torch.bool) if lengths is None else torch.arange(l) < lengths[:, None]
    ends = torch.full((b,), l) if lengths is None else lengths
    begins = torch.zeros(b, l, dtype=torch.bool)
    if seq_idx is not None:
        begins[:, 1:] = (seq_idx[:, 1:] != seq_idx[:, :-1]) & real[:, 1:]
    number = begins.cumsum(1)
    initial = torch.zeros(b, c, n, 2, dtype=x.dtype) if initial_state is None else initial_state
    initial = torch.complex(initial[..., 0], initial[..., 1])

    back = torch.arange(l)[:, None] - torch.arange(l)
    taps = (weights[..., None, None] * poles[..., None, None] ** back.clamp(min=0)).real.sum(1)
    seen = (back >= 0) & (number[:, :, None] == number[:, None, :]) & real[:, :, None] & real[:, None, :]
    y = torch.einsum("cij,bij,bjc->bic", taps, seen.to(x.dtype), x)
    first = ((number == 0) & real).to(x.dtype)
    from_state = (weights[..., None] * poles[..., None] ** torch.arange(1, l + 1) * initial[..., None]).real.sum(2)
    y = y + from_state.transpose(1, 2) * first[..., None]
    if bias is not None:
        y = y + bias * x * real[..., None]

    last = torch.where(ends > 0, number.gather(1, (ends - 1).clamp(min=0)[:, None])[:, 0], 0)
    distance = ends[:, None] - 1 - torch.arange(l)
    kept = (distance >= 0) & (number == last[:, None])
    decays = poles[None, :, :, None] ** distance.clamp(min=0)[:, None, None, :] * kept[:, None, None, :]
    final = (decays * x.transpose(1, 2)[:, :, None]).sum(3)
    final = final + poles ** ends[:, None, None] * initial * (last == 0)[:, None, None]
    return y, torch.view_as_real(final)


def boundaries(l, packed, padded, b=2):
    chosen = {"seq_idx": some_documents(b, l)} if packed else {}
    return chosen | ({"lengths": torch.tensor([l // 2, 0, l])[-b:]} if padded else {})


@pytest.mark.parametrize(("packed", "padded"), [(False, False), (True, False), (False, True), (True, True)])
def test_reference_is_the_sum_over_taps(packed, padded):
    tensors, chosen = make(l=40, dtype=torch.float64), boundaries(40, packed, padded)
    found = outputs_and_gradients(modal_conv_reference, tensors, chosen)
    expected = outputs_and_gradients(by_taps, tensors, chosen)
    for name, value in expected.items():
        assert relative_distance(found[name], value) < 1e-12, name


# length, modes, bias, state, packed, padded
CASES = [
    (1, 4, True, True, False, True),
    (1, 4, False, False, False, False),
    (2, 4, True, True, True, True),
    (17, 1, False, False, False, True),
    (64, 4, True, True, False, False),
    (65, 3, False, True, True, False),
    (130, 16, True, True, True, True),
    (200, 4, True, False, False, True),
]


def arguments(case, dtype):
    l, n, bias, state, packed, padded = case
    return make(3, l, 5, n, dtype, bias, state), boundaries(l, packed, padded, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"l{c[0]}-n{c[1]}")
def test_portable_is_the_reference(case, dtype):
    check_op(portable, modal_conv_reference, *arguments(case, dtype))


@pytest.mark.parametrize(
    ("case", "dtype"), [(0, "float32"), (2, "float16"), (4, "float32"), (5, "float16"), (6, "float32"), (7, "float32")]
)
def test_triton_is_the_reference(case, dtype):
    check_op(on("triton"), modal_conv_reference, *arguments(CASES[case], getattr(torch, dtype)))


@pytest.mark.parametrize("config", modal_triton.CONFIGS)
def test_every_triton_config(config, monkeypatch):
    """More states than one program holds, and more chunks than it fetches at once."""
    monkeypatch.setattr(modal_triton, "CONFIGS", [config])
    tensors = make(b=3, l=64 * 9 + 5, c=2, n=20)
    chosen = {"seq_idx": (torch.rand(3, 64 * 9 + 5) < 0.01).cumsum(1)}
    check_op(on("triton"), modal_conv_reference, tensors, chosen)


def test_triton_hands_float64_on():
    tensors = make(l=9, dtype=torch.float64)
    assert torch.equal(on("triton")(**tensors)[0], portable(**tensors)[0])


@pytest.mark.parametrize("l", [1, 5, 70])
def test_gradcheck(l):
    tensors = make(1, l, 2, 2, torch.float64)
    seq_idx = some_documents(1, l)
    inputs = [t.requires_grad_() for t in tensors.values()]

    def op(*values):
        return portable(**dict(zip(tensors, values)), seq_idx=seq_idx)

    torch.autograd.gradcheck(op, inputs, fast_mode=True)


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_into_one_output_alone(output):
    tensors = {name: t.requires_grad_() for name, t in make(l=70, dtype=torch.float64).items()}
    cotangent = torch.randn_like(portable(**tensors)[output])
    wanted = list(tensors.values())
    found, expected = (
        torch.autograd.grad(op(**tensors)[output], wanted, cotangent, allow_unused=True, materialize_grads=True)
        for op in (portable, modal_conv_reference)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("at", [1, 63, 64, 99])
def test_split_and_continued_is_the_whole(at):
    tensors = make(l=100, dtype=torch.float64)
    x, state = tensors.pop("x"), tensors.pop("initial_state")
    whole, final = portable(x=x, **tensors, initial_state=state)
    left, middle = portable(x=x[:, :at], **tensors, initial_state=state)
    right, end = portable(x=x[:, at:], **tensors, initial_state=middle)
    torch.testing.assert_close(torch.cat([left, right], 1), whole)
    torch.testing.assert_close(end, final)


def test_token_by_token_is_the_whole():
    tensors = make(l=70)
    x, state = tensors.pop("x"), tensors.pop("initial_state")
    whole, final = portable(x=x, **tensors, initial_state=state)
    steps = []
    for t in range(70):
        y, state = portable(x=x[:, t : t + 1], **tensors, initial_state=state)
        steps.append(y)
    assert relative_distance(torch.cat(steps, 1), whole) < 3e-6
    assert relative_distance(state, final) < 3e-6


def test_packed_documents_are_each_alone():
    sizes = [3, 61, 1, 70, 64]
    tensors = make(b=1, l=sum(sizes), dtype=torch.float64, state=False)
    seq_idx = torch.repeat_interleave(torch.arange(len(sizes)) % 2, torch.tensor(sizes))[None]
    leaves = {n: t.requires_grad_() for n, t in tensors.items() if t is not None}
    packed = portable(**leaves, seq_idx=seq_idx)
    alone = [portable(**{**leaves, "x": x}) for x in leaves["x"].split(sizes, 1)]
    expected = (torch.cat([y for y, _ in alone], 1), alone[-1][1])
    torch.testing.assert_close(packed, expected)
    cotangents = [torch.randn_like(t) for t in expected]
    found, wanted = (torch.autograd.grad(t, list(leaves.values()), cotangents) for t in (packed, expected))
    torch.testing.assert_close(found, wanted)


def test_pads_leave_the_state_alone():
    """Values at pads, finite or not, and documents that begin there have no effect."""
    tensors = make(l=80, dtype=torch.float64)
    seq_idx, lengths = some_documents(2, 80), torch.tensor([0, 70])
    seq_idx[:, 75] = 7
    tensors["x"][1, 70:] = torch.nan
    y, final = portable(**tensors, seq_idx=seq_idx, lengths=lengths)
    assert torch.equal(final[0], tensors["initial_state"][0])
    alone = {n: t[1:] if n == "initial_state" else t[1:, :70] if n == "x" else t for n, t in tensors.items()}
    expected_y, expected = portable(**alone, seq_idx=seq_idx[1:, :70])
    torch.testing.assert_close(final[1:], expected)
    torch.testing.assert_close(y[1:, :70], expected_y)
    assert (y[1, 70:] == 0).all()


@pytest.mark.parametrize("l", [1, 255, 257, 1000])
def test_taps_are_the_modal_sum(l):
    tensors = {k: t for k, t in make(l=1, dtype=torch.float64).items() if k in ("log_decay", "phase", "residues")}
    poles = torch.exp(torch.complex(-tensors["log_decay"].exp(), tensors["phase"]))
    weights = torch.view_as_complex(tensors["residues"])
    expected = (weights[..., None] * poles[..., None] ** torch.arange(l)).real.sum(1)
    torch.testing.assert_close(modal_taps(**tensors, length=l), expected)
    single = {k: t.float() for k, t in tensors.items()}
    rounded = {k: t.double() for k, t in single.items()}
    found = modal_taps(**single, length=l)
    assert found.dtype == torch.float32
    assert relative_distance(found, modal_taps(**rounded, length=l)) < 1e-6


def test_taps_far_out_keep_their_digits():
    """At tap 100,000, float32 would keep three digits of the angle."""
    poles = {"log_decay": torch.full((1, 1), -13.0), "phase": torch.full((1, 1), 2.9)}
    taps = modal_taps(**poles, residues=torch.tensor([[[1.0, 0.0]]]), length=100_001)[0]
    exact = torch.exp(-torch.exp(torch.tensor(-13.0).double()) * 1e5) * torch.cos(torch.tensor(2.9).double() * 1e5)
    assert abs(taps[100_000].double() - exact) < 1e-6


def test_longer_taps_begin_with_the_shorter():
    tensors = {k: make()[k] for k in ("log_decay", "phase", "residues")}
    long = modal_taps(**tensors, length=1000)
    for length in (1, 100, 256, 257, 900):
        torch.testing.assert_close(modal_taps(**tensors, length=length), long[:, :length], rtol=1e-6, atol=1e-6)


def test_taps_can_be_differentiated():
    tensors = {k: make(c=2, n=2, dtype=torch.float64)[k].requires_grad_() for k in ("log_decay", "phase", "residues")}
    torch.autograd.gradcheck(lambda *t: modal_taps(*t, length=300), list(tensors.values()), fast_mode=True)


def test_poles_stay_inside_the_unit_circle():
    """Powers are finite, and at most 1, for extreme parameters."""
    extreme = torch.tensor([[-1e4, -80.0, -3.0, 0.0, 3.0, 80.0, 1e4]])
    powers = modal_powers(extreme, 7 * extreme, torch.tensor([1.0, 1e6]))
    size = powers.norm(dim=3)
    assert powers.isfinite().all()
    assert (size <= 1 + 1e-6).all()
    assert (size[0, 2:, 0] < 1).all()


@pytest.mark.parametrize(("packed", "padded"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("l", [1, 70, 300])
def test_the_state_alone(l, packed, padded):
    tensors, chosen = make(l=l), boundaries(l, packed, padded)

    def alone(residues, bias, **rest):
        return modal_state(**rest, **chosen) + 0 * (residues.sum() + bias.sum())

    def expected(**tensors):
        return modal_conv_reference(**tensors, **chosen)[1] + 0 * (tensors["residues"].sum() + tensors["bias"].sum())

    check_op(alone, expected, tensors)


def test_views_and_mixed_dtypes():
    views = make(l=70)
    views["x"] = torch.randn(2, 5, 70).transpose(1, 2).bfloat16()
    views["residues"] = torch.randn(2, 4, 5).permute(2, 1, 0)
    views["initial_state"] = torch.randn(2, 5, 2, 4).transpose(2, 3)
    copies = {name: t.contiguous() for name, t in views.items()}
    for t in (*views.values(), *copies.values()):
        t.requires_grad_()
    found, expected = portable(**views), portable(**copies)
    assert found[0].dtype == torch.bfloat16
    assert found[1].dtype == torch.float32
    assert torch.equal(found[0], expected[0])
    grads = (torch.autograd.grad(t[0].float().sum(), list(u.values())) for t, u in ((found, views), (expected, copies)))
    for name, grad, other in zip(views, *grads):
        assert grad.dtype == views[name].dtype, name
        assert torch.equal(grad, other), name


def test_autocast_changes_nothing():
    for l in (1, 70):
        tensors = {n: t.requires_grad_() for n, t in make(l=l).items()}
        results = []
        for cast in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
                outputs = portable(**tensors)
                taps = modal_taps(tensors["log_decay"], tensors["phase"], tensors["residues"], 300)
            results.append((*outputs, taps, *torch.autograd.grad(outputs[0].sum(), list(tensors.values()))))
        for a, b in zip(*results):
            assert torch.equal(a, b)


def test_only_the_inputs_and_small_tables_are_saved():
    tensors = {k: v.requires_grad_() for k, v in make(l=2000).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, _ = portable(**tensors)
    assert {t.data_ptr() for t in saved if t.numel() >= 2000} <= {tensors["x"].data_ptr()}
    del y


def test_a_step_is_a_few_operators():
    tensors = make(l=1)
    found = operators(lambda: portable(**tensors))
    assert len(found) <= 20, found


@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", None), ("aot_eager", True), ("inductor", True)])
def test_one_graph_serves_every_length(backend, dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    def loss(tensors, seq_idx, lengths):
        y, state = portable(**tensors, seq_idx=seq_idx, lengths=lengths)
        return y.square().sum() + state.square().sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=dynamic)
    for l in (40, 70, 133, 201):
        tensors = {n: t.requires_grad_() for n, t in make(l=l, c=64).items()}  # 64: inductor splits small sums
        extra = some_documents(2, l), torch.tensor([l, l // 2])
        found, expected = compiled(tensors, *extra), loss(tensors, *extra)
        torch.testing.assert_close(found, expected)
        wanted = list(tensors.values())
        for a, b in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted)):
            assert relative_distance(a, b) < 3e-6
    assert counter.frame_count == (1 if dynamic else 2)  # by default the second length makes the length a symbol
    torch._dynamo.reset()


def test_a_compiled_step_is_one_graph():
    torch._dynamo.reset()
    tensors = make(b=1, l=1)
    compiled = torch.compile(modal_conv, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**tensors), modal_conv(**tensors))
    torch._dynamo.reset()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_opcheck(grad, everything):
    from hf_archs_hyena.ops import modal_portable

    m, (b, l, c, n) = modal_portable.CHUNK, (2, 70, 3, 2)
    tensors = (torch.randn(b, l, c), torch.randn(c, m), torch.rand(c, n, m + 1, 2), torch.randn(c, 2 * n, m))
    tensors += (torch.randn(b, c, n, 2) if everything else None,)
    inputs = [None if t is None else t.requires_grad_(grad) for t in tensors]
    documents = some_documents(b, l).cumsum(1, dtype=torch.int32) if everything else None
    lengths = torch.tensor([l, 9]) if everything else None
    torch.library.opcheck(torch.ops.hf_archs.modal_conv.default, (*inputs, documents, lengths, "portable"))


@pytest.mark.parametrize("packed", [False, True])
def test_export_knows_no_custom_op(packed):
    class Model(torch.nn.Module):
        def forward(self, tensors, seq_idx, lengths):
            return portable(**tensors, seq_idx=seq_idx, lengths=lengths)

    def example(l):
        return make(l=l), some_documents(2, l) if packed else None, torch.tensor([l, l // 2])

    length = torch.export.Dim("length", min=2, max=4096)
    fixed = dict.fromkeys(make())
    program = torch.export.export(
        Model(), example(100), dynamic_shapes=({**fixed, "x": {1: length}}, {1: length} if packed else None, None)
    )
    assert "hf_archs" not in program.graph_module.code
    for l in (30, 64, 300):
        arguments = example(l)
        torch.testing.assert_close(program.module()(*arguments), Model()(*arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.zeros(2, 5)),
        ("log_decay", torch.zeros(5)),
        ("log_decay", torch.zeros(4, 4)),
        ("phase", torch.zeros(5, 3)),
        ("residues", torch.zeros(5, 4)),
        ("bias", torch.zeros(4)),
        ("initial_state", torch.zeros(2, 5, 4)),
        ("seq_idx", torch.zeros(65)),
        ("lengths", torch.zeros(3)),
    ],
)
def test_a_wrong_shape_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        portable(**{**make(), name: value})


def test_the_environment_can_ask_for_the_reference():
    tensors = make(l=9, dtype=torch.float64)
    assert torch.equal(on("reference")(**tensors)[0], modal_conv_reference(**tensors)[0])
