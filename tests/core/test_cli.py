"""The command line: each command's results, and one sentence and status 2 for wrong inputs."""

import importlib.metadata
import json
import math
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import httpx2
import huggingface_hub.utils.logging as hub_logging
import pytest
import torch
import transformers.utils.logging as transformers_logging
import typer
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import hf_raise_for_status
from packaging.requirements import Requirement
from rich.table import Table
from transformers import MambaConfig, MambaForCausalLM

import hf_archs
from hf_archs import registry, training
from hf_archs.commands import cli, loading, sentences, tables, versions
from hf_archs.commands import train as training_command
from hf_archs.data import text
from hf_archs.native import disk
from hf_archs.testing.hub import EmbeddedHub

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TRAIN = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--block_size", "32", "--disable_tqdm", "true"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command line in ``tmp_path``, and return (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # keep the threads of this process
    monkeypatch.setattr(cli, "console", cli.Console(width=200))
    levels = hub_logging.get_verbosity(), transformers_logging.get_verbosity()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-archs", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    yield run
    hub_logging.set_verbosity(levels[0])
    transformers_logging.set_verbosity(levels[1])
    transformers_logging.enable_progress_bar()


@pytest.fixture
def refused(run):
    """Run a command line that must fail, and return its one sentence."""

    def refused(*arguments):
        status, _, error = run(*arguments)
        assert status == 2, error
        return one_sentence(error)

    return refused


def one_sentence(stderr):
    assert stderr.startswith("error: "), stderr
    assert len(stderr.splitlines()) == 1, stderr
    return stderr


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A tiny model with a tokenizer, and an adapter for it."""
    folder = tmp_path_factory.mktemp("trained")
    model = hf_archs.get_architecture("mamba").causal_lm_class(
        hf_archs.get_architecture("mamba").tiny_config(vocab_size=300)
    )
    model.save_pretrained(folder / "model")
    text.train_tokenizer(["some words to begin with"], 300).save_pretrained(folder / "model")
    training.add_lora(model).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the tiny model that a test may change."""
    folder = tmp_path / "copy"
    with disk.replacing(folder) as partial:
        for file in (trained / "model").iterdir():
            (partial / file.name).write_bytes(file.read_bytes())
    return folder


# -- what the commands do --------------------------------------------------------------------------------------


HELP = [["--version"], ["-h"], ["--help"], [], ["init", "-h"], ["describe", "--help"], ["lst"], ["init", "--sied", "3"]]


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_is_the_commands_own_and_needs_no_torch(run, arguments):
    """The program runs the commands' file without its package, with the same output."""
    program = (
        f"import sys; sys.argv = {['hf-archs', *arguments]}; import hf_archs_main\ntry:\n    hf_archs_main.main()\n"
    )
    program += "finally:\n    print([m for m in ('torch', 'transformers', 'hf_archs') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.endswith("[]\n")
    assert (done.returncode, done.stdout.removesuffix("[]\n"), done.stderr) == run(*arguments)
    if arguments == ["--version"]:
        assert done.stdout == f"hf-archs {hf_archs.__version__}\n[]\n"


def test_help_names_every_command_and_none_is_cut_short(run):
    _, out, _ = run("--help")
    commands = typer.main.get_command(cli.app).commands
    assert len(commands) == 13
    for name, command in commands.items():
        assert f"\n  {name}  " in out
        assert command.get_short_help_str(300) in out
        assert run(name, "-h")[0] == 0


@pytest.mark.parametrize(
    "start", [["-c", "import hf_archs_main; hf_archs_main.main()"], ["-m", "hf_archs.commands.cli"]]
)
def test_both_ways_in_run_a_command(start):
    done = subprocess.run([sys.executable, *start, "list"], capture_output=True, text=True)
    assert "hf_archs_mamba2" in done.stdout
    assert done.returncode == 0


def test_list_names_every_architecture(run):
    status, out, _ = run("list")
    assert status == 0
    for name in hf_archs.architectures():
        architecture = hf_archs.get_architecture(name)
        line = next(line for line in out.splitlines() if line.startswith(f"│ {name} "))
        for word in (architecture.model_type, *architecture.sizes, *architecture.lora_targets):
            assert re.search(rf"\b{re.escape(word)}[, ]", line)
    for name in {*registry.mixers(), *registry.feed_forwards()} - {"parallel"}:  # usable in a hybrid
        assert f"│ {name} " in out


