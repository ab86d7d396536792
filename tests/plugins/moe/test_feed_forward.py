"""The mixture of experts as a layer: its outputs, losses, callback and figures."""

import types

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from hf_archs.testing.ops import relative_distance
from hf_archs.training import callbacks
from hf_archs_moe.callbacks import RouterCallback
from hf_archs_moe.configuration import BALANCED, MoEConfig
from hf_archs_moe.feed_forward import MoE
from hf_archs_moe.routing import Statistics, pooled_balance_loss, predictor_loss, switch_balance_loss, z_loss

KINDS = {
    "top_k": {},
    "switch": {"capacity_factor": 1.0},
    "gshard": {"capacity_factor": 1.0},
    "expert_choice": {"capacity_factor": 2.0},
    "predicted": {"router": "expert_choice", "capacity_factor": 2.0, "causal_predictor": True},
    "loss_free": {"score_function": "sigmoid", "router_z_loss_coef": 0.01},
    "shared": {"router": "top_k", "shared_expert_intermediate_size": 24},
    "shared, gated": {
        "router": "top_k",
        "shared_expert_intermediate_size": 24,
        "shared_expert_gate": True,
        "gated": False,
        "hidden_act": "relu",
    },
}


def make(kind="top_k", **fields):
    sizes = {"hidden_size": 16, "num_experts": 4, "moe_intermediate_size": 8}
    layer = MoE(MoEConfig(**{"router": kind, **sizes, **KINDS[kind], **fields}))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def by_hand(layer, x):
    """Every expert on every token, times the router's weights."""
    tokens = x.flatten(0, 1)
    index, weight, *_ = layer.gate(x)
    y = torch.zeros_like(tokens)
    for e in range(layer.config.num_experts):
        only = torch.full((len(tokens), 1), e)
        scale = torch.where(index == e, weight, 0).sum(1, keepdim=True)
        y = y + scale * layer.experts(tokens, only, torch.ones_like(only, dtype=tokens.dtype))
    y = y.view_as(x)
    if layer.shared_experts is not None:
        shared = layer.shared_experts(x)
        gate = 1 if layer.shared_expert_gate is None else (x @ layer.shared_expert_gate.weight.T).sigmoid()
        y = y + gate * shared
    return y


