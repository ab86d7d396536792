"""Routers, which assign tokens to experts; their statistics, and the losses that balance their load.

Letters in shapes: b batch, l length, d hidden size, n tokens (b times l), e experts, k choices of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from hf_archs.kernels.backend import is_transformed
from hf_archs.kernels.numerics import cast, full_precision, wide
from hf_archs_moe.configuration import MoEConfig

TINY = 1e-20  # added to sums of scores, which may underflow to 0


class Statistics(NamedTuple):
    """Sums over the real tokens of one layer. Only `pack` and `unpack` know their order in one tensor.

    Attributes:
        load: (e,) choices of each expert before any is dropped; with ``gshard`` the first choices only.
        probability: (e,) probability of each expert, differentiable.
        placed: (e,) choices of each expert that it computes.
        z: () squared log-sum-exp of the logits, differentiable; 0 without a z loss.
        entropy: () entropy of the probabilities, in nats.
        dropped: () choices beyond an expert's capacity.
        predictor_loss: () cross entropy of the causal predictor, averaged over experts, differentiable.
        tokens: () number of real tokens.
    """

    load: Tensor
    probability: Tensor
    placed: Tensor
    z: Tensor
    entropy: Tensor
    dropped: Tensor
    predictor_loss: Tensor
    tokens: Tensor

    @staticmethod
    def size(num_experts: int) -> int:
        """Elements of the packed tensor."""
        return 3 * num_experts + 5

    def pack(self) -> Tensor:
        """All sums in one vector, for adding up over calls and ranks."""
        return torch.cat([self.load, self.probability, self.placed, torch.stack(self[3:])])

    @classmethod
    def unpack(cls, packed: Tensor) -> Statistics:
        """The inverse of `pack`."""
        *per_expert, single = packed.split([(packed.shape[0] - 5) // 3] * 3 + [5])
        return cls(*per_expert, *single.unbind())

    def mean(self, total: Tensor) -> Tensor:
        """``total`` per token; 0 without tokens."""
        return total / self.tokens.clamp(min=1)


# -- losses ----------------------------------------------------------------------------------------------------


def pooled_balance_loss(layers: Sequence[Statistics]) -> Tensor:
    """``e * sum(f * P)`` with load f and probability P of each expert, pooled over all layers.

    transformers pools the layers of Mixtral and its successors; Fedus et al. 2022 sum over them.
    """
    load, probability, tokens = (
        torch.stack([getattr(layer, field) for layer in layers]).sum(0) for field in ("load", "probability", "tokens")
    )
    return load.shape[0] * (load * probability).sum() / tokens.clamp(min=1).square()


def switch_balance_loss(layers: Sequence[Statistics]) -> Tensor:
    """``e * sum(f * P)``, summed over layers (Fedus et al. 2022, equation 4); 1 a layer at an even load."""
    return _sum(layer.mean(layer.load) @ layer.mean(layer.probability) * layer.load.shape[0] for layer in layers)


def gshard_balance_loss(layers: Sequence[Statistics]) -> Tensor:
    """``mean((c / S) * m)``, summed over layers (Lepikhin et al. 2021, algorithm 1, line 13).

    c is the load of first choices, S the number of tokens, m the mean probability.
    """
    return _sum(layer.mean(layer.load) @ layer.mean(layer.probability) / layer.load.shape[0] for layer in layers)


def z_loss(layers: Sequence[Statistics]) -> Tensor:
    """The mean squared log-sum-exp of the logits, summed over layers (Zoph et al. 2022, equation 5)."""
    return _sum(layer.mean(layer.z) for layer in layers)


def predictor_loss(layers: Sequence[Statistics]) -> Tensor:
    """The mean cross entropy of the causal predictors, summed over layers (Raposo et al. 2024, section 3.5)."""
    return _sum(layer.mean(layer.predictor_loss) for layer in layers)


def _sum(values: Any) -> Tensor:
    return torch.stack(list(values)).sum()


BALANCE_LOSSES: dict[str, Callable[[Sequence[Statistics]], Tensor]] = {
    "top_k": pooled_balance_loss,
    "switch": switch_balance_loss,
    "gshard": gshard_balance_loss,
}


# -- routers ---------------------------------------------------------------------------------------------------


def capacity(tokens: Tensor, factor: float, num_experts: int) -> Tensor:
    """``ceil(factor * tokens / num_experts)``, int64 like ``tokens``; the factor is rounded to six decimals."""
    million = 10**6  # whole numbers: a float's rounding error could lift a quotient to the next integer
    return -(-tokens * round(factor * million) // (num_experts * million))


def place(index: Tensor, wanted: Tensor, places: Tensor, num_experts: int) -> Tensor:
    """The choices that fit into the experts' capacity: first before second choices, then earlier before later tokens.

    Args:
        index: (n, k) int64, the experts of every token.
        wanted: (n, k) bool, the choices to be placed.
        places: () choices that one expert takes.

    Returns:
        (n, k) bool.
    """
    experts = index.t().reshape(-1, 1)
    occupied = torch.zeros(experts.shape[0], num_experts, dtype=torch.int32, device=index.device)
    occupied = occupied.scatter(1, experts, wanted.t().reshape(-1, 1).to(torch.int32)).cumsum(0, dtype=torch.int32)
    return (occupied.gather(1, experts) <= places).view_as(index.t()).t() & wanted


def _load(index: Tensor, which: Tensor, scores: Tensor) -> Tensor:
    """Choices of each expert among ``which`` (n, k), (e,) in the dtype of ``scores`` (n, e)."""
    return torch.zeros_like(scores).scatter(1, index, cast(which, scores.dtype)).sum(0)


class _Tally(torch.autograd.Function):
    """Add counts to a buffer; only an autograd function may under `torch.func`. `vmap` adds those of all samples."""

    @staticmethod
    def forward(buffer: Tensor, counts: Tensor) -> Tensor:
        buffer.add_(counts)
        return counts.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None]:
        return None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, buffer: Tensor, counts: Tensor) -> tuple[Tensor, None]:
        return _Tally.apply(buffer, counts if in_dims[1] is None else counts.sum(in_dims[1])), None


class Predictor(nn.Module):
    """Predicts from each token alone which experts will choose it. Its loss has no gradient for the model."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts))

    def init_weights(self) -> None:
        """Draw the weight as a router's, and set the bias to 0."""
        _init_scores(self.weight, self.config)
        init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, e) for x (n, d), in the dtype of x."""
        return F.linear(x.detach(), cast(self.weight, x.dtype), cast(self.bias, x.dtype))


def _init_scores(weight: Tensor, config: MoEConfig) -> None:
    init.normal_(weight, std=getattr(config.model_config, "initializer_range", 0.02))


class Router(nn.Module):
    """Scores every expert for every token, and assigns tokens to experts by ``config.router``.

    - ``top_k``: a token takes the k best experts, and none is dropped (Jiang et al. 2024, section 2.1).
    - ``switch``: a token takes the best expert, if that has capacity left (Fedus et al. 2022, section 2.2).
    - ``gshard``: a token takes the best two experts, if they have capacity left (Lepikhin et al. 2021, algorithm 1; Du
      et al. 2022). In training the second is used with twice its weight as probability; if not, it takes no capacity.
    - ``expert_choice``: every expert takes the best tokens of each row (Zhou et al. 2022, section 3.2). In evaluation
      with a causal predictor it takes the tokens that the predictor selects.
    - ``loss_free``: as ``top_k``, by scores plus a correction, which is not part of the weights; `correct` updates it
      after every step (Wang et al. 2024, algorithm 1; DeepSeek-V3, section 2.1.2).

    The weight is a bare parameter, so that adapters for linear layers skip it. Scores, weights and sums are float32, or
    float64 for float64 input, also under autocast and with half-precision weights.
    """

    weight: nn.Parameter
    e_score_correction_bias: Tensor
    training_statistics: Tensor

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        # reading a field of a model's config takes as long as a small operator, and a decode step reads many
        self.kind, self.score_function, self.scaling = (
            config.router,
            config.score_function,
            config.routed_scaling_factor,
        )
        self.num_experts = experts = config.num_experts
        self.top_k, self.normalize = config.experts_per_token, config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.predictor = Predictor(config) if config.causal_predictor else None
        if self.kind == "loss_free":
            self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))
        # sums since the last reset; activation checkpointing counts everything twice, which does not change ratios
        counts = torch.zeros(Statistics.size(experts), dtype=torch.float32)
        self.register_buffer("training_statistics", counts, persistent=False)

    def init_weights(self) -> None:
        """Draw the weight with the model's ``initializer_range``; set the correction and the statistics to 0."""
        _init_scores(self.weight, self.config)
        for buffer in self.buffers(recurse=False):
            init.zeros_(buffer)

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        # the buffers stay wide: bfloat16 cannot count beyond 256, or hold corrections of a thousandth
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype not in (torch.float32, torch.float64):
                setattr(self, name, buffer.to(moved.device))
        return self

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, count: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Assign experts to every token.

        Args:
            hidden_states: (b, l, d).
            mask: (b, l) bool, True for real tokens; None if all are.
            count: whether the statistics are needed; if not, they are zeros in evaluation, since counting takes longer
                than choosing.

        Returns:
            index (n, k) int64, ``num_experts`` for no expert and for pads; weight (n, k), 0 for these; `Statistics`,
            packed; and the logits (n, e). k is the config's ``experts_per_token``.
        """
        with full_precision(hidden_states):
            x = wide(hidden_states).flatten(0, 1)
            if self.training and self.config.router_jitter_noise:
                noise = self.config.router_jitter_noise
                x = x * torch.empty_like(x).uniform_(1 - noise, 1 + noise)
            return self._route(x, mask, hidden_states.shape[:2], count)

    def _route(
        self, x: Tensor, mask: Tensor | None, shape: torch.Size, count: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = F.linear(x, cast(self.weight, x.dtype))
        scores = logits.softmax(-1) if self.score_function == "softmax" else logits.sigmoid()
        all_kept = mask is None and self.kind != "expert_choice"  # then no choice has to be masked
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=x.device)
        real = mask.reshape(-1, 1)
        guess = None if self.predictor is None else self.predictor(x)

        if self.kind == "expert_choice":
            index = torch.arange(self.num_experts, device=x.device).expand_as(scores)
            weight = scores
            if guess is None or self.training:
                wanted = self._choose_tokens(scores.detach(), mask)
            else:
                wanted = (guess > 0) & real
        else:
            index, weight, drawn = self._choose_experts(scores)
            wanted = real.expand_as(index) if drawn is None else drawn & real
            all_kept = all_kept and drawn is None
        if guess is not None and torch.is_grad_enabled():
            # a gradient of 0 for the predictor if no loss has one: data-parallel processes wait for all gradients
            weight = weight + guess[:0].sum()
        kept = self._place(index, wanted, real)
        all_kept = all_kept and kept is wanted

        if not (count or self.training):
            statistics = x.new_zeros(Statistics.size(self.num_experts))
        else:
            statistics = self._count(logits, scores, guess, real, index, wanted, kept).pack()
        if self.training:
            if is_transformed():
                _Tally.apply(self.training_statistics, statistics.detach())
            else:
                self.training_statistics.add_(statistics.detach())
        if self.scaling != 1.0:
            weight = weight * self.scaling
        if not all_kept:
            index, weight = index.masked_fill(~kept, self.num_experts), weight.masked_fill(~kept, 0.0)
        return index, weight, statistics, logits

    def _count(
        self,
        logits: Tensor,  # (n, e)
        scores: Tensor,  # (n, e)
        guess: Tensor | None,  # (n, e)
        real: Tensor,  # (n, 1)
        index: Tensor,  # (n, k)
        wanted: Tensor,  # (n, k)
        kept: Tensor,  # (n, k)
    ) -> Statistics:
        probabilities = scores
        if self.score_function == "sigmoid":
            probabilities = scores / (scores.sum(-1, keepdim=True) + TINY)
        counted = cast(real, scores.dtype).squeeze(1)
        nothing = missed = counted.new_zeros(())
        if guess is not None and self.training:
            chosen = cast(wanted, scores.dtype)
            missed = counted @ F.binary_cross_entropy_with_logits(guess, chosen, reduction="none").mean(-1)
        first = self.kind == "gshard"
        load = _load(index[:, :1], wanted[:, :1], scores) if first else _load(index, wanted, scores)
        return Statistics(
            load=load,
            probability=counted @ probabilities,
            placed=load if kept is wanted and not first else _load(index, kept, scores),
            z=counted @ logits.logsumexp(-1).square() if self.config.router_z_loss_coef else nothing,
            entropy=counted @ torch.special.entr(probabilities.detach()).sum(-1),
            dropped=cast(wanted & ~kept, scores.dtype).sum(),
            predictor_loss=missed,
            tokens=counted.sum(),
        )

    def _choose_experts(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Every token's experts, their weights, and which of them were drawn (None for all); each (n, k)."""
        if self.kind == "loss_free":
            corrected = scores.detach() + cast(self.e_score_correction_bias, scores.dtype)
            index = corrected.topk(self.top_k).indices
            weight = scores.gather(1, index)
        else:
            weight, index = scores.topk(self.top_k)
        if self.kind == "gshard" or (self.normalize and self.kind != "switch"):
            weight = weight / (weight.sum(-1, keepdim=True) + TINY)
        if self.kind != "gshard" or not self.training:
            return index, weight, None
        # torch's default generator: the Trainer seeds and saves it, and activation checkpointing restores it
        drawn = torch.rand_like(weight[:, 1:]) < 2 * weight[:, 1:].detach()
        return index, weight, torch.cat([torch.ones_like(drawn), drawn], -1)

    def _choose_tokens(self, scores: Tensor, mask: Tensor) -> Tensor:
        """The tokens of each row that every expert takes, (n, e) bool."""
        b, l = mask.shape
        factor = self.config.capacity_factor or min(2.0, self.num_experts)
        places = capacity(mask.sum(1), factor, self.num_experts)
        scores = scores.view(b, l, -1).masked_fill(~mask.unsqueeze(-1), -1.0)
        # a stable sort takes the earlier of equal tokens, wherever pads are (ONNX's only sort is stable)
        stable = {} if torch.onnx.is_in_onnx_export() else {"stable": True}
        order = scores.sort(dim=1, descending=True, **stable).indices
        taken = torch.arange(l, device=mask.device)[:, None] < places[:, None, None]
        return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, taken.expand_as(order)).flatten(0, 1)

    def _place(self, index: Tensor, wanted: Tensor, real: Tensor) -> Tensor:
        config = self.config
        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        if self.kind == "expert_choice" or factor is None:
            return wanted
        return place(index, wanted, capacity(real.sum(), factor, self.num_experts), self.num_experts)

    @torch.no_grad()
    def correct(self, load: Tensor) -> None:
        """Lower the scores of experts with more than the mean load, and raise those of the others, by one step.

        Args:
            load: (e,) choices of each expert in the last step.
        """
        if self.kind == "loss_free":
            self.e_score_correction_bias.add_(torch.sign(load.mean() - load), alpha=self.config.bias_update_rate)


def router_figures(router: Router, counts: Statistics) -> dict[str, Tensor]:
    """See `hf_archs_moe.MoE.figures`."""
    choices = (counts.placed.sum() + counts.dropped).clamp(min=1)
    figures = {
        "load": counts.placed / choices,
        "max_load": counts.placed.max() / counts.placed.mean().clamp(min=1e-9),
        "entropy": counts.mean(counts.entropy),
        "drop_rate": counts.dropped / choices,
    }
    if router.config.router == "loss_free":
        figures["bias"] = router.e_score_correction_bias
    return figures
