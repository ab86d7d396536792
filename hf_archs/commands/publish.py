"""Push a model and its adapter to a Hub, and pull them into an empty cache, in a process of its own.

huggingface_hub reads its endpoint at import, so `run` starts a new process, which may use another Hub: ``python -m
hf_archs.commands.publish JSON``. One process both pushes and pulls, because the imports take longer than the rest.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_archs  # noqa: F401  (registers the Auto classes)
from hf_archs.commands import sentences
from hf_archs.commands.loading import load_adapter
from hf_archs.commands.progress import working
from hf_archs.model.adapters import quiet_peft
from hf_archs.native.model_card import model_card


def repositories(name: str) -> dict[str, str]:
    """The names of the model's and the adapter's repository, under the logged-in user.

    Raises:
        OSError: if no user is logged in, the token cannot write, or the Hub cannot be reached.
    """
    user = HfApi().whoami()
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise PermissionError(f"the token of {user['name']} has the role 'read'; pushing needs one with 'write'")
    return {"model": f"{user['name']}/{name}", "adapter": f"{user['name']}/{name}-english-lora"}


def push(folder: str, name: str, private: bool, cards: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Push ``folder/model`` with its tokenizer and, if ``cards`` has its card, ``folder/adapter``; write their cards.

    Args:
        name: name of the model's repository, without the owner.
        cards: arguments of `model_card` for ``model`` and ``adapter``.

    Returns:
        the names of the pushed repositories.
    """
    names = {part: repository for part, repository in repositories(name).items() if part in cards}
    parts = {part: Path(folder) / part for part in names}
    model: Any = AutoModelForCausalLM.from_pretrained(parts["model"])
    model.push_to_hub(names["model"], private=private)
    AutoTokenizer.from_pretrained(parts["model"]).push_to_hub(names["model"])
    card = model_card(model, names["model"], **cards["model"])
    card.save(parts["model"] / "README.md")
    card.push_to_hub(names["model"])
    if "adapter" in cards:
        adapted = load_adapter(model, str(parts["adapter"].resolve()), is_trainable=True)
        adapted.peft_config["default"].base_model_name_or_path = names["model"]
        adapted.push_to_hub(names["adapter"], private=private)
        card = model_card(adapted, names["adapter"], base_model=names["model"], **cards["adapter"])
        card.save(parts["adapter"] / "README.md")
        card.push_to_hub(names["adapter"])
    return names


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits (batch, length, vocabulary) of tokens (batch, length), on the CPU."""
    with torch.no_grad():
        return model.eval()(input_ids=tokens.to(model.device)).logits.cpu().contiguous()


def pull(names: Mapping[str, str], text: str, tokens: str, output: str, cache: str) -> dict[str, bool]:
    """Load model, tokenizer and any adapter from the Hub, and write the logits of each model to ``output``.

    Args:
        names: the repositories.
        text: a text that the tokenizer must encode as ``tokens``.
        tokens: safetensors file with ``tokens``, (1, length).
        output: safetensors file to write, with ``model`` and ``adapter``.
        cache: a new folder for the downloads, so that all files come from the Hub.

    Returns:
        ``tokenizer``: whether it encodes ``text`` as ``tokens``.
    """
    Path(cache).mkdir()
    given = load_file(tokens)["tokens"]
    encoded = AutoTokenizer.from_pretrained(names["model"], cache_dir=cache)(
        text, add_special_tokens=False, return_tensors="pt"
    )
    model: Any = AutoModelForCausalLM.from_pretrained(names["model"], cache_dir=cache)
    found = {"model": logits(model, given)}
    if "adapter" in names:
        with quiet_peft():
            found["adapter"] = logits(PeftModel.from_pretrained(model, names["adapter"], cache_dir=cache), given)
    save_file(found, output)
    return {"tokenizer": torch.equal(encoded["input_ids"], given)}


def run(environment: Mapping[str, str], push: Mapping[str, Any], pull: Mapping[str, Any]) -> dict[str, Any]:
    """Call `push` and then `pull` in a new process.

    Args:
        environment: environment variables to add.
        push, pull: arguments of `push`, and of `pull` without ``names``, which `push` returns.

    Returns:
        ``names``, the result of `push`, and ``same``, the result of `pull`.

    Raises:
        OSError: if the process fails, with the last line of its stderr.
    """
    command = [sys.executable, "-m", "hf_archs.commands.publish", json.dumps({"push": push, "pull": pull})]
    threads = {
        "OMP_NUM_THREADS": str(torch.get_num_threads())
    }  # the order of sums, and so their last bit, depends on it
    with tempfile.TemporaryFile("w+") as stderr, working("starting a fresh process to push and pull") as bar:
        process = subprocess.Popen(
            command, env={**os.environ, **threads, **environment}, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        assert process.stdout is not None
        line = ""
        with process:
            for line in process.stdout:
                if not line.startswith("{"):
                    bar.next(line.strip())
        if process.returncode:
            stderr.seek(0)
            last = stderr.read().strip().rpartition("\n")[2].removeprefix("error: ")
            raise OSError(f"{bar.what} failed: {last}")
    return json.loads(line)


def main() -> None:
    """The process that `run` starts: one line on stdout before each job, and the result as JSON in the last line."""
    arguments = json.loads(sys.argv[1])
    print("pushing", flush=True)
    names = push(**arguments["push"])
    print("pulling", flush=True)
    same = pull(names=names, **arguments["pull"])
    print(json.dumps({"names": names, "same": same}))


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        if not sentences.is_expected(error):
            raise
        sys.exit(sentences.report(error))
