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
    """Tensor-parallel plan: every expert is sharded in the width of its hidden layer, as any feed-forward."""
    wide = {"experts.gate_up_proj": "packed_colwise"} if config.gated else {"experts.up_proj": "colwise"}
    plan = {**wide, "experts.down_proj": "rowwise", "experts": "moe_tp_experts"}
    if config.shared_expert_intermediate_size:
        shared = mlp_tp_plan(MLPConfig(gated=config.gated))
        plan.update({f"shared_experts.{name}": style for name, style in shared.items()})
    return plan


def moe_ep_plan(config: MoEConfig) -> dict[str, str]:
    """Expert-parallel plan, in transformers' terms."""
    names = ("gate_up_proj" if config.gated else "up_proj", "down_proj")
    return {**{f"experts.{name}": "grouped_gemm" for name in names}, "experts": "ep_dispatch_experts"}


class MoE(RoutedFeedForward):
    """A router, the experts that it assigns to each token, and optionally a shared expert for all tokens."""

    config: MoEConfig
    gate: Router

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = ArchExperts(config)
        self.experts.config = config.model_config  # transformers selects the implementation of experts there
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
        """Route tokens and add up their experts' outputs.

        Args:
            hidden_states: (b, l, d).
            mask: (b, l) bool, True for real tokens; None if all are. Pads reach the shared expert only.
            count: whether the statistics are needed.

        Returns:
            (b, l, d) in the dtype of ``hidden_states``; the router's statistics, for `auxiliary_loss`; and its logits,
            (b * l, e).
        """
        index, weight, statistics, logits = self.gate(hidden_states, mask, count)
        no_expert = self.gate.num_experts
        if self.experts.num_experts < no_expert:
            # transformers' expert parallelism has no index for no expert: take the first one, at its weight of 0
            index = index.masked_fill(index == no_expert, 0)
        output = self.experts(hidden_states.flatten(0, 1), index, weight).view_as(hidden_states)
        if self.shared_experts is not None:
            shared = self.shared_experts(hidden_states)
            if self.shared_expert_gate is not None:
                shared = torch.sigmoid(self.shared_expert_gate(hidden_states)) * shared
            output = output + shared
        return output.to(hidden_states.dtype), statistics, logits

    def balance_loss(self, statistics: Sequence[Tensor]) -> Tensor:
        """The load-balancing loss of all layers with this config, zero-dimensional; 0 for routers without one.

        Args:
            statistics: of each of these layers, as `forward` returns them with ``count=True``.
        """
        if self.config.router not in BALANCE_LOSSES:
            return statistics[0].new_zeros(())
        return BALANCE_LOSSES[self.config.router](_unpacked(statistics))

    def auxiliary_loss(self, statistics: Sequence[Tensor]) -> Tensor:
        """The sum of the losses of all routers with this config, times their coefficients; zero-dimensional.

        Args:
            statistics: as for `balance_loss`.
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

    def balances_as_mixtral(self) -> bool:
        """Whether `auxiliary_loss` is Mixtral's load balancing alone, or nothing."""
        config = self.config
        mixtral = config.router == "top_k" and config.score_function == "softmax"
        only = not config.router_z_loss_coef and not config.causal_predictor
        return only and (mixtral or not config.router_aux_loss_coef)

    def figures(self, statistics: Tensor) -> dict[str, Any]:
        """Readable figures of this layer's router, from its statistics.

        Returns:
            ``load``, each expert's share of all choices, (experts,); ``max_load``, the busiest expert's load over the
            mean; ``entropy`` of a token's probabilities, in nats; ``drop_rate``, the share of dropped choices; and with
            ``loss_free`` the ``bias`` of each expert's score, (experts,).
        """
        return router_figures(self.gate, Statistics.unpack(statistics))

    def active_fraction(self) -> float:
        """The fraction of the experts' weights that one token uses."""
        return self.config.experts_per_token / self.config.num_experts

    def trainer_callbacks(self) -> list[TrainerCallback]:
        """A callback that updates corrections and logs figures, for all routers of a model."""
        from hf_archs_moe.callbacks import RouterCallback  # slow: it imports transformers' callbacks

        return [RouterCallback()]

    def check_generation(self) -> None:
        """Raise a `ValueError` if a token's experts depend on later tokens."""
        if self.config.router == "expert_choice" and not self.config.causal_predictor:
            raise ValueError(
                f"{type(self.config).__name__}: router is 'expert_choice', whose experts choose among all tokens of a "
                "row, later ones too, so it cannot generate; allowed are causal_predictor=True and the other routers"
            )


def _unpacked(statistics: Sequence[Tensor]) -> list[Statistics]:
    return [Statistics.unpack(packed.to(statistics[0].device)) for packed in statistics]
