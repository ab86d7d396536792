"""``hf-archs train``: its arguments, the checkpoint from which an interrupted run continues, and the run."""

import argparse
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainerState, TrainingArguments, default_data_collator
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.training_args import OptimizerNames

from hf_archs import errors
from hf_archs.commands import loading, trl
from hf_archs.data import examples, text
from hf_archs.data.rows import FORMS, Rows
from hf_archs.data.sources import read_rows
from hf_archs.native import disk
from hf_archs.training import ArchTrainer, add_lora

UNTOLD_REPORTERS = ("azure_ml", "flyte")  # transformers does not always report that they are installed
MEASURED = 2**20  # characters of held-out text that `train` measures
DATA = (
    "file or folder of text or of rows (CSV, TSV, JSON, JSONL, Parquet), folder of save_to_disk, name of a dataset, "
    "or: stdlib, topics"
)
READ_AHEAD = 2**26  # characters of a stream from which a tokenizer is trained


class _Sentences(argparse.ArgumentParser):
    """Reports an error as an exception with one sentence, and does not end the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"hf-archs train: {message}; see hf-archs train --help")


def parser(trainer: str | None = None) -> HfArgumentParser:
    """The arguments of ``hf-archs train``: its own, and every field of the config of ``trainer``.

    Args:
        trainer: one of `trl.TRAINERS`; None for `ArchTrainer`, whose config is `TrainingArguments`.

    Raises:
        ImportError: if ``trainer`` needs TRL, and TRL is not installed.
    """
    host, kind = (TrainingArguments, HfArgumentParser) if trainer is None else trl.config_and_parser(trainer)
    parser: Any = type("Parser", (_Sentences, kind), {})(
        host,
        prog="hf-archs train",
        usage="hf-archs train MODEL --data DATA --output_dir DIR [--trainer NAME] [--lora [LAYER ...]] "
        "[--NAME VALUE ...]",
        description="Train a checkpoint, or an adapter for it; continues where an interrupted run stopped.",
        epilog=f"Every field of {host.__module__.partition('.')[0]}.{host.__name__} is an option of the same name. "
        "With --trainer the options are those of TRL's config, which --help lists then.",
        allow_abbrev=False,
    )
    parser.set_defaults(disable_tqdm=False)  # the default follows transformers' verbosity, which the command lowers
    own = parser.add_argument_group("model and data")
    own.add_argument("model", help="folder or Hub repository of the checkpoint to start from")
    own.add_argument("--data", required=True, help=DATA)
    own.add_argument(
        "--eval_data", "--eval-data", default=None, help="data to measure with; by default a part of --data"
    )
    own.add_argument(
        "--column", default=None, help="column with the text; by default messages, prompt and completion, or text"
    )
    own.add_argument("--streaming", action="store_true", help="read rows when they are needed, in their order")
    own.add_argument(
        "--skip_bad", "--skip-bad", action="store_true", help="leave out lines and rows that are wrong, and count them"
    )
    own.add_argument(
        "--lora", nargs="*", metavar="LAYER", help="train a LoRA adapter, on these layers or the default ones"
    )
    own.add_argument("--lora_rank", "--lora-rank", type=int, default=16, help="rank of the adapter")
    own.add_argument("--lora_alpha", "--lora-alpha", type=int, default=32, help="scale of the adapter, times rank")
    own.add_argument(
        "--trainer", choices=[*trl.TRAINERS], help="train with this trainer of TRL, on rows of its formats"
    )
    if trainer is None:
        own.add_argument("--block_size", "--block-size", type=int, default=512, help="tokens in a training row")
    else:
        trl.add_options(parser, own, trainer)
    own.add_argument("--tokenizer", default=None, help="checkpoint to take the tokenizer from, if the model has none")
    own.add_argument("--license", default=None, help="licence to name in the model card")
    return parser


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, TrainingArguments]:
    """Parse the command line of ``hf-archs train``. Raises `ValueError` if it is wrong."""
    named = _Sentences(add_help=False, allow_abbrev=False)
    named.add_argument("--trainer", choices=[*trl.TRAINERS])
    options = parser(named.parse_known_args(arguments)[0].trainer)
    training_arguments, own, unknown = options.parse_args_into_dataclasses(
        [*arguments], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        known = [flag for action in options._actions for flag in action.option_strings]
        near = errors.similar(unknown[0].partition("=")[0], known)
        hint = errors.did_you_mean(near, "see hf-archs train --help")
        raise ValueError(f"hf-archs train has no argument {unknown[0]!r}; {hint}")
    if own.trainer is None and not 2 <= own.block_size <= 2**24:
        raise ValueError(f"block_size is {own.block_size}; allowed are 2 to {2**24}")
    if own.streaming and training_arguments.max_steps <= 0:
        raise ValueError(f"max_steps is {training_arguments.max_steps}; allowed are 1 or more with --streaming")
    _check_reporters(training_arguments)
    return own, training_arguments


def _check_reporters(arguments: TrainingArguments) -> None:
    for name in arguments.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            allowed = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"report_to is {name!r}; allowed are none, all, {allowed}")
        if name not in {*get_available_reporting_integrations(), *UNTOLD_REPORTERS}:
            raise ImportError(f"report_to is {name!r}, which is not installed here: pip install {name}")


@dataclass(frozen=True)
class Standing:
    """The progress of the runs in an output folder.

    Attributes:
        checkpoint: the folder to continue from; None if training starts anew.
        skipped: newer checkpoints that an interrupted save left incomplete: folder and reason.
        steps: optimizer steps of ``checkpoint``.
        reached: whether these are all the steps requested.
        finished: whether the final model of `train` exists too, so that nothing is left to do.
    """

    checkpoint: str | None = None
    skipped: tuple[str, ...] = ()
    steps: int = 0
    reached: bool = False
    finished: bool = False


def standing(arguments: TrainingArguments) -> Standing:
    """The start of `train`: the requested checkpoint, else the newest whole one in ``output_dir``, else anew.

    Raises:
        OSError: if the requested checkpoint does not exist or is not whole; if the folder holds a model but no
            checkpoint to continue from, unless ``resume_from_checkpoint`` is ``false``.
    """
    wanted = str(arguments.resume_from_checkpoint or "true")
    output = Path(str(arguments.output_dir)).expanduser()
    if wanted.lower() in ("false", "no", "0"):
        return Standing()
    requested = None if wanted.lower() in ("true", "yes", "1") else Path(wanted).expanduser()
    if requested is not None and not requested.is_dir():
        raise OSError(f"resume_from_checkpoint is {wanted!r}, which does not exist; allowed is a checkpoint folder")
    chosen, skipped = newest_whole([requested] if requested else checkpoint_folders(output))
    if requested is not None and skipped:
        raise OSError(f"resume_from_checkpoint is {skipped[0]}")
    steps, reached = _done(chosen, arguments) if chosen else (0, False)
    if _holds_weights(output) and why_not_whole(output) is None and (reached or requested is None):
        final_steps, final_reached = _done(output, arguments)
        if final_reached:  # with push_to_hub the model is written again, because the push may have failed
            return Standing(str(requested or output), (*skipped,), final_steps, True, not arguments.push_to_hub)
    if chosen is None and (_holds_weights(output) or (output / "config.json").exists()):
        raise FileExistsError(
            f"output_dir is {str(arguments.output_dir)!r}, which holds a model and no whole checkpoint to continue "
            "from; choose another folder, or replace it with --resume_from_checkpoint false"
        )
    return Standing(str(chosen) if chosen else None, (*skipped,), steps, reached)


def checkpoint_folders(output: Path) -> dict[Path, int]:
    """The Trainer's checkpoint folders and their steps, newest first."""
    found = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in output.glob("*") if path.is_dir()}
    steps = {path: int(step) for path, step in found.items() if step.isdigit()}
    return dict(sorted(steps.items(), key=lambda pair: pair[1], reverse=True))


