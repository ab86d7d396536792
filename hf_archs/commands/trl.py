"""``hf-archs train --trainer``: TRL's trainers, with LoRA targets, optimizer groups and router losses of this library.

TRL is imported on use only, since it is optional.
"""

import argparse
import copy
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments, set_seed

from hf_archs.commands import loading
from hf_archs.data.examples import described
from hf_archs.data.rows import Rows
from hf_archs.errors import needs
from hf_archs.native.disk import check_weights, looks_local
from hf_archs.native.reading import Checkpoint
from hf_archs.training import ArchTrainer, lora_config

# the first part of the names of TRL's classes, and the columns of its formats, of which the rows need one
TRAINERS: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "sft": ("SFT", (("messages",), ("prompt", "completion"), ("input_ids",))),
    "dpo": ("DPO", (("chosen", "rejected"),)),
    "grpo": ("GRPO", (("prompt",),)),
    "reward": ("Reward", (("chosen", "rejected"),)),
}
REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")  # of TRL; they read messages


def _trl(trainer: str) -> Any:
    # TRL uses old names of transformers
    warnings.filterwarnings("ignore", ".* is deprecated and will be removed in v6", FutureWarning)
    return needs("trl", f"--trainer {trainer}", "trl")


def config_and_parser(trainer: str) -> tuple[type[TrainingArguments], type[HfArgumentParser]]:
    """TRL's config of a trainer, and its parser of configs. Raises `ImportError` if TRL is not installed."""
    return getattr(_trl(trainer), f"{TRAINERS[trainer][0]}Config"), _trl(trainer).TrlParser


def trainer_class(trainer: str) -> type[ArchTrainer]:
    """TRL's trainer with what `ArchTrainer` adds."""
    name = f"{TRAINERS[trainer][0]}Trainer"
    return type(name, (ArchTrainer, getattr(_trl(trainer), name)), {})


def add_options(parser: HfArgumentParser, own: Any, trainer: str) -> None:
    """Add the options of ``trainer`` besides its config's, and set the defaults that differ from TRL's."""
    if trainer == "sft":
        parser.set_defaults(packing=True, packing_strategy="bfd_split")  # TRL's own strategy cuts off long documents
    if not torch.accelerator.is_available():
        parser.set_defaults(bf16=False)  # TRL's default needs an accelerator
    if trainer == "grpo":
        own.add_argument(
            "--reward",
            "--reward_funcs",
            "--reward-funcs",
            nargs="+",
            required=True,
            metavar="REWARD",
            help=f"MODULE:FUNCTION, a function of TRL ({', '.join(REWARDS)}), or a reward model's folder or repository",
        )


def make(
    own: argparse.Namespace,
    arguments: Any,
    read: Callable[..., tuple[Rows, Rows | None]],
    say: Callable[[str], object],
) -> ArchTrainer:
    """The trainer of ``own.trainer`` with its model and data, for the arguments from `hf_archs.commands.train.parse`.

    Args:
        read: reads rows of the given forms, and some to measure with if they are wanted; see
            `hf_archs.commands.train.read_data`.
        say: called with a line on the data.

    Raises:
        OSError, ValueError: if the model, its tokenizer, the data or a reward is wrong.
    """
    checkpoint = loading.look_at(own.model)
    refers = bool(getattr(arguments, "beta", 0)) and own.lora is None  # an adapter is switched off for the reference
    if refers and own.trainer == "grpo" and checkpoint.native is not None:
        raise ValueError(
            f"{own.model!r} is in the format of another library, and beta is {arguments.beta}, for which TRL loads the "
            "model a second time by itself; allowed is a beta of 0, --lora, or a folder written by `hf-archs convert`"
        )
    copies = 1 if own.lora is not None else 4 + refers
    loading.check_memory(checkpoint.config(), copies)
    if own.trainer == "sft" and own.column is not None:
        arguments.dataset_text_field = own.column
    training, held_out = read(forms(own, arguments), measured=arguments.eval_strategy != "no")
    tokenizer = loading.load_tokenizer(checkpoint, own.tokenizer, checkpoint.config())
    told = tokenizer.chat_template is not None or getattr(arguments, "chat_template_path", None) is not None
    if not told and _conversational(own, training):
        raise ValueError(
            f"data is {own.data!r}, whose rows are messages, and the tokenizer of {own.tokenizer or own.model!r} has "
            "no chat template; --tokenizer takes another's"
        )
    more: dict[str, Any] = {}
    if own.trainer == "grpo":
        more["reward_funcs"] = [_reward(own, name, training) for name in own.reward]
    model = _load(own, arguments, checkpoint, copies)
    if own.lora is not None:
        more["peft_config"] = lora_config(model, own.lora, rank=own.lora_rank, alpha=own.lora_alpha)
    if own.trainer == "dpo" and refers and not arguments.precompute_ref_log_probs:
        more["ref_model"] = copy.deepcopy(model)
    rows: Any = training.dataset
    if held_out is not None:
        more["eval_dataset"] = held_out.dataset
    measured = None if held_out is None else len(more["eval_dataset"])
    say(described(training, 0 if training.streamed else len(rows), measured))
    card = {"training": f"Trained on `{own.data}` by TRL's {TRAINERS[own.trainer][0]}Trainer.", "results": {}}
    return trainer_class(own.trainer)(
        model, arguments, card=card, train_dataset=rows, processing_class=tokenizer, **more
    )