@pytest.mark.parametrize("width", [20, 60, 90, 130, 1000])
@pytest.mark.parametrize("terminal", [False, True])
def test_tables_never_cut_a_name(capsys, width, terminal):
    """A table has a terminal's width if the words fit; in a pipe, each row is one line."""
    names = [
        "hf_archs_mamba2",
        "a, b, qwen3-next-like, falcon-h1, griffin-like",
        "q_proj, k_proj, gate_proj, down_proj",
    ]
    table = Table("name", "sizes", "LoRA on")
    table.add_row(*names)
    table.add_row("mamba", "", "x_proj")
    tables.show(table, cli.Console(width=width, force_terminal=terminal, color_system=None))
    lines = capsys.readouterr().out.splitlines()
    words = " ".join(" ".join(line.split("│")[i] for line in lines if "│" in line) for i in (1, 2, 3)).split()
    assert words == [*names[0].split(), "mamba", *names[1].split(), *names[2].split(), "x_proj"]
    assert "…" not in "".join(lines)
    least = len("hf_archs_mamba2") + len("qwen3-next-like,") + len("gate_proj,") + 10
    most = sum(map(len, names)) + 10
    assert len(lines[0]) == most if not terminal or width > most else least <= len(lines[0]) <= max(width, least)


def test_a_line_with_a_path_stays_a_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "console", cli.Console(width=20))
    said = "mamba of 5 parameters in /a/folder [red] of/a/long/name, and more"
    cli._say(said)
    assert capsys.readouterr().out == f"{said}\n"


def test_doctor_tells_versions_ops_and_failures(run, monkeypatch):
    status, out, _ = run("doctor")
    assert status == 0
    for word in (torch.__version__.partition("+")[0], "transformers", "op selective_scan", "portable", "all loaded"):
        assert word in out
    monkeypatch.setitem(versions.TESTED, "rich", "99")
    assert re.search(r"rich +│ \S+ +│ older than tested, 99 ", run("doctor")[1])
    monkeypatch.setitem(versions.TESTED, "peft", "0.0")
    monkeypatch.setattr(
        versions, "requirements", lambda: {"rich": Requirement("rich>=98"), "peft": Requirement("peft<0.1")}
    )
    status, out, _ = run("doctor")
    assert status == 1
    assert "older than allowed, >=98" in out
    assert "newer than allowed, <0.1" in out
    monkeypatch.undo()
    monkeypatch.setattr("hf_archs.registry.failed_plugins", lambda: {"broken": "ImportError: no module"})
    status, out, _ = run("doctor")
    assert status == 1
    assert "plugin broken" in out
    assert "ImportError: no module" in out


def test_the_tested_versions_are_those_of_the_constraints():
    """They cover all requirements of hf-archs and its users' extras, of which a wheel has no other list."""
    repository = Path(hf_archs.__file__).parents[1]
    lines = (repository / "constraints.txt").read_text().splitlines()
    constraints = dict(line.split("==") for line in lines if "==" in line)
    assert {name: constraints[name] for name in versions.TESTED} == versions.TESTED
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = [line for extra in ("triton", "trl", "plot", "quickstart", "serve") for line in extras[extra]]
    needed = [*project["dependencies"], *optional]
    assert versions.TESTED.keys() == {Requirement(line).name for line in needed} - {"hf-archs"}


def test_versions_are_compared_both_ways():
    def verdict(line, tested):
        found = versions._compare(Requirement(line), tested)
        return found.verdict, found.allowed

    here = importlib.metadata.version("rich")
    assert verdict("rich>=1", here) == ("as tested", True)
    assert verdict("rich>=1", "1000") == ("older than tested, 1000", True)
    assert verdict("rich>=1", "1.0") == ("newer than tested, 1.0", True)
    assert verdict("rich>=999", "1000") == ("older than allowed, >=999", False)
    assert verdict("rich<2", "1.0") == ("newer than allowed, <2", False)
    assert verdict("no-such-package-here>=1", "1.0") == ("tested: 1.0", False)
    assert verdict('no-such-package-here>=1; extra == "plot"', "1.0") == ("optional; tested: 1.0", True)
    assert versions._compare(Requirement("torch"), torch.__version__.partition("+")[0]).verdict == "as tested"


