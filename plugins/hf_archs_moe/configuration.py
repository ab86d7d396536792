"""Configs of the mixture of experts as a feed-forward, and of the architecture."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from hf_archs.config.composed import ComposedConfig, Instance
from hf_archs.config.model import LayerPlan
from hf_archs.parts import PartConfig, check_range

BALANCED = ("top_k", "switch", "gshard")  # routers with a load-balancing loss


@strict
@dataclass(kw_only=True)
class MoEConfig(PartConfig):
    """Fields of a mixture of experts: a router, its experts, and optionally a shared expert for all tokens.

    Args:
        router: routing algorithm, see `hf_archs_moe.routing.Router`. ``top_k``: Mixtral, OLMoE, Qwen3-MoE. ``switch``:
            Switch Transformer. ``gshard``: GShard and GLaM. ``expert_choice``: experts choose tokens. ``loss_free``: a
            correction of the scores balances the load, as in DeepSeek-V3.
        num_experts: experts per layer, without the shared expert.
        num_experts_per_tok: experts per token; None for the router's default, see `experts_per_token`.
        moe_intermediate_size: width of an expert's hidden layer.
        hidden_act: activation of all experts, by its name in transformers.
        gated: multiply the activation by a second projection (Shazeer 2020, the GLU variants).
        score_function: maps the router's logits to scores; ``sigmoid`` with ``top_k`` and ``loss_free`` only.
        norm_topk_prob: divide a token's weights by their sum, with ``top_k`` and ``loss_free``. ``gshard`` always does,
            ``switch`` and ``expert_choice`` never do.
        routed_scaling_factor: factor on all weights, applied last.
        capacity_factor: with ``switch`` and ``gshard`` an expert takes at most ``capacity_factor * tokens /
            num_experts`` tokens of a training batch; further tokens are dropped. None drops no tokens; the papers use
            1.25 and 2.0. With ``expert_choice`` an expert takes exactly that many tokens of each row, in evaluation
            too; None is the paper's 2.0.
        eval_capacity_factor: the same for ``switch`` and ``gshard`` in evaluation. With None a token's result does not
            depend on other tokens.
        router_jitter_noise: in training, multiply the router's input by random factors between ``1 - noise`` and ``1 +
            noise`` (Fedus et al. 2022, section 2.4).
        router_aux_loss_coef: coefficient of the load-balancing loss of ``top_k``, ``switch`` and ``gshard``; None for
            0.01 with these routers, and 0.0 with the others, which have no such loss.
        router_z_loss_coef: coefficient of the loss that keeps logits small (Zoph et al. 2022, equation 5).
        bias_update_rate: with ``loss_free``, change of a score's correction in one step.
        shared_expert_intermediate_size: width of the shared expert; 0 for none. Several shared experts equal one of
            their total width.
        shared_expert_gate: multiply the shared expert's output by a sigmoid gate of the token (Qwen2-MoE).
        causal_predictor: with ``expert_choice``, train a predictor of the experts' choices from each token alone, and
            use it in evaluation; without it the model cannot generate.
    """

    # for a layer without a model; transformers sets this attribute on a model's config
    _experts_implementation: ClassVar[str] = "hf_archs"

    router: Literal["top_k", "switch", "gshard", "expert_choice", "loss_free"] = "top_k"
    num_experts: int = 8
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int = 1024
    hidden_act: str = "silu"
    gated: bool = True
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    router_jitter_noise: float = 0.0
    router_aux_loss_coef: float | None = None
    router_z_loss_coef: float = 0.0
    bias_update_rate: float = 1e-3
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    causal_predictor: bool = False

    def __post_init__(self) -> None:
        self._fill_defaults()

    def _fill_defaults(self) -> None:
        """Replace None by the defaults in two fields that other libraries read."""
        if self.router_aux_loss_coef is None:
            self.router_aux_loss_coef = 0.01 if self.router in BALANCED else 0.0
        if self.num_experts_per_tok is None:
            self.num_experts_per_tok = self._default_top_k

    def validate_moe(self) -> None:
        """Refuse values that are out of range or do not fit together."""
        check_range(self, "num_experts", 1, 2**14)
        check_range(self, "moe_intermediate_size", 1, 2**20)
        check_range(self, "shared_expert_intermediate_size", 0, 2**20)
        check_range(self, "routed_scaling_factor", 1e-6, 1e6)
        check_range(self, "router_jitter_noise", 0.0, 1.0)
        check_range(self, "router_aux_loss_coef", 0.0, 1e6)
        has_loss = self.router in BALANCED or self.router_aux_loss_coef == 0.0
        self._allow(has_loss, "router_aux_loss_coef", f"is 0.0 with router {self.router!r}, which has no such loss")
        check_range(self, "router_z_loss_coef", 0.0, 1e6)
        check_range(self, "bias_update_rate", 0.0, 1.0)
        self._allow(self.hidden_act in ACT2FN, "hidden_act", f"are {', '.join(sorted(ACT2FN))}")
        self._allow(
            self.shared_expert_intermediate_size > 0 or not self.shared_expert_gate,
            "shared_expert_gate",
            "is False where shared_expert_intermediate_size is 0",
        )

    def validate_router(self) -> None:
        """Refuse options that the chosen router does not have, and values that it cannot work with."""
        with_router = f"with router {self.router!r}"
        chooses = self.router in ("top_k", "loss_free")
        if chooses:
            at_most = f"are 1 to num_experts = {self.num_experts}, and None for {self._default_top_k}"
            self._allow(1 <= self.experts_per_token <= self.num_experts, "num_experts_per_tok", at_most)
        else:
            own = f"is {self._default_top_k}, which is also what None stands for, {with_router}"
            self._allow(self.experts_per_token == self._default_top_k, "num_experts_per_tok", own)
            self._allow(
                self.experts_per_token <= self.num_experts,
                "num_experts",
                f"are {self.experts_per_token} and more {with_router}",
            )
        self._allow(chooses or self.score_function == "softmax", "score_function", f"is 'softmax' {with_router}")
        choice = self.router == "expert_choice"
        self._allow(choice or not self.causal_predictor, "causal_predictor", f"is False {with_router}")
        self._validate_capacity("capacity_factor", limited=not chooses)
        self._validate_capacity("eval_capacity_factor", limited=self.router in ("switch", "gshard"))

    def _validate_capacity(self, field: str, limited: bool) -> None:
        if getattr(self, field) is not None:
            self._allow(limited, field, f"is None with router {self.router!r}")
            check_range(self, field, 2.0**-10, self.num_experts)

    @property
    def _default_top_k(self) -> int:
        return {"switch": 1, "expert_choice": self.num_experts}.get(self.router, 2)

    @property
    def experts_per_token(self) -> int:
        """Experts that may compute one token: 1 with Switch, all with expert choice, else the field or by default 2."""
        return self._default_top_k if self.num_experts_per_tok is None else self.num_experts_per_tok


@strict
class ArchMoEConfig(ComposedConfig, MoEConfig):
    """Config of a stack of one mixer with experts in some layers: the fields of `ArchConfig`, `MoEConfig`, and these.

    Args:
        mixer: the token mixer of every layer: a dict with ``type``, the name of a registered mixer, and fields of its
            config; None for attention with heads of 64 channels.
        intermediate_size: width of the feed-forward's hidden layer in layers without experts.
        expert_layer_period: distance between layers with experts (2 in GShard, Switch and GLaM).
        expert_layer_offset: index of the first layer with experts.
        dense_layers: indices of layers without experts, in spite of the period.
        output_router_logits: return the routers' logits and loss, and add this loss to that of the predictions.
    """

    model_type = "hf_archs_moe"
    mixer: dict[str, Any] | None = None
    intermediate_size: int = 2048
    expert_layer_period: int = 1
    expert_layer_offset: int = 0
    dense_layers: list[int] | None = None
    output_router_logits: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.mixer is None:
            self.mixer = {"type": "attention", "num_heads": max(self.hidden_size // 64, 1)}
        self._fill_defaults()
        super().__post_init__(**kwargs)

    def validate_mixer_sizes(self) -> None:
        """Refuse sizes that are out of range. Runs first, since the other checks compute with them."""
        super().validate_mixer_sizes()
        check_range(self, "expert_layer_period", 1, 2**12)  # has_experts divides by it

    def validate_layers(self) -> None:
        """Refuse layer indices and widths that are out of range, and a mixer that its own config refuses."""
        check_range(self, "intermediate_size", 1, 2**20)
        check_range(self, "expert_layer_offset", 0, self.expert_layer_period - 1)
        for layer in self.dense_layers or ():
            self._allow(0 <= layer < self.num_hidden_layers, "dense_layers", f"are 0 to {self.num_hidden_layers - 1}")
        self.layer_plan(0)

    def has_experts(self, layer_idx: int) -> bool:
        """Whether layer ``layer_idx`` has experts."""
        placed = layer_idx % self.expert_layer_period == self.expert_layer_offset
        return placed and layer_idx not in (self.dense_layers or ())

    def instances(self) -> dict[str, Instance]:
        """The mixer, under the path ``mixer``."""
        assert self.mixer is not None
        return {"mixer": self.mixer_instance("mixer", self.mixer)}

    def layer_plan(self, layer_idx: int) -> LayerPlan:
        """The mixer, and experts or, in layers without, a dense feed-forward."""
        mixer, config = self.instances()["mixer"]
        if self.has_experts(layer_idx):
            return LayerPlan(mixer, config, "moe", self)
        dense = {"intermediate_size": self.intermediate_size, "hidden_act": self.hidden_act, "gated": self.gated}
        return LayerPlan(mixer, config, *self.feed_forward_instance("dense", {"type": "mlp", **dense}))
