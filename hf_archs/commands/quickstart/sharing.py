"""Push, pull and compare."""

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_archs.commands import publish
from hf_archs.commands.quickstart.run import Run
from hf_archs.errors import needs


def embedded_hub() -> Any:
    """The class of the embedded Hub; an ImportError names the extra that brings what it needs."""
    return needs("hf_archs.testing.hub", "the embedded Hub", "quickstart").EmbeddedHub


def share(
    run: Run,
    repository: str,
    prompt: str,
    tokens: torch.Tensor,
    pushed: Mapping[str, torch.Tensor],
    cards: Mapping[str, Any],
) -> dict[str, Any]:
    """Push, pull into an empty cache, compare."""
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
