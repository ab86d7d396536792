"""Which expert computes which token: the routers, what they count, and the losses that balance their load.

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

TINY = 1e-20  # added to sums of scores, which may underflow


class Statistics(NamedTuple):
    """Sums over the real tokens of one layer; `pack` and `unpack` alone know how they stand in one tensor.

    Attributes:
        load: (e,) choices of each expert before any is dropped; of ``gshard`` the first choices.
        probability: (e,) of each expert, with its gradient.
        placed: (e,) choices that the experts compute.
        z: () squared log-sum-exp of the logits, with its gradient; 0 where no loss is made of it.
        entropy: () of the probabilities, in nats.
        dropped: () choices beyond an expert's capacity.
        predictor_loss: () cross entropy of the causal predictor, its mean over the experts, with its gradient.
        tokens: () their number.
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
        """All of them in one vector, which sums over layers' calls and over ranks."""
        return torch.cat([self.load, self.probability, self.placed, torch.stack(self[3:])])

    @classmethod
    def unpack(cls, packed: Tensor) -> Statistics:
        """The inverse of `pack`."""
        *per_expert, single = packed.split([(packed.shape[0] - 5) // 3] * 3 + [5])
        return cls(*per_expert, *single.unbind())

    def mean(self, total: Tensor) -> Tensor:
        """``total`` for each token; 0 where there are none."""
        return total / self.tokens.clamp(min=1)


# -- losses ----------------------------------------------------------------------------------------------------


def pooled_balance_loss(layers: Sequence[Statistics]) -> Tensor:
    """``e * sum(f * P)`` with load f and probability P of each expert over all layers together.

    That is how transformers pools the layers of Mixtral and its successors, where Fedus et al. 2022 have a sum.
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
    """``ceil(factor * tokens / num_experts)``, int64 like ``tokens``; the factor to six digits after the point."""
    million = 10**6  # whole numbers, since rounding would lift some of them to the next one
    return -(-tokens * round(factor * million) // (num_experts * million))


def place(index: Tensor, wanted: Tensor, places: Tensor, num_experts: int) -> Tensor:
    """Which choices find a place: first choices before second ones, and among them earlier tokens first.

    Args:
        index: (n, k) int64, the experts of every token.
        wanted: (n, k) bool, the choices that are to be placed at all.
        places: () how many choices one expert takes.

    Returns:
        (n, k) bool.
    """
    experts = index.t().reshape(-1, 1)
    occupied = torch.zeros(experts.shape[0], num_experts, dtype=torch.int32, device=index.device)
    occupied = occupied.scatter(1, experts, wanted.t().reshape(-1, 1).to(torch.int32)).cumsum(0, dtype=torch.int32)
    return (occupied.gather(1, experts) <= places).view_as(index.t()).t() & wanted


def _load(index: Tensor, which: Tensor, scores: Tensor) -> Tensor:
    """How many of these choices (n, k) each expert has, (e,) in the dtype of the scores (n, e)."""
    return torch.zeros_like(scores).scatter(1, index, cast(which, scores.dtype)).sum(0)


class _Tally(torch.autograd.Function):
    """Adds counts to a buffer under transforms of `torch.func`, which refuse it elsewhere; under `vmap` all counts."""

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
    """Guesses from each token alone which experts will choose it; trained beside the model and not through it."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts))

    def init_weights(self) -> None:
        """Draw the weight as a router's; the bias is 0."""
        _init_scores(self.weight, self.config)
        init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, e) for x (n, d), in the dtype of x."""
        return F.linear(x.detach(), cast(self.weight, x.dtype), cast(self.bias, x.dtype))


def _init_scores(weight: Tensor, config: MoEConfig) -> None:
    init.normal_(weight, std=getattr(config.model_config, "initializer_range", 0.02))


class Router(nn.Module):
    """Scores every expert for every token, and lets one choose the other.

    - ``top_k``: a token takes the k best experts, none is dropped (Jiang et al. 2024, section 2.1).
    - ``switch``: it takes the best, if that has a place left (Fedus et al. 2022, section 2.2).
    - ``gshard``: it takes the best and, in training, with twice its weight as probability the second, if they have
      places left (Lepikhin et al. 2021, algorithm 1; Du et al. 2022). A second choice that is not drawn takes no place.
    - ``expert_choice``: every expert takes the best tokens of each row (Zhou et al. 2022, section 3.2). In evaluation
      with a causal predictor it takes those of which that says yes.
    - ``loss_free``: as top_k, by scores to which a correction is added that the weights do not see; `correct` moves it
      after every step (Wang et al. 2024, algorithm 1; DeepSeek-V3, section 2.1.2).

    The weight is a bare parameter so that adapters for linear layers leave it alone. Scores, weights and sums are in
    float32, or in float64 where the input is, under autocast and with weights in half precision too.
    """

    weight: nn.Parameter
    e_score_correction_bias: Tensor
    training_statistics: Tensor

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        experts = config.num_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.predictor = Predictor(config) if config.causal_predictor else None
        if config.router == "loss_free":
            self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))
        # the sum since it was last cleared; activation checkpointing counts everything twice, which ratios do not see
        counts = torch.zeros(Statistics.size(experts), dtype=torch.float32)
        self.register_buffer("training_statistics", counts, persistent=False)

    def init_weights(self) -> None:
        """Draw the weight as wide as the model's others; the correction and the statistics are 0."""
        _init_scores(self.weight, self.config)
        for buffer in self.buffers(recurse=False):
            init.zeros_(buffer)

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        # half precision counts to 256 and then no further, and cannot hold a correction of a thousandth
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
        """The experts of every token.

        Args:
            hidden_states: (b, l, d).
            mask: (b, l) bool, the real tokens; None where all are.
            count: whether the statistics are asked for; else they are zeros in evaluation, since counting takes longer
                than choosing.

        Returns:
            index (n, k) int64, where ``num_experts`` stands for no expert, as it does for pads; weight (n, k), 0 there;
            `Statistics`, packed; and the logits (n, e). k is the config's ``top_k``.
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
        config = self.config
        logits = F.linear(x, cast(self.weight, x.dtype))
        scores = logits.softmax(-1) if config.score_function == "softmax" else logits.sigmoid()
        every = mask is None and config.router != "expert_choice"  # whether all choices stand; no mask is needed then
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=x.device)
        real = mask.reshape(-1, 1)
        guess = None if self.predictor is None else self.predictor(x)

        if config.router == "expert_choice":
            index = torch.arange(config.num_experts, device=x.device).expand_as(scores)
            weight = scores
            if guess is None or self.training:
                wanted = self._choose_tokens(scores.detach(), mask)
            else:
                wanted = (guess > 0) & real
        else:
            index, weight, drawn = self._choose_experts(scores)
            wanted = real.expand_as(index) if drawn is None else drawn & real
            every = every and drawn is None
        if guess is not None and torch.is_grad_enabled():
            # a gradient of 0 where no loss asks for the guesses: processes that share out rows wait for one
            weight = weight + guess[:0].sum()
        kept = self._place(index, wanted, real)
        every = every and kept is wanted

        if not (count or self.training):
            statistics = x.new_zeros(Statistics.size(config.num_experts))
        else:
            statistics = self._count(logits, scores, guess, real, index, wanted, kept).pack()
        if self.training:
            if is_transformed():
                _Tally.apply(self.training_statistics, statistics.detach())
            else:
                self.training_statistics.add_(statistics.detach())
        if config.routed_scaling_factor != 1.0:
            weight = weight * config.routed_scaling_factor
        if not every:
            index, weight = index.masked_fill(~kept, config.num_experts), weight.masked_fill(~kept, 0.0)
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
        if self.config.score_function == "sigmoid":
            probabilities = scores / (scores.sum(-1, keepdim=True) + TINY)
        counted = cast(real, scores.dtype).squeeze(1)
        nothing = missed = counted.new_zeros(())
        if guess is not None and self.training:
            chosen = cast(wanted, scores.dtype)
            missed = counted @ F.binary_cross_entropy_with_logits(guess, chosen, reduction="none").mean(-1)
        first = self.config.router == "gshard"
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
        """For every token the experts, their weights, and which of them it wants, None for all; each (n, k)."""
        config = self.config
        if config.router == "loss_free":
            corrected = scores.detach() + cast(self.e_score_correction_bias, scores.dtype)
            index = corrected.topk(config.experts_per_token).indices
            weight = scores.gather(1, index)
        else:
            weight, index = scores.topk(config.experts_per_token)
        if config.router == "gshard" or (config.norm_topk_prob and config.router != "switch"):
            weight = weight / (weight.sum(-1, keepdim=True) + TINY)
        if config.router != "gshard" or not self.training:
            return index, weight, None
        # from torch's own generator, which the Trainer seeds and keeps in its checkpoints, and which activation
        # checkpointing plays again
        drawn = torch.rand_like(weight[:, 1:]) < 2 * weight[:, 1:].detach()
        return index, weight, torch.cat([torch.ones_like(drawn), drawn], -1)

    def _choose_tokens(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Which tokens of its row every expert takes, (n, e) bool."""
        b, l = mask.shape
        factor = self.config.capacity_factor or min(2.0, self.config.num_experts)
        places = capacity(mask.sum(1), factor, self.config.num_experts)
        # stable, so that of equal tokens the earlier ones are taken, wherever pads stand
        scores = scores.view(b, l, -1).masked_fill(~mask.unsqueeze(-1), -1.0)
        # (ONNX has one sort, which is)
        stable = {} if torch.onnx.is_in_onnx_export() else {"stable": True}
        order = scores.sort(dim=1, descending=True, **stable).indices
        taken = torch.arange(l, device=mask.device)[:, None] < places[:, None, None]
        return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, taken.expand_as(order)).flatten(0, 1)

    def _place(self, index: Tensor, wanted: Tensor, real: Tensor) -> Tensor:
        config = self.config
        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        if config.router == "expert_choice" or factor is None:
            return wanted
        return place(index, wanted, capacity(real.sum(), factor, config.num_experts), config.num_experts)

    @torch.no_grad()
    def correct(self, load: Tensor) -> None:
        """Make the scores of experts with more than the mean load lower, and those of the others higher, by one step.

        Args:
            load: (e,) choices in the last step.
        """
        if self.config.router == "loss_free":
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