def test_doctor_names_the_forced_implementation(run):
    with hf_archs.kernels.backend.use_backend("reference"):
        _, out, _ = run("doctor")
    assert "reference" in out


def test_init_makes_a_model_of_a_size_and_fields(run, tmp_path):
    assert run("init", "mamba", "-o", "a", "--size", "tiny", "--set", "state_size=4", "--set", "use_bias=true")[0] == 0
    model = loading.load_model(str(tmp_path / "a"))
    assert (model.config.state_size, model.config.use_bias, model.config.vocab_size) == (4, True, 512)
    run("init", "mamba", "-o", "b", "--size", "tiny", "--set", "state_size=4", "--set", "use_bias=true")
    run("init", "mamba", "-o", "c", "--size", "tiny", "--seed", "1")
    embedding = [loading.load_model(str(tmp_path / name)).model.embed_tokens.weight for name in "abc"]
    assert torch.equal(embedding[0], embedding[1])
    assert not torch.equal(embedding[0], embedding[2])


def test_init_takes_a_tokenizer_and_spares_a_checkpoint(run, refused, trained, copy):
    before = (copy / "model.safetensors").read_bytes()
    assert "holds a checkpoint already" in refused("init", "mamba", "-o", copy, "--size", "tiny")
    assert (copy / "model.safetensors").read_bytes() == before
    status, _, _ = run(
        "init", "mamba", "-o", copy, "--size", "tiny", "--overwrite", "--tokenizer", trained / "model", "--seed", 5
    )
    assert status == 0
    assert (copy / "model.safetensors").read_bytes() != before
    size = len(loading.load_tokenizer(str(copy)))
    assert size == loading.load_model(str(copy)).config.vocab_size


def test_train_then_continue_then_generate(run, trained, tmp_path):
    (tmp_path / "book.txt").write_text("It was the best of times. " * 200)
    arguments = ["train", trained / "model", "--data", "book.txt", "--output_dir", "out", *TRAIN]
    status, out, _ = run(*arguments)
    assert status == 0
    assert "bits per byte" in out
    status, out, _ = run(*arguments, "--max_steps", "2")
    assert "continuing from out/checkpoint-1" in out
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    status, _, error = run("train", "out", "--data", "book.txt", "--output_dir", "lora", "--lora", *TRAIN[:-2])
    assert status == 0
    assert "1/1 [" in error  # a progress bar
    status, out, _ = run(
        "generate", "out", "It was", "--adapter", "lora", "--max-new-tokens", "5", "--temperature", "0"
    )
    assert status == 0
    assert out.startswith("It was")


