"""The routers and their losses: cases worked out by hand, transformers' own routers, and common promises."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import (
    DeepseekV3Config,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
    TrainerControl,
    TrainerState,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHTopkRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from hf_archs.kernels.numerics import allowed
from hf_archs_moe import routing
from hf_archs_moe.callbacks import RouterCallback
from hf_archs_moe.configuration import MoEConfig
from hf_archs_moe.routing import Router, Statistics

ROUTERS = {
    "top_k": {"num_experts_per_tok": 3, "norm_topk_prob": False},
    "switch": {"capacity_factor": 1.0, "eval_capacity_factor": 1.0},
    "gshard": {"capacity_factor": 1.0, "eval_capacity_factor": 1.0},
    "expert_choice": {"capacity_factor": 1.5},
    "predicted": {"router": "expert_choice", "capacity_factor": 1.5, "causal_predictor": True},
    "loss_free": {"score_function": "sigmoid", "routed_scaling_factor": 2.5},
}


class Products(TorchDispatchMode):
    """Collects how far products of matrices may be rounded while they run."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.found.append(allowed("mkldnn", "matmul"))
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize("kind", ROUTERS)
def test_the_router_is_not_rounded(kind):
    """A program's setting for products of float32 has no effect in a router."""
    router = make(kind)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.no_grad(), Products() as products:
            router(torch.randn(2, 5, 12))
            torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    finally:
        torch.set_float32_matmul_precision("highest")
    *inside, outside = products.found
    assert outside == "bf16"
    assert inside
    assert set(inside) == {"ieee"}


def make(kind, d=12, e=6, **fields):
    config = MoEConfig(**{"router": kind, "hidden_size": d, "num_experts": e, **ROUTERS.get(kind, {}), **fields})
    router = Router(config)
    for module in router.modules():
        module.init_weights()
    torch.nn.init.normal_(router.weight)
    return router


def given(logits, router, training=True, mask=None, **fields):
    """The outputs of a router for these logits (b, l, e)."""
    e = logits.shape[-1]
    module = Router(MoEConfig(router=router, hidden_size=e, num_experts=e, **fields)).train(training)
    module.init_weights()
    torch.nn.init.eye_(module.weight).requires_grad_(False)
    index, weight, statistics, _ = module(logits, mask)
    return index, weight, Statistics.unpack(statistics)


def dense(index, weight, e):
    """Weights (n, e), independent of the order of the choices."""
    return torch.zeros(len(index), e + 1, dtype=weight.dtype).scatter_add(1, index, weight)[:, :e]


# -- losses ----------------------------------------------------------------------------------------------------

# of four tokens three choose the first of two experts, whose mean probability is 0.7; the log-sum-exp of logits is 0
SKEWED = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]]]).log()
# all four choose the second, whose mean probability is 0.8; the log-sum-exp is 2
OTHER = torch.tensor([[[0.2, 0.8]]]).log().expand(1, 4, 2) + 2


def layers(router, **fields):
    return [given(logits, router, **fields)[2] for logits in (SKEWED, OTHER)]


def test_switch_balance_loss():
    """2 (3/4 0.7 + 1/4 0.3) = 1.2, and 2 (0 0.2 + 1 0.8) = 1.6."""
    assert float(routing.switch_balance_loss(layers("switch"))) == pytest.approx(1.2 + 1.6)


def test_switch_counts_the_load_before_it_drops():
    """Two of three choices are placed, and two of the other four; the loss must count all."""
    dropping = layers("switch", capacity_factor=1.0)
    assert [layer.placed.tolist() for layer in dropping] == [[2, 1], [0, 2]]
    assert float(routing.switch_balance_loss(dropping)) == pytest.approx(1.2 + 1.6)


def test_gshard_balance_loss():
    """(3/4 0.7 + 1/4 0.3) / 2 = 0.3 and (1 0.8) / 2 = 0.4: second choices count nothing."""
    assert float(routing.gshard_balance_loss(layers("gshard"))) == pytest.approx(0.3 + 0.4)


def test_pooled_balance_loss():
    """Both layers: loads 3/8 and 5/8, probabilities 0.45 and 0.55, 2 (3/8 0.45 + 5/8 0.55) = 1.025."""
    assert float(routing.pooled_balance_loss(layers("top_k", num_experts_per_tok=1))) == pytest.approx(1.025)


