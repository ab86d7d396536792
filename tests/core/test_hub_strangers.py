"""A model that was pushed from here loads for a stranger: by the lines of its card, and without a prompt."""

import importlib
import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, TorchAoConfig

import hf_archs
from hf_archs.native.model_card import automatic_card, model_card
from hf_archs.testing.contract.models import lively, logits, tokens
from hf_archs.testing.hub import EmbeddedHub

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes/text content:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

IDS = tokens(1, 9) % 59 + 5
TOLD = {"training": "Not trained.", "results": {}}


@pytest.fixture(scope="module")
def world(tmp_path_factory, client_of):
    """A Hub, to which this process pushes, and the expected logits of each repository."""
    folder, expected = tmp_path_factory.mktemp("world"), {}
    torch.save(IDS, folder / "tokens.pt")
    with EmbeddedHub(folder / "hub") as hub, pytest.MonkeyPatch.context() as patch:
        client_of(hub, folder / "cache", patch)

        def push(model, name, route, card=None):
            patch.setattr(constants, "HF_HUB_DISABLE_XET", route == "lfs")
            model.push_to_hub(name)
            if card is not None:
                card.push_to_hub(name)
            with torch.no_grad():
                expected[name] = model.eval()(input_ids=IDS).logits
            torch.save(expected, folder / "expected.pt")

        yield SimpleNamespace(hub=hub, folder=folder, push=push)
        huggingface_hub.close_session()


@pytest.fixture(scope="module", params=["lfs", "xet"])
def route(request, world, lora_of, word_tokenizer):
    """By each path: a language model with its tokenizer, an adapter for it, another architecture's classifier."""
    route, mamba, hybrid = request.param, hf_archs.get_architecture("mamba"), hf_archs.get_architecture("hybrid")
    name, model = f"alice/{route}", lively(mamba.causal_lm_class, mamba.tiny_config())
    world.push(model, name, route, model_card(model, name, prompt="1 2 3", **TOLD))
    word_tokenizer.push_to_hub(name)
    world.push(lively(hybrid.sequence_classification_class, hybrid.tiny_config(num_labels=3)), f"{name}-labels", route)
    adapted = lora_of(lively(mamba.causal_lm_class, mamba.tiny_config()), name)
    world.push(adapted, f"{name}-adapter", route, model_card(adapted, f"{name}-adapter", base_model=name, **TOLD))
    return route


def stranger(world, route: str, code: str, **variables: str) -> str:
    """The output of a new process of another user, with an empty cache, and with nobody to answer a prompt."""
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | world.hub.environment(home) | {"HF_TOKEN": "hf_other"} | variables
        environment["HF_HUB_DISABLE_XET"] = str(int(route == "lfs"))
        code = f"folder, route = {str(world.folder)!r}, {route!r}\n{code}"
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    return done.stdout


CARDS = """
import re, sys, torch
from huggingface_hub import hf_hub_download
ids, expected = torch.load(f"{folder}/tokens.pt"), torch.load(f"{folder}/expected.pt")
for name in sorted(name for name in expected if name.partition("-")[0] == f"alice/{route}"):
    card = open(hf_hub_download(name, "README.md"), encoding="utf-8").read()
    (lines,) = re.findall("```python\\n(.*?)```", card, re.DOTALL)
    pasted = {}
    exec(lines, pasted)
    with torch.no_grad():
        assert torch.equal(pasted["model"].eval()(input_ids=ids).logits, expected[name]), name
    print("ran the card of", name)
"""


def test_the_lines_of_the_card_run_as_they_stand(world, route):
    output = stranger(world, route, CARDS)
    for name in (route, f"{route}-adapter", f"{route}-labels"):
        assert f"ran the card of alice/{name}\n" in output
    assert "<bos> 1 2 3" in output
    read = {folder.parent.parent.name for folder in world.hub.root.glob("*/*/*/xet-read/*")}
    assert {"xet", "xet-adapter", "xet-labels"} <= read if route == "xet" else not {"lfs"} & read


WITH_AND_WITHOUT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, expected = torch.load(f"{folder}/tokens.pt"), torch.load(f"{folder}/expected.pt")

def check(model, name):
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, expected[name]), name

class Missing:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "hf_archs":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

name, trusted = f"alice/{route}", {"trust_remote_code": True}
sys.meta_path.insert(0, Missing)
try:
    AutoModelForCausalLM.from_pretrained(name, **trusted)
except ImportError as error:
    print(error)
sys.meta_path.remove(Missing)
assert "hf_archs" not in sys.modules
check(AutoModelForCausalLM.from_pretrained(name, **trusted), name)
AutoTokenizer.from_pretrained(name, **trusted)
import hf_archs
for options in ({}, trusted, {"trust_remote_code": False}):
    check(AutoModelForCausalLM.from_pretrained(name, **options), name)
    check(AutoModelForCausalLM.from_pretrained(f"{name}-adapter", **options), f"{name}-adapter")
from peft import AutoPeftModelForCausalLM
check(AutoPeftModelForCausalLM.from_pretrained(f"{name}-adapter"), f"{name}-adapter")
print("loaded")
"""


@pytest.mark.parametrize("route", ["xet"], indirect=True)
def test_a_stranger_is_never_asked(world, route):
    """Without the library one sentence says what to install; with it the model loads, with trust and without."""
    output = stranger(world, route, WITH_AND_WITHOUT)
    assert output == "this model needs the package hf-archs: pip install hf-archs\nloaded\n"


@pytest.mark.torchao
def test_a_quantised_model(world, route, tmp_path):
    """Its card names the quantiser's package, too."""
    quantization = importlib.import_module("torchao.quantization")
    mamba, name = hf_archs.get_architecture("mamba"), f"alice/{route}-int8"
    plain = lively(mamba.causal_lm_class, mamba.tiny_config())
    plain.save_pretrained(tmp_path)
    options = TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options)
    assert not torch.equal(logits(model, IDS), logits(plain, IDS))
    assert "pip install hf-archs torchao;" in str(automatic_card(model))
    world.push(model, name, route)
    assert f"ran the card of {name}\n" in stranger(world, route, CARDS)
