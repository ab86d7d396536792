"""The library's main job in one run: pretrain, adapt with LoRA, generate, push, pull, and check every step.

Everything goes through the host libraries as a user would call them: `transformers.Trainer`, `peft`, the Auto
classes and the client of huggingface_hub.
"""

from __future__ import annotations

import importlib
import json
import math
import platform
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_archs import checkpoints, publish, text
from hf_archs.errors import CheckFailed
from hf_archs.registry import get_architecture
from hf_archs.training import ArchTrainer, add_lora

MERGE_TOLERANCE = 1e-4  # of the largest logit: float32 rounds W x + B A x and (W + B A) x differently
PROMPTS = {"code": "def read_file(path):\n", "english": "The function returns"}


@dataclass(frozen=True)
class Options:
    """What `quickstart` is asked for.

    Attributes:
        arch: name of the architecture.
        size: one of its sizes; None takes the first.
        overrides: config fields that differ from the size.
        steps, lora_steps: optimizer steps of the pretraining, and of LoRA.
        data: what to pretrain on instead of the standard library's source; see `hf_archs.text.read_corpus`.
        output: folder for ``model/``, ``adapter/``, ``loss.png`` and ``summary.json``.
        hub: push to huggingface.co (``HF_ENDPOINT``) instead of to an embedded Hub.
        public: whether the repositories can be seen by everybody.
        batch, block: rows of a step, and tokens of a row.
        seed: of the initial weights and the order of the data.
    """

    arch: str = "mamba"
    size: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 130
    lora_steps: int = 70
    data: str = "stdlib"
    output: str = "quickstart"
    hub: bool = False
    public: bool = False
    batch: int = 8
    block: int = 512
    seed: int = 0
    learning_rate: float = 4e-3
    lora_learning_rate: float = 4e-3

    def __post_init__(self) -> None:
        for name in ("steps", "lora_steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed are 1 or more")
        if self.block < 2:
            raise ValueError(f"block is {self.block}; allowed are 2 or more")