def test_the_same_training_again_is_finished_and_a_broken_checkpoint_is_skipped(run, trained, tmp_path):
    (tmp_path / "book.txt").write_text("It was the best of times. " * 200)
    arguments = [
        "train",
        trained / "model",
        "--data",
        "book.txt",
        "--output_dir",
        "out",
        *TRAIN[2:],
        "--save_steps",
        "1",
    ]
    assert run(*arguments, "--max_steps", 2)[0] == 0
    status, out, error = run(*arguments, "--max_steps", 2)
    assert status == 0
    assert "already finished: out holds the model after 2 steps; a larger --max_steps or --num_train_epochs" in out
    assert error == ""
    assert not (tmp_path / "out" / "checkpoint-3").exists()
    (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").unlink()
    status, out, _ = run(*arguments, "--max_steps", 3)
    assert status == 0
    assert "skipping 'out/checkpoint-2', which is not whole: it has no trainer_state.json" in out
    assert "continuing from out/checkpoint-1" in out


def test_another_s_tokenizer(run, refused, trained, tmp_path):
    """For a model without a tokenizer, every command can use another's, as the message says."""
    assert run("init", "moe", "-o", "bare", "--size", "tiny", "--set", "vocab_size=300")[0] == 0
    (tmp_path / "book.txt").write_text("It was the best of times. " * 200)
    greedy = ["generate", "bare", "some", "--max-new-tokens", "3", "--temperature", "0"]
    look = ["inspect", "bare", "--data", "book.txt", "--tokens", "64"]
    measure = ["evaluate", "bare", "--data", "book.txt"]
    for command in (greedy, look, measure):
        assert "'bare' has no tokenizer; `hf-archs train` makes one, and --tokenizer takes another's" in refused(
            *command
        )
        assert run(*command, "--tokenizer", trained / "model")[0] == 0
        assert "'bare' has no tokenizer" in refused(*command, "--tokenizer", "bare")
    assert run("init", "moe", "-o", "small", "--size", "tiny", "--set", "vocab_size=99")[0] == 0
    for command in (greedy, look):
        command[1] = "small"
        said = refused(*command, "--tokenizer", trained / "model")
        assert re.search(r"model' has \d+ tokens, and the model's vocab_size is 99; allowed are at most as many", said)


def test_generate_is_what_the_model_says(run, trained):
    model = loading.load_model(str(trained / "model")).eval()
    tokenizer = loading.load_tokenizer(str(trained / "model"))
    start = torch.tensor([[0, *text.encode(tokenizer, "some")]])
    expected = tokenizer.decode(model.generate(start, max_new_tokens=7, do_sample=False)[0], skip_special_tokens=True)
    _, out, _ = run("generate", trained / "model", "some", "--max-new-tokens", "7", "--temperature", "0")
    assert out.rstrip("\n") == expected
    two = [run("generate", trained / "model", "some", "--seed", seed)[1] for seed in (1, 1, 2)]
    assert two[0] == two[1] != two[2]


def test_serve_listens_to_this_machine_alone_and_names_a_missing_package(run, refused, trained, monkeypatch):
    listened = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: listened.extend(sockets))
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        said = refused("serve", trained / "model", "--port", port)
        assert f"the server cannot listen at 127.0.0.1 on port {port} (Address already in use" in said
    status, out, _ = run("serve", trained / "model", "--port", port)
    assert status == 0
    assert out.endswith(f"{str(trained / 'model')!r} at http://127.0.0.1:{port}/v1\n")
    assert [listener.getsockname() for listener in listened] == [("127.0.0.1", port)]
    listened[0].close()
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "hf-archs serve needs the package openai: pip install 'hf-archs[serve]'" in refused("serve", "anything")


def test_convert_there_and_back(run, refused, tmp_path, trained):
    native = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4))
    native.save_pretrained(tmp_path / "native")
    assert run("convert", "native", "-o", "ours")[0] == 0
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "hf_archs_mamba"
    assert run("convert", "ours", "-o", "back")[0] == 0
    back = MambaForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in native.state_dict().items())
    assert "holds a checkpoint already" in refused("convert", "native", "-o", "ours")
    assert "is native already" in refused("convert", "native", "-o", "x", "--to", "falcon_mamba")
    assert run("convert", trained / "model", "-o", "with-tokenizer")[0] == 0
    assert (tmp_path / "with-tokenizer" / "tokenizer.json").exists()


def test_train_help_names_our_arguments_and_the_trainer_s(run):
    status, out, _ = run("train", "--help")
    assert status == 0
    for argument in ("--data", "--lora", "--learning_rate", "--push_to_hub"):
        assert argument in out


