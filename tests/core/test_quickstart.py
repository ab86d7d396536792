"""The main job in miniature: every step of it, the push and the pull included."""

import dataclasses
import io
import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import hf_archs
from hf_archs.commands import cli, loading, publish
from hf_archs.commands.quickstart import GenomeOptions, TextOptions, jobs, make_options, quickstart, training
from hf_archs.commands.quickstart.figures import draw, in_bits, text_cards
from hf_archs.commands.quickstart.run import Run
from hf_archs.commands.sentences import CheckFailed
from hf_archs.data import text

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


def miniature(data, output, **changed):
    options = {"overrides": {"vocab_size": 400, "hidden_size": 32}, "steps": 12, "lora_steps": 6, **changed}
    return TextOptions(size="tiny", batch=4, block=64, data=str(data), output=str(output), **options)


def recorder():
    return Console(record=True, width=120, file=io.StringIO())


@pytest.fixture(autouse=True, scope="module")
def sample():
    """Less of the held-out text is measured than there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "SAMPLE", 300)
        yield 300


@pytest.fixture(scope="module")
def done(data, sample):
    """A finished miniature: its folder, its summary, what it printed."""
    console = recorder()
    summary = quickstart(miniature(data, data.parent / "out"), console)
    return data.parent, summary, console.export_text()


def exchange(environment, push, pull, change=0.0):
    """`publish.run` without a Hub; the adapter's logits come back with a change."""
    folder = Path(push["folder"])
    tokens = load_file(pull["tokens"])["tokens"]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    found = {"model": publish.logits(model, tokens)}
    found["adapter"] = publish.logits(PeftModel.from_pretrained(model, folder / "adapter"), tokens)
    found["adapter"][0, 0, 0] += change
    save_file(found, pull["output"])
    return {"names": {"model": "alice/a", "adapter": "alice/b"}, "same": {"tokenizer": True}}


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
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["versions"]["transformers"] == transformers.__version__
    assert {"python", "hf-archs", "peft", "datasets"} <= summary["versions"].keys()


