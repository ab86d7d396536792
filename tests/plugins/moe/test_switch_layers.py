"""The sparse layers of transformers' Switch Transformers: the same outputs and gradients, and back bit for bit."""

import pytest
import torch
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from hf_archs.testing.contract.models import assert_close
from hf_archs_moe import MoE, MoEConfig
from hf_archs_moe.switch_layers import from_switch_layer, to_switch_layer

CONFIG = {"d_model": 16, "d_ff": 24, "num_experts": 4, "expert_capacity": 40, "dropout_rate": 0.0}


def native(dtype=torch.float32, **fields):
    torch.manual_seed(0)
    config = SwitchTransformersConfig(**CONFIG, **fields)
    layer = SwitchTransformersSparseMLP(config).to(dtype).eval()
    layer.router.dtype = dtype  # lifts its cast to float32
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer, config


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
def test_parity(dtype, tolerance, activation):
    theirs, config = native(dtype, dense_act_fn=activation)
    ours = from_switch_layer(theirs, config)
    x = torch.randn(3, 20, 16, dtype=dtype, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(3, 20, 16, dtype=dtype, generator=torch.Generator().manual_seed(2))
    found = {}
    for name, layer in {"theirs": theirs, "ours": ours}.items():
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y = y[0] if isinstance(y, tuple) else y
        (y * weights).sum().backward()
        found[name] = y, inputs.grad
    for ours_found, theirs_found in zip(found["ours"], found["theirs"], strict=True):
        assert_close(ours_found, theirs_found, "output, gradient", tolerance)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert_close(ours.gate.weight.grad, gradients["router.classifier.weight"], "router", tolerance)
    for i in range(4):
        for mine, other in ((ours.experts.up_proj, "wi"), (ours.experts.down_proj, "wo")):
            assert_close(mine.grad[i], gradients[f"experts.expert_{i}.{other}.weight"], other, tolerance)


def test_there_and_back():
    theirs, config = native()
    back = to_switch_layer(from_switch_layer(theirs, config), expert_capacity=40)
    assert not back.training
    expected = theirs.state_dict()
    assert back.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())
    x = torch.randn(2, 9, 16)
    assert torch.equal(back(x), theirs(x))
    assert back.router.jitter_noise == config.router_jitter_noise
    assert not {p.data_ptr() for p in back.parameters()} & {p.data_ptr() for p in theirs.parameters()}


def test_what_the_other_lacks():
    with pytest.raises(ValueError, match="router_bias is True; allowed is False"):
        from_switch_layer(*native(router_bias=True))
    for fields, message in (
        ({}, "router is 'top_k'; allowed is 'switch'"),
        ({"router": "switch"}, "gated is True; allowed is False"),
        ({"router": "switch", "gated": False, "shared_expert_intermediate_size": 8}, "shared_expert_.* is 8; allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            to_switch_layer(MoE(MoEConfig(hidden_size=16, num_experts=4, moe_intermediate_size=8, **fields)))
