"""What routers need between the steps of a training, and what they report."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_archs_moe.routing import Router, Statistics, router_figures


class RouterCallback(TrainerCallback):
    """Moves the corrections of ``loss_free`` routers after every step, and adds figures of all routers to the logs.

    One serves all routers of a model; others beside it find nothing to do. The figures, since the last log:
    ``router/layer_3/max_load`` (of the busiest expert, over the mean), ``entropy`` (of a token's probabilities, in
    nats), ``drop_rate`` (of the choices) and, of ``loss_free`` routers, ``bias_range``.
    """

    def __init__(self) -> None:
        self._totals: dict[Router, Tensor] = {}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Correct every router by the loads since the last step, over all ranks, and start its statistics anew."""
        routers = list(_routers(kwargs["model"]).values())
        for router, counted in zip(routers, _over_ranks([router.training_statistics for router in routers])):
            router.correct(Statistics.unpack(counted).load)
            total = self._totals.get(router)
            self._totals[router] = counted.clone() if total is None else total + counted
            router.training_statistics.zero_()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the figures of all routers since the last log to the logs of a training step."""
        logs = kwargs["logs"]
        if "loss" not in logs:  # those of an evaluation, and of the end
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
        state.log_history[-1].update(figures)  # where the Trainer has copied the logs before it shows them to anyone


def _routers(model: nn.Module) -> dict[str, Router]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


def _over_ranks(counts: list[Tensor]) -> list[Tensor]:
    """The sums over all ranks, in one message."""
    if not (counts and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return counts
    message = torch.cat(counts)
    torch.distributed.all_reduce(message)
    return list(message.split([len(count) for count in counts]))
