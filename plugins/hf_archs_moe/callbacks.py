"""Update routers between training steps, and log their figures."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_archs_moe.routing import Router, Statistics, router_figures


class RouterCallback(TrainerCallback):
    """Update the corrections of ``loss_free`` routers after every step, and log figures of all routers.

    One callback serves all routers of a model; a second one has no effect. The figures, since the last log:
    ``router/layer_3/max_load`` (the busiest expert's load over the mean), ``entropy`` (of a token's probabilities, in
    nats), ``drop_rate`` (share of the choices) and, for ``loss_free``, ``bias_range``.
    """

    def __init__(self) -> None:
        self._totals: dict[Router, Tensor] = {}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Correct every router by the loads since the last step, summed over ranks, and reset its statistics."""
        routers = list(_routers(kwargs["model"]).values())
        for router, counted in zip(routers, _over_ranks([router.training_statistics for router in routers])):
            router.correct(Statistics.unpack(counted).load)
            total = self._totals.get(router)
            self._totals[router] = counted.clone() if total is None else total + counted
            router.training_statistics.zero_()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add all routers' figures since the last log to a log of training."""
        logs = kwargs["logs"]
        if "loss" not in logs:  # logs of an evaluation or of the end of training
            return
        figures: dict[str, float] = {}
        for name, router in _routers(kwargs["model"]).items():
            counts = Statistics.unpack(self._totals.pop(router, torch.zeros_like(router.training_statistics)).cpu())
            if counts.tokens:
                layer = next((part for part in name.split(".") if part.isdigit()), name)
                found = router_figures(router, counts)
                if "bias" in found:
                    found["bias_range"] = found["bias"].max() - found["bias"].min()
                figures |= {f"router/layer_{layer}/{k}": float(v) for k, v in found.items() if v.ndim == 0}
        logs.update(figures)
        state.log_history[-1].update(figures)  # the Trainer's copy of the logs, made before this call


def _routers(model: nn.Module) -> dict[str, Router]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


def _over_ranks(counts: list[Tensor]) -> list[Tensor]:
    """The sums over all ranks, in one all-reduce."""
    if not (counts and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return counts
    message = torch.cat(counts)
    torch.distributed.all_reduce(message)
    return list(message.split([len(count) for count in counts]))
