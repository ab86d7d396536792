"""Training that continues from its last checkpoint."""

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_archs.commands.progress import Bar, working
from hf_archs.commands.quickstart.options import Options
from hf_archs.commands.train import checkpoint_folders, newest_whole
from hf_archs.training import ArchTrainer

SAVE_EVERY = 30.0  # seconds between two checkpoints of a training


def train_rows(
    scratch: Path,
    options: Options,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Any,
    steps: int,
    rate: float,
) -> dict[str, Any]:
    """Train on rows of ``input_ids`` and ``labels``, from the last checkpoint in ``scratch`` if there is one.

    Returns:
        ``losses``, in nats per token at every step, and ``tokens_per_second``.
    """
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=steps,
        per_device_train_batch_size=options.batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(steps / 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=1,
        logging_strategy="steps",
        save_strategy="no",  # `Steps` requests the checkpoints
        save_total_limit=1,
        disable_tqdm=True,
        report_to="none",
        seed=options.seed,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    trainer = ArchTrainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    newest, before = newest_of(scratch)
    began = time.perf_counter()
    with working(scratch.name) as bar:
        trainer.add_callback(Steps(bar))
        trainer.train(resume_from_checkpoint=newest)
    tokens = (steps - before) * options.batch * options.block
    speed = tokens / (time.perf_counter() - began)
    shutil.rmtree(scratch, ignore_errors=True)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"losses": losses, "tokens_per_second": speed}


def newest_of(stage: Path) -> tuple[str | None, int]:
    """The newest whole checkpoint of a stage, and its steps; None and 0 if there is none."""
    steps = checkpoint_folders(stage)
    newest, _ = newest_whole(steps)
    return (None, 0) if newest is None else (str(newest), steps[newest])


class Steps(TrainerCallback):
    """The progress bar of a training, and checkpoints at intervals of time."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the time of the first checkpoint."""
        self.saved = time.perf_counter()
        self.bar(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Request a checkpoint if the last one is older than `SAVE_EVERY` seconds."""
        # after the last step the model itself is saved
        if time.perf_counter() - self.saved > SAVE_EVERY and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the time of the next checkpoint."""
        self.saved = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the loss."""
        if logs and "loss" in logs:
            self.bar(state.global_step, state.max_steps, f"loss {logs['loss']:.3f}")
