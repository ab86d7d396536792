"""Parts of training that transformers' Trainer does not derive from a model.

`parameter_groups` and `callbacks` serve any training loop; `ArchTrainer` is transformers' Trainer with both.
"""

import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from hf_archs.model.adapters import add_adapter
from hf_archs.model.heads import ArchForCausalLM, ArchForSequenceClassification
from hf_archs.model.watching import PlainTrainerWarning
from hf_archs.native import disk
from hf_archs.native.model_card import model_card
from hf_archs.parts import BringsCallbacks


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters with weight decay: matrices of linear layers and convolutions.

    Excluded are a mixer's ``ssm`` (states, decays, step biases), norms, biases and embeddings.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and "ssm" not in name.split(".") and id(parameter) not in embeddings
    ]


def parameter_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Two groups of trainable parameters for an optimizer: with weight decay, and without.

    Args:
        model: any model; see `decay_parameter_names`.
        weight_decay: weight decay of the first group.

    Returns:
        Groups for ``torch.optim``; every trainable parameter is in exactly one.
    """
    decayed = set(decay_parameter_names(model))
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in trainable if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
    ]


def callbacks(model: nn.Module) -> list[TrainerCallback]:
    """The Trainer callbacks of the layers of ``model``, one of each class; see `hf_archs.parts.BringsCallbacks`."""
    found: dict[type, TrainerCallback] = {}
    for module in model.modules():
        if isinstance(module, BringsCallbacks):
            for callback in module.trainer_callbacks():
                found.setdefault(type(callback), callback)
    return list(found.values())


@dataclass
class _RouterLabelSmoother(LabelSmoother):
    """transformers' label-smoothed loss plus the loss of the routers."""

    config: Any = None

    def __call__(
        self, model_output: Any, labels: torch.Tensor, shift_labels: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        loss = super().__call__(model_output, labels, shift_labels, num_items_in_batch)
        auxiliary = model_output.get("aux_loss")
        if auxiliary is None:
            return loss
        targets = labels[:, 1:] if shift_labels else labels
        share = 1.0 if num_items_in_batch is None else (targets != self.ignore_index).sum() / num_items_in_batch
        return loss + self.config.router_aux_loss_coef * share * auxiliary.to(loss.device)


def _add_router_losses(trainer: Any) -> None:
    """Let a trainer of TRL add all losses of the routers; it would add Mixtral's load balancing, whatever they are."""
    whole = trainer.model
    model = whole.get_base_model() if isinstance(whole, PeftModel) else whole
    if not isinstance(model, ArchForCausalLM) or not model.model.has_routers:
        return
    if hasattr(model.config, "router_aux_loss_coef"):
        model.config.router_aux_loss_coef = trainer.router_aux_loss_coef
    if not trainer.router_aux_loss_coef:  # of the load balancing; other losses have coefficients of their own
        trainer.aux_loss_enabled, trainer.router_aux_loss_coef = True, 1.0
    statistics: deque[Any] = deque(maxlen=1)
    model.model.register_forward_hook(lambda _, __, outputs: statistics.append(outputs.router_statistics))
    fused = model.forward

    @wraps(fused)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (kwargs.get("fused_lm_head") and kwargs.get("output_router_logits")):
            return fused(*args, **kwargs)
        outputs = fused(*args, **kwargs, output_router_statistics=True)
        outputs.aux_loss = model.model.auxiliary_losses(statistics[-1])[1] / trainer.router_aux_loss_coef
        return outputs

    model.forward = forward


class ArchTrainer(Trainer):
    """transformers' Trainer with `callbacks`, `decay_parameter_names`, and the routers' loss with label smoothing.

    It saves a folder completely or not at all. Before a trainer of TRL among the bases of a class, as in
    ``class Trainer(hf_archs.ArchTrainer, trl.SFTTrainer): pass``, it does the same for that one, and the loss has the
    routers' own losses.

    Args:
        model, args: as in transformers, or in TRL; any other argument is passed by name.
        card: arguments of `model_card` for the model card.
    """

    def __init__(
        self, model: Any, args: TrainingArguments | None = None, *, card: dict[str, Any] | None = None, **kwargs: Any
    ):
        self.card = card or {"training": "Not described.", "results": {}}
        given = kwargs.pop("callbacks", None) or []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlainTrainerWarning)  # this class does what it recommends
            super().__init__(model, args=args, callbacks=given, **kwargs)
        trained: Any = self.model  # TRL has loaded the model of a name, and may have added an adapter
        if self.label_smoother is not None:
            self.label_smoother = _RouterLabelSmoother(self.args.label_smoothing_factor, config=trained.config)
        if hasattr(self, "router_aux_loss_coef"):
            _add_router_losses(self)
        for callback in reversed(callbacks(trained)):
            self.add_callback(callback)
            # in front, so that reporting callbacks see its additions to the logs
            self.callback_handler.callbacks.insert(0, self.callback_handler.callbacks.pop())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in transformers, by `decay_parameter_names`."""
        return decay_parameter_names(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, but old files stay until all new files are written."""
        with disk.replacing(output_dir or str(self.args.output_dir)) as partial:
            super().save_model(str(partial), _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card into the output folder; Trainer calls this when it pushes."""
        if not self.is_world_process_zero():
            return
        repository = getattr(self, "hub_model_id", None) or Path(str(self.args.output_dir)).name
        card = model_card(self.accelerator.unwrap_model(self.model), repository, **self.card)
        card.save(Path(str(self.args.output_dir)) / "README.md")


def add_lora(model: PreTrainedModel, targets: Sequence[str] = (), **options: Any) -> PeftModel:
    """Add a trainable LoRA adapter (Hu et al. 2021) to ``model``.

    Args:
        targets, options: as for `lora_config`.

    Raises:
        ValueError: as `lora_config` and, for a target that is tied, `add_adapter`.
    """
    return add_adapter(model, lora_config(model, targets, **options))  # type: ignore[return-value]


def lora_config(
    model: PreTrainedModel, targets: Sequence[str] = (), *, rank: int = 16, alpha: int = 32, dropout: float = 0.0
) -> LoraConfig:
    """The config of a LoRA adapter for ``model``; the head of a classifier is trained with it.

    Args:
        targets: names of linear layers, or ``all-linear``; empty for the architecture's ``lora_targets``.
        rank, alpha, dropout: as in `peft.LoraConfig`.

    Raises:
        ValueError: for a rank out of range, or a target that is no linear layer.
    """
    linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if unknown := set(targets) - linear - {"all-linear"}:
        raise ValueError(f"LoRA target is {min(unknown)!r}; allowed are all-linear, {', '.join(sorted(linear))}")
    if not 1 <= rank <= 2**16:
        raise ValueError(f"LoRA rank is {rank}; allowed are 1 to {2**16}")
    modules: Any = "all-linear" if "all-linear" in targets else [*targets] or None
    task = TaskType.SEQ_CLS if isinstance(model, ArchForSequenceClassification) else TaskType.CAUSAL_LM
    return LoraConfig(task_type=task, r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules)
