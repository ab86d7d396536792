"""A saved checkpoint finds its code, with the library imported or only installed, or names a missing package."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import hf_archs
from hf_archs.native.stub import STUB_MODULE
from hf_archs.testing.contract.models import lively, logits, tokens

# an import system in which a package is not installed
BLOCKED = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a checkpoint, and its expected logits."""
    architecture = hf_archs.get_architecture("mamba")
    model = lively(architecture.causal_lm_class, architecture.tiny_config())
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder / "model")
    torch.save(logits(model, tokens(1, 9)), folder / "logits.pt")
    torch.save(tokens(1, 9), folder / "tokens.pt")
    return folder


def python(code: str, folder: Path, *, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run code in a new interpreter with its own module cache and without the ``blocked`` packages."""
    head = BLOCKED.format(blocked=set(blocked)) if blocked else ""
    names = f"folder = {str(folder)!r}\nmodel_folder = folder + '/model'\n"
    return subprocess.run(
        [sys.executable, "-c", head + names + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HOME": str(folder / "home")},
        timeout=300,
    )


CHECK = """
import torch
with torch.no_grad():
    found = model(torch.load(folder + "/tokens.pt")).logits
assert torch.equal(found, torch.load(folder + "/logits.pt")), "other logits"
"""


def test_what_is_saved(saved):
    config = json.loads((saved / "model" / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", *hf_archs.get_architecture("mamba").auto_classes()}
    assert {value.partition(".")[0] for value in config["auto_map"].values()} == {STUB_MODULE}
    stub = (saved / "model" / f"{STUB_MODULE}.py").read_text()
    assert "pip install hf-archs" in stub
    for value in config["auto_map"].values():
        assert f"\n{value.partition('.')[2]} = " in stub


def test_with_the_import(saved):
    code = "import hf_archs\nfrom transformers import AutoModelForCausalLM\n"
    done = python(f"{code}model = AutoModelForCausalLM.from_pretrained(model_folder)\n{CHECK}", saved)
    assert done.returncode == 0, done.stderr


def test_without_the_import(saved):
    """With trust, the repository's stub imports the classes, for all Auto classes."""
    code = f"""
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification
assert "hf_archs" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=True)
{CHECK}
assert type(AutoConfig.from_pretrained(model_folder, trust_remote_code=True)) is type(model.config)
for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification):
    other = auto_class.from_pretrained(model_folder, trust_remote_code=True)
    assert type(other).__module__.startswith("hf_archs_"), type(other)
model.save_pretrained(folder + "/again")
"""
    done = python(code, saved)
    assert done.returncode == 0, done.stderr
    for file in (saved / "model").iterdir():
        assert (saved / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_without_trust(saved):
    """Without trust or import, transformers' own error is raised, and no code of the repository runs."""
    code = """
from transformers import AutoModelForCausalLM
import sys
try:
    AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=False)
except ValueError as error:
    print(error)
else:
    raise AssertionError("loaded without trust")
assert "hf_archs" not in sys.modules
"""
    done = python(code, saved)
    assert done.returncode == 0, done.stderr
    assert "trust_remote_code" in done.stdout


@pytest.mark.parametrize("missing", [("hf_archs",), ("hf_archs_mamba", "hf_archs_mamba2")], ids=["library", "plugin"])
def test_with_a_package_missing(saved, missing):
    """Without the library, and with it but without the plugin, one sentence names the distribution to install."""
    code = """
import warnings
warnings.simplefilter("ignore")
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=True)
except ImportError as error:
    print(error)
else:
    raise AssertionError("loaded without the package")
"""
    done = python(code, saved, blocked=missing)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "this model needs the package hf-archs: pip install hf-archs\n"


def test_register_for_auto_class_changes_nothing(tmp_path):
    """The method would copy a model's source into its repository, which breaks a package's imports."""
    architecture = hf_archs.get_architecture("mamba")
    architecture.config_class.register_for_auto_class()
    architecture.causal_lm_class.register_for_auto_class("AutoModelForCausalLM")
    architecture.causal_lm_class(architecture.tiny_config()).save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.py")] == [f"{STUB_MODULE}.py"]


def test_a_config_saved_alone(tmp_path):
    hf_archs.get_architecture("mamba").tiny_config().save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", f"{STUB_MODULE}.py"}