def newest_whole(folders: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """The first whole checkpoint, and the folders before it with their faults."""
    skipped: list[str] = []
    for folder in folders:
        why = why_not_whole(folder)
        if why is None:
            return folder, skipped
        skipped.append(f"{str(folder)!r}, which is not whole: {why}")
    return None, skipped


def _holds_weights(folder: Path) -> bool:
    return any(path for pattern in disk.WEIGHTS for path in folder.glob(pattern))


def _done(folder: Path, arguments: TrainingArguments) -> tuple[int, bool]:
    """The steps of a checkpoint, and whether they are all the steps requested."""
    state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    if arguments.max_steps > 0:
        return state.global_step, state.global_step >= arguments.max_steps
    return state.global_step, (state.epoch or 0) >= arguments.num_train_epochs


def why_not_whole(folder: Path) -> str | None:
    """The fault of a Trainer checkpoint whose save was interrupted; None if it is whole.

    The Trainer's state is written last, and each of torch's files is an archive with its list of contents at the end.
    """
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    except OSError:
        return f"it has no {TRAINER_STATE_NAME}"
    except (ValueError, KeyError, TypeError):
        return f"its {TRAINER_STATE_NAME} is cut off"
    for file in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
        if not zipfile.is_zipfile(file):
            return f"its {file.name} is cut off"
    try:
        disk.check_weights(folder)
    except SafetensorError as error:
        return str(error)
    # FSDP and DeepSpeed save shards in folders, in their own formats
    sharded = any(path.is_dir() for path in folder.iterdir())
    return None if sharded or _holds_weights(folder) else "it has no weights"


def read_data(
    own: argparse.Namespace, forms: Mapping[str, tuple[str, ...]] = FORMS, measured: bool = True
) -> tuple[Rows, Rows | None]:
    """The rows for training, and those to measure with: of ``--eval-data``, or held out of ``--data``.

    ``.dataset`` of each is a dataset of `datasets` with all columns of the source.

    Args:
        forms: the kinds of rows that are allowed, and their columns; see `read_rows`.
        measured: whether rows are needed to measure with; if not, None are held out.

    Raises:
        OSError, ValueError: see `read_rows`.
    """
    rows = read_rows(own.data, column=own.column, streaming=own.streaming, skip_bad=own.skip_bad, forms=forms)
    if own.eval_data is not None:
        return rows, read_rows(own.eval_data, column=own.column, skip_bad=own.skip_bad, forms=forms)
    return rows.split() if measured else (rows, None)


def train(
    own: argparse.Namespace, arguments: TrainingArguments, say: Callable[[str], object] = print
) -> dict[str, float]:
    """Train as ``hf-archs train`` does, with the arguments from `parse`.

    The model (or its adapter), tokenizer and model card are written into ``output_dir``, and pushed if ``push_to_hub``
    is set. A run that left checkpoints there is continued; see `standing`. Folder, disk and memory are checked before
    any data is read.

    Args:
        say: called with a line on the data before the training.

    Returns:
        ``train_loss`` if a step was left to do, and the ``bits_per_byte`` of the held-out text (of rows, of their text
        to learn) after training; of a trainer of TRL the ``eval_loss`` if ``eval_strategy`` is set.

    Raises:
        OSError, ValueError: if an argument, the folder or the data is wrong, or the disk is full.
    """
    if not torch.accelerator.is_available():
        arguments.dataloader_pin_memory = False  # pinning needs an accelerator, and PyTorch warns without one
    run = standing(arguments)
    loading.check_output(str(arguments.output_dir))
    if own.trainer is not None:
        made: Any = trl.make(own, arguments, partial(read_data, own), say)
        loading.check_output(str(arguments.output_dir), _bytes_to_write(made.model, arguments, run.steps))
        return _finish(own, made, run, trl.measure)
    copies = 1 if own.lora is not None else 4
    checkpoint = loading.look_at(own.model)
    loading.check_memory(checkpoint.config(), copies)
    training, held_out = read_data(own)
    assert held_out is not None
    known = [source for source in (own.model, run.checkpoint) if source and loading.has_tokenizer(source)]
    tokenizer_source = own.tokenizer or next(iter(known), None)
    model: Any = loading.load_model(checkpoint, copies=copies)
    if own.lora is not None:
        if tokenizer_source is None:
            raise ValueError(f"{own.model!r} has no tokenizer, so it was never trained; train it before its adapter")
        model = add_lora(model, own.lora, rank=own.lora_rank, alpha=own.lora_alpha)
    loading.check_output(str(arguments.output_dir), _bytes_to_write(model, arguments, run.steps))
    if tokenizer_source is not None:
        tokenizer = loading.load_tokenizer(tokenizer_source, tokenizer_source, model.config)
    else:
        texts = examples.up_to(READ_AHEAD if training.streamed else math.inf, training.texts())
        tokenizer = text.train_tokenizer(texts, model.config.vocab_size)
    found, measured = examples.Found(), examples.Found()
    datasets = [
        examples.training_rows(rows, tokenizer, own.block_size, sizes)
        for rows, sizes in ((training, found), (held_out, measured))
    ]
    say(examples.described(training, found.rows, measured.rows, examples.to_learn(training, found)))
    of_rows = (
        "of which every twentieth document was held out"
        if own.eval_data is None
        else f"and measured on `{own.eval_data}`"
    )
    trainer = ArchTrainer(
        model,
        arguments,
        card={"training": f"Trained on `{own.data}`, {of_rows}.", "results": {}},
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )

    def measure(trainer: ArchTrainer) -> dict[str, float]:
        figure = examples.measure(model, tokenizer, held_out, examples.Found(), most=MEASURED).bits_per_byte
        trainer.card["results"] = {f"held-out {examples.MEASURED[held_out.kind]}": f"{figure:.3f} bits per byte"}
        return {"bits_per_byte": figure}

    return _finish(own, trainer, run, measure)


def _finish(
    own: argparse.Namespace,
    trainer: ArchTrainer,
    run: Standing,
    measure: Callable[[ArchTrainer], dict[str, float]],
) -> dict[str, float]:
    """Train, measure, and write the model, its card and the state."""
    trainer.card |= {"license": own.license, "base_model": own.model if own.lora is not None else None}
    results: dict[str, float] = {}
    try:
        if run.reached:  # the Trainer would do one more step
            _load(trainer, str(run.checkpoint))
        else:
            results["train_loss"] = trainer.train(resume_from_checkpoint=run.checkpoint).training_loss
        results |= measure(trainer)
        trainer.card["training"] += (
            f" {trainer.state.global_step:,} steps, {trainer.args.learning_rate:g} learning rate."
        )
        trainer.save_model()
        trainer.create_model_card()
        trainer.save_state()  # written last: `standing` takes the state as a sign that all was written
    except Exception as error:
        if not errors.is_full_disk(error):
            raise
        raise OSError(
            f"the disk of output_dir = {str(trainer.args.output_dir)!r} is full; make room, and the same command goes "
            "on from the newest whole checkpoint"
        ) from error
    return results


def described(results: dict[str, float]) -> str:
    """The results of `train` in words."""
    words = {
        "train_loss": "training loss {:.4f}",
        "eval_loss": "evaluation loss {:.4f}",
        "bits_per_byte": "held-out data {:.4f} bits per byte",
    }
    return ", ".join(form.format(results[name]) for name, form in words.items() if name in results)


def _load(trainer: Trainer, checkpoint: str) -> None:
    """Load the state of a checkpoint and its weights, or with ``load_best_model_at_end`` the best weights."""
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(best or checkpoint)


def _bytes_to_write(model: nn.Module, arguments: TrainingArguments, steps: int) -> int:
    """The bytes that the run after ``steps`` will write at least: adapter or model, and checkpoints."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = trained if isinstance(model, PeftModel) else sum(p.numel() * p.element_size() for p in model.parameters())
    if arguments.save_strategy == SaveStrategy.NO:
        return weights
    adam = arguments.optim in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
    states = 2 * trained if adam and not arguments.save_only_model else 0
    kept = arguments.save_total_limit or 1
    if arguments.max_steps > 0 and arguments.save_steps >= 1:
        kept = min(kept, math.ceil((arguments.max_steps - steps) / arguments.save_steps))
    existing = len(checkpoint_folders(Path(str(arguments.output_dir)).expanduser()))
    return weights + (weights + states) * max(kept - existing, 1)