# -- wrong inputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["manba"], "no architecture 'manba'; did you mean mamba"),
        (["mamba", "--set", "hidden_size=0"], "hidden_size is 0; allowed are 1 to"),
        (["mamba", "--set", "hidden_size=wide"], "'hidden_size' expected int, got str (value: 'wide')"),
        (["mamba", "--set", "hiden_size=8"], "no field 'hiden_size'; did you mean hidden_size"),
        (["mamba", "--set", "hidden_size"], "--set is 'hidden_size'; allowed is FIELD=VALUE"),
        (["mamba", "--size", "9000t"], "size is '9000t'; mamba has tiny, 4m"),
        (["mamba", "--set", "hidden_size=99999999999"], "hidden_size is 99999999999; allowed are"),
        (["mamba", "--size", "2.8b", "--set", "hidden_size=100000"], "GiB are free here: choose a smaller size"),
        (["mamba", "--tokenizer", "missing/tokenizer/there"], "missing/tokenizer/there"),
    ],
)
def test_init_refuses(refused, tmp_path, arguments, said):
    assert said in refused("init", *arguments, "-o", "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["init", "mambaa", "-o", "new"],
        ["quickstart", "--arch", "mambaa"],
        ["bench", "--arch", "mambaa"],
        ["describe", "mambaa"],
        ["describe", "mambaa:griffin-like"],
        ["generate", "mambaa"],
        ["generate", "mamba"],
        ["convert", "mambaa", "-o", "new"],
        ["inspect", "mambaa", "--data", "stdlib"],
        ["train", "mambaa", "--data", "someone/dataset", "--output_dir", "new"],
        ["generate", "{model}", "--adapter", "mambaa"],
        ["generate", "{model}", "--tokenizer", "mambaa"],
        ["init", "mamba", "-o", "new", "--tokenizer", "mambaa"],
    ],
    ids=" ".join,
)
def test_a_mistyped_architecture_is_not_looked_for_on_the_hub(run, monkeypatch, trained, tmp_path, arguments):
    def asks(*arguments, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("httpx2.Client.send", asks)
    status, _, error = run(*(trained / "model" if word == "{model}" else word for word in arguments))
    said = error.splitlines()[-1]  # quickstart first prints its imports
    assert status == 2
    assert said.startswith("error: ")
    assert re.search(r"did you mean (the architecture )?mamba\b", said)
    assert not (tmp_path / "new").exists()


def test_a_preset_s_name_leads_to_it(refused, monkeypatch):
    monkeypatch.setattr("httpx2.Client.send", None)
    assert "did you mean the architecture hybrid:jamba?" in refused("describe", "jamba")
    assert "hybrid:samba" in refused("describe", "sambaa")


@pytest.mark.parametrize("command", ["init", "train", "convert"])
def test_the_output_folder_is_looked_at_first(refused, monkeypatch, trained, tmp_path, command):
    """A file at its place, a read-only place or a full disk is found before weights are made, read or trained."""
    model = trained / "model"
    (tmp_path / "file").write_text("")
    start = {
        "init": ["init", "mamba", "--size", "tiny", "-o"],
        "train": ["train", model, "--data", "stdlib", *TRAIN, "--output_dir"],
        "convert": ["convert", model, "-o"],
    }[command]
    monkeypatch.setattr(loading, "load_model", None)
    monkeypatch.setattr(training_command, "read_rows", None)
    monkeypatch.setattr(hf_archs.get_architecture("mamba").causal_lm_class, "save_pretrained", None)
    for wrong in ("file", "file/below"):
        assert f"the output folder is '{wrong}', but '{tmp_path}/file' is a file; choose another" in refused(
            *start, wrong
        )
    if Path("/proc/self").exists():
        assert "nothing can be written into '/proc' (" in refused(*start, "/proc/new")
    if command == "train":  # the model is read, and then the room looked for: see test_training
        return
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "are to be written there, and 0.0 MiB are free; make room" in refused(*start, "new/folder")
    assert not (tmp_path / "new").exists()


def test_absurd_sizes_allocate_nothing(refused, monkeypatch):
    def allocates(*arguments, **kwargs):
        raise AssertionError("memory was allocated")

    monkeypatch.setattr(hf_archs.get_architecture("mamba").causal_lm_class, "save_pretrained", allocates)
    monkeypatch.setattr("transformers.set_seed", allocates)  # called before the model is made
    assert "its weights need" in refused("init", "mamba", "--size", "1.4b", "--set", "hidden_size=131072", "-o", "new")


def test_damaged_weights(refused, copy, tmp_path):
    (tmp_path / "book.txt").write_text("It was the best of times. " * 200)
    weights = (copy / "model.safetensors").read_bytes()
    for damaged in (weights[:-100], weights[:4], b"\xff" * 3000, b""):
        (copy / "model.safetensors").write_bytes(damaged)
        sentence = refused("generate", copy, "x")
        assert f"{copy}/model.safetensors is corrupt or truncated" in sentence
        assert "corrupt or truncated" in refused("train", copy, "--data", "book.txt", "--output_dir", "out")
        assert "corrupt or truncated" in refused("convert", copy, "-o", "out")


def test_damaged_configs(refused, copy):
    config = (copy / "config.json").read_text()
    for old, new, said in (
        ('"hidden_size": 64', '"hidden_size": -1', "hidden_size is -1"),
        ('"hidden_size": 64', '"hidden_size": 131072', "GiB are free here"),
        ('"state_size": 8', '"state_size": 4', "A_log has shape (128, 8)"),
        (
            '"num_hidden_layers": 2',
            '"num_hidden_layers": 3',
            "layers.2.mixer.conv1d.bias (and 9 more) is missing in",
        ),
        ('"hf_archs_mamba"', '"gpt2"', "is a checkpoint of 'gpt2'; allowed are hf_archs_"),
        ("{", "", "not a valid JSON file"),
    ):
        changed = config.replace(old, new, 1)
        assert changed != config
        if "GiB" in said:
            changed = changed.replace('"num_hidden_layers": 2', '"num_hidden_layers": 64')
        (copy / "config.json").write_text(changed)
        assert said in refused("generate", copy, "x")


def test_missing_things(refused, trained, tmp_path):
    (tmp_path / "empty").mkdir()
    model = trained / "model"
    assert "is no checkpoint: it has no config.json" in refused("generate", "empty")
    assert "it holds an adapter" in refused("generate", trained / "adapter")
    assert "does not exist" in refused("generate", "./nowhere")
    assert "is no adapter: it has no adapter_config.json" in refused("generate", model, "--adapter", "empty")
    assert "is no adapter" in refused("generate", model, "--adapter", tmp_path / "nowhere")
    assert "does not exist" in refused("train", model, "--data", "nowhere.txt", "--output_dir", "out")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((model / "config.json").read_bytes())
    assert "model.safetensors" in refused("generate", "bare")
    assert "required: --data" in refused("train", model, "--output_dir", "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_or_foreign_adapter(refused, run, trained, tmp_path):
    (tmp_path / "bad").mkdir()
    for file in (trained / "adapter").iterdir():
        (tmp_path / "bad" / file.name).write_bytes(file.read_bytes()[:900])
    (tmp_path / "bad" / "adapter_config.json").write_bytes((trained / "adapter" / "adapter_config.json").read_bytes())
    assert "adapter_model.safetensors is corrupt" in refused("generate", trained / "model", "--adapter", "bad")
    run("init", "mamba", "-o", "wide", "--size", "tiny", "--set", "hidden_size=32", "--tokenizer", trained / "model")
    assert "does not fit this model" in refused("generate", "wide", "--adapter", trained / "adapter")


def command(*arguments, **environment):
    """Run a command in its own process, without huggingface_hub's half minute of waiting for a Hub."""
    program = "import time; time.sleep = lambda seconds: None; from hf_archs.commands.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "0", **environment},
        capture_output=True,
        text=True,
    )


def test_an_unreachable_hub_and_a_corrupt_file_in_a_process(copy, tmp_path):
    away = command("generate", "alice/model", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "home"))
    assert away.returncode == 2
    assert "the Hub at http://127.0.0.1:9 cannot be reached" in one_sentence(away.stderr)
    (copy / "model.safetensors").write_bytes(b"no weights")
    corrupt = command("generate", copy)
    assert corrupt.returncode == 2
    assert "corrupt or truncated" in one_sentence(corrupt.stderr)