def test_z_loss():
    """0 and 2 squared."""
    assert float(routing.z_loss(layers("top_k", router_z_loss_coef=1.0))) == pytest.approx(4.0, abs=1e-5)


def test_predictor_loss():
    """A predictor of zeros gives every choice a half: log 2 a layer."""
    module = make("predicted")
    torch.nn.init.zeros_(module.predictor.weight)
    statistics = Statistics.unpack(module(torch.randn(2, 5, 12))[2])
    assert routing.predictor_loss([statistics, statistics]).item() == pytest.approx(2 * math.log(2))


def test_entropy_is_of_the_probabilities():
    """log 2 if both experts are equally likely."""
    statistics = given(torch.zeros(1, 3, 2), "top_k")[2]
    assert float(statistics.entropy) == pytest.approx(3 * math.log(2))


@pytest.mark.parametrize("masked", [False, True])
def test_the_pooled_loss_equals_transformers(masked):
    logits = [torch.randn(3, 7, 5) * 2 for _ in range(4)]
    mask = torch.rand(3, 7) > 0.3 if masked else None
    expected = load_balancing_loss_func(tuple(t.flatten(0, 1) for t in logits), 5, 2, mask)
    found = routing.pooled_balance_loss([given(t, "top_k", mask=mask)[2] for t in logits])
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    "loss", [routing.pooled_balance_loss, routing.switch_balance_loss, routing.gshard_balance_loss, routing.z_loss]
)
def test_losses_reach_the_weights_of_the_router(loss):
    router = make("top_k", router_z_loss_coef=1.0).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)

    def value(weight):
        return loss([Statistics.unpack(torch.func.functional_call(router, {"weight": weight}, (x,))[2])])

    assert torch.autograd.gradcheck(value, router.weight, atol=1e-8)
    assert torch.autograd.grad(value(router.weight), router.weight)[0].abs().max() > 1e-4


def test_statistics_pack_and_unpack():
    statistics = Statistics(*torch.randn(3, 4), *torch.randn(5))
    packed = statistics.pack()
    assert packed.shape == (Statistics.size(4),)
    assert all(torch.equal(a, b) for a, b in zip(Statistics.unpack(packed), statistics))


# -- who is dropped --------------------------------------------------------------------------------------------


def logits_of(choices, e, second=None):
    """Logits for which tokens choose the experts ``first``, and with nearly the same score ``second`` if given."""
    logits = torch.nn.functional.one_hot(torch.tensor(choices), e) * 8.0
    if second is not None:
        logits = logits + torch.nn.functional.one_hot(torch.tensor(second), e) * 7.99
    return logits


def test_switch_drops_the_last_tokens_beyond_the_capacity():
    """Six tokens and two experts: three places each. The fourth that wants expert 0 is the fifth of all."""
    index, weight, statistics = given(logits_of([[0, 0, 1], [0, 0, 1]], 2), "switch", capacity_factor=1.0)
    assert index.flatten().tolist() == [0, 0, 1, 0, 2, 1]
    p = 1 / (1 + math.exp(-8))
    torch.testing.assert_close(weight.flatten(), torch.tensor([p, p, p, p, 0, p]))
    assert statistics.load.tolist() == [4, 2]
    assert statistics.placed.tolist() == [3, 2]
    assert float(statistics.dropped) == 1


def test_pads_take_no_place_and_make_none():
    """Without the pad there are five tokens: ceil(5 / 2) = 3 places, and the last token for 0 has one."""
    mask = torch.tensor([[True, False, True], [True, True, True]])
    index, weight, statistics = given(logits_of([[0, 0, 1], [0, 0, 1]], 2), "switch", mask=mask, capacity_factor=1.0)
    assert index.flatten().tolist() == [0, 2, 1, 0, 0, 1]
    assert float(weight[1]) == float(statistics.dropped) == 0
    index, *_ = given(logits_of([[0, 0, 1], [0, 0, 1]], 2), "switch", mask=mask, capacity_factor=0.8)
    assert index.flatten().tolist() == [0, 2, 1, 0, 2, 1]  # 0.8 * 5 / 2 = 2 places


