"""Files of an earlier version give the same results: checkpoints, adapters, caches, and the stub without the library.

Weights are equal bit for bit, and so are logits on the kind of machine that wrote the files; others add in another
order.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_archs
from hf_archs.testing.contract.models import assert_close

FOLDER = Path(__file__).parent.parent / "data" / "written_by_0_1"
_spec = importlib.util.spec_from_file_location("written_by_0_1", FOLDER / "make.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)

WITHOUT_THE_IMPORT = f"""
import importlib.util, sys
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

spec = importlib.util.spec_from_file_location("written_by_0_1", {str(FOLDER / "make.py")!r})
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
assert "hf_archs" not in sys.modules
for name in make.ARCHITECTURES:
    model = AutoModelForCausalLM.from_pretrained(make.FOLDER / name, trust_remote_code=True)
    found = make.answers(model, name)
    if name in make.ADAPTED:
        found |= {{f"adapted.{{key}}": value for key, value in make.answers(make.adapted(model, name), name).items()}}
    save_file(found, f"{{sys.argv[1]}}/{{name}}.safetensors")
"""


def compare(found: dict[str, torch.Tensor], name: str) -> None:
    written_with = json.loads((FOLDER / "written_with.json").read_text())
    same = make.machine().items() <= written_with.items()
    expected = load_file(FOLDER / f"{name}.answers.safetensors")
    assert found.keys() == expected.keys()
    for key, value in found.items():
        if same or not value.is_floating_point():
            assert torch.equal(value, expected[key]), f"{name}, {key}"
        else:
            assert_close(value, expected[key], f"{name}, {key}")


def test_every_architecture_is_here():
    assert set(make.ARCHITECTURES) == set(hf_archs.architectures())


@pytest.mark.parametrize("name", make.ARCHITECTURES)
def test_with_the_import(name):
    model = AutoModelForCausalLM.from_pretrained(FOLDER / name)
    assert type(model) is hf_archs.get_architecture(name).causal_lm_class
    stored, loaded = load_file(FOLDER / name / "model.safetensors"), model.state_dict()
    found = make.answers(model, name)
    if name in make.ADAPTED:
        found |= {f"adapted.{key}": value for key, value in make.answers(make.adapted(model, name), name).items()}
    compare(found, name)
    if name not in ("hybrid", "moe"):  # their files have one tensor per expert
        assert all(torch.equal(loaded[key], value) for key, value in stored.items())


def test_without_the_import(tmp_path):
    """The stub in each folder finds the classes in the installed library."""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", WITHOUT_THE_IMPORT, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in make.ARCHITECTURES:
        compare(load_file(tmp_path / f"{name}.safetensors"), name)