def test_every_core_gets_a_thread(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 6)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cli._use_all_cores()
    assert asked == []  # the user decides
    monkeypatch.delenv("OMP_NUM_THREADS")
    cli._use_all_cores()
    assert asked == [3]


def test_the_traceback_is_there_for_who_asks(run, monkeypatch):
    monkeypatch.setenv("HF_ARCHS_DEBUG", "1")
    status, _, error = run("generate", "./nowhere")
    assert status == 2
    assert "Traceback" in error


@pytest.mark.parametrize(
    ("method", "status", "headers", "said"),
    [
        ("GET", 404, {"X-Error-Code": "RepoNotFound"}, "(404): Nothing here.; check the name, and HF_TOKEN"),
        ("GET", 403, {"X-Error-Code": "GatedRepo"}, "ask for access on the repository's page"),
        ("GET", 403, {}, "a token of a user who may read it is needed"),
        ("POST", 403, {}, "a token with the role 'write' is needed"),
        ("GET", 404, {"X-Error-Code": "RevisionNotFound"}, "(404): Nothing here."),
        ("GET", 500, {}, "(500): Nothing here."),
    ],
)
def test_what_a_hub_refuses(method, status, headers, said):
    request = httpx2.Request(method, "https://hub.example/api/models/alice/x")
    response = httpx2.Response(status, headers={**headers, "X-Error-Message": "Nothing here."}, request=request)
    with pytest.raises(HfHubHTTPError) as caught:
        hf_raise_for_status(response)
    wrapped = OSError("something that transformers says\nin several lines")
    wrapped.__cause__ = caught.value
    sentence = sentences.sentence(wrapped)
    assert said in sentence
    assert "/api/models/alice/x" in sentence
    assert "\n" not in sentence