def test_without_a_capacity_and_in_evaluation_nothing_is_dropped():
    logits = logits_of([[0, 0, 0], [0, 0, 0]], 2)
    assert given(logits, "switch")[0].flatten().tolist() == [0] * 6
    assert given(logits, "switch", training=False, capacity_factor=1.0)[0].flatten().tolist() == [0] * 6
    dropping = given(logits, "switch", training=False, eval_capacity_factor=1.0)[0]
    assert dropping.flatten().tolist() == [0, 0, 0, 2, 2, 2]


@pytest.mark.parametrize(
    ("tokens", "factor", "e", "places"),
    [(10, 1.1, 1, 11), (90, 0.3, 1, 27), (7, 1.25, 8, 2), (2560001, 1.0, 128, 20001)],
)
def test_capacity_is_exact(tokens, factor, e, places):
    assert routing.capacity(torch.tensor(tokens), factor, e).tolist() == places


def test_gshard_places_first_choices_first():
    """One place per expert: the second token keeps its first choice, which the first token has as its second."""
    logits = logits_of([[0, 1]], 2, second=[[1, 0]])
    index, _, statistics = given(logits, "gshard", training=False, eval_capacity_factor=1.0)
    assert index.tolist() == [[0, 2], [1, 2]]
    assert statistics.load.tolist() == statistics.placed.tolist() == [1, 1]
    assert float(statistics.dropped) == 2
    index, weight, statistics = given(logits, "gshard", training=False)
    assert index.tolist() == [[0, 1], [1, 0]]
    torch.testing.assert_close(weight.sum(1), torch.ones(2))
    assert statistics.placed.tolist() == [2, 2]


def test_gshard_draws_the_second_choice_with_twice_its_weight():
    p = torch.tensor([0.64, 0.16, 0.2])  # weights 0.64 / 0.84 and 0.2 / 0.84
    logits = p.log().expand(1, 20000, 3)
    index, weight, statistics = given(logits, "gshard")
    drawn = index[:, 1] == 2
    assert float(drawn.float().mean()) == pytest.approx(2 * 0.2 / 0.84, abs=0.015)
    torch.testing.assert_close(weight[drawn][0], torch.tensor([0.64, 0.2]) / 0.84)
    assert not weight[~drawn, 1].any()
    assert bool((index[:, 0] == 0).all())
    assert float(statistics.dropped) == 0  # a choice that is not drawn is not dropped
    assert bool((given(logits, "gshard", training=False)[0][:, 1] == 2).all())


def test_a_second_choice_that_is_not_drawn_takes_no_place():
    """First choices fill expert 0, and half of expert 1: as many second ones find a place there as are free."""
    logits = torch.cat([logits_of([[0] * 40], 3) + torch.tensor([0, 6.5, 0]), logits_of([[1] * 20], 3)], 1)
    index, _, statistics = given(logits, "gshard", capacity_factor=2.0)  # 2 * 60 / 3 = 40 places
    assert float(statistics.placed[1]) == 20 + int((index[:40, 1] == 1).sum())
    assert float(statistics.dropped) == 0
    assert 0 < int((index[:40, 1] == 1).sum()) < 40


