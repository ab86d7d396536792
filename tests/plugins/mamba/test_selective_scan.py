"""The selective scan: reference, portable form, Triton kernels, and the op in PyTorch's op library."""

import pytest
import torch
import torch.nn.functional as F

from hf_archs.kernels.backend import use_backend
from hf_archs.testing.ops import check_op, outputs_and_gradients, relative_distance
from hf_archs_mamba.ops import selective_scan_portable as portable
from hf_archs_mamba.ops.selective_scan import selective_scan, selective_scan_reference

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def make_inputs(b=2, l=17, c=10, n=3, dtype=torch.float32, without=()):
    """Activations in ``dtype``; A, D and the state in float32 or wider, as a model holds them."""
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {
        "x": torch.randn(b, l, c).to(dtype),
        "dt": (2 * torch.randn(b, l, c) - 2).to(dtype),
        "A": (-4 * torch.rand(c, n) - 0.05).to(wide),
        "B": torch.randn(b, l, n).to(dtype),
        "C": torch.randn(b, l, n).to(dtype),
        "D": torch.randn(c).to(wide),
        "z": torch.randn(b, l, c).to(dtype),
        "dt_bias": torch.randn(c).to(wide),
        "initial_state": torch.randn(b, c, n).to(wide),
    }
    return {name: None if name in without else t for name, t in tensors.items()}


