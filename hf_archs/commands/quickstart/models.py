"""The model of a run: whether it fits, made new, saved, generating."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, set_seed
from transformers.generation.streamers import BaseStreamer

from hf_archs.commands import loading, publish
from hf_archs.commands.progress import Bar, working
from hf_archs.commands.quickstart.options import Options
from hf_archs.commands.quickstart.sharing import embedded_hub
from hf_archs.data import text
from hf_archs.errors import needs
from hf_archs.native import disk
from hf_archs.registry import get_architecture

NEW_TOKENS = 60  # of a generated text


def prepare(options: Options, overrides: Mapping[str, Any]) -> tuple[Any, int, str]:
    """The config, its number of parameters and the repository's name; and what is missing is better known now."""
    architecture = get_architecture(options.arch)
    size = options.task if options.size is None and options.task in architecture.sizes else options.size
    config = loading.sized_config(architecture, size, {**overrides, **options.overrides})
    parameters = loading.check_memory(config, copies=4)
    # the model, and for a moment two checkpoints with AdamW's two moments
    loading.check_output(options.output, parameters * 4 * (1 + 2 * 3))
    repository = f"hf-archs-quickstart-{options.arch}"
    with working("looking for matplotlib and a Hub"):
        needs("matplotlib", "the picture of the losses", "quickstart")
        if options.hub:
            publish.repositories(repository)
        else:
            embedded_hub()
    return config, parameters, repository


def to_device(model: Any) -> Any:
    """The model, on the accelerator where there is one."""
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model


def new_model(config: Any, seed: int) -> Any:
    """A model with the initial weights of this seed."""
    set_seed(seed)
    return to_device(AutoModelForCausalLM.from_config(config))


def save(folder: Path, *parts: Any) -> None:
    """Save a model, a tokenizer or both into ``folder``, at once or not at all."""
    with disk.replacing(folder) as partial:
        for part in parts:
            part.save_pretrained(partial)


class _Tokens(BaseStreamer):
    """The bar of a generation."""

    def __init__(self, bar: Bar) -> None:
        self.bar, self.count = bar, -1  # the prompt comes first

    def put(self, value: Any) -> None:
        self.count += 1
        self.bar(self.count, NEW_TOKENS)

    def end(self) -> None:
        pass


def generate(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int) -> str:
    """A sample that continues ``prompt``."""
    set_seed(seed)
    start = [text.start_token(tokenizer), *text.encode(tokenizer, prompt)]
    with working("generating") as bar:
        output = model.generate(
            torch.tensor([start], device=model.device),
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=0.7,
            top_k=50,
            pad_token_id=tokenizer.pad_token_id,
            streamer=_Tokens(bar),
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
