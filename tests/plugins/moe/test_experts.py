"""`expert_mlp`: every implementation against the reference, and the reference and the layer against transformers."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import MixtralConfig, MixtralForCausalLM, activations
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from hf_archs.kernels.backend import use_backend
from hf_archs.testing.ops import check_op, operators, outputs_and_gradients, relative_distance
from hf_archs_moe.expert_layer import ArchExperts, _activation, hf_archs_experts_forward
from hf_archs_moe.ops import experts_portable
from hf_archs_moe.ops.experts import ACTIVATIONS, expert_mlp, expert_mlp_reference

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

EXPERTS, HIDDEN, INNER = 5, 72, 40
EMPTY = 3  # no token chooses this expert


def inputs(tokens=33, k=2, gated=True, dtype=torch.float32):
    """Some choices have no expert, as have all of token 0."""
    index = torch.rand(tokens, EXPERTS + 1).argsort(1)[:, :k]
    index[index == EMPTY] = EXPERTS
    index[:1] = EXPERTS
    return {
        "x": torch.randn(tokens, HIDDEN).to(dtype),
        "expert_index": index,
        "expert_weight": torch.rand(tokens, k, dtype=torch.promote_types(dtype, torch.float32)),
        "up": (torch.randn(EXPERTS, 2 * INNER if gated else INNER, HIDDEN) / 8).to(dtype),
        "down": (torch.randn(EXPERTS, HIDDEN, INNER) / 6).to(dtype),
    }


def gradients_of(op, tensors, **options):
    return outputs_and_gradients(op, tensors, options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_formula(activation):
    """By transformers' own activations, in float64, without a loop."""
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in inputs().items()}

    def formula(x, expert_index, expert_weight, up, down):
        chosen = F.one_hot(expert_index, EXPERTS + 1)[:, :, :EXPERTS].to(x.dtype)
        gate, value = torch.einsum("eih,th->tei", up, x).chunk(2, -1)
        outputs = torch.einsum("ehi,tei->teh", down, ACT2FN[activation](gate) * value)
        return torch.einsum("tke,tk,teh->th", chosen, expert_weight, outputs)

    got = gradients_of(expert_mlp_reference, tensors, activation=activation)
    expected = gradients_of(formula, tensors)
    for name in expected:
        assert relative_distance(got[name], expected[name]) < 1e-13