def documents(b, l, every=7):
    """Boundaries that fall differently in each row."""
    return torch.stack([(torch.arange(l) + 3 * row) // every for row in range(b)])


def options_for(kind, b, l):
    some = torch.tensor([0, l, l // 2, max(l - 1, 0)])[torch.arange(b) % 4]
    return {
        "plain": {},
        "documents": {"seq_idx": documents(b, l)},
        "lengths": {"lengths": some},
        "both": {"seq_idx": documents(b, l), "lengths": some},
    }[kind]


KINDS = ("plain", "documents", "lengths", "both")


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        assert relative_distance(found[name], expected[name]) < tolerance, name


# The reference


def test_reference_is_the_sum_over_all_earlier_tokens():
    t = make_inputs(b=1, l=9, c=4, dtype=torch.float64)
    delta = F.softplus(t["dt"] + t["dt_bias"])
    sums = delta.cumsum(1)
    y = torch.zeros(1, 9, 4, dtype=torch.float64)
    for i in range(9):
        h = torch.exp(sums[:, i, :, None] * t["A"]) * t["initial_state"]
        for j in range(i + 1):
            kernel = torch.exp((sums[:, i] - sums[:, j])[..., None] * t["A"])
            h = h + kernel * (delta * t["x"])[:, j, :, None] * t["B"][:, j, None, :]
        y[:, i] = torch.einsum("bcn,bn->bc", h, t["C"][:, i])
    y = (y + t["D"] * t["x"]) * t["z"] * torch.sigmoid(t["z"])
    found, state = selective_scan_reference(**t)
    assert relative_distance(found, y) < 1e-13
    assert relative_distance(state, h) < 1e-13


def test_reference_is_what_transformers_computes():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=8, state_size=4, num_hidden_layers=1, vocab_size=16, time_step_rank=2)
    mixer = MambaMixer(config, layer_idx=0)
    with torch.no_grad():
        mixer.dt_proj.bias.copy_(torch.randn_like(mixer.dt_proj.bias))
        mixer.D.copy_(torch.randn_like(mixer.D))
        hidden = torch.randn(2, 11, 8)
        x, z = mixer.in_proj(hidden).chunk(2, -1)
        x = F.silu(mixer.conv1d(x.transpose(1, 2))[..., :11]).transpose(1, 2)
        rank, B, C = mixer.x_proj(x).split([2, 4, 4], -1)
        y, _ = selective_scan_reference(x, mixer.dt_proj(rank), -mixer.A_log.exp(), B, C, mixer.D, z)
        assert relative_distance(mixer.out_proj(y), mixer(hidden)) < 1e-5


# The portable form


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("l", [1, 2, 17, 64, 65, 130])
def test_portable(l, dtype, kind, nan_filled_memory):
    check_op(selective_scan, selective_scan_reference, make_inputs(4, l, dtype=dtype), options_for(kind, 4, l))


@pytest.mark.parametrize(
    "without", [("D",), ("z",), ("dt_bias",), ("initial_state",), ("D", "z", "dt_bias", "initial_state")], ids=str
)
@pytest.mark.parametrize("l", [1, 70])
def test_portable_without_optional_tensors(l, without, nan_filled_memory):
    check_op(selective_scan, selective_scan_reference, make_inputs(l=l, without=without))


@pytest.mark.parametrize("small", [1, 60, 10_000])
@pytest.mark.parametrize("large", [12, 10_000])
def test_portable_in_tiles(small, large, monkeypatch, nan_filled_memory):
    """Rows and channels are scanned in parts, uneven ones too: 5 rows, and 10 channels of 3 states."""
    monkeypatch.setattr(portable, "_SMALL", small)
    monkeypatch.setattr(portable, "_LARGE", large)
    check_op(selective_scan, selective_scan_reference, make_inputs(5, 66), options_for("both", 5, 66))


def test_portable_gradients_in_float64():
    t = make_inputs(2, 66, 2, 2, dtype=torch.float64)
    leaves = [t[name].requires_grad_() for name in NAMES]
    options = options_for("both", 2, 66)
    assert torch.autograd.gradcheck(
        lambda *a: selective_scan(*a[:-1], initial_state=a[-1], **options), leaves, fast_mode=True
    )


def test_strong_decay_and_large_steps_stay_finite():
    t = make_inputs(l=130)
    t["dt"] = t["dt"] * 20
    t["A"] = t["A"] * 20
    check_op(selective_scan, selective_scan_reference, t)


def test_inference_mode_and_training_take_turns():
    """The workspace outlives a call; a tensor made in inference mode could not be written outside of it."""
    t = make_inputs(1, 9, 7, 3)
    portable._local.__dict__.clear()
    with torch.inference_mode():
        expected, _ = selective_scan(**t)
    found, _ = selective_scan(**{name: v.requires_grad_() for name, v in t.items()})
    found.sum().backward()
    assert torch.equal(found, expected)


# Both implementations


@pytest.fixture(params=["portable", "triton"])
def backend(request, monkeypatch):
    """Each implementation; the Triton one, slow in the interpreter, with chunks of 16 tokens, so that few are many."""
    if request.param == "triton":
        from hf_archs_mamba.ops import selective_scan_triton

        monkeypatch.setattr(selective_scan_triton, "CHUNK", 16)
    with use_backend(request.param):
        yield request.param


def test_non_contiguous_inputs(backend, nan_filled_memory):
    t = make_inputs(2, 19)

    def op(x, z, B, C, **others):
        return selective_scan(
            x.transpose(1, 2).contiguous().transpose(1, 2),
            z=torch.cat([z, z], -1)[..., :10],
            B=torch.cat([B, C], -1)[..., :3],
            C=torch.cat([B, C], -1)[..., 3:],
            **others,
        )

    check_op(op, selective_scan_reference, t)


@pytest.mark.parametrize("split", [1, 16])
def test_a_split_anywhere_changes_nothing(backend, split):
    t = make_inputs(1, 19, 5, 2)

    def in_two(initial_state, A, D, dt_bias, **others):
        ours = {"A": A, "D": D, "dt_bias": dt_bias}
        first = {name: v[:, :split] for name, v in others.items()}
        second = {name: v[:, split:] for name, v in others.items()}
        y1, state = selective_scan(**first, **ours, initial_state=initial_state)
        y2, state = selective_scan(**second, **ours, initial_state=state)
        return torch.cat([y1, y2], 1), state

    assert_close(outputs_and_gradients(in_two, t, {}), outputs_and_gradients(selective_scan, t, {}), 2e-5)


def test_packed_documents_are_as_each_alone(backend):
    t = make_inputs(1, 23, 5, 2)
    ends = (5, 16, 23)
    seq_idx = torch.tensor([[0] * 5 + [1] * 11 + [2] * 7])

    def alone(initial_state, A, D, dt_bias, **others):
        ours = {"A": A, "D": D, "dt_bias": dt_bias}
        outputs, start = [], 0
        for end in ends:
            part = {name: v[:, start:end] for name, v in others.items()}
            y, state = selective_scan(**part, **ours, initial_state=initial_state if start == 0 else None)
            outputs.append(y)
            start = end
        return torch.cat(outputs, 1), state

    packed = outputs_and_gradients(selective_scan, t, {"seq_idx": seq_idx})
    assert_close(packed, outputs_and_gradients(alone, t, {}), 2e-5)


def test_pads_leave_the_state_alone(backend):
    t = make_inputs(3, 19, 5, 2)
    t["x"][1, 12:] = 1e4
    lengths = torch.tensor([0, 12, 19])
    seq_idx = documents(3, 19)
    y, state = selective_scan(**t, lengths=lengths, seq_idx=seq_idx)
    assert torch.isfinite(y).all()
    assert torch.equal(state[0], t["initial_state"][0])
    for row, length in ((1, 12), (2, 19)):
        alone = {name: v if name in ("A", "D", "dt_bias") else v[row : row + 1] for name, v in t.items()}
        alone = {name: v[:, :length] if name in ("x", "dt", "B", "C", "z") else v for name, v in alone.items()}
        y_alone, state_alone = selective_scan(**alone, seq_idx=seq_idx[row : row + 1, :length])
        assert relative_distance(y[row : row + 1, :length], y_alone) < 1e-5
        assert relative_distance(state[row : row + 1], state_alone) < 1e-5


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_into_one_output_only(backend, which):
    t = make_inputs(l=17)
    used = NAMES if which == 0 else ("x", "dt", "A", "B", "dt_bias", "initial_state")

    def one(op):
        leaves = {name: v.clone().requires_grad_() for name, v in t.items()}
        return torch.autograd.grad(
            op(**leaves)[which].square().sum(), [leaves[name] for name in NAMES], allow_unused=op is not selective_scan
        )

    for name, found, expected in zip(NAMES, one(selective_scan), one(selective_scan_reference)):
        if name in used:
            assert relative_distance(found, expected) < 2e-5, name
        else:
            assert not found.any(), name


def test_mixed_dtypes(backend):
    """Half-precision x beside a float32 dt, as a model in half precision under autocast has them."""
    t = make_inputs(l=17, dtype=torch.float16)
    t |= {"dt": t["dt"].float(), "B": t["B"].float(), "initial_state": t["initial_state"].half()}
    check_op(selective_scan, selective_scan_reference, t)


@pytest.mark.parametrize("l", [1, 17])
def test_autocast_leaves_the_state_in_float32(backend, l):
    t = {name: v.requires_grad_() for name, v in make_inputs(l=l).items()}
    expected = selective_scan(**t)
    with torch.autocast("cpu", torch.bfloat16):
        found = selective_scan(**t)
        gradients = torch.autograd.grad(found[0].square().sum() + found[1].sum(), list(t.values()))
    for a, b in zip(found, expected):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    expected_gradients = torch.autograd.grad(expected[0].square().sum() + expected[1].sum(), list(t.values()))
    for a, b in zip(gradients, expected_gradients):
        assert torch.equal(a, b)


# The Triton kernels


def _triton_op(config, segment):
    """The kernels with a given configuration and segmentation, under autograd."""
    from hf_archs_mamba.ops import selective_scan_triton as kernels

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, lengths):
            y, state, kept = kernels.selective_scan_fwd(
                x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, lengths, True, config=config, segment=segment
            )
            ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, seq_idx, lengths, kept)
            return y, state

        @staticmethod
        def backward(ctx, dy, d_state):
            gradients = kernels.selective_scan_bwd(dy, d_state, *ctx.saved_tensors, config=config, segment=segment)
            like = (*ctx.saved_tensors[:8], None)
            return *(g.to(t.dtype) if t is not None else g for g, t in zip(gradients, like)), None, None

    def op(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx=None, lengths=None):
        return Op.apply(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, lengths)

    return op


class TestTriton:
    @pytest.fixture(autouse=True)
    def _short_chunks(self, monkeypatch):
        from hf_archs_mamba.ops import selective_scan_triton

        monkeypatch.setattr(selective_scan_triton, "CHUNK", 16)

    @pytest.mark.parametrize(
        ("l", "kind", "dtype"),
        [
            (1, "both", torch.float32),
            (2, "lengths", torch.float16),
            (17, "plain", torch.float16),
            (17, "documents", torch.float32),
            (33, "both", torch.float32),
        ],
    )
    def test_forward_and_backward(self, l, kind, dtype, nan_filled_memory):
        with use_backend("triton"):
            check_op(
                selective_scan, selective_scan_reference, make_inputs(2, l, 5, 2, dtype=dtype), options_for(kind, 2, l)
            )

    def test_at_the_real_chunk_length(self, monkeypatch, nan_filled_memory):
        from hf_archs_mamba.ops import selective_scan_triton

        monkeypatch.setattr(selective_scan_triton, "CHUNK", 64)
        with use_backend("triton"):
            check_op(selective_scan, selective_scan_reference, make_inputs(1, 66, 3, 2))

    @pytest.mark.parametrize(
        "without", [("D",), ("z",), ("dt_bias",), ("initial_state",), ("D", "z", "dt_bias", "initial_state")], ids=str
    )
    def test_without_optional_tensors(self, without, nan_filled_memory):
        with use_backend("triton"):
            check_op(selective_scan, selective_scan_reference, make_inputs(1, 9, 5, 2, without=without))

    @pytest.mark.parametrize(
        ("index", "segment", "l"), [(0, 48, 18), (0, 16, 33), (1, 16, 33), (2, 16, 18), (2, 48, 3)]
    )
    def test_every_config_alone_and_in_segments(self, index, segment, l, nan_filled_memory):
        """Of 70 channels the last block is not full."""
        from hf_archs_mamba.ops.selective_scan_triton import CONFIGS

        assert len(CONFIGS) == 3
        op = _triton_op(CONFIGS[index], segment)
        check_op(op, selective_scan_reference, make_inputs(1, l, 70, 1), options_for("documents", 1, l))

    def test_segments_with_pads_and_no_documents(self, nan_filled_memory):
        from hf_archs_mamba.ops.selective_scan_triton import CONFIGS

        op = _triton_op(CONFIGS[1], 16)
        check_op(op, selective_scan_reference, make_inputs(2, 34, 5, 1), {"lengths": torch.tensor([20, 34])})

    def test_float64_runs_the_portable_form(self):
        t = make_inputs(l=9, dtype=torch.float64)
        with use_backend("triton"):
            y, _ = selective_scan(**t)
        assert relative_distance(y, selective_scan_reference(**t)[0]) < 1e-13

    def test_softplus_keeps_what_small_values_carry(self):
        t = make_inputs(1, 8, 5, 1)
        t["dt"] = torch.linspace(-40, 40, 40).view(1, 8, 5)
        t |= {name: torch.ones_like(t[name]) for name in "xBC"} | {"A": torch.full_like(t["A"], -1e9)}
        del t["D"], t["z"], t["dt_bias"], t["initial_state"]
        with use_backend("triton"):
            y, _ = selective_scan(**t)  # nothing decays slowly enough to be left: y is delta
        expected = F.softplus(t["dt"].double(), threshold=1e9)
        forgotten = t["dt"] > -15
        assert ((y.double() - expected) / expected).abs()[forgotten].max() < 5e-7


# The op library, torch.compile and export


def test_the_op_registration():
    t = {name: v.requires_grad_() for name, v in make_inputs(2, 9, 4, 2).items()}
    options = options_for("both", 2, 9)
    torch.library.opcheck(
        torch.ops.hf_archs.selective_scan.default,
        (*(t[name] for name in NAMES), options["seq_idx"], options["lengths"], True, "portable"),
    )
    torch.library.opcheck(
        torch.ops.hf_archs.selective_scan.default,
        (*(t[name].detach() for name in NAMES[:5]), None, None, None, None, None, None, False, "portable"),
    )


def test_nothing_is_kept_without_gradients():
    t = make_inputs(l=130)
    inputs = (*(t[name] for name in NAMES), None, None)
    assert torch.ops.hf_archs.selective_scan(*inputs, False, "portable")[2].numel() == 0
    kept = torch.ops.hf_archs.selective_scan(*inputs, True, "portable")[2]
    assert kept.numel() == 2 * 2 * 10 * 3  # a state (b, c, n) for 128 tokens
    y, state = selective_scan(**t)
    assert y.grad_fn is None
    assert state.grad_fn is None


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_one_compiled_graph_serves_every_length(compiler):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)

    def loss(tensors, seq_idx):
        y, state = selective_scan(**tensors, seq_idx=seq_idx)
        return y.square().sum() + state.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for l in (20, 33, 70):
        tensors = {name: v.requires_grad_() for name, v in make_inputs(2, l).items()}
        seq_idx = documents(2, l)
        found = torch.autograd.grad(compiled(tensors, seq_idx), list(tensors.values()))
        expected = torch.autograd.grad(loss(tensors, seq_idx), list(tensors.values()))
        for a, b in zip(found, expected):
            assert relative_distance(a, b) < 1e-5
    assert counter.frame_count == 1


