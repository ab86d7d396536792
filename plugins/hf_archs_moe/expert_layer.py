"""The experts of a layer in transformers' experts interface, and `expert_mlp` as an implementation of it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate, use_experts_implementation

from hf_archs.kernels.exporting import any_length
from hf_archs.kernels.numerics import cast
from hf_archs_moe.ops.experts import expert_mlp


@use_experts_implementation
class _Experts(nn.Module):
    gate_up_proj: nn.Parameter
    up_proj: nn.Parameter

    def __init__(self, config: Any):
        super().__init__()
        experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = experts  # transformers lowers it to the number on this rank
        self.gated = config.gated
        if self.gated:
            self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        else:
            self.up_proj = nn.Parameter(torch.empty(experts, inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        outputs = hidden_states.new_zeros(*top_k_index.shape, hidden_states.shape[1], dtype=dtype)
        # an exported graph also serves other tokens, so it loops over all experts
        for expert in range(self.num_experts) if any_length() else top_k_index.unique().tolist():
            if expert < self.num_experts:
                token, choice = torch.where(top_k_index == expert)
                if self.gated:
                    gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, -1)
                    inner = self.act_fn(gate) * up
                else:
                    inner = self.act_fn(F.linear(hidden_states[token], self.up_proj[expert]))
                output = F.linear(inner, self.down_proj[expert]) * top_k_weights[token, choice, None]
                outputs = outputs.index_put((token, choice), cast(output, dtype))
        return cast(outputs.sum(1), hidden_states.dtype)


class ArchExperts(_Experts):
    """The experts of a layer: parallel feed-forwards, of which each token uses those that the router chose.

    ``forward(hidden_states, top_k_index, top_k_weights)`` takes tokens (tokens, hidden), the indices of their experts
    (tokens, k), with ``num_experts`` for no expert, and the experts' weights (tokens, k). It returns (tokens, hidden)
    in the dtype of the tokens. ``config._experts_implementation`` names the implementation: ``hf_archs`` is
    `hf_archs_moe.expert_mlp`, ``eager`` a loop over the experts.

    Args:
        config: an object with ``num_experts, hidden_size, moe_intermediate_size, hidden_act, gated``, and optionally
            ``initializer_range`` for `init_weights`.

    Attributes:
        gate_up_proj: (experts, 2 * inner, hidden), the gate first; only if ``gated``.
        up_proj: (experts, inner, hidden); only if not ``gated``.
        down_proj: (experts, hidden, inner).
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self.has_gate = self.gated  # transformers' decorator sets it per class
        self._is_expert_parallel = True  # transformers' implementations then skip the index for no expert

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Also load the names of files, one tensor per expert: transformers' Trainer resumes from files without
        conversion, and from sharded files one by one.
        """
        parts = {"gate_up_proj": ("gate_proj", "up_proj")} if self.gated else {"up_proj": ("in_proj",)}
        for target, names in {**parts, "down_proj": ("down_proj",)}.items():
            whole = getattr(self, target)
            stored = [
                (e, i, key)
                for e in range(self.num_experts)
                for i, name in enumerate(names)
                if (key := f"{prefix}{e}.{name}.weight") in state_dict
            ]
            if stored:
                merged = whole.detach().clone()
                for e, i, key in stored:
                    merged[e].chunk(len(names))[i].copy_(state_dict.pop(key))
                state_dict[f"{prefix}{target}"] = merged
        super()._load_from_state_dict(state_dict, prefix, *args)

    def init_weights(self) -> None:
        """Draw all weights from a normal distribution with standard deviation ``initializer_range``."""
        for weight in self.parameters():
            init.normal_(weight, std=getattr(self.config, "initializer_range", 0.02))


# names in `expert_mlp` of activation modules; modules of one name differ in rounding only
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_pytorch_tanh",
    activations.NewGELUActivation: "gelu_pytorch_tanh",
    activations.AccurateGELUActivation: "gelu_pytorch_tanh",
    activations.FastGELUActivation: "gelu_pytorch_tanh",
    nn.ReLU: "relu",
    activations.ReLUSquaredActivation: "relu2",
}
_FUNCTIONS = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu", torch.relu: "relu"}


def _activation(act_fn: Any) -> str | None:
    """The name of an activation in `expert_mlp`, or None if it has none."""
    if isinstance(act_fn, nn.GELU):
        return "gelu" if act_fn.approximate == "none" else "gelu_pytorch_tanh"
    if isinstance(act_fn, nn.Module):
        return next((name for kind, name in _ACTIVATIONS.items() if isinstance(act_fn, kind)), None)
    return _FUNCTIONS.get(act_fn)


def hf_archs_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """`expert_mlp` for any experts of transformers' interface, registered there as ``hf_archs``.

    Args:
        self: the experts: `ArchExperts`, or native experts of Mixtral, OLMoE, Qwen3-MoE and many others.
        hidden_states: (tokens, hidden).
        top_k_index: integer, (tokens, k); ``num_experts`` for no expert.
        top_k_weights: (tokens, k).

    Returns:
        (tokens, hidden) in the dtype of ``hidden_states``.

    Raises:
        ValueError: for experts with a feature that `expert_mlp` lacks, naming it.
    """
    module: Any = self
    activation = _activation(module.act_fn)
    lacking = {
        "biases": module.has_bias,
        "transposed weights": module.is_transposed,
        "gate and value interleaved": not module.is_concatenated,
        "a norm after each expert": module.has_post_expert_norm,
        "a gate of their own": module.has_gate and type(module)._apply_gate is not _default_apply_gate,
        f"the activation {type(module.act_fn).__name__}": activation is None,
    }
    if any(lacking.values()):
        raise ValueError(
            f"experts implementation 'hf_archs': {type(module).__name__} has "
            f"{', '.join(name for name, has in lacking.items() if has)}, which it does not compute; 'eager' does"
        )
    assert activation is not None
    up = module.gate_up_proj if module.has_gate else module.up_proj
    return cast(
        expert_mlp(
            hidden_states,
            top_k_index,
            top_k_weights,
            up,
            module.down_proj,
            activation=activation,
            gated=module.has_gate,
        ),
        hidden_states.dtype,
    )


ALL_EXPERTS_FUNCTIONS.register("hf_archs", hf_archs_experts_forward)
