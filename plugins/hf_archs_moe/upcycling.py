"""Make a mixture of experts from a dense model (Komatsuzaki et al. 2023, "Sparse Upcycling", section 2)."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from hf_archs import registry
from hf_archs.layers.mlp import MLP, MLPConfig
from hf_archs.native.conversion import from_native
from hf_archs_moe.configuration import ArchMoEConfig


def upcycle(
    model: PreTrainedModel,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    *,
    noise: float = 0.0,
    seed: int = 0,
    **fields: Any,
) -> PreTrainedModel:
    """Copy a model, with every dense feed-forward replaced by a mixture of copies of it and a new router.

    The weights of a token's experts sum to one, so without noise the result computes the same as the dense model,
    for any choice of its routers; training makes the copies differ.

    Args:
        model: a ``moe`` model with dense layers, a ``hybrid`` model with ``mlp`` among its feed-forwards, or a model of
            transformers that `hf_archs.from_native` converts to one (Llama, Mistral, Qwen3), with any head. It is not
            changed.
        num_experts: copies in each layer.
        num_experts_per_tok: experts per token.
        noise: standard deviation of noise added to the experts' weights, as a multiple of that of the weights.
        seed: seed of the routers' weights and the noise.
        fields: other fields of `MoEConfig`.

    Returns:
        A model of the same class (ours, for a model of transformers), device, dtype and mode.

    Raises:
        ValueError: if there is no dense feed-forward, if one has biases, which experts do not have, or if weights would
            not sum to one.
    """
    if not 0.0 <= noise <= 1.0:
        raise ValueError(f"upcycle: noise is {noise}; allowed are 0.0 to 1.0")
    if registry.find_architecture(type(model.config)) is None:
        model = from_native(model)
    router = {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok, **fields}
    config = _with_experts(model.config, router)
    generator = torch.Generator().manual_seed(seed)
    state = dict(model.state_dict())
    std = model.config.initializer_range
    for name, module in model.named_modules():
        if not isinstance(module, MLP):
            continue
        parts = ("gate_proj", "up_proj") if module.gate_proj is not None else ("up_proj",)
        up = torch.cat([state.pop(f"{name}.{part}.weight") for part in parts])
        down = state.pop(f"{name}.down_proj.weight")
        state[f"{name}.experts.{'gate_up_proj' if len(parts) == 2 else 'up_proj'}"] = _copies(
            up, num_experts, noise, generator
        )
        state[f"{name}.experts.down_proj"] = _copies(down, num_experts, noise, generator)
        state[f"{name}.gate.weight"] = _noise((num_experts, down.shape[0]), std, generator).to(down)
    with no_init_weights(), torch.device(model.device):
        result: Any = type(model)._from_config(config, dtype=model.dtype)
    result.load_state_dict({**result.state_dict(), **state})
    result.tie_weights()
    if model.can_generate():
        result.generation_config = copy.deepcopy(model.generation_config)
    return result.train(model.training)


def _with_experts(config: Any, router: dict[str, Any]) -> Any:
    """The config with a mixture in place of every dense feed-forward."""
    fields = config.to_dict()
    if isinstance(config, ArchMoEConfig):
        if all(config.has_experts(i) for i in range(config.num_hidden_layers)):
            raise ValueError("upcycle: every layer of this model has experts already; allowed is one with dense layers")
        if any(config.has_experts(i) for i in range(config.num_hidden_layers)):
            raise ValueError("upcycle: some layers of this model have experts; allowed is a model where none has")
        whole = {"dense_layers": None, "expert_layer_period": 1, "expert_layer_offset": 0, "router_aux_loss_coef": None}
        fields |= {**whole, "moe_intermediate_size": config.intermediate_size, **router}
        found = type(config).from_dict(fields)
        _check(found, found)
        return found
    named = getattr(config, "feed_forward", None) or {}
    dense = {name: described for name, described in named.items() if described["type"] == "mlp"}
    if not dense:
        raise ValueError(
            f"upcycle: a {type(config).__name__} with no feed-forward of type 'mlp' cannot be upcycled; allowed are "
            "moe with dense layers and hybrid with an mlp"
        )
    for name in dense:
        mlp: Any = config.feed_forward_instance(name, named[name])[1]
        assert isinstance(mlp, MLPConfig)
        if mlp.bias:
            raise ValueError(
                f"upcycle: feed_forward {name!r} has biases, which experts have not; allowed is bias=False"
            )
        same = {"hidden_act": mlp.hidden_act, "gated": mlp.gated, "moe_intermediate_size": mlp.intermediate_size}
        fields["feed_forward"] = {**fields["feed_forward"], name: {"type": "moe", **same, **router}}
    found = type(config).from_dict(fields)
    for name in dense:
        _check(found, found.feed_forward_instance(name, found.feed_forward[name])[1])
    return found


def _check(config: Any, moe: Any) -> None:
    if moe.router not in ("top_k", "loss_free") or not moe.norm_topk_prob or moe.routed_scaling_factor != 1.0:
        raise ValueError(
            f"upcycle: router is {moe.router!r}, norm_topk_prob {moe.norm_topk_prob} and routed_scaling_factor "
            f"{moe.routed_scaling_factor}; allowed are top_k and loss_free, True and 1.0, whose weights add up to one"
        )


def _copies(weight: Tensor, experts: int, noise: float, generator: torch.Generator) -> Tensor:
    copies = weight.expand(experts, *weight.shape).clone()
    if noise:
        copies += _noise(copies.shape, noise * weight.float().std().item(), generator).to(weight)
    return copies


def _noise(shape: Any, std: float, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator) * std