def test_the_compiled_decode_step_has_no_opaque_op():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    t = make_inputs(l=1)
    with torch.no_grad():
        y, state = torch.compile(selective_scan, fullgraph=True, backend=keep)(**t)
        expected = selective_scan_reference(**t)
    assert relative_distance(y, expected[0]) < 1e-6
    assert relative_distance(state, expected[1]) < 1e-6
    calls = [node for node in graphs[0].graph.nodes if node.op.startswith("call")]
    assert not any("hf_archs" in str(node.target) for node in calls)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("l", [1, 2, 13])
def test_export_gives_ordinary_operators(l, kind):
    class Scan(torch.nn.Module):
        def forward(self, tensors, options):
            return selective_scan(**tensors, **options)

    t, options = make_inputs(4, l), options_for(kind, 4, l)
    program = torch.export.export(Scan(), (t, options))
    assert "hf_archs" not in str(program.graph)
    for found, expected in zip(program.module()(t, options), selective_scan_reference(**t, **options)):
        assert relative_distance(found, expected) < 1e-6


@pytest.mark.parametrize("name", [*NAMES, "seq_idx", "lengths"])
def test_a_shape_that_does_not_fit_is_named(name):
    t = make_inputs() | options_for("both", 2, 17)
    t[name] = t[name][:1] if name in ("lengths", "seq_idx") else t[name][..., :-1]
    with pytest.raises(ValueError, match=r"selective_scan: (\w+) must have shape") as caught:
        selective_scan(**t)
    if name not in ("x", "A"):  # these two set the shapes that the others must have
        assert f"{name} must" in str(caught.value)
    with pytest.raises(ValueError, match="x must be"):
        selective_scan(**make_inputs() | {"x": torch.zeros(3)})


def test_a_mixer_in_bfloat16_keeps_no_step_in_float32():
    """The bias of the step is added inside the op: outside, a float32 tensor of all channels was made and kept."""
    from hf_archs_mamba.configuration import MambaMixerConfig
    from hf_archs_mamba.mixer import MambaMixer

    mixer = MambaMixer(MambaMixerConfig(hidden_size=16, state_size=4))
    for name, parameter in mixer.named_parameters():
        parameter.data = torch.randn_like(parameter).to(torch.float32 if "ssm" in name else torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mixer(torch.randn(2, 150, 16, dtype=torch.bfloat16))
    assert {t.dtype for t in saved if t.shape[:2] == (2, 150)} == {torch.bfloat16}
