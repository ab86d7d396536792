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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

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

from hf_archs import checkpoints, dna, publish, text
from hf_archs.errors import CheckFailed
from hf_archs.registry import get_architecture
from hf_archs.training import ArchTrainer, add_lora

MERGE_TOLERANCE = 1e-4  # of the largest logit: float32 rounds W x + B A x and (W + B A) x differently
PROMPTS = {"code": "def read_file(path):\n", "english": "The function returns"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `quickstart` is asked for, whatever the task.

    Attributes:
        arch: name of the architecture.
        size: one of its sizes; None takes the one with the task's name, or the first.
        overrides: config fields that differ from the size.
        output: folder for ``model/``, ``loss.png`` and ``summary.json``.
        hub: push to huggingface.co (``HF_ENDPOINT``) instead of to an embedded Hub.
        public: whether the repositories can be seen by everybody.
        data: what to pretrain on.
        steps: optimizer steps of the pretraining.
        batch, block: rows of a step, and tokens of a row.
        seed: of the initial weights and the order of the data.
        learning_rate: of the pretraining.
    """

    task: ClassVar[str]
    arch: str = "mamba"
    size: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    output: str = "quickstart"
    hub: bool = False
    public: bool = False
    data: str
    steps: int
    batch: int
    block: int
    seed: int = 0
    learning_rate: float = 4e-3

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            self._check(name, 1)
        self._check("block", 2)

    def _check(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise ValueError(f"{name} is {getattr(self, name)}; allowed are {least} or more")


@dataclass(frozen=True, kw_only=True)
class TextOptions(Options):
    """Pretrain on text, adapt with LoRA to English.

    Attributes:
        data: see `hf_archs.text.read_corpus`; the standard library's source, unless something else is named.
        lora_steps, lora_learning_rate: optimizer steps of LoRA, and their rate; the adapter goes to ``adapter/``.
    """

    task = "text"
    data: str = "stdlib"
    steps: int = 130
    batch: int = 8
    block: int = 512
    lora_steps: int = 70
    lora_learning_rate: float = 4e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("lora_steps", 1)


@dataclass(frozen=True, kw_only=True)
class GenomeOptions(Options):
    """Pretrain on DNA, compare with Markov models.

    Attributes:
        data: a FASTA file.
    """

    task = "genome"
    data: str = str(dna.GENOME)
    steps: int = 600
    batch: int = 2
    block: int = 4096


TASKS: dict[str, type[Options]] = {options.task: options for options in (TextOptions, GenomeOptions)}


def make_options(task: str, **given: Any) -> Options:
    """The options of a task; None stands for what nobody gave.

    Raises:
        ValueError: for an unknown task, an option that it does not have, or a value out of range.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; allowed are {' and '.join(TASKS)}")
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() - {f.name for f in fields(TASKS[task])}:
        raise ValueError(f"{name} is {given[name]!r}, but the task {task!r} has no {name}")
    return TASKS[task](**given)


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
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Any, options: Options, steps: int, rate: float
) -> tuple[list[float], float]:
    """Train on rows of ``input_ids`` and ``labels``, and give the loss of every step and the seconds."""
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
    """Run the job of these options, `_text` or `_genome`, and give its summary, which is also in ``summary.json``.

    Raises:
        ValueError, OSError: for a wrong option, before anything is trained, and where the Hub refuses.
        CheckFailed: where a model pulled from the Hub differs from what was pushed, or a merged model from its parts.
    """
    jobs: dict[type[Options], Callable[[Any, Console], dict[str, Any]]] = {TextOptions: _text, GenomeOptions: _genome}
    return jobs[type(options)](options, console or Console())


def _prepare(options: Options, overrides: Mapping[str, Any]) -> tuple[Any, int, str]:
    """The config, its number of parameters and the repository's name; and what is missing is better known now."""
    architecture = get_architecture(options.arch)
    size = options.task if options.size is None and options.task in architecture.sizes else options.size
    config = checkpoints.sized_config(architecture, size, {**overrides, **options.overrides})
    parameters = checkpoints.check_memory(config, copies=4)
    repository = f"hf-archs-quickstart-{options.arch}"
    _needs("matplotlib", "the plot of the losses")
    if options.hub:
        publish.repositories(repository)
    else:
        _embedded_hub()
    return config, parameters, repository


def _new_model(config: Any, seed: int) -> Any:
    set_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model