@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
@pytest.mark.parametrize("gated", [True, False])
def test_equal_experts_are_one_mlp(backend, gated):
    tensors = inputs(gated=gated)
    tensors["expert_index"] = torch.rand(33, EXPERTS).argsort(1)[:, :2]
    tensors["expert_weight"] = torch.randn(33, 2).softmax(1)
    for name in ("up", "down"):
        tensors[name] = tensors[name][:1].repeat(EXPERTS, 1, 1)
    first = F.linear(tensors["x"], tensors["up"][0])
    inner = F.silu(first[:, :INNER]) * first[:, INNER:] if gated else F.silu(first)
    with use_backend(backend):
        y = expert_mlp(**tensors, gated=gated)
    torch.testing.assert_close(y, F.linear(inner, tensors["down"][0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_portable(k, activation, dtype):
    with use_backend("portable"):
        for gated in (True, False):
            tensors = inputs(k=k, gated=gated, dtype=dtype)
            check_op(expert_mlp, expert_mlp_reference, tensors, {"activation": activation, "gated": gated})


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("block", [1, 12])
def test_portable_in_blocks(block, gated):
    """Of each expert, and of one or several with a last one that is short."""
    tensors = [*inputs(gated=gated, dtype=torch.float64).values()]
    grad_y = torch.randn_like(tensors[0])
    found = []
    for chosen in ({}, {"block": block}):
        y, kept = experts_portable.expert_mlp_fwd(*tensors, "silu", gated, True, **chosen)
        gradients = experts_portable.expert_mlp_bwd(grad_y, *tensors, kept, "silu", gated, **chosen)
        found.append((y, kept, *gradients))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "k", "activation", "gated"),
    [
        (1, 1, "silu", True),
        (33, 1, "relu", True),
        (33, 1, "relu2", False),
        (33, 2, "silu", True),
        (33, 2, "gelu", False),
        (50, 4, "silu", False),
        (50, 4, "gelu_pytorch_tanh", True),
    ],
)
def test_triton(tokens, k, activation, gated, dtype):
    tensors = inputs(tokens, k, gated, dtype)
    tensors["expert_index"][-1, 0] = 0
    with use_backend("triton"):
        check_op(expert_mlp, expert_mlp_reference, tensors, {"activation": activation, "gated": gated})


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("number", range(3))
def test_every_triton_config(number, gated):
    """With 200 tokens, an expert has more than the largest tile."""
    from hf_archs_moe.ops import experts_triton

    assert len(experts_triton.CONFIGS) == 3
    config = experts_triton.CONFIGS[number]
    tensors = inputs(200, 4, gated)
    arguments = (*tensors.values(),)
    grad_y = torch.randn(200, HIDDEN)
    y, pre = experts_triton.expert_mlp_fwd(*arguments, "silu", gated, True, config)
    expected, expected_pre = experts_portable.expert_mlp_fwd(*arguments, "silu", gated, True)
    assert relative_distance(y, expected) < 2e-6
    got = experts_triton.expert_mlp_bwd(grad_y, *arguments, pre, "silu", gated, config=config)
    expected = experts_portable.expert_mlp_bwd(grad_y, *arguments, expected_pre, "silu", gated)
    for a, b in zip(got, expected):
        assert relative_distance(a, b) < 4e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    for gated in (True, False):
        tensors = inputs(4, 2, gated, torch.float64)
        tensors |= {"x": tensors["x"][:, :3], "up": tensors["up"][:, : 2 + 2 * gated, :3]}
        tensors["down"] = tensors["down"][:, :3, :2]
        index = tensors.pop("expert_index")
        leaves = [t.clone().requires_grad_() for t in tensors.values()]

        def op(x, weight, up, down, index=index, gated=gated):
            return expert_mlp(x, index, weight, up, down, activation=activation, gated=gated)

        assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_float64_stays_float64(backend):
    tensors = inputs(dtype=torch.float64)
    with use_backend(backend):
        got = gradients_of(expert_mlp, tensors)
    expected = gradients_of(expert_mlp_reference, tensors)
    for name in expected:
        assert got[name].dtype == torch.float64
        assert relative_distance(got[name], expected[name]) < 1e-14


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_two_runs_are_bit_equal(backend):
    tensors = inputs(60, 4)
    tensors["expert_index"][:, 1] = tensors["expert_index"][:, 0]  # the same expert twice for a token
    with use_backend(backend):
        first, second = (gradients_of(expert_mlp, tensors) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])
    check_op(expert_mlp, expert_mlp_reference, tensors)


@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_nothing_chosen_is_zero_everywhere(tokens, backend):
    """Gradients of zero exist too: a sharded model waits for them."""
    tensors = inputs(tokens)
    tensors["expert_index"][:] = EXPERTS
    with use_backend(backend):
        found = gradients_of(expert_mlp, tensors)
    assert len(found) == 5
    for name, t in found.items():
        assert torch.equal(t, torch.zeros_like(t)), name