def test_tokens_and_pushes_in_a_process(trained, tmp_path):
    (tmp_path / "book.txt").write_text("It was the best of times. " * 200)
    arguments = ["train", trained / "model", "--data", tmp_path / "book.txt", "--output_dir", tmp_path / "out", *TRAIN]
    with EmbeddedHub(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "home")
        refused = command(*arguments, "--push-to-hub", **environment | {"HF_TOKEN": "hf_read"})
        assert refused.returncode == 2
        assert "(403)" in one_sentence(refused.stderr)
        assert "role 'write'" in refused.stderr
        assert not (tmp_path / "out" / "model.safetensors").exists()
        pushed = command(*arguments, "--push-to-hub", "--hub_model_id", "alice/trained", **environment)
        assert pushed.returncode == 0, pushed.stderr
        pulled = command("generate", "alice/trained", "It was", "--max-new-tokens", "3", **environment)
        assert pulled.stdout.startswith("It was"), pulled.stderr


# -- describe and inspect ----------------------------------------------------------------------------------------------


def test_describe(run, refused, tmp_path):
    """A config by name and size, from a folder and from a file, compared with attention in every layer."""
    status, out, _ = run("describe", "hybrid:jamba", "--length", 4096, "--picture", "jamba.png")
    assert status == 0
    rows = [line.split("│") for line in out.splitlines() if "│" in line]
    mixers = [row[2].strip() for row in rows if row[1].strip().isdigit()]
    assert mixers == ["mamba"] * 4 + ["attention"] + ["mamba"] * 3
    assert "attention everywhere" in out
    assert (tmp_path / "jamba.png").stat().st_size > 10_000
    assert run("init", "hybrid", "--size", "tiny", "-o", "model")[0] == 0
    in_folder = run("describe", "model", "--length", 100)[1]
    assert run("describe", "model/config.json", "--length", 100)[1] == in_folder
    assert "local+keep" not in in_folder
    assert "parallel" in in_folder
    assert refused("describe", "hybrid:jambo").startswith("error: size is 'jambo'; hybrid has tiny, mixture, jamba")
    assert "does not exist" in refused("describe", "nowhere/at/all")


