"""The scalar-decay scan: its reference against the parallel form, its fast forms against the reference."""

import functools

import pytest
import torch

from hf_archs.kernels import decay_scan_portable, decay_scan_triton
from hf_archs.kernels.backend import use_backend
from hf_archs.kernels.decay_scan import decay_scan, decay_scan_reference
from hf_archs.testing.ops import check_op, operators, outputs_and_gradients, relative_distance


def on(backend):
    """`decay_scan` on one backend."""

    def op(**arguments):
        with use_backend(backend):
            return decay_scan(**arguments)

    return op


portable = on("portable")


def make(b=2, l=65, g=2, h=4, n=8, p=12, dtype=torch.float32, scale=True, state=True, decay=1.0, skip=True):
    """Tensors as a mixed-precision model hands them over: decays and steps are in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "q": torch.randn(b, l, g, n, dtype=dtype),
        "k": torch.randn(b, l, g, n, dtype=dtype),
        "v": torch.randn(b, l, h, p, dtype=dtype),
        "log_decay": -decay * torch.rand(b, l, h, dtype=wide) ** 3,  # many close to 0, some strong
        "scale": torch.rand(b, l, h, dtype=wide) if scale else None,
        "skip": torch.randn(h, dtype=wide) if skip else None,
        "initial_state": torch.randn(b, h, p, n, dtype=wide) if state else None,
    }


def some_documents(b, l):
    """Document numbers of random rows; one number comes twice, in documents apart."""
    return (torch.rand(b, l) < 0.06).cumsum(1) % 3


def parallel(q, k, v, log_decay, scale=None, skip=None, initial_state=None, seq_idx=None, lengths=None):
    """All pairs of tokens at once, decays as sums over masked steps: independent of any recurrence."""
    (b, l, h, p), (g, n) = v.shape, q.shape[2:]
    q, k = (t.repeat_interleave(h // g, 2) for t in (q, k))
    real = torch.ones(b, l, dtype=torch.bool) if lengths is None else torch.arange(l) < lengths[:, None]
    begins = torch.zeros(b, l, dtype=torch.bool)
    if seq_idx is not None:
        begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    # -inf at a document's first token ends every path through it
    step = torch.where(begins[..., None] & real[..., None], -torch.inf, torch.where(real[..., None], log_decay, 0))
    write = v * real[..., None, None] if scale is None else v * (scale * real[..., None])[..., None]
    initial = torch.zeros(b, h, p, n, dtype=v.dtype) if initial_state is None else initial_state
    # position 0 stands for the initial state
    step = torch.cat([torch.zeros_like(step[:, :1]), step], 1).transpose(1, 2)  # (b, h, 1 + l)
    below = torch.ones(l + 1, l + 1, dtype=torch.bool).tril(-1)
    sums = torch.where(below, step[..., None], 0).cumsum(2)  # (b, h, i, j)
    decay = torch.where(below | torch.eye(l + 1, dtype=torch.bool), sums, -torch.inf).exp()
    weight = torch.einsum("bihn,bjhn->bhij", q, k) * decay[:, :, 1:, 1:]
    y = torch.einsum("bhij,bjhp->bihp", weight, write)
    y = y + torch.einsum("bhi,bhpn,bihn->bihp", decay[:, :, 1:, 0], initial, q)
    y = y if skip is None else y + skip[:, None] * v
    final = torch.einsum("bhj,bjhp,bjhn->bhpn", decay[:, :, -1, 1:], write, k)
    return y, final + decay[:, :, -1, 0, None, None] * initial


@pytest.mark.parametrize("boundaries", ["none", "documents", "lengths", "both"])
def test_reference_is_the_parallel_form(boundaries):
    tensors = make(l=40, dtype=torch.float64)
    options = {}
    if boundaries in ("documents", "both"):
        options["seq_idx"] = some_documents(2, 40)
    if boundaries in ("lengths", "both"):
        options["lengths"] = torch.tensor([13, 40])
    found = outputs_and_gradients(decay_scan_reference, tensors, options)
    expected = outputs_and_gradients(parallel, tensors, options)
    for name, value in expected.items():
        assert relative_distance(found[name], value) < 1e-12, name


# The fast forms against the reference. Each case has an odd mix of options, so that few cases cover all of them.
CASES = [
    # length, groups, heads, key_dim, value_dim, scale, state, decay, documents, lengths
    (1, 2, 4, 8, 12, True, True, 1.0, False, [0, 1]),
    (2, 1, 3, 8, 12, False, True, 1.0, True, None),
    (17, 3, 3, 5, 7, True, False, 30.0, False, [17, 6]),
    (64, 1, 4, 16, 8, True, True, 1.0, True, [0, 50]),
    (65, 2, 4, 8, 12, False, True, 0.02, True, None),
    (130, 1, 2, 8, 12, True, True, 30.0, False, [130, 64]),
    (200, 4, 4, 8, 4, True, False, 0.02, True, [128, 199]),
]


def arguments(case, dtype):
    l, g, h, n, p, scale, state, decay, documents, lengths = case
    options = {"seq_idx": some_documents(2, l) if documents else None}
    options["lengths"] = None if lengths is None else torch.tensor(lengths)
    return make(2, l, g, h, n, p, dtype, scale, state, decay), options


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"l{c[0]}")
def test_portable_is_the_reference(case, dtype, nan_filled_memory):
    check_op(portable, decay_scan_reference, *arguments(case, dtype))


# Interpreted kernels are slow: the cases that differ in what the kernels do.
@pytest.mark.parametrize(
    ("case", "dtype"), [(0, "float32"), (2, "float16"), (4, "float32"), (5, "float32"), (6, "float16")]
)
def test_triton_is_the_reference(case, dtype, nan_filled_memory):
    check_op(on("triton"), decay_scan_reference, *arguments(CASES[case], getattr(torch, dtype)))


@pytest.mark.parametrize(
    ("config", "programs", "key_dim", "value_dim"), [(0, 1, 300, 140), (0, 512, 70, 8), (1, 512, 40, 70)]
)
def test_every_triton_config(config, programs, key_dim, value_dim, monkeypatch, nan_filled_memory):
    """Over several tiles that the dimensions do not fill, heads in turn in one program or split among several."""
    monkeypatch.setattr(decay_scan_triton, "PROGRAMS", programs)
    for name in ("decay_scan_fwd", "decay_scan_bwd"):
        real = getattr(decay_scan_triton, name)
        monkeypatch.setattr(decay_scan_triton, name, functools.partial(real, config=config))
    for table in ("STATE_CONFIGS", "OUTPUT_CONFIGS", "SCORE_CONFIGS", "KEY_CONFIGS"):
        assert len(getattr(decay_scan_triton, table)) == 2
    case = (135, 1, 2, key_dim, value_dim, True, True, 1.0, True, [135, 130])
    check_op(on("triton"), decay_scan_reference, *arguments(case, torch.float32))


def test_triton_says_how_long_a_row_may_be(monkeypatch):
    """As many chunks as a grid has places in its second dimension; here two."""
    assert decay_scan_triton.MOST_CHUNKS == 2**16 - 1
    monkeypatch.setattr(decay_scan_triton, "MOST_CHUNKS", 2)
    with pytest.raises(ValueError, match=r"length must be at most 256 on a GPU, not 257; .* initial_state"):
        on("triton")(**make(b=1, l=257, g=1, h=1))


def test_triton_hands_float64_on():
    tensors = make(l=9, dtype=torch.float64)
    assert torch.equal(on("triton")(**tensors)[0], portable(**tensors)[0])


def test_triton_over_views_and_mixed_dtypes():
    tensors = make(l=20, g=4)
    tensors["q"] = tensors["q"].half()
    tensors["v"] = tensors["v"].transpose(1, 2).contiguous().transpose(1, 2)
    tensors["k"] = torch.randn(2, 8, 4, 20).permute(0, 3, 2, 1)
    tensors["log_decay"] = -torch.rand(4).expand(2, 20, 4)
    found, expected = on("triton")(**tensors), decay_scan_reference(**tensors)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_portable_in_several_spans(monkeypatch):
    monkeypatch.setattr(decay_scan_portable, "_SPAN", 2 * 2 * 2 * 64 * 64)  # two chunks of 64 at a time
    tensors, options = arguments((64 * 5 + 9, 1, 2, 4, 4, True, True, 1.0, True, [64 * 3 + 1, 64 * 5]), torch.float32)
    check_op(portable, decay_scan_reference, tensors, options)


def constant(op, decay):
    """``op`` with one decay per head for all tokens, which nothing learns: an expanded view."""

    def run(q, v, **tensors):
        return op(q=q, v=v, log_decay=decay.to(q.device).expand(v.shape[:3]), **tensors)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("l", "state"), [(2, True), (64, False), (64 * 5 + 9, True)])
@pytest.mark.parametrize("strength", [1e-3, 1.0, 30.0])
def test_constant_decays_are_the_reference(l, state, strength, dtype, monkeypatch, nan_filled_memory):
    """They have a form of their own, here in several spans."""
    monkeypatch.setattr(decay_scan_portable, "_CONSTANT_SPAN", 2 * 2 * 3 * 64 * 64)  # two chunks of 64 at a time
    asked = []
    for name in ("_constant_fwd", "_constant_bwd"):
        real = getattr(decay_scan_portable, name)
        monkeypatch.setattr(
            decay_scan_portable, name, lambda *a, real=real, name=name: (asked.append(name), real(*a))[1]
        )
    tensors = make(l=l, g=3, h=3, dtype=dtype, scale=False, state=state, skip=False)
    del tensors["log_decay"]
    decay = -strength * torch.rand(3, dtype=torch.float64)
    check_op(constant(portable, decay), constant(decay_scan_reference, decay), tensors)
    assert asked == ["_constant_fwd", "_constant_bwd"]


def test_constant_decays_beside_a_skip():
    tensors = make(g=3, h=3, scale=False)
    del tensors["log_decay"]
    decay = -torch.rand(3, dtype=torch.float64)
    check_op(constant(portable, decay), constant(decay_scan_reference, decay), tensors)


@pytest.mark.parametrize(
    ("backend", "boundaries"),
    [("portable", "none"), ("portable", "documents"), ("portable", "lengths"), ("triton", "none"), ("triton", "both")],
)
def test_gradients_without_those_of_the_decays(backend, boundaries):
    """Gradients of tensors that nothing learns are not computed, and all others are the same."""
    tensors = make(l=140, g=1, h=1)
    fixed = {name: tensors.pop(name) for name in ("log_decay", "scale")}
    if boundaries == "none":
        fixed = {"log_decay": fixed["log_decay"]}
    options = {"seq_idx": some_documents(2, 140)} if boundaries in ("documents", "both") else {}
    options |= {"lengths": torch.tensor([0, 133])} if boundaries in ("lengths", "both") else {}

    def op(**arguments):
        return on(backend)(**arguments, **fixed)

    def reference(**arguments):
        wide = {name: t.to(arguments["v"].dtype) for name, t in fixed.items()}
        return decay_scan_reference(**arguments, **wide)

    check_op(op, reference, tensors, options)


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_uneven_decays_cost_no_digits(backend):
    """A strong decay at the start of a chunk, none later: differences of float32 sums would be off by 1e-4.

    Nor may the gradients of the decays share an error, which would add up in a parameter that all tokens share.
    """

    def op(log_decay, by, scan, **tensors):
        return scan(log_decay=log_decay * by, **tensors)

    tensors = make(b=1, l=128, decay=1e-3) | {"by": torch.ones(4)}
    tensors["log_decay"][:, :32] = -100.0
    check_op(functools.partial(op, scan=on(backend)), functools.partial(op, scan=decay_scan_reference), tensors)


@pytest.mark.parametrize("l", [1, 5, 67])
def test_gradcheck(l):
    tensors = make(b=1, l=l, g=1, h=2, n=2, p=2, dtype=torch.float64)
    tensors["log_decay"] -= 0.01  # so that no finite difference reaches a growth, which is not allowed
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
    found = torch.autograd.grad(portable(**tensors)[output], wanted, cotangent)
    expected = torch.autograd.grad(
        decay_scan_reference(**tensors)[output], wanted, cotangent, allow_unused=True, materialize_grads=True
    )
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("at", [1, 63, 64, 99])
def test_split_and_continued_is_the_whole(at):
    tensors = make(l=100, dtype=torch.float64)
    state, skip = tensors.pop("initial_state"), tensors.pop("skip")
    whole, final = portable(**tensors, skip=skip, initial_state=state)
    left, middle = portable(**{n: t[:, :at] for n, t in tensors.items()}, skip=skip, initial_state=state)
    right, end = portable(**{n: t[:, at:] for n, t in tensors.items()}, skip=skip, initial_state=middle)
    torch.testing.assert_close(torch.cat([left, right], 1), whole)
    torch.testing.assert_close(end, final)


def test_packed_documents_are_each_alone():
    sizes = [3, 61, 1, 70, 64]
    tensors = make(b=1, l=sum(sizes), dtype=torch.float64, state=False, skip=False)
    seq_idx = torch.repeat_interleave(torch.arange(len(sizes)) % 2, torch.tensor(sizes))[None]
    leaves = {n: t.requires_grad_() for n, t in tensors.items() if t is not None}
    packed, final = portable(**leaves, seq_idx=seq_idx)
    pieces = [t.split(sizes, 1) for t in leaves.values()]
    alone = [portable(**dict(zip(leaves, part))) for part in zip(*pieces)]
    torch.testing.assert_close(packed, torch.cat([y for y, _ in alone], 1))
    torch.testing.assert_close(final, alone[-1][1])
    cotangent = torch.randn_like(packed)
    found = torch.autograd.grad((packed * cotangent).sum(), list(leaves.values()))
    expected = torch.autograd.grad((torch.cat([y for y, _ in alone], 1) * cotangent).sum(), list(leaves.values()))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_pads_leave_the_state_alone():
    """Values at pads, finite or not, and documents that begin there, change nothing."""
    tensors = make(l=80, dtype=torch.float64)
    seq_idx, lengths = some_documents(2, 80), torch.tensor([0, 70])
    seq_idx[:, 75] = 7
    for name in ("scale", "log_decay"):
        tensors[name][1, 70:] = torch.nan
    y, final = portable(**tensors, seq_idx=seq_idx, lengths=lengths)
    assert torch.equal(final[0], tensors["initial_state"][0])
    whole = {"initial_state": tensors["initial_state"][1:], "skip": tensors["skip"]}
    alone = {n: t[1:, :70] for n, t in tensors.items() if n not in whole} | whole
    expected_y, expected = portable(**alone, seq_idx=seq_idx[1:, :70])
    torch.testing.assert_close(final[1:], expected)
    torch.testing.assert_close(y[1:, :70], expected_y)
    assert y.isfinite().all()


def test_views_and_mixed_dtypes():
    """q, k and v cut from one projection, a decay expanded from one number per head: gradients keep each dtype."""
    b, l, g, h, n, p = 2, 70, 2, 4, 8, 6
    mixed = torch.randn(b, l, 2 * g * n + h * p).bfloat16()
    q, k, v = mixed.split([g * n, g * n, h * p], 2)
    views = {"q": q.unflatten(2, (g, n)), "k": k.unflatten(2, (g, n)), "v": v.unflatten(2, (h, p))}
    views["log_decay"] = -torch.rand(h).expand(b, l, h)
    views["scale"] = torch.rand(b, h, l).transpose(1, 2)
    views["initial_state"] = torch.randn(b, h, n, p).transpose(2, 3)
    copies = {name: t.contiguous() for name, t in views.items()}
    for t in (*views.values(), *copies.values()):
        t.requires_grad_()
    found, expected = portable(**views), portable(**copies)
    assert found[0].dtype == torch.bfloat16
    assert found[1].dtype == torch.float32
    assert torch.equal(found[0], expected[0])
    grads = torch.autograd.grad(found[0].float().sum(), list(views.values()))
    for (name, t), grad, other in zip(
        views.items(), grads, torch.autograd.grad(expected[0].float().sum(), list(copies.values()))
    ):
        assert grad.dtype == t.dtype, name
        assert torch.equal(grad, other), name


def test_autocast_changes_nothing():
    for l in (1, 70):
        tensors = {n: t.requires_grad_() for n, t in make(l=l).items()}
        plain = portable(**tensors)
        plain_grads = torch.autograd.grad(plain[0].sum(), list(tensors.values()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = portable(**tensors)
        cast_grads = torch.autograd.grad(cast[0].sum(), list(tensors.values()))
        for a, b in zip((*plain, *plain_grads), (*cast, *cast_grads)):
            assert torch.equal(a, b)


def test_a_step_is_a_handful_of_operators():
    tensors = make(b=1, l=1)
    found = operators(lambda: portable(**tensors))
    assert len(found) <= 10, found  # two of them give every head its group's q and k


def test_states_are_kept_for_a_backward_only(monkeypatch):
    asked = []
    real = decay_scan_portable.decay_scan_fwd

    def spy(*args):
        asked.append((args[8], result := real(*args)))
        return result

    monkeypatch.setattr(decay_scan_portable, "decay_scan_fwd", spy)
    tensors = make(l=130)
    portable(**tensors)
    with torch.no_grad():
        portable(**{n: t.requires_grad_() for n, t in tensors.items()})
    portable(**tensors)
    assert [wanted for wanted, _ in asked] == [False, False, True]
    b, _, h, p = tensors["v"].shape
    # one state per chunk of 64 tokens, never one per token
    assert [kept.numel() for _, (_, _, kept) in asked] == [0, 0, 3 * b * h * p * tensors["q"].shape[3]]


@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", None), ("aot_eager", True), ("inductor", True)])
@pytest.mark.filterwarnings("ignore:.*jit.script_method:DeprecationWarning")  # inductor's own import
def test_one_graph_serves_every_length(backend, dynamic):
    torch._dynamo.reset()
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example_inputs)

    def loss(tensors, seq_idx, lengths):
        y, state = portable(**tensors, seq_idx=seq_idx, lengths=lengths)
        return y.square().sum() + state.square().sum()

    compiled = torch.compile(loss, backend=counting, fullgraph=True, dynamic=dynamic)
    for l in (40, 70, 133, 201):
        tensors = {n: t.requires_grad_() for n, t in make(l=l, p=32).items()}  # inductor splits small tensors otherwise
        extra = some_documents(2, l), torch.tensor([l, l // 2])
        found = compiled(tensors, *extra)
        expected = loss(tensors, *extra)
        torch.testing.assert_close(found, expected)
        wanted = list(tensors.values())
        for a, b in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted)):
            torch.testing.assert_close(a, b)
    assert len(graphs) == (1 if dynamic else 2)  # by default the second length makes the length a symbol


def test_a_compiled_step_is_one_graph():
    torch._dynamo.reset()
    tensors = make(b=1, l=1)
    compiled = torch.compile(portable, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(**tensors), portable(**tensors)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_opcheck(grad, everything):
    tensors = make(l=70, scale=everything, state=everything)
    inputs = [None if t is None else t.requires_grad_(grad) for t in tensors.values()]
    documents = torch.zeros(2, 70, dtype=torch.int32)
    documents[:, 33:] = 1
    torch.library.opcheck(
        torch.ops.hf_archs.decay_scan.default, (*inputs, documents if everything else None, grad, "portable")
    )


def test_export_knows_no_custom_op():
    class Scan(torch.nn.Module):
        def forward(self, q, k, v, log_decay, scale, skip, initial_state, seq_idx):
            optional = {"scale": scale, "skip": skip, "initial_state": initial_state, "seq_idx": seq_idx}
            return portable(q=q, k=k, v=v, log_decay=log_decay, **optional)

    def inputs(l):
        return (*make(l=l).values(), some_documents(2, l))

    length = torch.export.Dim("length", min=2, max=4096)
    shapes = (*[{1: length}] * 5, None, None, {1: length})
    program = torch.export.export(Scan(), inputs(100), dynamic_shapes=shapes)
    assert "hf_archs" not in program.graph_module.code
    for l in (30, 64, 300):
        example = inputs(l)
        for a, b in zip(program.module()(*example), Scan()(*example)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", torch.zeros(2, 65, 2, 9)),
        ("v", torch.zeros(2, 65, 3, 12)),
        ("log_decay", torch.zeros(2, 64, 4)),
        ("scale", torch.zeros(2, 65)),
        ("skip", torch.zeros(3)),
        ("initial_state", torch.zeros(2, 4, 8, 12)),
        ("seq_idx", torch.zeros(65, dtype=torch.long)),
        ("lengths", torch.zeros(3, dtype=torch.long)),
        ("q", torch.zeros(65, 2, 8)),
    ],
)
def test_a_wrong_shape_is_named(name, value):
    with pytest.raises(ValueError, match="heads must be" if name == "v" else name):
        portable(**{**make(), name: value})


def test_the_environment_can_ask_for_the_reference():
    tensors = make(l=9, dtype=torch.float64)
    assert torch.equal(on("reference")(**tensors)[0], decay_scan_reference(**tensors)[0])
