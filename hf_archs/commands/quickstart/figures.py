"""The presentation of a run's figures: cards, tables, a picture, the machine."""

import math
import platform
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

import hf_archs
from hf_archs.commands import versions
from hf_archs.commands.progress import working
from hf_archs.commands.quickstart.options import Options, TextOptions, label_of

CODE_PROMPT = "def read_file(path):\n"
_YES = {True: "[green]yes", False: "[red]no"}


def command_of(options: Options) -> str:
    """The command that repeats this run, and the machine."""
    # fields that change no model, are written separately below, or are no flags
    others = ("output", "hub", "public", "overrides", "learning_rate", "lora_learning_rate")
    names = [f.name for f in fields(options) if f.name not in others and getattr(options, f.name) != f.default]
    words = [] if isinstance(options, TextOptions) else [f"--task {options.task}"]
    flags = {name: f"--{name.replace('_', '-')}" for name in names}
    words += [
        flag if getattr(options, name) is True else f"{flag} {getattr(options, name)}" for name, flag in flags.items()
    ]
    words += [f"--set {name}={value}" for name, value in options.overrides.items()]
    command = " ".join(["hf-archs quickstart", *words])
    return f"`{command}` on {platform.machine()} with {torch.get_num_threads()} threads"


def prompts_of(options: TextOptions) -> tuple[str, str]:
    """The prompts of the generated text, and of the example in the card; empty for data other than ``stdlib``."""
    return (CODE_PROMPT, "import ") if options.data == "stdlib" else ("", "")


def text_cards(
    options: TextOptions, bits: Mapping[str, Mapping[str, float]], characters: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, Any]]:
    """The cards of model and adapter, as arguments of `hf_archs.native.model_card.model_card`."""
    ours = options.data == "stdlib"  # the licence of a model on other data is unknown
    corpus = "the source of Python's standard library" if ours else f"`{options.data}`"
    license = "apache-2.0" if ours else None
    code, english = bits["code"], bits["english"]
    label = {
        name: f"held-out {what} ({sizes['measured']:,} of {sizes['held_out']:,} characters)"
        for (name, sizes), what in zip(characters.items(), (label_of(options.data), "English"))
    }
    return {
        "model": {
            "training": f"{options.steps:,} steps of {options.batch} x {options.block} tokens on {corpus}, by "
            f"{command_of(options)}. A demonstration: too small to be of use.",
            "results": {
                f"{label['code']}, before training": f"{code['before']:.3f} bits per byte",
                f"{label['code']}, after": f"{code['after']:.3f} bits per byte",
            },
            "license": license,
            "prompt": prompts_of(options)[1],
        },
        "adapter": {
            "training": f"{options.lora_steps:,} steps of {options.batch} x {options.block} tokens on the topics of "
            f"Python's `help()`, by {command_of(options)}.",
            "results": {
                f"{label['english']}, without the adapter": f"{english['before_lora']:.3f} bits per byte",
                f"{label['english']}, with it": f"{english['after_lora']:.3f} bits per byte",
                f"{label['code']}, without it": f"{code['after']:.3f} bits per byte",
                f"{label['code']}, with it": f"{code['after_lora']:.3f} bits per byte",
            },
            "license": license,
        },
    }


def in_bits(losses: list[float], size: float) -> list[float]:
    """Convert nats per token to bits per unit of the data; ``size`` is the number of units in a token."""
    return [loss / math.log(2) / size for loss in losses]


def where_it_ran() -> dict[str, Any]:
    """The machine and the versions of a run."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    installed = {library.name: library.found for library in versions.compare() if library.found}
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
        "versions": {"python": platform.python_version(), "hf-archs": hf_archs.__version__, **installed},
    }


def draw(curves: Mapping[str, list[float]], unit: str, folder: Path) -> None:
    """Draw ``loss.png``: the training loss of every step, in bits per ``unit`` of the data."""
    with working("drawing the losses"):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot, ticker

        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        begin = 1
        for label, bits in curves.items():
            axes.plot(range(begin, begin + len(bits)), bits, label=label)
            begin += len(bits)
        last = max(begin - 1, 2)
        inner = ticker.MaxNLocator(8, integer=True).tick_values(1, last)
        axes.set_xticks(sorted({1, *(int(tick) for tick in inner if 1 < tick <= last)}))
        axes.set_xlim(1, last)
        axes.set_ylim(bottom=math.floor(min(min(bits) for bits in curves.values())))
        axes.set(xlabel="step", ylabel=f"training loss (bits per {unit})", title="hf-archs quickstart")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(folder / "loss.png", dpi=120)
        pyplot.close(figure)


def text_table(summary: Mapping[str, Any]) -> Table:
    """The summary of `run_text` as a table."""
    table = Table(title=f"{summary['arch']}, {summary['parameters']:,} parameters: bits per byte of held-out text")
    table.caption = "; ".join(
        f"{'English' if name == 'english' else label_of(summary['data'])}: {sizes['measured']:,} of "
        f"{sizes['held_out']:,} held-out characters"
        for name, sizes in summary["characters"].items()
    )
    for heading in ("text", "untrained", "trained", "with LoRA"):
        table.add_column(heading, justify="left" if heading == "text" else "right")
    code, english = summary["bits_per_byte"]["code"], summary["bits_per_byte"]["english"]
    table.add_row(
        escape(label_of(summary["data"])), f"{code['before']:.3f}", f"{code['after']:.3f}", f"{code['after_lora']:.3f}"
    )
    change = english["after_lora"] / english["before_lora"] - 1
    table.add_row("English", "", f"{english['before_lora']:.3f}", f"{english['after_lora']:.3f} ({change:+.0%})")
    table.add_section()
    table.add_row("merged = unmerged", "", "", _YES[summary["merged_equals_unmerged"]])
    table.add_row("pulled = pushed", "", "", _YES[summary["pulled_equals_pushed"]])
    table.add_row("tokens per second", "", "", f"{summary['tokens_per_second']:,.0f}")
    table.add_row("seconds in all", "", "", f"{summary['seconds']:,.0f}")
    return table


def genome_table(summary: Mapping[str, Any]) -> Table:
    """The summary of `run_genome` as a table."""
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
