"""The model of a run: checked for memory, initialised, saved, sampled, pushed and pulled."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, set_seed
from transformers.generation.streamers import BaseStreamer

from hf_archs.commands import loading, publish
from hf_archs.commands.progress import Bar, working
from hf_archs.commands.quickstart.options import Options
from hf_archs.commands.quickstart.run import Run
from hf_archs.data import text
from hf_archs.errors import needs
from hf_archs.native import disk
from hf_archs.registry import get_architecture

NEW_TOKENS = 60  # in a generated text


def embedded_hub() -> Any:
    """The class of the embedded Hub. Raises an `ImportError` that names the extra to install."""
    return needs("hf_archs.testing.hub", "the embedded Hub", "quickstart").EmbeddedHub


def prepare(options: Options, overrides: Mapping[str, Any]) -> tuple[Any, int, str]:
    """The config, its number of parameters and the repository's name; raises if a package or the Hub is missing."""
    architecture = get_architecture(options.arch)
    size = options.task if options.size is None and options.task in architecture.sizes else options.size
    config = loading.sized_config(architecture, size, {**overrides, **options.overrides})
    parameters = loading.check_memory(config, copies=4)
    # in float32, the model, and during a save two checkpoints, each of the model and AdamW's two moments
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
    """The model, moved to the accelerator if there is one."""
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model


def new_model(config: Any, seed: int) -> Any:
    """A model with initial weights of this seed."""
    set_seed(seed)
    return to_device(AutoModelForCausalLM.from_config(config))


def save(folder: Path, *parts: Any) -> None:
    """Save a model, a tokenizer or both into ``folder``, completely or not at all."""
    with disk.replacing(folder) as partial:
        for part in parts:
            part.save_pretrained(partial)


class _Tokens(BaseStreamer):
    """The progress bar of a generation."""

    def __init__(self, bar: Bar) -> None:
        self.bar, self.count = bar, -1  # the first `put` is the prompt, not a new token

    def put(self, value: Any) -> None:
        self.count += 1
        self.bar(self.count, NEW_TOKENS)

    def end(self) -> None:
        pass


def generate(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int) -> str:
    """``prompt`` and a sampled continuation."""
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


def share(
    run: Run,
    repository: str,
    prompt: str,
    tokens: torch.Tensor,
    pushed: Mapping[str, torch.Tensor],
    cards: Mapping[str, Any],
) -> dict[str, Any]:
    """Push the models, pull them into an empty cache, and compare their logits."""
    hub = "the Hub" if run.options.hub else "an embedded Hub"
    run.console.print(f"[bold]4[/] push to {hub}, [bold]5[/] and pull")
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: f"{scratch}/{name}.safetensors" for name in ("tokens", "logits")}
        save_file({"tokens": tokens}, files["tokens"])
        push = {"folder": str(run.folder), "name": repository, "private": not run.options.public, "cards": cards}
        pull = {"text": prompt, "tokens": files["tokens"], "output": files["logits"], "cache": f"{scratch}/pulled"}
        if run.options.hub:
            answer = publish.run({"HF_XET_CACHE": f"{scratch}/xet"}, push, pull)
        else:
            with embedded_hub()() as server:
                answer = publish.run(server.environment(f"{scratch}/home"), push, pull)
        pulled = load_file(files["logits"])
    same = {part: torch.equal(pulled[part], pushed[part]) for part in pushed} | answer["same"]
    return {"repositories": answer["names"], "pulled_equals_pushed": all(same.values()), "pulled": same}
