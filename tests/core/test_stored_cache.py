"""A cache as a file: resumed elsewhere, and refused where it does not belong. `StateCache`: size and order."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hf_archs
from hf_archs.cache import ArchDynamicCache, ArchStaticCache, StateCache
from hf_archs.cache.stored import fingerprint
from hf_archs.testing.contract.models import assert_close, forward, lively, tokens
from hf_archs.testing.hub import EmbeddedHub

OPTIONS = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": 128, "pad_token_id": 0}
RESUME = f"""
import sys, torch, hf_archs
from transformers import AutoModelForCausalLM
from hf_archs.cache import ArchDynamicCache
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    cache = ArchDynamicCache.load(f"{{folder}}/state", model)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **{OPTIONS})
    print(out[0, -64:].tolist())
"""

PUSH = """
import sys, torch, hf_archs
from transformers import AutoModelForCausalLM
from hf_archs.cache import ArchDynamicCache
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
cache = model(torch.ones(1, 9, dtype=torch.long), use_cache=True).past_key_values
cache.push_to_hub("alice/states", model, private=True, commit_message="A prompt")
states = dict(ArchDynamicCache.load("alice/states", model).tensors())
assert all(torch.equal(states[name], tensor) for name, tensor in cache.tensors())
print("pulled")
"""


@pytest.fixture(scope="module", params=["mamba", "hybrid"])
def model(request):
    architecture = hf_archs.get_architecture(request.param)
    return lively(architecture.causal_lm_class, architecture.tiny_config())


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "prompt.safetensors"
    forward(model, tokens(1, 9), use_cache=True).past_key_values.save(path, model)
    return path


def changed(path, without=None, **about):
    """The same file with other metadata, or without one of its states."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    states = {name: tensor for name, tensor in load_file(path).items() if name != without}
    save_file(states, path, metadata={**metadata, **about})


def test_a_long_prompt_in_another_process(tmp_path):
    """Of all architectures. In this process, of the next prompt that begins with it only the rest is read."""
    ids, expected = tokens(1, 8192), []
    more = torch.cat([ids, tokens(1, 40, seed=1)], 1)
    torch.save(ids, tmp_path / "ids.pt")
    for name in hf_archs.architectures():
        architecture = hf_archs.get_architecture(name)
        model = lively(architecture.causal_lm_class, architecture.tiny_config())
        model.save_pretrained(tmp_path / name)
        states, read = StateCache(model, 2**26), []
        states.read(ids).save(tmp_path / name / "state", model)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)
        expected.append(out[0, -64:].tolist())
        whole = forward(model, more, logits_to_keep=1).logits
        model.get_input_embeddings().register_forward_pre_hook(lambda _, args, read=read: read.append(args[0].shape[1]))
        assert states.known(more) == 8191
        cache = states.read(more)
        assert_close(forward(model, more[:, -1:], past_key_values=cache).logits, whole, f"{name}, the next prompt")
        assert sum(read) == 41  # the last token of a prompt is left to `generate`
    folders = [str(tmp_path / name) for name in hf_archs.architectures()]
    command = [sys.executable, "-c", RESUME, str(tmp_path / "ids.pt"), *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    assert [*map(json.loads, done.stdout.splitlines())] == expected, done.stderr


def test_a_file_that_does_not_belong(model, saved, tmp_path):
    whole = saved.read_bytes()
    saved.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"prompt\.safetensors is damaged or no safetensors file"):
        ArchDynamicCache.load(saved, model)
    saved.write_bytes(whole)
    names = [name for name in load_file(saved) if name != "length"]
    changed(saved, without=names[0])
    with pytest.raises(ValueError, match=rf"of another model: {names[0]} is missing or unknown"):
        ArchDynamicCache.load(saved, model)
    saved.write_bytes(whole)
    changed(saved, version="7", library="9.0")
    with pytest.raises(ValueError, match=r"has version 7 of the file format, of hf-archs 9\.0; allowed is version 1"):
        ArchDynamicCache.load(saved, model)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors holds no cache"):
        ArchDynamicCache.load(tmp_path / "other.safetensors", model)
    with pytest.raises(OSError, match=r"nothing\.safetensors"):
        ArchDynamicCache.load(tmp_path / "nothing.safetensors", model)


def test_another_model(model, saved):
    architecture = hf_archs.get_architecture("retnet")
    with pytest.raises(ValueError, match=r"is of another model: \w+ is .* there and .* in this one"):
        ArchDynamicCache.load(saved, lively(architecture.causal_lm_class, architecture.tiny_config()))
    other = type(model)(type(model.config).from_dict({**model.config.to_dict(), "norm_eps": 1e-3}))
    with pytest.raises(ValueError, match=r"is of another model: norm_eps is 1e-05 there and 0\.001 in this one"):
        ArchDynamicCache.load(saved, other)


def test_an_empty_cache_is_not_saved(model, tmp_path):
    with pytest.raises(ValueError, match="the cache is empty; allowed is one that has read a token"):
        ArchDynamicCache(model.config).save(tmp_path / "state.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_no_room_in_a_static_cache(saved):
    architecture = hf_archs.get_architecture("moe")
    model = lively(architecture.causal_lm_class, architecture.tiny_config())
    forward(model, tokens(1, 9), use_cache=True).past_key_values.save(saved, model)
    with pytest.raises(ValueError, match=r"the states are of 9 positions; allowed are max_cache_len = 8"):
        ArchStaticCache.load(saved, model, 8)


def test_fingerprint(model):
    """One for a model and its base, in float32 and bf16; another one for every change that states can see."""
    ours = fingerprint(model)
    half = type(model)(model.config)
    half.load_state_dict(model.state_dict())
    assert fingerprint(half.to(torch.bfloat16)) == fingerprint(model.model) == ours
    assert fingerprint(model.train()) == ours
    with torch.no_grad():
        half.model.norm.weight[0] += 1
    assert fingerprint(half) != ours
    adapted = get_peft_model(half, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    with_adapter = fingerprint(adapted)
    with adapted.disable_adapter():
        assert fingerprint(adapted) != with_adapter


def test_the_hub(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    with EmbeddedHub(tmp_path / "hub") as hub:
        environment = os.environ | hub.environment(tmp_path / "home") | {"PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-c", PUSH, str(tmp_path / "model")]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.endswith("pulled\n"), done.stderr


def test_least_recently_used_states_go(model):
    ids = [tokens(1, 9, seed=seed) for seed in range(4)]
    one = forward(model, ids[0][:, :-1], use_cache=True).past_key_values.state_dict()
    size = sum(tensor.nbytes for tensor in one.values())
    states = StateCache(model, 2 * size)
    for prompt in (ids[0], ids[1], ids[0], ids[2]):  # the second one is used least recently
        states.read(prompt)
    assert len(states) == 2
    assert states.num_bytes() == 2 * size
    read = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    states.read(ids[0])
    assert not read
    states.read(ids[1])
    assert read == [8]
    hook.remove()
    other = ids[1].clone()
    other[0, 7] = other[0, 7] % 100 + 3  # the last token that was read
    assert (states.known(ids[1]), states.known(other)) == (8, 0)
    states.clear()
    assert len(states) == 0
    with pytest.raises(ValueError, match=r"max_bytes is -1"):
        StateCache(model, -1)
    with pytest.raises(ValueError, match=r"input_ids has shape \(2, 9\); allowed is \(1, length\)"):
        states.read(tokens(2, 9))
    with pytest.raises(ValueError, match=r"allowed is \(1, 8\), the tokens that the cache has read"):
        states.keep(ids[0], states.read(ids[0]))