def test_the_draw_follows_torchs_generator():
    router, x = make("gshard", capacity_factor=None), torch.randn(2, 50, 12)
    torch.manual_seed(3)
    first, second = router(x)[0], router(x)[0]
    torch.manual_seed(3)
    assert torch.equal(router(x)[0], first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("fields", [{}, {"router_jitter_noise": 0.3}])
def test_checkpointing_draws_the_same_again(use_reentrant, fields):
    router, x = make("gshard", **fields), torch.randn(2, 50, 12, requires_grad=True)
    seen = []
    router.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    with set_checkpoint_early_stop(False):
        checkpoint(lambda t: router(t)[1], x, use_reentrant=use_reentrant).square().sum().backward()
    (index, weight, *_), (again, weight_again, *_) = seen
    assert torch.equal(index, again)
    assert torch.equal(weight, weight_again)


def test_jitter_is_of_training_and_bounded():
    """With an identity for the weight, logits are the input times the noise; their differences show it."""
    logits = torch.full((1, 500, 2), 5.0)
    seen = [
        given(logits, "top_k", router_jitter_noise=0.1, router_z_loss_coef=1.0, training=t)[2] for t in (True, False)
    ]
    assert float(seen[0].probability[0]) != 250.0
    assert float(seen[1].probability[0]) == pytest.approx(250.0)
    assert float(seen[0].z) / 500 == pytest.approx((5 + math.log(2)) ** 2, rel=0.02)
    _, weight, _ = given(logits, "top_k", router_jitter_noise=0.1)
    assert 0.9 < float(weight.max()) / (1 / (1 + math.exp(-1.0))) <= 1.0  # at most 5.5 against 4.5


# -- expert choice ---------------------------------------------------------------------------------------------


def test_every_expert_takes_exactly_its_number_of_each_row():
    router, x = make("expert_choice", capacity_factor=1.5), torch.randn(3, 7, 12)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 2:] = mask[2, :4] = False
    index, weight, statistics, _ = router(x, mask)
    chosen = (index.view(3, 7, 6) < 6).sum(1)
    assert chosen.tolist() == [[2] * 6, [1] * 6, [1] * 6]  # ceil(1.5 t / 6) of 7, 2 and 3 tokens
    assert statistics[:6].tolist() == [4] * 6
    scores = (x @ router.weight.T).softmax(-1).masked_fill(~mask.unsqueeze(-1), 0)
    best = scores.topk(2, dim=1).values
    torch.testing.assert_close(weight.view(3, 7, 6)[0].sort(0).values[-2:], best[0].sort(0).values)
    torch.testing.assert_close(weight.view(3, 7, 6)[1].max(0).values, best[1, 0])


def test_of_equal_tokens_each_expert_takes_the_first():
    index, *_ = make("expert_choice", capacity_factor=3.0)(torch.ones(1, 4, 12))
    assert (index < 6).tolist() == [[True] * 6] * 2 + [[False] * 6] * 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pads", ["left", "right", "interior"])
def test_experts_choose_as_if_pads_and_neighbours_were_not_there(pads, training):
    router = make("expert_choice").train(training)
    row = torch.randn(7, 12)
    row[4] = row[1]  # a tie
    alone, weight, _, _ = router(row[None])
    places = {"left": range(4, 11), "right": range(7), "interior": (0, 2, 3, 5, 8, 9, 10)}[pads]
    x, mask = torch.randn(3, 11, 12) * 5, torch.ones(3, 11, dtype=torch.bool)
    mask[1] = False
    for t, place in enumerate(places):
        x[1, place], mask[1, place] = row[t], True
    index, weights, _, _ = router(x, mask)
    assert torch.equal(index.view(3, 11, 6)[1, list(places)], alone)
    torch.testing.assert_close(weights.view(3, 11, 6)[1, list(places)], weight)
    assert bool((index.view(3, 11, 6)[1, ~mask[1]] == 6).all())


def test_with_a_predictor_evaluation_is_causal():
    router, x = make("predicted").eval(), torch.randn(1, 9, 12)
    whole, weight, *_ = router(x)
    assert torch.equal(torch.cat([router(x[:, t : t + 1])[0] for t in range(9)]), whole)
    expected = x[0] @ router.predictor.weight.T + router.predictor.bias > 0
    assert torch.equal(whole < 6, expected)
    torch.testing.assert_close(weight[expected], (x[0] @ router.weight.T).softmax(-1)[expected])


def test_the_predictor_learns_the_choice_and_leaves_the_model_alone():
    router = make("predicted", capacity_factor=2.0)
    x = torch.randn(4, 64, 12, requires_grad=True)
    statistics = Statistics.unpack(router(x)[2])
    gradients = torch.autograd.grad(statistics.predictor_loss, [x, router.weight, router.predictor.weight])
    assert [bool(gradient.any()) for gradient in gradients] == [False, False, True]
    optimizer = torch.optim.Adam(router.predictor.parameters(), 0.03)
    for _ in range(150):
        loss = routing.predictor_loss([Statistics.unpack(router(torch.randn(4, 64, 12))[2])])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(8, 64, 12)
    right = (router.eval()(x)[0] < 6) == (router.train()(x)[0] < 6)
    assert float(right.float().mean()) > 0.85  # two in three would be right without looking


# -- transformers' routers -------------------------------------------------------------------------------------