# -- outputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_weighted_sum_of_its_experts(kind, training):
    layer, x = make(kind).train(training).double(), torch.randn(2, 9, 16, dtype=torch.float64)
    torch.manual_seed(2)
    y, statistics, _ = layer(x)
    torch.manual_seed(2)
    assert relative_distance(y, by_hand(layer, x)) < 1e-12
    assert (y.dtype, statistics.dtype, statistics.ndim) == (torch.float64, torch.float64, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_pads_see_the_shared_expert_only(kind):
    layer, x = make(kind).eval(), torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
    padded, statistics, _ = layer(x, mask)
    alone = torch.cat([layer(x[:1])[0][0], layer(x[1:, 2:])[0][0]])
    torch.testing.assert_close(padded[mask], alone)
    if layer.shared_experts is None:
        assert not padded[~mask].any()
    assert float(Statistics.unpack(statistics.detach()).tokens) == 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_output_has_the_dtype_of_the_input(kind, dtype):
    layer, x = make(kind).to(dtype), torch.randn(2, 9, 16, dtype=dtype)
    y, statistics, _ = layer(x)
    assert (y.dtype, statistics.dtype) == (dtype, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, statistics, _ = make(kind)(torch.randn(2, 9, 16))
    assert (y.dtype, statistics.dtype) == (torch.float32, torch.float32)


def test_experts_without_tokens_have_a_gradient_of_zero():
    layer = make(score_function="sigmoid")
    x = torch.rand(2, 9, 16)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([[1.0], [2.0], [-1.0], [-2.0]]).expand(4, 16))
    layer(x)[0].square().sum().backward()
    for name, parameter in layer.experts.named_parameters():
        assert [bool(g.any()) for g in parameter.grad] == [True, True, False, False], name
        assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_nothing(kind, use_reentrant):
    layer, x = make(kind), torch.randn(2, 9, 16, requires_grad=True)
    layer.config.router_aux_loss_coef = float(layer.config.router in BALANCED)

    def gradients(run):
        torch.manual_seed(4)
        layer.zero_grad()
        y, statistics, _ = run(x)
        (y.square().sum() + layer.auxiliary_loss([statistics])).backward()
        return [p.grad.clone() for p in layer.parameters()]

    torch.testing.assert_close(
        gradients(lambda t: checkpoint(layer, t, use_reentrant=use_reentrant)), gradients(layer), rtol=0, atol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_to_one_graph(kind):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = make(kind).train(kind != "gshard")  # the compiler has its own generator
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for l in (5, 9, 16):
        x, mask = torch.randn(2, l, 16), torch.rand(2, l) > 0.2
        torch.testing.assert_close(compiled(x, mask), layer(x, mask))
        graphs.append(counter.frame_count)  # dynamo may trace the first one twice
    assert graphs[0] == graphs[-1]


def test_the_experts_know_the_config_of_the_model():
    config, model_config = MoEConfig(), types.SimpleNamespace(_experts_implementation="eager")
    assert MoE(config).experts.config is config
    assert MoE(config.belongs_to(model_config)).experts.config is model_config


def test_the_router_is_no_linear_layer():
    """The router is not a linear layer: an adapter would change the assignment of tokens."""
    for kind in KINDS:
        assert not [m for m in make(kind).gate.modules() if isinstance(m, nn.Linear)]


# -- losses ----------------------------------------------------------------------------------------------------


def test_auxiliary_loss_has_the_coefficients():
    x, y = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    for kind, loss in (("top_k", pooled_balance_loss), ("switch", switch_balance_loss)):
        layer = make(kind, router_aux_loss_coef=0.3, router_z_loss_coef=0.2)
        packed = [layer(x)[1], layer(y)[1]]
        layers = [Statistics.unpack(p) for p in packed]
        found = layer.auxiliary_loss(packed)
        assert found.ndim == 0
        torch.testing.assert_close(found, 0.3 * loss(layers) + 0.2 * z_loss(layers))
    layer = make("predicted")
    packed = [layer(x)[1]]
    torch.testing.assert_close(layer.auxiliary_loss(packed), predictor_loss([Statistics.unpack(packed[0])]))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("top_k", {"router_aux_loss_coef": 0.0}), ("expert_choice", {}), ("loss_free", {"router_z_loss_coef": 0.0})],
)
def test_auxiliary_loss_is_zero_where_nothing_applies(kind, fields):
    layer = make(kind, **fields)
    assert layer.auxiliary_loss([layer(torch.randn(2, 9, 16))[1]]).tolist() == 0.0


def test_generation_is_refused_where_experts_see_later_tokens():
    with pytest.raises(ValueError, match=r"router is 'expert_choice', .* allowed are causal_predictor=True and the"):
        make("expert_choice").check_generation()
    for kind in KINDS.keys() - {"expert_choice"}:
        make(kind).check_generation()


# -- callback --------------------------------------------------------------------------------------------------


class _Model(nn.Module):
    """Two layers that learn to reproduce their input."""

    def __init__(self, kind, **fields):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"feed_forward": make(kind, **fields)}) for _ in range(2))

    def forward(self, x, mask=None, labels=None):
        y, statistics = x, []
        for layer in self.layers:
            output, counted, _ = layer["feed_forward"](y, mask)
            y, statistics = y + output, [*statistics, counted]
        loss = (y - x).square().mean() + layer["feed_forward"].auxiliary_loss(statistics)
        return {"loss": loss, "logits": y}


class _Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        return {"x": 1 + torch.randn(6, 16, generator=torch.Generator().manual_seed(i))}


