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
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from transformers import HfArgumentParser, TrainingArguments, set_seed

from hf_archs.commands import loading
from hf_archs.data import text
from hf_archs.errors import needs, reason
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
FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")  # of TRL; they read messages
EVERY = 20  # one row in this many is held out


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


def make(own: argparse.Namespace, arguments: Any) -> ArchTrainer:
    """The trainer of ``own.trainer`` with its model and data, for the arguments from `hf_archs.commands.train.parse`.

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
    rows = read_rows(own.data)
    check_rows(own, arguments, rows["train"])
    tokenizer = loading.load_tokenizer(checkpoint, own.tokenizer, checkpoint.config())
    told = tokenizer.chat_template is not None or getattr(arguments, "chat_template_path", None) is not None
    if not told and _conversational(own, rows["train"]):
        raise ValueError(
            f"data is {own.data!r}, whose rows are messages, and the tokenizer of {own.tokenizer or own.model!r} has "
            "no chat template; --tokenizer takes another's"
        )
    more: dict[str, Any] = {}
    if own.trainer == "grpo":
        more["reward_funcs"] = [_reward(own, name, rows["train"]) for name in own.reward]
    model = _load(own, arguments, checkpoint, copies)
    if own.lora is not None:
        more["peft_config"] = lora_config(model, own.lora, rank=own.lora_rank, alpha=own.lora_alpha)
    if own.trainer == "dpo" and refers and not arguments.precompute_ref_log_probs:
        more["ref_model"] = copy.deepcopy(model)
    if arguments.eval_strategy != "no":
        rows = held_out(rows)
        more["eval_dataset"] = rows["test"]
    card = {
        "training": f"Trained on `{own.data}` by TRL's {TRAINERS[own.trainer][0]}Trainer.",
        "results": {},
        "license": own.license,
        "base_model": own.model if own.lora is not None else None,
    }
    return trainer_class(own.trainer)(
        model, arguments, card=card, train_dataset=rows["train"], processing_class=tokenizer, **more
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


def read_rows(data: str) -> DatasetDict:
    """The rows of a data source, by split; ``train`` is one of the splits.

    Args:
        data: a CSV, JSON, JSON-lines or Parquet file; the name of a dataset, ``owner/name`` or ``owner/name:config``;
            or text for `text.read_documents`, each document of which is a row with the column ``text``.

    Raises:
        OSError, ValueError: if the data does not exist or cannot be read.
    """
    path = Path(data).expanduser()
    form = FILES.get(path.suffix.lower())
    name, _, config = data.partition(":")
    where = (name, config or None)
    if form is not None and path.is_file():
        where = (form, None)
    elif form is not None or path.exists() or data in text.OURS or looks_local(data):
        return DatasetDict(train=Dataset.from_dict({"text": [*text.read_documents(data).values()]}))
    try:
        found = load_dataset(*where, data_files=str(path) if where[0] == form else None)
    except (DatasetsError, ValueError, StopIteration) as error:  # the last two for files without rows
        raise ValueError(f"data is {data!r}, which cannot be read: {reason(error.__cause__ or error)}") from error
    if "train" not in found:
        raise ValueError(f"data is {data!r} with the splits {', '.join(found)}; a split 'train' is needed")
    return found


def check_rows(own: argparse.Namespace, arguments: Any, rows: Dataset) -> None:
    """Raise a `ValueError` if there are no rows, or not the columns that the trainer reads."""
    forms = TRAINERS[own.trainer][1]
    if own.trainer == "sft":
        forms = ((arguments.dataset_text_field,), *forms)
    if not any({*form} <= {*rows.column_names} for form in forms):
        raise ValueError(
            f"data is {own.data!r} with the columns {', '.join(rows.column_names)}; --trainer {own.trainer} reads "
            f"{', or '.join(' and '.join(form) for form in forms)}"
        )
    if not len(rows):
        raise ValueError(f"data is {own.data!r}, which has no rows")


def held_out(rows: DatasetDict) -> DatasetDict:
    """The rows with a split ``test``: the dataset's own test or validation split, or every twentieth row.

    Raises:
        ValueError: if there is one row only.
    """
    for name in ("test", "validation"):
        if name in rows:
            return DatasetDict(train=rows["train"], test=rows[name])
    count = len(rows["train"])
    if count < 2:
        raise ValueError("eval_strategy needs a row to hold out, and the data has one row; allowed is eval_strategy no")
    kept = rows["train"].select([i for i in range(count) if i % EVERY != 1])
    return DatasetDict(train=kept, test=rows["train"].select(range(1, count, EVERY)))


def _conversational(own: argparse.Namespace, rows: Dataset) -> bool:
    _trl(own.trainer)
    return importlib.import_module("trl.data_utils").is_conversational(rows[0])


def _reward(own: argparse.Namespace, name: str, rows: Dataset) -> Any:
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
    try:
        inspect.signature(found).bind(**dict.fromkeys([*known, *(c for c in rows.column_names if c != "prompt")]))
    except TypeError as error:
        raise ValueError(
            f"reward is {name!r}, which takes other arguments than TRL passes ({error}); data is {own.data!r} with the "
            f"columns {', '.join(rows.column_names)}, and TRL passes them and {', '.join(known)}"
        ) from error
    return found
