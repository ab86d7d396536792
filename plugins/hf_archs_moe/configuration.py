"""Configs of the mixture of experts as a feed-forward, and of the architecture."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from hf_archs.config.composed import ComposedConfig, Instance
from hf_archs.config.model import LayerPlan
from hf_archs.parts import PartConfig, check_range

BALANCED = ("top_k", "switch", "gshard")  # routers with a loss that balances their load


@strict
@dataclass(kw_only=True)
class MoEConfig(PartConfig):
    """Fields of a mixture of experts: a router, the experts, and one more that computes every token.

    Args:
        router: how tokens and experts find each other, see `hf_archs_moe.routing.Router`. ``top_k``: Mixtral, OLMoE,
            Qwen3-MoE. ``switch``: Switch Transformer. ``gshard``: GShard and GLaM. ``expert_choice``: experts choose
            tokens. ``loss_free``: a correction of the scores balances the load, as in DeepSeek-V3.
        num_experts: experts of a layer.
        num_experts_per_tok: experts that a token chooses; None becomes the router's own number, see
            `experts_per_token`.
        moe_intermediate_size: width of an expert's hidden layer.
        hidden_act: the activation of all experts, by its name in transformers.
        gated: multiply the activation by a second projection (Shazeer 2020, the GLU variants).
        score_function: of the router; ``sigmoid`` with ``top_k`` and ``loss_free`` only.
        norm_topk_prob: divide a token's weights by their sum, with ``top_k`` and ``loss_free`` (the weights of
            ``gshard`` always are, those of ``switch`` and ``expert_choice`` never).
        routed_scaling_factor: what every weight is multiplied by at the end.
        capacity_factor: with ``switch`` and ``gshard`` an expert takes at most ``capacity_factor * tokens /
            num_experts`` tokens of a batch in training, and others are dropped; None drops none. (The papers have 1.25
            and 2.0.) With ``expert_choice`` it takes exactly so many of each row, in evaluation too; None is the
            paper's 2.0.
        eval_capacity_factor: the same for ``switch`` and ``gshard`` in evaluation, where None lets a token's result
            not depend on its neighbours.
        router_jitter_noise: in training the router's input is multiplied by random numbers that are at most so far
            from one (Fedus et al. 2022, section 2.4).
        router_aux_loss_coef: of the loss that balances the load of ``top_k``, ``switch`` and ``gshard``; None becomes
            0.01 with these, and 0.0 with the others, which have no such loss.
        router_z_loss_coef: of the loss that keeps logits small (Zoph et al. 2022, equation 5).
        bias_update_rate: with ``loss_free``, how far one step moves the correction of a score.
        shared_expert_intermediate_size: width of the expert that computes every token; 0 for none. (Several of them
            are one of their common width.)
        shared_expert_gate: multiply its output by a sigmoid of the token (Qwen2-MoE).
        causal_predictor: with ``expert_choice``, learn which choices the experts make from each token alone, and go by
            that in evaluation; without it the model cannot generate.
    """

    # of a layer outside of a model: a model's config has its own, by this name in transformers
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
        self._settle()

    def _settle(self) -> None:
        """Put numbers in the place of None: other libraries compute with these two."""
        if self.router_aux_loss_coef is None:
            self.router_aux_loss_coef = 0.01 if self.router in BALANCED else 0.0
        if self.num_experts_per_tok is None:
            self.num_experts_per_tok = self._own_top_k

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
            at_most = f"are 1 to num_experts = {self.num_experts}, and None for {self._own_top_k}"
            self._allow(1 <= self.experts_per_token <= self.num_experts, "num_experts_per_tok", at_most)
        else:
            own = f"is {self._own_top_k}, which is also what None stands for, {with_router}"
            self._allow(self.experts_per_token == self._own_top_k, "num_experts_per_tok", own)
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
    def _own_top_k(self) -> int:
        return {"switch": 1, "expert_choice": self.num_experts}.get(self.router, 2)

    @property
    def experts_per_token(self) -> int:
        """Experts that may compute one token: one with Switch, all where experts choose, two unless told otherwise."""
        return self._own_top_k if self.num_experts_per_tok is None else self.num_experts_per_tok


@strict
class ArchMoEConfig(ComposedConfig, MoEConfig):
    """Config of a stack of one mixer with experts in some layers: the fields of `ArchConfig`, `MoEConfig`, and these.

    Args:
        mixer: the token mixer of every layer, a dict with ``type``, the name of a registered mixer, and fields of its
            config; None for attention with heads of 64 channels.
        intermediate_size: width of the feed-forward in layers without experts.
        expert_layer_period: every so many layers one has experts (2 in GShard, Switch and GLaM).
        expert_layer_offset: the first layer with experts, counted from 0.
        dense_layers: layers that have none all the same.
        output_router_logits: return the routers' logits and their loss, and add that to the loss of the predictions.
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
        self._settle()
        super().__post_init__(**kwargs)

    def validate_mixer_sizes(self) -> None:
        """Refuse sizes that are out of range; first of all, since others compute with them."""
        super().validate_mixer_sizes()
        check_range(self, "expert_layer_period", 1, 2**12)  # layers are counted with it

    def validate_layers(self) -> None:
        """Refuse layers that there are not, a width out of range, and a mixer that its own config refuses."""
        check_range(self, "intermediate_size", 1, 2**20)
        check_range(self, "expert_layer_offset", 0, self.expert_layer_period - 1)
        for layer in self.dense_layers or ():
            self._allow(0 <= layer < self.num_hidden_layers, "dense_layers", f"are 0 to {self.num_hidden_layers - 1}")
        self.layer_plan(0)

    def has_experts(self, layer_idx: int) -> bool:
        """Whether the feed-forward of a layer is a mixture of experts."""
        placed = layer_idx % self.expert_layer_period == self.expert_layer_offset
        return placed and layer_idx not in (self.dense_layers or ())

    def instances(self) -> dict[str, Instance]:
        """The one mixer."""
        assert self.mixer is not None
        return {"mixer": self.mixer_instance("mixer", self.mixer)}

    def layer_plan(self, layer_idx: int) -> LayerPlan:
        """The mixer, with experts or, in the other layers, a dense feed-forward."""
        mixer, config = self.instances()["mixer"]
        if self.has_experts(layer_idx):
            return LayerPlan(mixer, config, "moe", self)
        dense = {"intermediate_size": self.intermediate_size, "hidden_act": self.hidden_act, "gated": self.gated}
        return LayerPlan(mixer, config, *self.feed_forward_instance("dense", {"type": "mlp", **dense}))