@pytest.mark.parametrize("backend", ["reference", "portable", "triton", "exported"])
@pytest.mark.parametrize("tokens", [2, 33])
def test_what_is_not_chosen_does_not_leak(tokens, backend):
    """Not-a-number in a token without experts, in the weight of no expert and in an unused expert has no effect."""
    tensors = inputs(tokens)
    clean = dict(tensors)
    none = tensors["expert_index"] == EXPERTS
    tensors["x"] = torch.where(none.all(1, keepdim=True), torch.nan, tensors["x"])
    tensors["expert_weight"] = torch.where(none, torch.nan, tensors["expert_weight"])
    for name in ("up", "down"):
        tensors[name] = tensors[name].clone()
        tensors[name][EMPTY] = torch.nan
    if backend == "exported":
        got = exported(tensors)(**tensors)
        torch.testing.assert_close(got, expert_mlp_reference(**clean), rtol=1e-5, atol=1e-5)
        return
    with use_backend(backend):
        got, expected = gradients_of(expert_mlp, tensors), gradients_of(expert_mlp, clean)
        with torch.no_grad():
            assert torch.equal(expert_mlp(**tensors), got["output 0"])
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("chosen", [[4, 1], [EXPERTS, 4], [1, 1]])
def test_a_decode_step_reads_only_the_experts_that_are_hit(chosen):
    tensors = inputs(1, 2) | {"expert_index": torch.tensor([chosen])}
    expected = expert_mlp_reference(**tensors)
    for name in ("up", "down"):
        tensors[name][[e for e in range(EXPERTS) if e not in chosen]] = torch.nan
    for backend in ("portable", "triton"):
        with use_backend(backend), torch.no_grad():
            torch.testing.assert_close(expert_mlp(**tensors), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_decode_step_on_several_threads(threads, dtype, monkeypatch):
    """The number of threads decides how the products are split."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs(2, k=3).items()}
    for name in ("x", "expert_index", "expert_weight"):
        tensors[name] = tensors[name][1:]
    expected = expert_mlp_reference(**tensors)
    with torch.no_grad(), use_backend("portable"):
        torch.testing.assert_close(expert_mlp(**tensors), expected, check_dtype=True)


def test_a_decode_step_is_a_handful_of_operators():
    found = operators(lambda: expert_mlp(**inputs(1, 2) | {"expert_index": torch.tensor([[4, 1]])}))
    assert len(found) - len(operators(lambda: inputs(1, 2))) <= 24, found


def test_only_the_inputs_and_one_product_are_saved():
    tensors = {n: t.requires_grad_(t.is_floating_point()) for n, t in inputs().items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = expert_mlp(**tensors)
    own = {t.data_ptr() for t in tensors.values()}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in own] == [(66, 2 * INNER)]
    del y


@pytest.mark.parametrize("learns", ["x", "expert_weight", "up", "down"])
@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_one_gradient_alone(backend, learns):
    """Only one tensor requires a gradient, as with frozen experts and adapters."""
    tensors = inputs()
    with use_backend(backend):
        expected = gradients_of(expert_mlp, tensors)[f"gradient of {learns}"]
        tensors[learns].requires_grad_()
        y = expert_mlp(**tensors)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (got,) = torch.autograd.grad((y.double() * cotangent).sum(), [tensors[learns]])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_any_layout_of_the_inputs(backend):
    tensors = inputs()
    with use_backend(backend):
        expected = gradients_of(expert_mlp, tensors)["output 0"]
        spread = {n: t.transpose(0, 1).contiguous().transpose(0, 1) for n, t in tensors.items()}
        assert not spread["x"].is_contiguous()
        torch.testing.assert_close(expert_mlp(**spread), expected, rtol=1e-5, atol=1e-6)
        y = expert_mlp(**{n: t.requires_grad_(t.is_floating_point()) for n, t in tensors.items()})
        (from_expanded,) = torch.autograd.grad(y.sum(), tensors["up"], retain_graph=True)
        (from_whole,) = torch.autograd.grad(y, tensors["up"], torch.ones_like(y))
    torch.testing.assert_close(from_expanded, from_whole, rtol=0, atol=0)


def test_weights_narrower_than_the_tokens():
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in inputs().items()}
    tensors["expert_weight"] = tensors["expert_weight"].float()
    expected = gradients_of(expert_mlp_reference, tensors)
    for name, got in gradients_of(expert_mlp, tensors).items():
        assert relative_distance(got, expected[name]) < (1e-6 if name == "grad_expert_weight" else 1e-12), name


def test_int32_indices():
    tensors = inputs()
    expected = expert_mlp(**tensors)
    for backend in ("portable", "triton"):
        with use_backend(backend):
            y = expert_mlp(**tensors | {"expert_index": tensors["expert_index"].int()})
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tokens", [1, 9])
def test_autocast_casts_as_linear_does(tokens, grad):
    tensors = inputs(tokens)
    tensors["expert_index"][-1] = torch.tensor([0, 2])
    tensors = {n: t.requires_grad_(grad and t.is_floating_point()) for n, t in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = expert_mlp(**tensors)
    cast = {n: t.bfloat16() if n in ("x", "up", "down") else t for n, t in tensors.items()}
    expected = expert_mlp(**cast)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    if grad:
        leaves = [t for t in tensors.values() if t.requires_grad]
        for got, wanted, leaf in zip(
            torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), leaves
        ):
            assert got.dtype == leaf.dtype
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_opcheck(backend):
    tensors = inputs(9)
    tensors["expert_index"] %= EXPERTS  # rows of no expert are left as they are, which opcheck takes for results
    tensors = [t.requires_grad_(t.is_floating_point()) for t in tensors.values()]
    torch.library.opcheck(torch.ops.hf_archs.expert_mlp.default, (*tensors, "silu", True, True, backend))
    plain = [t.detach() for t in tensors]
    torch.library.opcheck(torch.ops.hf_archs.expert_mlp.default, (*plain, "silu", True, False, backend))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_once_for_all_lengths(compiler):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)

    def layer(**tensors):
        return expert_mlp(**tensors).tanh()

    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (10, 33, 18):
        tensors = {n: t.requires_grad_(t.is_floating_point()) for n, t in inputs(tokens).items()}
        leaves = [t for t in tensors.values() if t.requires_grad]
        results = [(y, *torch.autograd.grad(y.sum(), leaves)) for y in (compiled(**tensors), layer(**tensors))]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_step_compiles_into_one_graph():
    torch._dynamo.reset()
    step = torch.compile(expert_mlp, backend="aot_eager", fullgraph=True)
    tensors = inputs(1) | {"expert_index": torch.tensor([[4, 1]])}
    with torch.no_grad():
        torch.testing.assert_close(step(**tensors), expert_mlp(**tensors))
    torch._dynamo.reset()


def exported(tensors):
    class Model(nn.Module):
        def forward(self, x, expert_index, expert_weight, up, down):
            return expert_mlp(x, expert_index, expert_weight, up, down)

    tokens = torch.export.Dim("tokens", min=2, max=1000)
    shapes = dict.fromkeys(tensors) | {n: {0: tokens} for n in ("x", "expert_index", "expert_weight")}
    program = torch.export.export(Model(), (), tensors, dynamic_shapes=shapes)
    assert not any("hf_archs" in str(node.target) for node in program.graph.nodes)
    return program.module()


def test_exports_as_ordinary_operators():
    module = exported(inputs(12))
    tensors = inputs(40)
    torch.testing.assert_close(module(**tensors), expert_mlp(**tensors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(2, 3, HIDDEN)}, "x must be"),
        ({"expert_index": torch.zeros(33, 2)}, "expert_index must be an integer"),
        ({"expert_index": torch.zeros(32, 2, dtype=torch.int64)}, "expert_index must have shape"),
        ({"expert_weight": torch.zeros(33, 3)}, "expert_weight must have shape"),
        ({"up": torch.zeros(EXPERTS, INNER, HIDDEN)}, "up must have shape"),
        ({"down": torch.zeros(EXPERTS, HIDDEN + 1, INNER)}, "down must have shape"),
        ({"activation": "tanh"}, "activation must be one of silu, gelu, gelu_pytorch_tanh, relu, relu2, not 'tanh'"),
    ],
)
def test_what_does_not_fit_is_named(change, named):
    with pytest.raises(ValueError, match=f"expert_mlp: .*{named}"):
        expert_mlp(**{**inputs(), **change})


# The layer and transformers' interface


def layer_config(gated=True, implementation="hf_archs", **changes):
    return SimpleNamespace(
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        hidden_act="silu",
        gated=gated,
        _experts_implementation=implementation,
        **changes,
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_layer_by_every_implementation(implementation, gated):
    """With a choice of none, which transformers knows where experts are on several ranks."""
    layer = ArchExperts(layer_config(gated, initializer_range=0.1))
    assert layer.has_gate is gated
    assert [*dict(layer.named_parameters())] == ["gate_up_proj" if gated else "up_proj", "down_proj"]
    layer.init_weights()
    layer._is_expert_parallel = True
    tensors = inputs(gated=gated)
    arguments = [tensors["x"].requires_grad_(), tensors["expert_index"], tensors["expert_weight"]]
    # they all multiply what has no expert by a weight of zero
    arguments[2] = arguments[2].masked_fill(arguments[1] == EXPERTS, 0.0).requires_grad_()
    leaves = [arguments[0], arguments[2], *layer.parameters()]
    results = []
    for name in ("hf_archs", implementation):
        layer.config._experts_implementation = name
        y = layer(*arguments)
        results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_weights_begin_as_the_config_says_and_loaded_ones_stay():
    layer = ArchExperts(layer_config(initializer_range=0.5))
    layer.init_weights()
    assert all(0.48 < float(p.detach().std()) < 0.52 for p in layer.parameters())
    del layer.config.initializer_range
    loaded = layer.down_proj
    loaded._is_hf_initialized = True
    before = loaded.detach().clone()
    layer.init_weights()
    assert 0.019 < float(layer.gate_up_proj.detach().std()) < 0.021
    assert torch.equal(layer.down_proj, before)


@pytest.mark.parametrize("native", ["eager", "grouped_mm", "batched_mm"])
def test_a_native_mixtral(native):
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config)
    ids = torch.randint(50, (2, 19))
    results = []
    for name in (native, "hf_archs"):
        model.set_experts_implementation(name)
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        results.append([output.logits, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("act_fn", "name"),
    [(ACT2FN[name], name) for name in ACTIVATIONS]
    + [
        (ACT2FN["swish"], "silu"),
        (ACT2FN["gelu_new"], "gelu_pytorch_tanh"),
        (ACT2FN["gelu_fast"], "gelu_pytorch_tanh"),
        (ACT2FN["gelu_accurate"], "gelu_pytorch_tanh"),
        (ACT2FN["gelu_python"], "gelu"),
        (activations.PytorchGELUTanh(), "gelu_pytorch_tanh"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_pytorch_tanh"),
        (F.silu, "silu"),
        (torch.relu, "relu"),
    ],
)
def test_activations_are_known_by_what_they_compute(act_fn, name):
    assert _activation(act_fn) == name
    x = torch.randn(1000)
    torch.testing.assert_close(act_fn(x), ACTIVATIONS[name](x), rtol=1e-5, atol=1e-6)


def test_other_activations_are_not_known():
    for name in ("quick_gelu", "relu6", "leaky_relu", "tanh", "gelu_10", "mish"):
        assert _activation(ACT2FN[name]) is None
    assert _activation(torch.tanh) is None


class Own(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states, top_k_index, top_k_weights): ...


class OwnGate(Own):
    def _apply_gate(self, gate_up): ...


@pytest.mark.parametrize(
    ("base", "traits", "named"),
    [
        (Own, {"has_bias": True}, "biases"),
        (Own, {"is_transposed": True, "has_bias": True}, "biases, transposed weights"),
        (Own, {"is_concatenated": False}, "gate and value interleaved"),
        (Own, {"has_post_expert_norm": True}, "a norm after each expert"),
        (OwnGate, {}, "a gate of their own"),
    ],
)
def test_what_the_op_lacks_is_an_error(base, traits, named):
    native = use_experts_implementation(**traits)(type("NativeExperts", (base,), {}))(layer_config())
    with pytest.raises(ValueError, match=f"'hf_archs': NativeExperts has {named}, which it .*; 'eager' does"):
        native(torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))


def test_an_activation_that_the_op_lacks_is_an_error():
    layer = ArchExperts(layer_config())
    layer.act_fn = nn.Tanh()
    with pytest.raises(ValueError, match="ArchExperts has the activation Tanh"):
        hf_archs_experts_forward(layer, *[*inputs().values()][:3])