def train(model, folder, **options):
    settings = {"max_steps": 6, "logging_steps": 3, "per_device_train_batch_size": 4, "report_to": "none"}
    arguments = TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **{**settings, **options})
    trainer = Trainer(model, arguments, train_dataset=_Rows(), eval_dataset=_Rows(), callbacks=callbacks(model)[:1])
    trainer.train()
    return trainer


def test_the_figures_are_in_the_logs(tmp_path):
    model = _Model("switch", capacity_factor=0.5)
    trainer = train(model, tmp_path, eval_strategy="steps", eval_steps=2)
    history = trainer.state.log_history
    logged = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [3, 6]
    for entry in logged:
        for layer in range(2):
            figures = {key.split("/")[2]: value for key, value in entry.items() if f"router/layer_{layer}/" in key}
            assert set(figures) == {"max_load", "entropy", "drop_rate"}
            assert 1.0 <= figures["max_load"] <= 4.0
            assert 0.0 < figures["entropy"] < 1.4
            assert figures["drop_rate"] >= 0.5  # half as many places as tokens
    others = [entry for entry in history if "loss" not in entry]
    assert len(others) == 4  # three evaluations, and the end
    assert not any("router" in key for entry in others for key in entry)


def test_the_figures_are_those_since_the_last_log():
    """Two steps, in each of which the first expert has three of four choices."""
    layer, callback, state = make("loss_free"), RouterCallback(), types.SimpleNamespace(log_history=[{"loss": 1.0}])
    size = Statistics.size(4)
    for placed, tokens, entropy, dropped in (
        ([3.0, 1.0, 0.0, 0.0], 4.0, 2.0, 0.0),
        ([3.0, 0.0, 0.0, 1.0], 4.0, 6.0, 2),
    ):
        counts = Statistics(
            torch.tensor(placed),
            torch.zeros(4),
            torch.tensor(placed),
            *torch.tensor([0.0, entropy, dropped, 0, tokens]),
        )
        layer.gate.training_statistics.copy_(counts.pack())
        callback.on_optimizer_step(None, state, None, model=layer)
    assert layer.gate.training_statistics.tolist() == [0.0] * size
    logs = {"loss": 1.0}
    callback.on_log(None, state, None, model=nn.ModuleDict({"5": layer}), logs=logs)
    # 6 of 8 choices, of which an expert has 2 on average; 8 nats of 8 tokens; 2 of 10 choices
    expected = {"loss": 1.0, "router/layer_5/max_load": 3.0, "router/layer_5/entropy": 1.0}
    expected |= {"router/layer_5/drop_rate": pytest.approx(0.2), "router/layer_5/bias_range": pytest.approx(4e-3)}
    assert logs == expected
    assert state.log_history == [expected]
    callback.on_log(None, state, None, model=layer, logs=(empty := {"loss": 1.0}))
    assert empty == {"loss": 1.0}


def test_the_trainer_moves_the_corrections_once_a_step(tmp_path):
    model = _Model("loss_free", bias_update_rate=0.01)
    assert [type(callback) for callback in callbacks(model)] == [RouterCallback] * len(callbacks(model))
    train(model, tmp_path, gradient_accumulation_steps=2)
    for layer in model.layers:
        bias = layer["feed_forward"].gate.e_score_correction_bias
        steps = (bias / 0.01).round()
        torch.testing.assert_close(bias, steps * 0.01)
        assert bool((steps.abs() <= 6).all())
        assert bool((steps.abs() >= 1).any())
        assert not layer["feed_forward"].gate.training_statistics.any()


def test_a_second_callback_finds_nothing_to_do():
    layer, state = make("loss_free", bias_update_rate=0.5), types.SimpleNamespace(log_history=[{}])
    layer(torch.randn(2, 9, 16))
    for callback in (RouterCallback(), RouterCallback()):
        callback.on_optimizer_step(None, state, None, model=layer)
    assert float(layer.gate.e_score_correction_bias.abs().max()) == 0.5