def test_inspect(run, refused, tmp_path):
    """A model's routers over a text: a row for each layer with experts, and a heat map."""
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 400)
    assert run("init", "moe", "--size", "tiny", "-o", "model", "--set", "router=loss_free")[0] == 0
    texts = ["some words and some more of them, " * 20] * 20
    text.train_tokenizer(texts, 300).save_pretrained(tmp_path / "model")
    status, out, error = run("inspect", "model", "--data", "text.txt", "--tokens", 256, "--picture", "heat.png")
    assert status == 0, error
    assert [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")] == ["0"]
    assert (tmp_path / "heat.png").stat().st_size > 5_000
    assert run("init", "mamba", "--size", "tiny", "-o", "dense")[0] == 0
    text.train_tokenizer(texts, 300).save_pretrained(tmp_path / "dense")
    assert "without routers; allowed is a model with experts" in refused("inspect", "dense", "--data", "text.txt")


def test_evaluate(run, refused, trained, tmp_path):
    """A long document is read whole, with the same figures in any chunks; the loss is that of one forward."""
    words = "It was the best of times, it was the worst of times. " * 300
    (tmp_path / "book.txt").write_text(words)
    arguments = ["evaluate", trained / "model", "--data", "book.txt", "--data", "topics"]
    assert "data is 'nowhere.txt', which does not exist" in refused(*arguments[:-1], "nowhere.txt")
    tables = [run(*arguments[:4], "--chunk", chunk)[1] for chunk in (64, 10_000)]
    assert tables[0] == tables[1]
    row = [cell.strip() for cell in tables[0].splitlines()[3].split("│")[1:-1]]
    model = loading.load_model(str(trained / "model")).eval()
    tokenizer = loading.load_tokenizer(str(trained / "model"))
    ids = torch.tensor([[text.start_token(tokenizer), *text.encode(tokenizer, words)]])
    loss = model(ids, labels=ids).loss.item()
    tokens = ids.shape[1] - 1
    bits = loss * tokens / math.log(2) / len(words)
    assert row == [
        *("book.txt", "1", f"{tokens:,}", f"{len(words):,}"),
        *(f"{loss:.4f}", f"{math.exp(loss):.3f}", f"{bits:.4f}"),
    ]


def test_evaluate_needs_something_to_evaluate(refused, trained, monkeypatch):
    model = trained / "model"
    assert "neither data nor tasks are given; allowed are --data, --tasks" in refused("evaluate", model)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = "--tasks needs the package lm_eval: pip install 'hf-archs[tasks]'"
    assert said in refused("evaluate", model, "--tasks", "hellaswag")


@pytest.mark.lm_eval
@pytest.mark.filterwarnings("ignore")
def test_evaluate_in_tasks(run, refused, trained, tmp_path):
    questions = [(f"is {i} even? ", i % 2) for i in range(12)]
    rows = [json.dumps({"question": question, "answer": answer}) for question, answer in questions]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    task = {
        "task": "parity",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "parity.yaml").write_text(json.dumps(task))
    model = trained / "model"
    assert "Tasks not found: nothere; allowed are" in refused("evaluate", model, "--tasks", "nothere")
    table = run("evaluate", model, "--tasks", "parity.yaml", "--limit", 10)[1]
    row = next(line for line in table.splitlines() if "parity" in line)
    loaded, encoder = loading.load_ready(str(model))
    asked = questions[:10]

    def likelihood(question, answer):
        ids = torch.tensor([[text.start_token(encoder), *text.encode(encoder, question)]])
        whole = torch.cat([ids, torch.tensor([text.encode(encoder, answer)])], dim=1)
        logits = loaded(whole).logits.log_softmax(-1)[0, ids.shape[1] - 1 : -1]
        return logits.gather(1, whole[0, ids.shape[1] :, None]).sum().item()

    right = [(likelihood(question, "no") > likelihood(question, "yes")) == bool(answer) for question, answer in asked]
    assert [cell.strip() for cell in row.split("│")[1:5]] == ["parity", "10", "acc", f"{sum(right) / 10:.4f}"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["num_experts_per_tok=9", "num_experts=8"], "num_experts_per_tok is 9; allowed are 1 to num_experts = 8"),
        (["router=swtich"], "router"),
        (['mixer={"type": "atention"}'], "no mixer 'atention'; did you mean attention"),
    ],
)
def test_experts_that_cannot_be(refused, arguments, sentence):
    sets = [part for pair in arguments for part in ("--set", pair)]
    assert sentence in refused("init", "moe", "-o", "model", *sets)


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ('["ssm", "local"]', "layer_pattern has 2 entries; allowed are num_hidden_layers = 6"),
        ("ssm lcal", "layer_pattern has 'lcal'; did you mean local?"),
    ],
)
def test_patterns_that_cannot_be(refused, pattern, sentence):
    assert sentence in refused("init", "hybrid", "-o", "model", "--set", f"layer_pattern={pattern}")