def _mixtral():
    config = MixtralConfig(hidden_size=12, num_local_experts=6, num_experts_per_tok=3)
    return MixtralTopKRouter(config), {"num_experts_per_tok": 3}


def _olmoe(norm):
    config = OlmoeConfig(hidden_size=12, num_experts=6, num_experts_per_tok=3, norm_topk_prob=norm)
    return OlmoeTopKRouter(config), {"num_experts_per_tok": 3, "norm_topk_prob": norm}


def _qwen3(norm):
    config = Qwen3MoeConfig(hidden_size=12, num_experts=6, num_experts_per_tok=2, norm_topk_prob=norm)
    return Qwen3MoeTopKRouter(config), {"norm_topk_prob": norm}


def _sigmoid(config_class, router_class, norm):
    config = config_class(
        hidden_size=12,
        n_routed_experts=6,
        num_experts_per_tok=3,
        n_group=1,
        topk_group=1,
        norm_topk_prob=norm,
        routed_scaling_factor=2.5,
    )
    fields = {"router": "loss_free", "score_function": "sigmoid", "num_experts_per_tok": 3, "norm_topk_prob": norm}
    return router_class(config), {**fields, "routed_scaling_factor": 2.5}


NATIVE = {
    "mixtral": _mixtral,
    "olmoe": lambda: _olmoe(False),
    "olmoe, normalised": lambda: _olmoe(True),
    "qwen3": lambda: _qwen3(False),
    "qwen3, normalised": lambda: _qwen3(True),
    "deepseek": lambda: _sigmoid(DeepseekV3Config, DeepseekV3TopkRouter, True),
    "deepseek, not normalised": lambda: _sigmoid(DeepseekV3Config, DeepseekV3TopkRouter, False),
    "nemotron": lambda: _sigmoid(NemotronHConfig, NemotronHTopkRouter, True),
}


@pytest.mark.parametrize("name", NATIVE)
def test_equals_transformers(name):
    native, fields = NATIVE[name]()
    torch.nn.init.normal_(native.weight)
    if hasattr(native, "e_score_correction_bias"):
        torch.nn.init.normal_(native.e_score_correction_bias, std=0.3)
    ours = make("own", **{"router": "top_k", **fields})
    ours.load_state_dict(native.state_dict())  # the names are equal
    x = torch.randn(2, 40, 12)
    _, expected_weight, expected = native(x)
    index, weight, _, _ = ours(x)
    assert torch.equal(index.sort(-1).values, expected.sort(-1).values)
    torch.testing.assert_close(dense(index, weight, 6), dense(expected, expected_weight, 6), rtol=1e-6, atol=1e-7)


# -- common promises -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROUTERS)
def test_pads_count_nowhere(kind):
    """Pads at the end, full of large numbers, against the same tokens without."""
    x, pads = torch.randn(1, 9, 12), torch.randn(1, 4, 12) * 100
    mask = torch.arange(13)[None] < 9
    for training in (False, True):
        # gshard draws second choices, and other ones for another number of tokens
        router = make(kind).train(training and kind != "gshard")
        index, weight, statistics, _ = router(x)
        padded, padded_weight, padded_statistics, _ = router(torch.cat([x, pads], 1), mask)
        torch.testing.assert_close(padded_statistics, statistics)
        assert torch.equal(padded[:9], index)
        torch.testing.assert_close(padded_weight[:9], weight)
        assert bool((padded[9:] == 6).all())
        assert not padded_weight[9:].any()
        gradients = torch.autograd.grad(padded_statistics.sum() + padded_weight.square().sum(), router.weight)
        expected = torch.autograd.grad(statistics.sum() + weight.square().sum(), router.weight)
        torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("training", [True, False])
def test_only_pads_give_zeros(kind, training):
    router = make(kind).train(training)
    index, weight, statistics, _ = router(torch.randn(2, 3, 12), torch.zeros(2, 3, dtype=torch.bool))
    assert bool((index == 6).all())
    assert not weight.any()
    assert not statistics.any()
    assert not routing.pooled_balance_loss([Statistics.unpack(statistics)])


