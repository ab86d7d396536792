"""A word to users of a Trainer that knows nothing of recurrences: weight decay reaches their states' parameters there.

`hf_archs.ArchTrainer` and `hf_archs.parameter_groups` leave them out.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch import nn
from transformers import TrainerCallback


class StateDecayWarning(UserWarning):
    """Parameters of a recurrence are pulled to zero, where they are decays, frequencies and skips, and no matrices."""


def watch_trainers() -> None:
    """Have every `Trainer` that is made from now on look at what it decays."""
    trainer: Any = sys.modules.get("transformers.trainer")  # which is slow to import, and not imported for this
    if trainer is not None and _Watch not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(_Watch)


class _Watch(TrainerCallback):
    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.weight_decay and kwargs.get("optimizer") is None:
            decayed = decayed_states(kwargs["model"])
            if decayed:
                warnings.warn(
                    f"weight_decay {args.weight_decay} will be applied to {', '.join(decayed)} of the recurrences, "
                    "which are no matrices and lose what they learnt; use hf_archs.ArchTrainer in place of Trainer, "
                    "or pass optimizers=(torch.optim.AdamW(hf_archs.parameter_groups(model)), None)",
                    StateDecayWarning,
                    stacklevel=5,
                )


def decayed_states(model: nn.Module) -> list[str]:
    """The names, without their modules', of the trainable parameters in ``ssm`` that a plain `Trainer` decays."""
    named = sys.modules["transformers.trainer"].Trainer.get_decay_parameter_names(None, model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    states = [name for name in named if name in trainable and "ssm" in name.split(".")]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in states))