def _text(options: TextOptions, console: Console) -> dict[str, Any]:
    """Run the main job and give its summary, which is also in ``summary.json``.

    1. A tokenizer and a small model are trained on the corpus; held-out documents are never trained on.
    2. A LoRA adapter is trained on English, the topics of Python's ``help()``.
    3. Text is generated from both.
    4. Model, tokenizer, adapter and cards are pushed to a Hub.
    5. They are pulled into an empty cache, and their logits compared with those of what was pushed.
    6. A table is printed; ``loss.png``, ``model/`` (before LoRA), ``adapter/`` and ``summary.json`` are written.
    """
    began = time.perf_counter()
    config, parameters, repository = _prepare(options, {})
    code, held_out_code = text.split(text.read_corpus(options.data))
    english, held_out_english = text.split(text.read_corpus("topics"))
    output = Path(options.output).expanduser()
    output.mkdir(parents=True, exist_ok=True)

    console.print(f"[bold]1[/] tokenizer and {options.arch} of {parameters:,} parameters on {options.data}")
    tokenizer = text.train_tokenizer(code.values(), config.vocab_size)
    model: Any = _new_model(config, options.seed)
    bits: dict[str, dict[str, float]] = {"code": {}, "english": {}}
    bits["code"]["before"] = text.bits_per_byte(model, tokenizer, held_out_code.values())
    rows = text.token_blocks(tokenizer, code.values(), options.block)
    losses, seconds = _train(model, tokenizer, rows, options, options.steps, options.learning_rate)
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
    rows = text.token_blocks(tokenizer, english.values(), options.block)
    lora_losses, _ = _train(model, tokenizer, rows, options, options.lora_steps, options.lora_learning_rate)
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
        "machine": _machine(),
    }
    _draw({"pretraining": losses, "LoRA on English": lora_losses}, output / "loss.png")
    return _finish(summary, _table, began, output, console)


def _genome(options: GenomeOptions, console: Console) -> dict[str, Any]:
    """Train on DNA, and compare with Markov models fitted on the same bases.

    The first nine tenths of the bases are trained on, on both strands; all of the rest is scored, every window from an
    empty context. The model is pushed to a Hub, pulled into an empty cache, and its logits compared.
    """
    began = time.perf_counter()
    tokenizer = dna.dna_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config, parameters, repository = _prepare(options, {"vocab_size": len(tokenizer), **special})
    bases, held_out = dna.split(dna.read_fasta(options.data))
    rows = dna.Windows(bases, options.block, options.steps * options.batch, options.seed)
    output = Path(options.output).expanduser()
    output.mkdir(parents=True, exist_ok=True)

    console.print(f"[bold]1[/] Markov models on {len(bases):,} bases")
    markov = {str(order): dna.markov_bits(bases, held_out, order) for order in range(1, 13)}
    console.print(f"[bold]2[/] {options.arch} of {parameters:,} parameters on both strands of them")
    model = _new_model(config, options.seed)
    losses, seconds = _train(model, tokenizer, rows, options, options.steps, options.learning_rate)
    bits = {
        "model": dna.bits_per_base(model, held_out, options.block),
        "best_markov": min(markov.values()),
        "markov": markov,
    }
    with checkpoints.replacing(output / "model") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    prompt = "".join(dna.BASES[base] for base in held_out[:500])
    tokens = torch.tensor([text.encode(tokenizer, prompt)])
    pushed = {"model": publish.logits(model, tokens)}

    console.print("[bold]3[/] generated bases")
    sample = _generate(model, tokenizer, prompt[:60], options.seed)
    console.print(sample, style="dim", markup=False, highlight=False)
    console.print(f"[bold]4[/] push to {'the Hub' if options.hub else 'an embedded Hub'}, [bold]5[/] and pull")
    card = {
        "training": f"{options.steps:,} steps of {options.batch} x {options.block} bases, from both strands of "
        f"`{Path(options.data).name}`, by {_command(options)}. A demonstration: too small to be of use.",
        "results": {
            "held-out bases": f"{bits['model']:.3f} bits per base",
            "the best Markov model of them": f"{bits['best_markov']:.3f} bits per base",
        },
        "prompt": prompt[:20],
    }
    summary: dict[str, Any] = {
        "arch": options.arch,
        "task": options.task,
        "parameters": parameters,
        "seconds": 0.0,
        "tokens_per_second": options.steps * options.batch * options.block / seconds,
        "bits_per_base": bits,
        "bases": {"trained_on": len(bases), "held_out": len(held_out)},
        **_share(options, repository, output, prompt, tokens, pushed, {"model": card}),
        "steps": options.steps,
        "losses": losses,
        "samples": {"model": sample},
        "machine": _machine(),
    }
    _draw({"pretraining": losses}, output / "loss.png")
    return _finish(summary, _genome_table, began, output, console)


