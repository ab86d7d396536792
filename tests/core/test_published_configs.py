"""Every published ``config.json`` in the tests is read by one architecture, or refused by name by all.

The files in ``tests/data/configs`` are as published, as far as their source shows; the plugins' tests compare models of
the readable files with their native classes.
"""

import json
from pathlib import Path

import pytest

import hf_archs
from hf_archs.registry import get_architecture

FILES = sorted((Path(__file__).parents[1] / "data/configs").glob("*.json"))
# readable families; their refused files are named by a field, and all others by their type
READ = {
    "mamba": ("state-spaces__mamba-", "tiiuae__falcon-mamba"),
    "mamba2": ("state-spaces__mamba2-", "mistralai__Mamba-Codestral"),
    "retnet": ("fla-hub__retnet", "syncdoth__retnet"),
    "moe": ("Qwen__Qwen3-30B", "allenai__OLMoE", "meta-llama", "mistralai__Mi"),
    "hybrid": ("ai21labs", "nvidia__NVIDIA-Nemotron", "nvidia__Nemotron"),
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_whose_it_is(file, tmp_path):
    (tmp_path / "config.json").write_bytes(file.read_bytes())
    raw = json.loads(file.read_text())
    readers = [name for name, starts in READ.items() if file.name.startswith(starts)]
    for name in hf_archs.architectures():
        config_class = get_architecture(name).config_class
        try:
            config = config_class.from_pretrained(tmp_path)
        except ValueError as error:
            said = str(error)
            if name in readers:
                fields = [field for field in raw if field in said]
                assert fields, f"{name} refuses it without a field: {said}"
            else:
                kind = repr(raw["model_type"]) if "model_type" in raw else "state-spaces"
                assert f"is a {kind}" in said or f"'{kind}" in said, said
        else:
            assert name in readers, f"{name} reads it, width {config.hidden_size}"