class _Progress(ProgressCallback):
    """The loss of every step beside the progress bar, not in a line of its own, and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])
            if self.training_bar is not None:
                self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


def _train(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], options: Options, steps: int, rate: float
) -> tuple[list[float], float]:
    """Train and give the loss of every step and the seconds."""
    rows = text.token_blocks(tokenizer, texts, options.block)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=options.batch,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(steps / 10),
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_steps=1,
            logging_strategy="steps",
            save_strategy="no",
            disable_tqdm=False,
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
        progress = _Progress()
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(progress)
        began = time.perf_counter()
        trainer.train()
        return progress.losses, time.perf_counter() - began


def _generate(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int) -> str:
    set_seed(seed)
    start = [text.start_token(tokenizer), *text.encode(tokenizer, prompt)]
    output = model.generate(
        torch.tensor([start], device=model.device),
        max_new_tokens=60,
        do_sample=True,
        temperature=0.7,
        top_k=50,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def quickstart(options: Options, console: Console | None = None) -> dict[str, Any]:
    """Run the main job and give its summary, which is also in ``summary.json``.

    1. A tokenizer and a small model are trained on the corpus; held-out documents are never trained on.
    2. A LoRA adapter is trained on English, the topics of Python's ``help()``.
    3. Text is generated from both.
    4. Model, tokenizer, adapter and cards are pushed to a Hub.
    5. They are pulled into an empty cache, and their logits compared with those of what was pushed.
    6. A table is printed; ``loss.png``, ``model/`` (before LoRA), ``adapter/`` and ``summary.json`` are written.

    Raises:
        ValueError, OSError: for a wrong option, before anything is trained, and where the Hub refuses.
        CheckFailed: where a model pulled from the Hub differs from what was pushed, or a merged model from its parts.
    """
    console = console or Console()
    began = time.perf_counter()
    architecture = get_architecture(options.arch)
    config = checkpoints.sized_config(architecture, options.size, options.overrides)
    parameters = checkpoints.check_memory(config, copies=4)
    repository = f"hf-archs-quickstart-{options.arch}"
    _needs("matplotlib", "the plot of the losses")  # this, and a missing login, is better known now
    if options.hub:
        publish.repositories(repository)
    else:
        _embedded_hub()
    code, held_out_code = text.split(text.read_corpus(options.data))
    english, held_out_english = text.split(text.read_corpus("topics"))
    output = Path(options.output).expanduser()
    output.mkdir(parents=True, exist_ok=True)

    console.print(f"[bold]1[/] tokenizer and {options.arch} of {parameters:,} parameters on {options.data}")
    tokenizer = text.train_tokenizer(code.values(), config.vocab_size)
    set_seed(options.seed)
    model: Any = AutoModelForCausalLM.from_config(config)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    bits: dict[str, dict[str, float]] = {"code": {}, "english": {}}
    bits["code"]["before"] = text.bits_per_byte(model, tokenizer, held_out_code.values())
    losses, seconds = _train(model, tokenizer, code.values(), options, options.steps, options.learning_rate)
    tokens_per_second = options.steps * options.batch * options.block / seconds
    bits["code"]["after"] = text.bits_per_byte(model, tokenizer, held_out_code.values())
    bits["english"]["before_lora"] = text.bits_per_byte(model, tokenizer, held_out_english.values())
    samples = {"model": _generate(model, tokenizer, PROMPTS["code"], options.seed)}
    with checkpoints.replacing(output / "model") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    prompt = next(iter(held_out_english.values()))[:500]
    tokens = torch.tensor([text.encode(tokenizer, prompt)])
    pushed = {"model": publish.logits(model, tokens)}

    console.print("[bold]2[/] LoRA on English")
    model.name_or_path = str((output / "model").resolve())  # where the adapter's config says its base model is
    model = add_lora(model, rank=32, alpha=128)
    lora_losses, _ = _train(model, tokenizer, english.values(), options, options.lora_steps, options.lora_learning_rate)
    bits["english"]["after_lora"] = text.bits_per_byte(model, tokenizer, held_out_english.values())
    bits["code"]["after_lora"] = text.bits_per_byte(model, tokenizer, held_out_code.values())
    pushed["adapter"] = publish.logits(model, tokens)
    with checkpoints.replacing(output / "adapter") as folder:
        model.save_pretrained(folder)

    console.print("[bold]3[/] generated text")
    samples["adapter"] = _generate(model, tokenizer, PROMPTS["english"], options.seed)
    for sample in samples.values():
        console.print(sample, style="dim", markup=False, highlight=False)
    merged = publish.logits(model.merge_and_unload(safe_merge=False), tokens)
    difference = (merged - pushed["adapter"]).abs().max().item()
    agrees = difference <= MERGE_TOLERANCE * pushed["adapter"].abs().max().item()

    summary: dict[str, Any] = {
        "arch": options.arch,
        "parameters": parameters,
        "seconds": 0.0,
        "tokens_per_second": tokens_per_second,
        "bits_per_byte": bits,
        "merged_equals_unmerged": agrees,
        "merged_largest_difference": difference,
    }
    console.print(f"[bold]4[/] push to {'the Hub' if options.hub else 'an embedded Hub'}, [bold]5[/] and pull")
    summary |= _share(options, repository, output, prompt, tokens, pushed, _cards(options, bits))
    summary |= {
        "steps": {"code": options.steps, "lora": options.lora_steps},
        "losses": {"code": losses, "lora": lora_losses},
        "samples": samples,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {model.device.type}",
    }
    _draw(losses, lora_losses, output / "loss.png")
    summary["seconds"] = time.perf_counter() - began
    with checkpoints.replacing(output) as folder:
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    console.print(_table(summary))
    console.print(f"written to {output}", highlight=False)
    for check in ("merged_equals_unmerged", "pulled_equals_pushed"):
        if not summary[check]:
            raise CheckFailed(f"{check} is false, see {output / 'summary.json'}")
    return summary


def _needs(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs the package {error.name}: pip install 'hf-archs[dev]'") from error


def _embedded_hub() -> Any:
    return _needs("hf_archs.testing.hub", "the embedded Hub").EmbeddedHub


def _cards(options: Options, bits: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    given = {f.name: getattr(options, f.name) for f in fields(options) if getattr(options, f.name) != f.default}
    names = ("arch", "size", "steps", "lora_steps", "data", "batch", "block", "seed")
    flags = [f" --{name.replace('_', '-')} {given[name]}" for name in names if name in given]
    command = f"`hf-archs quickstart{''.join(flags)}{''.join(f' --set {k}={v}' for k, v in options.overrides.items())}`"
    corpus = "the source of Python's standard library" if options.data == "stdlib" else f"`{options.data}`"
    where = f"on {platform.machine()} with {torch.get_num_threads()} threads"
    code, english = bits["code"], bits["english"]
    return {
        "model": {
            "training": f"{options.steps:,} steps of {options.batch} x {options.block} tokens on {corpus}, by "
            f"{command} {where}. A demonstration: too small to be of use.",
            "results": {
                "held-out code, before training": f"{code['before']:.3f} bits per byte",
                "held-out code, after": f"{code['after']:.3f} bits per byte",
            },
            "license": "apache-2.0",
        },
        "adapter": {
            "training": f"{options.lora_steps:,} steps of {options.batch} x {options.block} tokens on the topics of "
            f"Python's `help()`, by {command} {where}.",
            "results": {
                "held-out English, without the adapter": f"{english['before_lora']:.3f} bits per byte",
                "held-out English, with it": f"{english['after_lora']:.3f} bits per byte",
                "held-out code, without it": f"{code['after']:.3f} bits per byte",
                "held-out code, with it": f"{code['after_lora']:.3f} bits per byte",
            },
            "license": "apache-2.0",
        },
    }


def _share(
    options: Options,
    repository: str,
    output: Path,
    prompt: str,
    tokens: torch.Tensor,
    pushed: Mapping[str, torch.Tensor],
    cards: Mapping[str, Any],
) -> dict[str, Any]:
    """Push, pull into an empty cache, compare."""
    with tempfile.TemporaryDirectory() as scratch:
        save_file({"tokens": tokens}, f"{scratch}/tokens.safetensors")

        def exchange(push_from: Mapping[str, str], pull_to: Mapping[str, str]) -> dict[str, Any]:
            names = publish.run(
                "push", push_from, folder=str(output), name=repository, private=not options.public, cards=cards
            )
            found = publish.run(
                "pull",
                pull_to,
                names=names,
                text=prompt,
                tokens=f"{scratch}/tokens.safetensors",
                output=f"{scratch}/logits.safetensors",
            )
            logits = load_file(f"{scratch}/logits.safetensors")
            same = {part: torch.equal(logits[part], pushed[part]) for part in pushed} | found
            return {"repositories": names, "pulled_equals_pushed": all(same.values()), "pulled": same}

        if options.hub:
            empty = {"HF_HUB_CACHE": f"{scratch}/hub", "HF_XET_CACHE": f"{scratch}/xet"}
            return exchange({}, empty)
        with _embedded_hub()() as hub:
            return exchange(hub.environment(f"{scratch}/pusher"), hub.environment(f"{scratch}/puller"))


def _draw(losses: list[float], lora_losses: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, label="pretraining")
    axes.plot(range(len(losses) + 1, len(losses) + len(lora_losses) + 1), lora_losses, label="LoRA on English")
    axes.set(xlabel="step", ylabel="training loss (nats per token)", title="hf-archs quickstart")
    axes.grid(alpha=0.3)
    axes.legend()
    with checkpoints.replacing(path.parent) as folder:
        figure.savefig(folder / path.name, dpi=120)
    pyplot.close(figure)


def _table(summary: Mapping[str, Any]) -> Table:
    table = Table(title=f"{summary['arch']}, {summary['parameters']:,} parameters: bits per byte of held-out text")
    for heading in ("text", "untrained", "trained", "with LoRA"):
        table.add_column(heading, justify="left" if heading == "text" else "right")
    code, english = summary["bits_per_byte"]["code"], summary["bits_per_byte"]["english"]
    table.add_row("code", f"{code['before']:.3f}", f"{code['after']:.3f}", f"{code['after_lora']:.3f}")
    change = english["after_lora"] / english["before_lora"] - 1
    table.add_row("English", "", f"{english['before_lora']:.3f}", f"{english['after_lora']:.3f} ({change:+.0%})")
    table.add_section()
    yes = {True: "[green]yes", False: "[red]no"}
    table.add_row("merged = unmerged", "", "", yes[summary["merged_equals_unmerged"]])
    table.add_row("pulled = pushed", "", "", yes[summary["pulled_equals_pushed"]])
    table.add_row("tokens per second", "", "", f"{summary['tokens_per_second']:,.0f}")
    table.add_row("seconds in all", "", "", f"{summary['seconds']:,.0f}")
    return table
