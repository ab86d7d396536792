"""The model cards of a run."""

import platform
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from hf_archs.commands.quickstart.options import Options, TextOptions, label_of

CODE_PROMPT = "def read_file(path):\n"


def command_of(options: Options) -> str:
    """The command that does this, and where it ran."""
    told = ("output", "hub", "public", "overrides", "learning_rate", "lora_learning_rate")  # elsewhere, or no flags
    names = [f.name for f in fields(options) if f.name not in told and getattr(options, f.name) != f.default]
    words = [] if isinstance(options, TextOptions) else [f"--task {options.task}"]
    flags = {name: f"--{name.replace('_', '-')}" for name in names}
    words += [
        flag if getattr(options, name) is True else f"{flag} {getattr(options, name)}" for name, flag in flags.items()
    ]
    words += [f"--set {name}={value}" for name, value in options.overrides.items()]
    command = " ".join(["hf-archs quickstart", *words])
    return f"`{command}` on {platform.machine()} with {torch.get_num_threads()} threads"


def prompts_of(options: TextOptions) -> tuple[str, str]:
    """The beginnings of the text that is generated here, and of that in the card; empty for data that is not ours."""
    return (CODE_PROMPT, "import ") if options.data == "stdlib" else ("", "")


def text_cards(
    options: TextOptions, bits: Mapping[str, Mapping[str, float]], characters: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, Any]]:
    """The cards of model and adapter, as arguments of `hf_archs.native.model_card.model_card`."""
    ours = options.data == "stdlib"  # of other data nobody said under which licence its model may go on
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
