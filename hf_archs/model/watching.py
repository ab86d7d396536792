"""Warnings for a plain `Trainer`: it decays states, and leaves routers out of a smoothed loss; TRL's have other losses.

`hf_archs.ArchTrainer` does none of these.
"""

import sys
import warnings
from typing import Any

from torch import nn
from transformers import TrainerCallback

from hf_archs.parts import RoutedFeedForward


class PlainTrainerWarning(UserWarning):
    """A plain `Trainer` decays the states of a recurrence, or leaves losses of routers out of the loss."""


def watch_trainers() -> None:
    """Check every `Trainer` that is made from now on."""
    trainer: Any = sys.modules.get("transformers.trainer")  # slow to import; every Trainer has imported it
    if trainer is not None and _Watch not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(_Watch)


class _Watch(TrainerCallback):
    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        decayed = decayed_states(model) if args.weight_decay and kwargs.get("optimizer") is None else []
        if decayed:
            _warn(
                f"weight_decay {args.weight_decay} will be applied to {', '.join(decayed)} of the recurrences, which "
                "are no matrices and lose what they learnt; use hf_archs.ArchTrainer in place of Trainer, or pass "
                "optimizers=(torch.optim.AdamW(hf_archs.parameter_groups(model)), None)"
            )
        if args.label_smoothing_factor and getattr(model.config, "router_aux_loss_coef", 0.0):
            _warn(
                f"label_smoothing_factor {args.label_smoothing_factor}: the smoothed loss is made of the logits alone, "
                "so the loss of the routers is no part of it; use hf_archs.ArchTrainer in place of Trainer"
            )
        trl = type(args).__module__.startswith("trl.")
        if trl and not all(m.balances_as_mixtral() for m in model.modules() if isinstance(m, RoutedFeedForward)):
            name = f"trl.{type(args).__name__.removesuffix('Config')}Trainer"
            _warn(
                f"{name} adds the load balancing of Mixtral, and the routers of this {type(model).__name__} have other "
                f"losses; use a class Trainer(hf_archs.ArchTrainer, {name}), which adds theirs"
            )


def _warn(message: str) -> None:
    warnings.warn(message, PlainTrainerWarning, stacklevel=6)


def decayed_states(model: nn.Module) -> list[str]:
    """The last components of the names of trainable ``ssm`` parameters that a plain `Trainer` decays."""
    named = sys.modules["transformers.trainer"].Trainer.get_decay_parameter_names(None, model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    states = [name for name in named if name in trainable and "ssm" in name.split(".")]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in states))
