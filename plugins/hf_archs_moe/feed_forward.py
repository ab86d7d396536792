"""The mixture of experts as a feed-forward, registered as ``moe``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_archs.layers.mlp import MLP, MLPConfig, mlp_tp_plan
from hf_archs.parts import RoutedFeedForward
from hf_archs_moe.configuration import MoEConfig
from hf_archs_moe.expert_layer import ArchExperts
from hf_archs_moe.routing import BALANCE_LOSSES, Router, Statistics, predictor_loss, router_figures, z_loss

if TYPE_CHECKING:
    from transformers import TrainerCallback


def moe_tp_plan(config: MoEConfig) -> dict[str, str]:
    """How every expert is sharded over processes: in the width of its hidden layer, as any feed-forward."""
    wide = {"experts.gate_up_proj": "packed_colwise"} if config.gated else {"experts.up_proj": "colwise"}
    plan = {**wide, "experts.down_proj": "rowwise", "experts": "moe_tp_experts"}
    if config.shared_expert_intermediate_size:
        shared = mlp_tp_plan(MLPConfig(gated=config.gated))
        plan.update({f"shared_experts.{name}": style for name, style in shared.items()})
    return plan


def moe_ep_plan(config: MoEConfig) -> dict[str, str]:
    """How the experts are spread over processes, in transformers' words."""
    names = ("gate_up_proj" if config.gated else "up_proj", "down_proj")
    return {**{f"experts.{name}": "grouped_gemm" for name in names}, "experts": "ep_dispatch_experts"}


class MoE(RoutedFeedForward):
    """Every token through the experts that its router gives it, and through the shared one where there is one."""

    config: MoEConfig
    gate: Router

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = ArchExperts(config)
        self.experts.config = config.model_config  # where transformers keeps which implementation of experts runs
        self.shared_experts = self.shared_expert_gate = None
        if config.shared_expert_intermediate_size:
            self.shared_experts = MLP(
                MLPConfig(
                    hidden_size=config.hidden_size,
                    intermediate_size=config.shared_expert_intermediate_size,
                    hidden_act=config.hidden_act,
                    gated=config.gated,
                )
            )
        if config.shared_expert_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, count: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            hidden_states: (b, l, d).
            mask: (b, l) bool, the real tokens; None where all are. No expert but the shared one sees others.
            count: whether the statistics are asked for.

        Returns:
            (b, l, d) in the dtype of ``hidden_states``; the router's statistics, for `auxiliary_loss`; and its logits,
            (b * l, e).
        """
        index, weight, statistics, logits = self.gate(hidden_states, mask, count)
        everywhere = self.config.num_experts
        if (
            self.experts.num_experts < everywhere
        ):  # transformers sends tokens to other ranks' experts, and knows no none
            index = index.masked_fill(index == everywhere, 0)  # at a weight of 0
        output = self.experts(hidden_states.flatten(0, 1), index, weight).view_as(hidden_states)
        if self.shared_experts is not None:
            shared = self.shared_experts(hidden_states)
            if self.shared_expert_gate is not None:
                shared = torch.sigmoid(self.shared_expert_gate(hidden_states)) * shared
            output = output + shared
        return output.to(hidden_states.dtype), statistics, logits

    def balance_loss(self, statistics: Sequence[Tensor]) -> Tensor:
        """The loss that balances the load in all layers with this config, zero-dimensional; 0 for routers without one.

        Args:
            statistics: what `forward` of each of these layers gave, counted.
        """
        if self.config.router not in BALANCE_LOSSES:
            return statistics[0].new_zeros(())
        return BALANCE_LOSSES[self.config.router](_unpacked(statistics))

    def auxiliary_loss(self, statistics: Sequence[Tensor]) -> Tensor:
        """What the routers of all layers with this config add to the loss, coefficients and all; zero-dimensional.

        Args:
            statistics: as those of `balance_loss`.
        """
        config, layers = self.config, _unpacked(statistics)
        loss = statistics[0].new_zeros(())
        if config.router_aux_loss_coef:
            loss = loss + config.router_aux_loss_coef * self.balance_loss(statistics)
        if config.router_z_loss_coef:
            loss = loss + config.router_z_loss_coef * z_loss(layers)
        if config.causal_predictor:
            loss = loss + predictor_loss(layers)
        return loss

    def figures(self, statistics: Tensor) -> dict[str, Any]:
        """What a person wants to know of this layer's router, from its statistics.

        Returns:
            ``load``, the share of each expert in all choices, (experts,); ``max_load``, the busiest one's over the
            mean; ``entropy`` of a token's probabilities in nats; ``drop_rate`` of the choices; and with ``loss_free``
            the ``bias`` of each expert's score, (experts,).
        """
        return router_figures(self.gate, Statistics.unpack(statistics))

    def active_fraction(self) -> float:
        """How much of the experts' weights a token uses."""
        return self.config.experts_per_token / self.config.num_experts

    def trainer_callbacks(self) -> list[TrainerCallback]:
        """The one that moves corrections and logs figures, for all routers of a model."""
        from hf_archs_moe.callbacks import RouterCallback  # transformers' callbacks are slow to import, and few need it

        return [RouterCallback()]

    def check_generation(self) -> None:
        """Raise a `ValueError` where a token's experts depend on later tokens."""
        if self.config.router == "expert_choice" and not self.config.causal_predictor:
            raise ValueError(
                f"{type(self.config).__name__}: router is 'expert_choice', whose experts choose among all tokens of a "
                "row, later ones too, so it cannot generate; allowed are causal_predictor=True and the other routers"
            )


def _unpacked(statistics: Sequence[Tensor]) -> list[Statistics]:
    return [Statistics.unpack(packed.to(statistics[0].device)) for packed in statistics]