@pytest.mark.parametrize("kind", ROUTERS)
def test_runs_in_float32_under_autocast_and_with_half_weights(kind):
    router = make(kind, d=64)
    half = make(kind, d=64)
    half.load_state_dict(router.state_dict())
    half.to(torch.bfloat16)
    x = torch.randn(2, 30, 64).to(torch.bfloat16)
    results = []
    for module, under_autocast in ((router, True), (half, False), (half, True)):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
            index, weight, statistics, _ = module(x)
        assert (index.dtype, weight.dtype, statistics.dtype) == (torch.int64, torch.float32, torch.float32)
        results.append((index, weight, statistics))
    torch.manual_seed(1)
    expected = router(x.float())[:3]
    torch.testing.assert_close(results[0], expected)
    torch.testing.assert_close(results[1], results[2])


@pytest.mark.parametrize("kind", ROUTERS)
def test_float64_stays(kind):
    router = make(kind).double()
    index, weight, statistics, _ = router(torch.randn(2, 5, 12, dtype=torch.float64))
    assert (index.dtype, weight.dtype, statistics.dtype) == (torch.int64, torch.float64, torch.float64)


def test_buffers_never_go_to_half_precision():
    router = make("loss_free")
    router.e_score_correction_bias.fill_(1.001)
    router.training_statistics.fill_(1001)
    router.half().to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.e_score_correction_bias.dtype == router.training_statistics.dtype == torch.float32
    assert router.e_score_correction_bias.tolist() == pytest.approx([1.001] * 6)
    assert set(router.training_statistics.tolist()) == {1001}
    assert list(router.state_dict()) == ["weight", "e_score_correction_bias"]


@pytest.mark.parametrize("kind", ROUTERS)
def test_is_deterministic(kind):
    router, x = make(kind), torch.randn(3, 20, 12)
    outcomes = []
    for _ in range(2):
        torch.manual_seed(5)
        outcomes.append(router(x))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ROUTERS)
