"""The main job in miniature: every step of it, the push and the pull included."""

import io
import json
import math
import sys

import numpy as np
import pytest
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_archs
from hf_archs import checkpoints, publish, text
from hf_archs.errors import CheckFailed
from hf_archs.quickstart import GenomeOptions, TextOptions, make_options, quickstart

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
FIELDS = {"arch", "parameters", "seconds", "tokens_per_second", "bits_per_byte", "merged_equals_unmerged"}
FIELDS |= {"repositories", "pulled_equals_pushed"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of small files to pretrain on."""
    folder = tmp_path_factory.mktemp("quickstart") / "data"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.py").write_text(f"def function_{i}(value):\n    return value + {i}\n" * 9)
    return folder


@pytest.fixture(scope="module")
def done(data):
    """A finished miniature: its folder, its summary, what it printed."""
    folder = data.parent
    options = TextOptions(
        size="tiny",
        overrides={"vocab_size": 400, "hidden_size": 32},
        steps=12,
        lora_steps=6,
        batch=4,
        block=64,
        data=str(data),
        output=str(folder / "out"),
    )
    console = Console(record=True, width=120, file=io.StringIO())
    summary = quickstart(options, console)
    return folder, summary, console.export_text()


def test_the_summary(done):
    folder, summary, _ = done
    assert json.loads((folder / "out" / "summary.json").read_text()) == summary
    assert summary.keys() >= FIELDS
    bits = summary["bits_per_byte"]
    assert bits["code"].keys() == {"before", "after", "after_lora"}
    assert bits["english"].keys() == {"before_lora", "after_lora"}
    assert bits["code"]["after"] < 0.95 * bits["code"]["before"]
    assert bits["english"]["after_lora"] < bits["english"]["before_lora"]
    assert summary["merged_equals_unmerged"] is True
    assert summary["pulled_equals_pushed"] is True
    assert summary["repositories"]["model"] == "alice/hf-archs-quickstart-mamba"
    assert len(summary["losses"]["code"]) == 12
    assert len(summary["losses"]["lora"]) == 6
    assert math.isfinite(sum(summary["losses"]["code"]))


def test_the_figures_are_those_of_the_files(done):
    folder, summary, _ = done
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "out" / "model")
    assert sum(p.numel() for p in model.parameters()) == summary["parameters"]
    _, code = text.split(text.read_corpus(str(folder / "data")))
    _, english = text.split(text.read_corpus("topics"))
    bits = summary["bits_per_byte"]
    assert text.bits_per_byte(model, tokenizer, code.values()) == pytest.approx(bits["code"]["after"], rel=1e-5)
    before = text.bits_per_byte(model, tokenizer, english.values())
    assert before == pytest.approx(bits["english"]["before_lora"], rel=1e-5)
    adapted = PeftModel.from_pretrained(model, folder / "out" / "adapter")
    assert text.bits_per_byte(adapted, tokenizer, english.values()) == pytest.approx(
        bits["english"]["after_lora"], rel=1e-5
    )
    assert text.bits_per_byte(adapted, tokenizer, code.values()) == pytest.approx(bits["code"]["after_lora"], rel=1e-5)


def test_the_files_and_the_table(done):
    folder, summary, printed = done
    assert {path.name for path in (folder / "out").iterdir()} == {"model", "adapter", "loss.png", "summary.json"}
    assert (folder / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"{summary['bits_per_byte']['code']['after']:.3f}" in printed
    card = (folder / "out" / "model" / "README.md").read_text()
    for word in ("library_name: transformers", "alice/hf-archs-quickstart-mamba", "import hf_archs", "bits per byte"):
        assert word in card
    card = (folder / "out" / "adapter" / "README.md").read_text()
    assert "base_model: alice/hf-archs-quickstart-mamba" in card


def test_a_difference_after_the_pull_is_an_error(data, tmp_path, monkeypatch):
    asked = []

    def exchange(action, environment, **arguments):
        asked.append(action)
        if action == "push":
            return {"model": "alice/a", "adapter": "alice/b"}
        tokens = load_file(arguments["tokens"])["tokens"]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
        found = {"model": publish.logits(model, tokens)}
        found["adapter"] = publish.logits(PeftModel.from_pretrained(model, tmp_path / "out" / "adapter"), tokens)
        found["adapter"][0, 0, 0] += 1e-6
        save_file(found, arguments["output"])
        return {"tokenizer": True}

    monkeypatch.setattr(publish, "run", exchange)
    options = TextOptions(
        size="tiny", steps=2, lora_steps=2, batch=2, block=32, data=str(data), output=str(tmp_path / "out")
    )
    with pytest.raises(CheckFailed, match="pulled_equals_pushed is false"):
        quickstart(options, Console(file=io.StringIO()))
    assert asked == ["push", "pull"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["pulled"] == {"model": True, "adapter": False, "tokenizer": True}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"arch": "manba"}, "no architecture 'manba'"),
        ({"size": "9t"}, "size is '9t'"),
        ({"steps": 0}, "steps is 0; allowed are 1 or more"),
        ({"data": "nowhere.txt"}, "data is 'nowhere.txt'"),
        ({"overrides": {"hidden_size": 0}}, "hidden_size is 0"),
        ({"size": "2.8b", "overrides": {"hidden_size": 100_000}}, "GiB are free here"),
    ],
)
def test_wrong_options_cost_nothing(tmp_path, options, said):
    with pytest.raises(Exception, match=said):  # the host library's for a config, ValueError or OSError otherwise
        quickstart(TextOptions(**{"output": str(tmp_path / "out"), **options}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["matplotlib", "starlette.applications"])
def test_a_missing_package_is_named_before_anything_is_trained(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "hf_archs.testing.hub", raising=False)
    with pytest.raises(ImportError, match=f"needs the package {module}: pip install"):
        quickstart(TextOptions(size="tiny", output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", hf_archs.architectures())
def test_every_architecture_has_a_first_size_for_the_quickstart(name):
    config = checkpoints.sized_config(hf_archs.get_architecture(name), None, {})
    assert 2e6 < checkpoints.check_memory(config, copies=4) < 6e6
    assert config.vocab_size >= text.SMALLEST_VOCABULARY


def test_the_genome_job(tmp_path):
    """DNA in which every base follows from the two before: a model learns that, and so does a Markov model."""
    dice = np.random.default_rng(0)
    letters = [0, 1]
    for noise in dice.random(20000):
        letters.append((letters[-1] + letters[-2] + 1) % 4 if noise < 0.9 else int(dice.integers(4)))
    (tmp_path / "x.fa").write_text(">made\n" + "".join("ACGT"[i] for i in letters))
    options = GenomeOptions(
        size="tiny",
        overrides={"hidden_size": 32},
        steps=60,
        batch=4,
        block=128,
        data=str(tmp_path / "x.fa"),
        output=str(tmp_path / "out"),
    )
    console = Console(record=True, width=120, file=io.StringIO())
    summary = quickstart(options, console)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert summary.keys() >= {"arch", "parameters", "seconds", "tokens_per_second", "repositories"}
    bits = summary["bits_per_base"]
    assert bits["markov"].keys() == {str(order) for order in range(1, 13)}
    assert bits["best_markov"] == min(bits["markov"].values()) == bits["markov"]["2"] < 0.8
    assert bits["model"] < bits["markov"]["1"] - 0.5
    assert summary["pulled_equals_pushed"] is True
    assert summary["repositories"] == {"model": "alice/hf-archs-quickstart-mamba"}
    printed = console.export_text()
    assert "Markov, order 2 (the best of them)" in printed
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "`hf-archs quickstart --task genome --size tiny" in card
    assert "--steps 60" in card
    assert "bits per base" in card
    assert "import " not in card.split("tokenizer.bos_token")[1]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out" / "model")("ACGT")["input_ids"]) == 4
    assert (tmp_path / "out" / "loss.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "proteins"}, "task is 'proteins'; allowed are text and genome"),
        ({"task": "genome", "steps": 0}, "steps is 0; allowed are 1 or more"),
        ({"task": "genome", "lora_steps": 5}, "lora_steps is 5, but the task 'genome' has no lora_steps"),
    ],
)
def test_wrong_options(options, said):
    with pytest.raises(ValueError, match=said):
        make_options(**options)


def test_a_missing_genome_is_named_before_anything_is_trained(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get download bowtie-examples"):
        quickstart(GenomeOptions(size="tiny", data=str(tmp_path / "x.fa"), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
