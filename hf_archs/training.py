"""What the host's Trainer cannot find on a model by itself, and training from the command line.

`parameter_groups` and `callbacks` serve everybody's own training loop; `ArchTrainer` is transformers' Trainer with
both; `train` is what ``hf-archs train`` does.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_archs import checkpoints, text
from hf_archs.model_card import model_card

MEASURED = 2**20  # characters of the held-out text that `train` measures with


def decay_parameter_names(model: nn.Module) -> list[str]:
    """The parameters that weight decay is for: matrices of linear layers and convolutions.

    Not states, decays and step biases (everything in a mixer's ``ssm``), norms, biases and embeddings.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and "ssm" not in name.split(".") and id(parameter) not in embeddings
    ]


def parameter_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """The trainable parameters in two groups for an optimizer: with weight decay, and without.

    Args:
        model: any model; `decay_parameter_names` says which parameters decay.
        weight_decay: of the first group.

    Returns:
        groups for ``torch.optim``; every trainable parameter is in exactly one.
    """
    decayed = set(decay_parameter_names(model))
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in trainable if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
    ]


def callbacks(model: nn.Module) -> list[TrainerCallback]:
    """The Trainer callbacks that the layers of ``model`` need.

    A layer that must act between steps, as a router does to balance its load, has a method ``trainer_callbacks()``
    that returns them; here they are gathered, one of each kind, which serves all layers.
    """
    found: dict[type, TrainerCallback] = {}
    for module in model.modules():
        if "trainer_callbacks" in dir(type(module)):
            for callback in module.trainer_callbacks():  # type: ignore[operator]
                found.setdefault(type(callback), callback)
    return list(found.values())


