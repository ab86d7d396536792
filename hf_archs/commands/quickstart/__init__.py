"""The library's main job in one run: pretrain, adapt with LoRA, generate, push, pull, and check every step.

All steps use the host libraries as a user would: `transformers.Trainer`, `peft`, the Auto classes and the client of
huggingface_hub.
"""

from collections.abc import Callable
from typing import Any

from rich.console import Console

from hf_archs.commands.quickstart.jobs import run_genome, run_text
from hf_archs.commands.quickstart.options import GenomeOptions, Options, TextOptions, make_options

__all__ = ["GenomeOptions", "TextOptions", "make_options", "quickstart"]


def quickstart(options: Options, console: Console | None = None) -> dict[str, Any]:
    """Run the job of these options, `run_text` or `run_genome`, and return its summary, which is also ``summary.json``.

    Raises:
        ValueError, OSError: for a wrong option, before any training, and if the Hub refuses.
        CheckFailed: if a model pulled from the Hub differs from the pushed one, or a merged model from the unmerged.
    """
    jobs: dict[type[Options], Callable[[Any, Console], dict[str, Any]]] = {
        TextOptions: run_text,
        GenomeOptions: run_genome,
    }
    return jobs[type(options)](options, console or Console())