def test_one_graph_serves_every_length(kind, training):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    # the compiler has its own generator
    router = make(kind).train(training and kind != "gshard")
    compiled = torch.compile(router, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for l in (5, 9, 16):
        x, mask = torch.randn(2, l, 12), torch.rand(2, l) > 0.2
        torch.testing.assert_close(compiled(x, mask), router(x, mask))
        graphs.append(counter.frame_count)  # dynamo may trace the first one twice
    assert graphs[0] == graphs[-1]


def test_gshard_compiles_in_training():
    torch._dynamo.reset()
    index, weight, _, _ = torch.compile(make("gshard"), backend="aot_eager", fullgraph=True)(torch.randn(2, 9, 12))
    assert bool(((index == 6) == (weight == 0)).all())


def test_counts_are_made_for_those_who_ask():
    router, x = make("top_k"), torch.randn(3, 1, 12)
    assert Statistics.unpack(router(x, count=False)[2]).tokens.tolist() == 3  # in training the callback needs them
    assert not router.eval()(x, count=False)[2].any()
    assert Statistics.unpack(router(x)[2]).tokens.tolist() == 3


def test_training_counts_add_up():
    router, x = make("top_k"), torch.randn(2, 5, 12)
    first, second = router(x)[2], router(-x)[2]
    router.eval()(x)
    torch.testing.assert_close(router.training_statistics, (first + second).detach())


# -- balance without a loss ------------------------------------------------------------------------------------


def balance(router, steps, batch):
    callback = RouterCallback()
    state = TrainerState()
    for _ in range(steps):
        router(batch())
        callback.on_optimizer_step(None, state, TrainerControl(), model=router)
    return callback


def busiest(router, batch):
    load = Statistics.unpack(router(batch())[2].detach()).load
    return float(load.max() / load.mean())


def test_the_correction_balances_skewed_tokens():
    """Tokens that agree in half of what they are."""
    router = make("loss_free", d=12, e=8, bias_update_rate=0.003)
    common = torch.randn(12)

    def batch():
        return common + torch.randn(4, 64, 12)

    before = busiest(router, batch)
    assert before > 2.0  # 2.8, and 1.2 at the end
    assert not router.e_score_correction_bias.any()
    balance(router, 300, batch)
    assert busiest(router.eval(), batch) < 1.5
    assert router.e_score_correction_bias.dtype == torch.float32
    assert not router.e_score_correction_bias.requires_grad


def test_the_correction_moves_by_one_step_of_its_rate():
    """Loads 3, 1, 0 and 0, whose mean is 1: down, not at all, up, up."""
    router = make("loss_free", e=4, bias_update_rate=0.25)
    router.correct(torch.tensor([3.0, 1.0, 0.0, 0.0]))
    assert router.e_score_correction_bias.tolist() == [-0.25, 0.0, 0.25, 0.25]


def test_the_correction_chooses_and_does_not_weigh():
    logits = torch.tensor([[[2.0, 1.0, -4.0]]])
    router = Router(MoEConfig(router="loss_free", score_function="sigmoid", hidden_size=3, num_experts=3))
    router.init_weights()
    torch.nn.init.eye_(router.weight)
    router.e_score_correction_bias[2] = 5.0
    index, weight, _, _ = router(logits)
    assert index.tolist() == [[2, 0]]
    scores = logits.sigmoid()[0, 0, [2, 0]]
    torch.testing.assert_close(weight[0], scores / scores.sum())


def test_the_correction_sees_the_last_step_and_all_ranks(monkeypatch):
    router, x = make("loss_free", bias_update_rate=0.5), torch.randn(1, 30, 12)
    elsewhere = torch.zeros(Statistics.size(6))
    elsewhere[0] = 1000.0  # another rank's tokens all choose the first expert

    def all_reduce(message):
        message += elsewhere

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    balance(router, 1, lambda: x)
    assert router.e_score_correction_bias.tolist() == [-0.5] + [0.5] * 5
    assert not router.training_statistics.any()


# -- bad values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_experts": 0}, "num_experts is 0; allowed are 1 to 16384"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0; allowed are 1 to 1048576"),
        ({"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size is -1; allowed are 0 to 1048576"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0.0; allowed are 1e-06 to 1000000.0"),
        ({"router_jitter_noise": 1.5}, "router_jitter_noise is 1.5; allowed are 0.0 to 1.0"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef is -1.0; allowed are 0.0 to 1000000.0"),
        ({"router_z_loss_coef": -1.0}, "router_z_loss_coef is -1.0; allowed are 0.0 to 1000000.0"),
        ({"bias_update_rate": 2.0}, "bias_update_rate is 2.0; allowed are 0.0 to 1.0"),
        ({"hidden_act": "loud"}, "hidden_act is 'loud'; allowed are "),
        (
            {"shared_expert_gate": True},
            "shared_expert_gate is True; allowed is False where shared_expert_intermediate_size is 0",
        ),
        (
            {"num_experts": 4, "num_experts_per_tok": 5},
            "num_experts_per_tok is 5; allowed are 1 to num_experts = 4, and None for 2",
        ),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0; allowed are 1 to num_experts = 8, and None for 2"),
        (
            {"router": "switch", "num_experts_per_tok": 2},
            "num_experts_per_tok is 2; allowed is 1, which is also what None stands for, with router 'switch'",
        ),
        (
            {"router": "gshard", "num_experts_per_tok": 1},
            "num_experts_per_tok is 1; allowed is 2, which is also what None stands for, with router 'gshard'",
        ),
        ({"router": "gshard", "num_experts": 1}, "num_experts is 1; allowed are 2 and more with router 'gshard'"),
        (
            {"router": "switch", "score_function": "sigmoid"},
            "score_function is 'sigmoid'; allowed is 'softmax' with router 'switch'",
        ),
        ({"causal_predictor": True}, "causal_predictor is True; allowed is False with router 'top_k'"),
        ({"capacity_factor": 1.0}, "capacity_factor is 1.0; allowed is None with router 'top_k'"),
        (
            {"router": "switch", "capacity_factor": 9.0},
            "capacity_factor is 9.0; allowed are 0.0009765625 to 8",
        ),
        (
            {"router": "expert_choice", "capacity_factor": 1.0, "eval_capacity_factor": 1.0},
            "eval_capacity_factor is 1.0; allowed is None with router 'expert_choice'",
        ),
    ],
)
def test_bad_values_are_named(fields, sentence):
    with pytest.raises(StrictDataclassClassValidationError) as error:
        MoEConfig(**fields)
    assert f"MoEConfig: {sentence}" in str(error.value)