class ArchTrainer(Trainer):
    """transformers' Trainer with `callbacks` and the weight decay of `parameter_groups`; it saves whole or not at all.

    Args:
        card: arguments of `model_card` for the card that is saved and pushed.
    """

    def __init__(self, model: Any, args: TrainingArguments, *, card: dict[str, Any] | None = None, **kwargs: Any):
        self.card = card or {"training": "Not described.", "results": {}}
        given = kwargs.pop("callbacks", None) or []
        super().__init__(model, args, callbacks=given, **kwargs)
        for callback in reversed(callbacks(model)):
            self.add_callback(callback)
            # before those that report, so that they see what it adds to the logs
            self.callback_handler.callbacks.insert(0, self.callback_handler.callbacks.pop())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decay_parameter_names(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with checkpoints.replacing(output_dir or str(self.args.output_dir)) as partial:
            super().save_model(str(partial), _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card into the output folder; Trainer calls this when it pushes."""
        if not self.is_world_process_zero():
            return
        repository = getattr(self, "hub_model_id", None) or Path(str(self.args.output_dir)).name
        card = model_card(self.accelerator.unwrap_model(self.model), repository, **self.card)
        card.save(Path(str(self.args.output_dir)) / "README.md")


def add_lora(
    model: PreTrainedModel, targets: Sequence[str] = (), *, rank: int = 16, alpha: int = 32, dropout: float = 0.0
) -> PeftModel:
    """``model`` with a LoRA adapter (Hu et al. 2021) to be trained.

    Args:
        targets: names of linear layers, or ``all-linear``; empty takes the architecture's ``lora_targets``.
        rank, alpha, dropout: of `peft.LoraConfig`.

    Raises:
        ValueError: where a target is no linear layer of the model.
    """
    linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if unknown := set(targets) - linear - {"all-linear"}:
        raise ValueError(f"LoRA target is {min(unknown)!r}; allowed are all-linear, {', '.join(sorted(linear))}")
    if not 1 <= rank <= 2**16:
        raise ValueError(f"LoRA rank is {rank}; allowed are 1 to {2**16}")
    modules: Any = "all-linear" if "all-linear" in targets else [*targets] or None
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules
    )
    with checkpoints.quiet_peft():
        return get_peft_model(model, config)  # type: ignore[return-value]


class _Parser(HfArgumentParser):
    """Says what is wrong as an exception, in one sentence, and does not end the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"hf-archs train: {message}; see hf-archs train --help")


def parser() -> HfArgumentParser:
    """The arguments of ``hf-archs train``: its own, and every field of `TrainingArguments`."""
    host: Any = TrainingArguments
    parser = _Parser(
        host,
        prog="hf-archs train",
        usage="hf-archs train MODEL --data TEXT --output_dir DIR [--lora [LAYER ...]] [--NAME VALUE ...]",
        description="Train a checkpoint on text, or an adapter for it; continues where an interrupted run stopped.",
        epilog="Every field of transformers.TrainingArguments is an option of its name.",
        allow_abbrev=False,
    )
    parser.set_defaults(disable_tqdm=False)  # by default it follows transformers' verbosity, which the command lowers
    own = parser.add_argument_group("model and data")
    own.add_argument("model", help="folder or Hub repository of the checkpoint to start from")
    own.add_argument(
        "--data", required=True, help="a text file, a folder of them, a dataset's name, or: stdlib, topics"
    )
    own.add_argument(
        "--lora", nargs="*", metavar="LAYER", help="train a LoRA adapter, on these layers or on the usual ones"
    )
    own.add_argument("--lora_rank", "--lora-rank", type=int, default=16, help="rank of the adapter")
    own.add_argument("--lora_alpha", "--lora-alpha", type=int, default=32, help="scale of the adapter, times rank")
    own.add_argument("--block_size", "--block-size", type=int, default=512, help="tokens of one training row")
    own.add_argument("--tokenizer", default=None, help="another checkpoint's tokenizer, where the model has none")
    own.add_argument("--license", default=None, help="the licence that the model card names")
    return parser


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, TrainingArguments]:
    """The command line of ``hf-archs train``. Raises `ValueError` where it is wrong."""
    options = parser()
    training_arguments, own, unknown = options.parse_args_into_dataclasses(
        [*arguments], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        known = [flag for action in options._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; see hf-archs train --help"
        raise ValueError(f"hf-archs train has no argument {unknown[0]!r}{hint}")
    if not 2 <= own.block_size <= 2**24:
        raise ValueError(f"block_size is {own.block_size}; allowed are 2 to {2**24}")
    return own, training_arguments


def train(own: argparse.Namespace, arguments: TrainingArguments) -> dict[str, float]:
    """Train as ``hf-archs train`` does; the arguments are `parse`'s.

    The model (or its adapter), tokenizer and model card are written into ``output_dir``, and pushed where
    ``push_to_hub`` is set. A run that left checkpoints there is continued, unless ``resume_from_checkpoint`` is
    ``false``.

    Returns:
        ``train_loss`` and the ``bits_per_byte`` of held-out text after training.
    """
    if not torch.accelerator.is_available():
        arguments.dataloader_pin_memory = False  # there is nothing to pin for, and PyTorch warns
    training, held_out = text.split(text.read_corpus(own.data))
    checkpoint = checkpoint_to_continue(arguments)
    known = [source for source in (own.model, checkpoint) if source and checkpoints.has_tokenizer(source)]
    tokenizer_source = own.tokenizer or next(iter(known), None)
    model: Any = checkpoints.load_model(own.model, copies=1 if own.lora is not None else 4)
    if tokenizer_source is not None:
        tokenizer = checkpoints.load_tokenizer(tokenizer_source)
    else:
        tokenizer = text.train_tokenizer(training.values(), model.config.vocab_size)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {tokenizer_source!r} has {len(tokenizer)} tokens, and the model's vocab_size is "
            f"{model.config.vocab_size}; allowed are at most as many"
        )
    base = own.model
    if own.lora is not None:
        if tokenizer_source is None:
            raise ValueError(f"{own.model!r} has no tokenizer, so it was never trained; train it before its adapter")
        model = add_lora(model, own.lora, rank=own.lora_rank, alpha=own.lora_alpha)
    card: dict[str, Any] = {
        "training": f"Trained on `{own.data}`, of which every twentieth document was held out.",
        "results": {},
        "license": own.license,
        "base_model": base if own.lora is not None else None,
    }
    trainer = ArchTrainer(
        model,
        arguments,
        card=card,
        train_dataset=text.token_blocks(tokenizer, training.values(), own.block_size),
        eval_dataset=text.token_blocks(tokenizer, held_out.values(), own.block_size),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    figure = text.bits_per_byte(model, tokenizer, _up_to(MEASURED, held_out.values()))
    card["training"] += f" {trainer.state.global_step:,} steps, {arguments.learning_rate:g} learning rate."
    card["results"] = {"held-out text": f"{figure:.3f} bits per byte"}
    trainer.save_model()
    trainer.create_model_card()
    return {"train_loss": outcome.training_loss, "bits_per_byte": figure}


def _up_to(size: int, texts: Any) -> list[str]:
    kept = []
    for document in texts:
        kept.append(document[:size])
        size -= len(document)
        if size <= 0:
            break
    return kept


def checkpoint_to_continue(arguments: TrainingArguments) -> str | None:
    """The checkpoint that `train` continues from: the one asked for, or the last in ``output_dir``.

    Raises:
        OSError: where the one asked for does not exist.
    """
    wanted = arguments.resume_from_checkpoint
    folder = str(arguments.output_dir)
    if wanted is not None and str(wanted).lower() in ("false", "no", "0"):
        return None
    if wanted is not None and str(wanted).lower() not in ("true", "yes", "1"):
        if not os.path.isdir(wanted):
            raise OSError(f"resume_from_checkpoint is {wanted!r}, which does not exist; allowed is a checkpoint folder")
        return wanted
    return get_last_checkpoint(folder) if os.path.isdir(folder) else None