def _load(own: argparse.Namespace, arguments: Any, checkpoint: Checkpoint, copies: int) -> Any:
    """The model to train, with ``model_init_kwargs``; for rewards with a head of one score, which may be new."""
    options = {"dtype": torch.float32, **(arguments.model_init_kwargs or {})}  # as TRL loads models
    arguments.model_init_kwargs = None  # TRL warns of them beside a model
    if own.trainer != "reward":
        return loading.load_model(checkpoint, copies=copies, **options)
    set_seed(arguments.seed)
    scorer: Any = checkpoint.architecture.sequence_classification_class
    check_weights(Path(checkpoint.source).expanduser())
    return scorer.from_pretrained(checkpoint.source, checkpoint=checkpoint, num_labels=1, **options)


def measure(trainer: ArchTrainer) -> dict[str, float]:
    """The ``eval_loss`` of a trainer with held-out rows."""
    if trainer.eval_dataset is None:
        return {}
    loss = trainer.evaluate()["eval_loss"]
    trainer.card["results"] = {"held-out rows": f"loss {loss:.4f}"}
    return {"eval_loss": loss}


def forms(own: argparse.Namespace, arguments: Any) -> dict[str, tuple[str, ...]]:
    """The kinds of rows that the trainer reads, and their columns; see `hf_archs.data.sources.read_rows`."""
    texts = {"text": (arguments.dataset_text_field,)} if own.trainer == "sft" else {}
    return texts | {f"rows of {' and '.join(columns)}": columns for columns in TRAINERS[own.trainer][1]}


def _conversational(own: argparse.Namespace, rows: Rows) -> bool:
    _trl(own.trainer)
    return importlib.import_module("trl.data_utils").is_conversational(next(iter(rows))[1])


def _reward(own: argparse.Namespace, name: str, rows: Rows) -> Any:
    """A reward for TRL: a function, or the name of a model.

    Raises:
        OSError, ValueError: if there is no such reward, or the rows lack what it reads.
    """
    module, colon, function = name.partition(":")
    if name in REWARDS:
        module, function = "trl.rewards", name
    elif not colon:
        if Path(name).expanduser().is_dir() or ("/" in name and not looks_local(name)):
            return str(Path(name).expanduser())
        raise ValueError(
            f"reward is {name!r}; allowed are {', '.join(REWARDS)}, MODULE:FUNCTION, and the folder or repository of a "
            "reward model"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a program that is installed does not look there
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward is {name!r}, which cannot be imported: {error}") from error
    if name in REWARDS and not _conversational(own, rows):
        raise ValueError(f"reward is {name!r}, which reads messages, and the prompts of {own.data!r} are strings")
    # as TRL calls it: with what it knows itself, and every column
    known = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
    columns = [*next(iter(rows))[1]]
    try:
        inspect.signature(found).bind(**dict.fromkeys([*known, *(c for c in columns if c != "prompt")]))
    except TypeError as error:
        raise ValueError(
            f"reward is {name!r}, which takes other arguments than TRL passes ({error}); data is {own.data!r} with the "
            f"columns {', '.join(columns)}, and TRL passes them and {', '.join(known)}"
        ) from error
    return found