def test_the_figures_are_those_of_the_files(done):
    folder, summary, _ = done
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "out" / "model")
    assert sum(p.numel() for p in model.parameters()) == summary["parameters"]
    _, code = text.split(text.read_corpus(str(folder / "data")))
    _, english = text.split(text.read_corpus("topics"))
    sizes = {name: sum(map(len, texts.values())) for name, texts in (("code", code), ("english", english))}
    assert summary["characters"] == {name: {"measured": 300, "held_out": size} for name, size in sizes.items()}
    code, english = text.sample(code, 300), text.sample(english, 300)
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
    sizes = summary["characters"]["code"]
    stated = f"data: 300 of {sizes['held_out']:,} held-out characters"
    assert stated in " ".join(printed.split())
    card = (folder / "out" / "model" / "README.md").read_text()
    for word in ("library_name: transformers", "alice/hf-archs-quickstart-mamba", "import hf_archs", "bits per byte"):
        assert word in card
    assert f"held-out data (300 of {sizes['held_out']:,} characters), after" in card
    adapted = (folder / "out" / "adapter" / "README.md").read_text()
    assert "base_model: alice/hf-archs-quickstart-mamba" in adapted
    about = json.loads((folder / "out" / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(folder / "out" / "model")
    for word in ("held-out code", "license:"):  # of other data than the default nobody said either
        assert word not in card + adapted


def test_the_card_of_the_default_data(done):
    _, summary, _ = done
    cards = text_cards(TextOptions(), summary["bits_per_byte"], summary["characters"])
    assert {card["license"] for card in cards.values()} == {"apache-2.0"}
    assert any(what.startswith("held-out code (") for what in cards["model"]["results"])


def test_a_card_begins_a_text_as_training_did(done):
    folder, _, _ = done
    code = (folder / "out" / "model" / "README.md").read_text().split("```python")[1].split("```")[0]
    inputs = code[code.index("start = ") : code.index("print(")]
    names = {"tokenizer": AutoTokenizer.from_pretrained(folder / "out" / "model")}
    exec(inputs, names)
    assert names["inputs"]["input_ids"].tolist() == [[names["tokenizer"].bos_token_id]]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_an_interrupted_run_goes_on(done, data, tmp_path, monkeypatch):
    """In the pretraining, then in LoRA before and after a checkpoint; it gives what an uninterrupted run gives."""
    _, expected, _ = done
    monkeypatch.setattr(publish, "run", exchange)
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    options = miniature(data, tmp_path / "out")
    steps = []
    on_step_end = training.Steps.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        steps.append((self.bar.what, state.global_step))
        if steps[-1] == stop:
            raise KeyboardInterrupt
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(training.Steps, "on_step_end", interrupt)
    stops = {
        ("pretraining", 7): "tokenizer, figures before, pretraining up to step 6",
        ("LoRA", 1): "model, figures after, text",
        ("LoRA", 3): "text, LoRA up to step 2",
    }
    for at, kept in stops.items():
        stop, console = at, recorder()
        with pytest.raises(KeyboardInterrupt):
            quickstart(options, console)
        printed = console.export_text()
        assert f"{kept}. The same command goes on from there." in printed
    assert "going on from" in printed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unfinished"]
    stop = None
    summary = quickstart(options, recorder())
    pretrained = [("pretraining", step) for step in (*range(1, 8), *range(7, 13))]
    assert steps == pretrained + [("LoRA", step) for step in (1, 1, 2, 3, 3, 4, 5, 6)]
    for what in ("losses", "bits_per_byte", "samples", "bytes_per_token", "merged_largest_difference"):
        assert summary[what] == expected[what], what
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model", "adapter", "loss.png", "summary.json"}
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (data.parent / "out" / file).read_bytes()


def test_other_options_start_anew(tmp_path):
    options = TextOptions(output=str(tmp_path / "out"))

    def begin(data=b"data", **changed):
        console = recorder()
        run = Run(dataclasses.replace(options, **changed), data, console)
        return run, console.export_text()

    run, printed = begin()
    assert run.once("a stage", lambda: {"x": 1.5}) == {"x": 1.5}
    assert printed == ""
    run, printed = begin(public=True)
    assert "going on from" in printed
    assert run.once("a stage", lambda: 1 / 0) == {"x": 1.5}
    for changed, said in (
        ({"seed": 1}, "(seed was 0, and is 1 now): starting anew"),
        ({"data": b"other"}, "(data was"),
    ):
        run, printed = begin(**changed)
        assert said in printed.replace("\n", "")
        assert run.once("a stage", lambda: 2) == 2
    assert run.seconds > 0
    shutil.rmtree(run.folder)
    run.folder.mkdir()
    (run.folder / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="is no unfinished quickstart"):
        begin()
    assert (run.folder / "thesis.txt").exists()


def test_half_a_checkpoint_is_none(tmp_path):
    for step, whole in ((9, True), (10, True), (11, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
        if whole:
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert training.newest_of(tmp_path) == (str(tmp_path / "checkpoint-10"), 10)
    assert training.newest_of(tmp_path / "none") == (None, 0)


def test_checkpoints_come_now_and_then_and_not_at_the_end(monkeypatch):
    steps = training.Steps(lambda *told: None)
    state = SimpleNamespace(global_step=0, max_steps=3)
    steps.on_train_begin(None, state, None)
    saved = []
    for every, steps_done in ((1e9, 1), (0.0, 2), (0.0, 3)):
        monkeypatch.setattr(training, "SAVE_EVERY", every)
        state.global_step = steps_done
        control = SimpleNamespace(should_save=False)
        steps.on_step_end(None, state, control)
        saved.append(control.should_save)
    assert saved == [False, True, False]


def test_the_picture(tmp_path, monkeypatch):
    """In the table's unit, and its steps are whole and begin with the first."""
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *a, **k: drawn.append(figure.axes[0]))
    for count in (1, 2, 7, 130):
        losses = {"pretraining": in_bits([2.0] * count, 3.0), "LoRA": in_bits([4.0], 2.0)}
        draw(losses, "byte", tmp_path)
        axes = drawn.pop()
        assert axes.get_ylabel() == "training loss (bits per byte)"
        ticks = axes.get_xticks().tolist()
        assert ticks[0] == axes.get_xlim()[0] == 1
        assert all(tick == int(tick) for tick in ticks)
        first, second = axes.get_lines()
        assert first.get_ydata().tolist() == pytest.approx([2 / math.log(2) / 3] * count)
        assert second.get_xdata().tolist() == [count + 1]


def test_bytes_per_token():
    corpus = {"a": "ab ab ab " * 40}
    tokenizer = text.train_tokenizer(corpus.values(), 262)
    rows = text.token_blocks(tokenizer, corpus.values(), 9)
    tokens = sum(len(row) for row in rows["input_ids"])
    assert jobs._bytes_per_token(tokenizer, rows) == pytest.approx(360 / tokens, rel=0.05)


def test_encoding_and_measuring_say_how_far_they_are():
    tokenizer = text.train_tokenizer(["abc"], 261)
    model = AutoModelForCausalLM.from_config(hf_archs.get_architecture("mamba").tiny_config(vocab_size=261))
    told = []
    text.token_blocks(tokenizer, ["abc", "defgh"], 4, lambda *share: told.append(share))
    assert told == [(3, 8), (8, 8)]
    told.clear()
    text.bits_per_byte(
        model, tokenizer, ["abc", "defgh"], chunk=2, batch_size=2, progress=lambda *share: told.append(share)
    )
    assert told == [(4, 8), (7, 8), (8, 8)]


def test_a_sample_is_from_all_over_the_corpus():
    corpus = {f"{i}": f"{i:03}" * 100 for i in range(50)}
    chosen = text.sample(corpus, 1000, longest=90)
    assert [len(document) for document in chosen.values()] == [90] * 11 + [10]
    assert all(corpus[name].startswith(document) for name, document in chosen.items())
    assert list(chosen) != sorted(chosen, key=int)
    assert text.sample(dict(reversed(corpus.items())), 1000, longest=90) == chosen
    assert text.sample(corpus, 10**6, longest=300).items() == corpus.items()


def test_a_difference_after_the_pull_is_an_error(data, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "run", lambda *given: exchange(*given, change=1e-6))
    options = miniature(data, tmp_path / "out", steps=2, lora_steps=2, full=True)
    with pytest.raises(CheckFailed, match="pulled_equals_pushed is false"):
        quickstart(options, recorder())
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["pulled"] == {"model": True, "adapter": False, "tokenizer": True}
    assert all(sizes["measured"] == sizes["held_out"] for sizes in summary["characters"].values())


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


def test_an_output_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file' is a file"):
        quickstart(TextOptions(size="tiny", output=str(tmp_path / "file" / "out")))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=2**20))
    with pytest.raises(OSError, match="are free; make room"):
        quickstart(TextOptions(size="tiny", output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["matplotlib", "starlette.applications"])
def test_a_missing_package_is_named_before_anything_is_trained(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    for name in [name for name in sys.modules if name.startswith("hf_archs.testing.hub")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=rf"needs the package {module}: pip install 'hf-archs\[quickstart\]'"):
        quickstart(TextOptions(size="tiny", output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", hf_archs.architectures())
def test_every_architecture_has_a_first_size_for_the_quickstart(name):
    config = loading.sized_config(hf_archs.get_architecture(name), None, {})
    assert 2e6 < loading.check_memory(config, copies=4) < 6e6
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
    console = recorder()
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
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "model")("ACGT")["input_ids"] == [2, 7, 8, 9, 10]
    assert (tmp_path / "out" / "loss.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "proteins"}, "task is 'proteins'; allowed are text and genome"),
        ({"task": "genome", "steps": 0}, "steps is 0; allowed are 1 or more"),
        ({"task": "genome", "lora_steps": 5}, "lora_steps is 5, but the task 'genome' has no lora_steps"),
        ({"task": "genome", "full": True}, "full is True, but the task 'genome' has no full"),
    ],
)
def test_wrong_options(options, said):
    with pytest.raises(ValueError, match=said):
        make_options(**options)


def test_the_command_shows_that_it_imports(monkeypatch):
    """And its threads do not spin for long: beside other work that costs ten times the time."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setattr(cli, "_silence_libraries", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    result = CliRunner().invoke(cli.app, ["quickstart", "--task", "proteins", "--size", "tiny"])
    assert "importing torch, transformers and PEFT ..." in result.stderr
    assert "task is 'proteins'" in str(result.exception)
    assert os.environ["GOMP_SPINCOUNT"] == "100000"
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_a_missing_genome_is_named_before_anything_is_trained(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get download bowtie-examples"):
        quickstart(GenomeOptions(size="tiny", data=str(tmp_path / "x.fa"), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