def _finish(
    summary: dict[str, Any], table: Callable[[Mapping[str, Any]], Table], began: float, output: Path, console: Console
) -> dict[str, Any]:
    """Write and print the summary.

    Raises:
        CheckFailed: where one of its checks failed.
    """
    summary["seconds"] = time.perf_counter() - began
    with checkpoints.replacing(output) as folder:
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    console.print(table(summary))
    console.print(f"written to {output}", highlight=False)
    for check in ("merged_equals_unmerged", "pulled_equals_pushed"):
        if not summary.get(check, True):
            raise CheckFailed(f"{check} is false, see {output / 'summary.json'}")
    return summary


def _machine() -> str:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {device}"


def _needs(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs the package {error.name}: pip install 'hf-archs[dev]'") from error


def _embedded_hub() -> Any:
    return _needs("hf_archs.testing.hub", "the embedded Hub").EmbeddedHub


def _command(options: Options) -> str:
    """The command that does this, and where it ran."""
    told = ("output", "hub", "public", "overrides", "learning_rate", "lora_learning_rate")  # elsewhere, or no flags
    names = [f.name for f in fields(options) if f.name not in told and getattr(options, f.name) != f.default]
    words = [] if isinstance(options, TextOptions) else [f"--task {options.task}"]
    words += [f"--{name.replace('_', '-')} {getattr(options, name)}" for name in names]
    words += [f"--set {name}={value}" for name, value in options.overrides.items()]
    command = " ".join(["hf-archs quickstart", *words])
    return f"`{command}` on {platform.machine()} with {torch.get_num_threads()} threads"


def _cards(options: TextOptions, bits: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    corpus = "the source of Python's standard library" if options.data == "stdlib" else f"`{options.data}`"
    code, english = bits["code"], bits["english"]
    return {
        "model": {
            "training": f"{options.steps:,} steps of {options.batch} x {options.block} tokens on {corpus}, by "
            f"{_command(options)}. A demonstration: too small to be of use.",
            "results": {
                "held-out code, before training": f"{code['before']:.3f} bits per byte",
                "held-out code, after": f"{code['after']:.3f} bits per byte",
            },
            "license": "apache-2.0",
        },
        "adapter": {
            "training": f"{options.lora_steps:,} steps of {options.batch} x {options.block} tokens on the topics of "
            f"Python's `help()`, by {_command(options)}.",
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


def _draw(curves: Mapping[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    begin = 1
    for label, losses in curves.items():
        axes.plot(range(begin, begin + len(losses)), losses, label=label)
        begin += len(losses)
    axes.set(xlabel="step", ylabel="training loss (nats per token)", title="hf-archs quickstart")
    axes.grid(alpha=0.3)
    axes.legend()
    with checkpoints.replacing(path.parent) as folder:
        figure.savefig(folder / path.name, dpi=120)
    pyplot.close(figure)


_YES = {True: "[green]yes", False: "[red]no"}


def _table(summary: Mapping[str, Any]) -> Table:
    table = Table(title=f"{summary['arch']}, {summary['parameters']:,} parameters: bits per byte of held-out text")
    for heading in ("text", "untrained", "trained", "with LoRA"):
        table.add_column(heading, justify="left" if heading == "text" else "right")
    code, english = summary["bits_per_byte"]["code"], summary["bits_per_byte"]["english"]
    table.add_row("code", f"{code['before']:.3f}", f"{code['after']:.3f}", f"{code['after_lora']:.3f}")
    change = english["after_lora"] / english["before_lora"] - 1
    table.add_row("English", "", f"{english['before_lora']:.3f}", f"{english['after_lora']:.3f} ({change:+.0%})")
    table.add_section()
    table.add_row("merged = unmerged", "", "", _YES[summary["merged_equals_unmerged"]])
    table.add_row("pulled = pushed", "", "", _YES[summary["pulled_equals_pushed"]])
    table.add_row("tokens per second", "", "", f"{summary['tokens_per_second']:,.0f}")
    table.add_row("seconds in all", "", "", f"{summary['seconds']:,.0f}")
    return table


def _genome_table(summary: Mapping[str, Any]) -> Table:
    bits = summary["bits_per_base"]
    table = Table(title=f"{summary['arch']}, {summary['parameters']:,} parameters: bits per base of held-out DNA")
    table.add_column("model")
    table.add_column("bits per base", justify="right")
    for order, value in bits["markov"].items():
        best = " (the best of them)" if value == bits["best_markov"] else ""
        table.add_row(f"Markov, order {order}{best}", f"{value:.3f}")
    table.add_row(f"[bold]{summary['arch']}", f"[bold]{bits['model']:.3f}")
    table.add_section()
    table.add_row("pulled = pushed", _YES[summary["pulled_equals_pushed"]])
    table.add_row("tokens per second", f"{summary['tokens_per_second']:,.0f}")
    table.add_row("seconds in all", f"{summary['seconds']:,.0f}")
    return table
