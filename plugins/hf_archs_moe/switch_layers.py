"""Convert sparse layers of transformers' Switch Transformers to ``moe`` feed-forwards, and back.

Their models are encoder-decoders, which this library does not have; their experts and routers fit any stack.
"""

from typing import Any

import torch
from torch import nn
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from hf_archs_moe.configuration import MoEConfig
from hf_archs_moe.feed_forward import MoE

# our fields and theirs
_FIELDS = {
    "hidden_size": "d_model",
    "num_experts": "num_experts",
    "moe_intermediate_size": "d_ff",
    "hidden_act": "dense_act_fn",
    "router_jitter_noise": "router_jitter_noise",
    "router_aux_loss_coef": "router_aux_loss_coef",
    "router_z_loss_coef": "router_z_loss_coef",
}


def from_switch_layer(layer: SwitchTransformersSparseMLP, config: SwitchTransformersConfig) -> MoE:
    """A ``moe`` feed-forward with the weights of a sparse layer of transformers; they share no memory.

    The outputs are equal if theirs drops no token: it limits an expert to ``expert_capacity`` tokens of every row, in
    evaluation too, and ours by ``capacity_factor`` to a share of a batch, in training only. Dropout within the experts
    is not carried over.

    Raises:
        ValueError: if the layer's router has a bias.
    """
    if config.router_bias:
        raise ValueError("from_switch_layer: router_bias is True; allowed is False, for our routers have none")
    fields: dict[str, Any] = {ours: getattr(config, theirs) for ours, theirs in _FIELDS.items()}
    moe = MoE(MoEConfig(router="switch", gated=False, **fields))
    state = layer.state_dict()
    experts = range(config.num_experts)
    theirs = {
        "gate.weight": state["router.classifier.weight"],
        "experts.up_proj": torch.stack([state[f"experts.expert_{i}.wi.weight"] for i in experts]),
        "experts.down_proj": torch.stack([state[f"experts.expert_{i}.wo.weight"] for i in experts]),
    }
    return _filled(moe, theirs, layer)


def to_switch_layer(moe: MoE, expert_capacity: int = 64) -> SwitchTransformersSparseMLP:
    """A sparse layer of transformers with the weights of a ``moe`` feed-forward; they share no memory.

    Args:
        moe: a feed-forward with the router ``switch``, ungated experts and no shared expert.
        expert_capacity: tokens of a row that one expert of the result takes.

    Raises:
        ValueError: for any other feed-forward, naming the field.
    """
    config = moe.config
    allowed = {
        "router": "switch",
        "gated": False,
        "shared_expert_intermediate_size": 0,
        "routed_scaling_factor": 1.0,
    }
    for field, value in allowed.items():
        if getattr(config, field) != value:
            raise ValueError(f"to_switch_layer: {field} is {getattr(config, field)!r}; allowed is {value!r}")
    fields = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    layer = SwitchTransformersSparseMLP(
        SwitchTransformersConfig(**fields, expert_capacity=expert_capacity, dropout_rate=0.0)
    )
    state: dict[str, torch.Tensor] = {"router.classifier.weight": moe.gate.weight}
    for i, (up, down) in enumerate(zip(moe.experts.up_proj, moe.experts.down_proj, strict=True)):
        state |= {f"experts.expert_{i}.wi.weight": up, f"experts.expert_{i}.wo.weight": down}
    return _filled(layer, state, moe)


def _filled(module: Any, state: dict[str, torch.Tensor], source: nn.Module) -> Any:
    """``module`` with copies of the weights of ``state``, in their dtype, and in the mode of ``source``."""
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    module.load_state_dict(copies, assign=True)
    return module.train(source.training)
