"""Text, parameter groups, callbacks, atomic saving, and the library side of ``hf-archs train``."""

import errno
import hashlib
import math
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments, pipeline
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.integrations.integration_utils import get_available_reporting_integrations

import hf_archs
from hf_archs import errors, training
from hf_archs.commands import loading, sentences, train
from hf_archs.data import sources, text
from hf_archs.native import disk

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def tiny(name="mamba", **fields):
    return AutoModelForCausalLM.from_config(hf_archs.get_architecture(name).tiny_config(vocab_size=300, **fields))


def corpus_folder(folder: Path) -> Path:
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"def function_{i}(value):\n    return value + {i}\n" * 6)
    return folder


# -- text ------------------------------------------------------------------------------------------------------


def test_the_library_is_its_own_source_and_the_rule_is_on_the_path():
    corpus = text.standard_library()
    library = Path(sysconfig.get_path("stdlib"))
    assert corpus["functools.py"] == (library / "functools.py").read_bytes().decode()
    assert "json/decoder.py" in corpus
    first = {name.split("/")[0] for name in corpus}
    assert not first & {"test", "idlelib", "pydoc_data", "lib2to3", "site-packages"}
    kept, held_out = text.split(corpus)
    assert kept.keys() | held_out.keys() == corpus.keys()
    assert not kept.keys() & held_out.keys()
    assert all(int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0 for name in held_out)
    assert not any(int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0 for name in kept)


def test_a_folder_gives_its_text_files_only(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("häuser", encoding="utf-8")
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "latin").write_bytes("häuser".encode("latin-1"))
    (tmp_path / "empty").write_text("")
    assert text.read_text_files(tmp_path) == {"sub/a.txt": "häuser", "empty": ""}
    (tmp_path / "b.txt").write_text("b")
    assert text.read_corpus(str(tmp_path)) == {"sub/a.txt": "häuser", "b.txt": "b"}


def test_a_file_is_cut_without_a_loss_and_so_is_a_folder_with_one(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(500)))
    corpus = text.read_corpus(str(path))
    assert "".join(corpus.values()) == path.read_text()
    kept, held_out = text.split(corpus)
    assert kept
    assert held_out
    (tmp_path / "empty.txt").write_text("")
    assert text.read_corpus(str(tmp_path)) == corpus


def test_a_table_beside_more_text_is_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "words"}\n' * 9)
    (tmp_path / "README.txt").write_text("About the rows.")
    assert set(sources.read_corpus(str(tmp_path)).values()) == {"words"}
    (tmp_path / "book.txt").write_text("It was the best of times. " * 20)
    assert {"book.txt", "a.jsonl"} <= {*sources.read_corpus(str(tmp_path))}


@pytest.mark.parametrize("name", ["missing.txt", "missing.CSV", "./missing", "a/b/c", "~/no-such-folder-here"])
def test_a_path_that_is_not_there(name):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        sources.read_rows(name)


def test_a_mistyped_corpus_is_not_looked_for_on_the_hub():
    with pytest.raises(FileNotFoundError, match="'stdlb', which does not exist; did you mean stdlib"):
        sources.read_rows("stdlb")


def test_no_text_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no text"):
        text.read_corpus(str(tmp_path))
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="not UTF-8"):
        text.read_corpus(str(tmp_path / "x.txt"))
    with pytest.raises(ValueError, match="1 document"):
        text.split({"a": "b"})


def test_something_is_always_held_out():
    assert [len(part) for part in text.split({"a": "1", "b": "2", "c": "3"})] == [2, 1]


def test_the_tokenizer_writes_any_text(tmp_path):
    tokenizer = text.train_tokenizer(["hello hello hello"], 264)
    for sample in ("hello", " tab\t\n  two", "日本 ☃ é \x00", "x" * 50):
        assert tokenizer.decode(text.encode(tokenizer, sample)) == sample
    assert len(tokenizer) <= 264
    assert text.start_token(tokenizer) == 0
    with pytest.raises(ValueError, match="vocab_size is 260; allowed are 261"):
        text.train_tokenizer(["a"], 260)


def test_a_prompt_begins_as_a_document_does(tmp_path):
    """For any caller (a pipeline, a server, README), one start token precedes the text."""
    text.train_tokenizer(["some words"], 300).save_pretrained(tmp_path)
    tokenizer = loading.load_tokenizer(str(tmp_path))
    own = text.encode(tokenizer, "some words")
    assert 0 not in own
    assert tokenizer("some words")["input_ids"] == [0, *own]
    assert tokenizer("some", "words")["input_ids"].count(0) == 2
    assert tokenizer.decode(tokenizer("some words")["input_ids"], skip_special_tokens=True) == "some words"
    model = tiny().eval()
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    greedy = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(torch.tensor([[0, *own]]), **greedy)[0]
    assert generator("some words", **greedy)[0]["generated_text"] == tokenizer.decode(
        expected, skip_special_tokens=True
    )
    messages = [{"role": "user", "content": "some words"}]
    expected = model.generate(torch.tensor([[0, 3, *own, 4]]), **greedy)[0, len(own) + 3 :]
    assert generator(messages, **greedy)[0]["generated_text"][-1] == {
        "role": "assistant",
        "content": tokenizer.decode(expected, skip_special_tokens=True),
    }


def test_a_conversation():
    """Each answer ends with the end of text, which is no pad; a conversation begins with what was said before."""
    tokenizer = text.train_tokenizer(["some words and more"], 300)
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    messages = [
        {"role": "system", "content": "\nBe short. "},
        {"role": "user", "content": " some words?"},
        {"role": "assistant", "content": "\nmore words"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": ""},
    ]
    expected, answers = [0], []
    for message in messages:
        expected += [2 + text.ROLES.index(message["role"]), *text.encode(tokenizer, message["content"])]
        if message["role"] == "assistant":
            expected.append(0)
            answers += [len(expected) - 1 - i for i in range(len(text.encode(tokenizer, message["content"])) + 1)]
    made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert made["input_ids"] == expected
    assert [i for i, marked in enumerate(made["assistant_masks"]) if marked] == sorted(answers)
    prompt = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt == expected[: len(prompt)]
    assert prompt[-1] == 4
    with pytest.raises(TemplateError, match="role is tool; allowed are system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}])


def test_blocks_are_one_stream_with_a_start_before_every_document():
    tokenizer = text.train_tokenizer(["ab"], 261)
    a, b = text.encode(tokenizer, "ab")
    rows = text.token_blocks(tokenizer, ["ab", "b", "aab"], 3)["input_ids"][:]
    assert rows == [[0, a, b], [0, b, 0], [a, a, b]]
    assert text.token_blocks(tokenizer, ["a"], 8)["input_ids"][:] == [[0, a]]


@pytest.mark.parametrize("name", hf_archs.architectures())
def test_bits_per_byte_are_those_of_each_text_alone(name):
    model = tiny(name).double().eval()
    texts = ["def f(x): return x\n" * 9, "é" * 70, "", "a", "import os"]
    tokenizer = text.train_tokenizer(texts, 300)
    nats, size = 0.0, 0
    for document in texts:
        tokens = torch.tensor([[0, *text.encode(tokenizer, document)]])
        if tokens.shape[1] > 1:
            logits = model(tokens[:, :-1]).logits[0]
            nats += F.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
        size += len(document.encode())
    expected = nats / math.log(2) / size
    model.train()
    for batch_size, chunk in ((8, 512), (2, 7), (3, 16), (1, 1000)):
        found = text.bits_per_byte(model, tokenizer, texts, batch_size=batch_size, chunk=chunk)
        assert found == pytest.approx(expected, rel=1e-6), (batch_size, chunk)
    assert model.training


# -- groups, callbacks, LoRA -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hf_archs.architectures())
def test_only_matrices_decay(name):
    model = tiny(name)
    groups = training.parameter_groups(model, 0.3)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = ([names[id(p)] for p in group["params"]] for group in groups)
    assert sorted(decayed + kept) == sorted(names.values())
    # experts are matrices, stacked
    matrices = [n for n in decayed if n.endswith("weight") or ".experts." in n]
    assert matrices == decayed
    assert not any("norm" in n or "embed" in n or ".ssm." in n for n in decayed)
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head" and ".ssm." not in n}
    assert linear
    assert {f"{n}.weight" for n in linear} <= set(decayed)
    assert {n for n in names.values() if ".ssm." in n} <= set(kept)


def test_frozen_parameters_are_in_no_group():
    model = training.add_lora(tiny())
    parameters = [p for group in training.parameter_groups(model) for p in group["params"]]
    assert len(parameters) == 2 * 2 * 4  # A and B of four layers in each of two blocks
    assert all(p.requires_grad for p in parameters)


def test_the_trainer_decays_the_same_parameters(tmp_path):
    model = tiny()
    trainer = training.ArchTrainer(model, TrainingArguments(str(tmp_path), weight_decay=0.3, report_to="none"))
    found = {
        group["weight_decay"]: {id(p) for p in group["params"]} for group in trainer.create_optimizer().param_groups
    }
    expected = {g["weight_decay"]: {id(p) for p in g["params"]} for g in training.parameter_groups(model, 0.3)}
    assert found == expected


class _Balanced(nn.Module):
    class Callback(TrainerCallback):
        pass

    def trainer_callbacks(self):
        return [self.Callback()]


def test_layers_bring_their_callbacks(tmp_path):
    model = tiny()
    assert training.callbacks(model) == []
    model.model.layers[1].router = _Balanced()
    assert [type(callback) for callback in training.callbacks(model)] == [_Balanced.Callback]
    trainer = training.ArchTrainer(model, TrainingArguments(str(tmp_path), report_to="none"))
    assert any(isinstance(callback, _Balanced.Callback) for callback in trainer.callback_handler.callbacks)


def test_lora_targets_are_checked():
    with pytest.raises(ValueError, match="LoRA target is 'q_proj'; allowed are all-linear, dt_proj, in_proj"):
        training.add_lora(tiny(), ["in_proj", "q_proj"])
    with pytest.raises(ValueError, match="LoRA rank is 0"):
        training.add_lora(tiny(), rank=0)
    assert set(training.add_lora(tiny(), ["in_proj"]).active_peft_config.target_modules) == {"in_proj"}


# -- checkpoints -----------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_files(tmp_path):
    folder = tmp_path / "model"
    tiny().save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fails():
        with disk.replacing(folder) as partial:
            (partial / "config.json").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fails()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_there_is_written_within(tmp_path):
    """It may be a separate disk, to which files cannot be renamed, or its parent may be read-only."""
    with disk.replacing(tmp_path) as partial:
        assert partial.parent == tmp_path
        (partial / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with disk.replacing(tmp_path / "new" / "folder") as partial:
        assert partial.parent == tmp_path / "new"
    assert (tmp_path / "new" / "folder").is_dir()


def test_new_weights_replace_old_shards_and_nothing_else(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    assert (tmp_path / "m" / "model.safetensors.index.json").exists()
    with disk.replacing(tmp_path / "m") as partial:
        model.save_pretrained(partial)
    assert [path.name for path in (tmp_path / "m").glob("model*")] == ["model.safetensors"]
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    loading.load_model(str(tmp_path / "m"))


def test_a_model_that_does_not_fit_is_refused_before_it_is_allocated():
    architecture = hf_archs.get_architecture("mamba")
    config = loading.sized_config(architecture, "4m", {})
    assert loading.check_memory(config) == sum(p.numel() for p in architecture.causal_lm_class(config).parameters())
    config = loading.sized_config(architecture, "2.8b", {"hidden_size": 100_000})
    with pytest.raises(ValueError, match=r"hidden_size 100000, 64 layers .* GiB are free here"):
        loading.check_memory(config)


def test_weights_that_do_not_fit_or_do_not_read(tmp_path):
    source = tmp_path / "m"
    tiny().save_pretrained(source)
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(errors.CheckpointMismatch, match=r"model\.layers\.2\.\S+ \(and \d+ more\) is missing in"):
        loading.load_model(str(source))
    (source / "config.json").write_text(config.replace('"state_size": 8', '"state_size": 4'))
    with pytest.raises(errors.CheckpointMismatch, match="A_log has shape"):
        loading.load_model(str(source))
    (source / "config.json").write_text(config)
    architecture = hf_archs.get_architecture("mamba")
    architecture.model_class(architecture.tiny_config(tie_word_embeddings=False)).save_pretrained(tmp_path / "no head")
    with pytest.raises(errors.CheckpointMismatch, match=r"lm_head\.weight is missing in"):
        loading.load_model(str(tmp_path / "no head"))
    weights = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(weights[:-1000])
    with pytest.raises(SafetensorError, match=r"model.safetensors is corrupt or truncated"):
        loading.load_model(str(source))


# -- hf-archs train --------------------------------------------------------------------------------------------


def run(model, data, output, *arguments):
    fixed = [
        "--per_device_train_batch_size",
        "2",
        "--block_size",
        "32",
        "--disable_tqdm",
        "true",
        "--lr_scheduler_type",
    ]
    return train.train(
        *train.parse([str(model), "--data", str(data), "--output_dir", str(output), *fixed, "constant", *arguments])
    )


def test_a_continued_run_equals_an_uninterrupted_one(tmp_path):
    data = corpus_folder(tmp_path / "data")
    tiny().save_pretrained(tmp_path / "m")
    whole = run(tmp_path / "m", data, tmp_path / "whole", "--max_steps", "4")
    run(tmp_path / "m", data, tmp_path / "parts", "--max_steps", "2")
    parts = run(tmp_path / "m", data, tmp_path / "parts", "--max_steps", "4")
    a, b = (loading.load_model(str(tmp_path / name)).state_dict() for name in ("whole", "parts"))
    start = loading.load_model(str(tmp_path / "m")).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.layers.0.mixer.in_proj.weight"], start["model.layers.0.mixer.in_proj.weight"])
    assert whole["bits_per_byte"] == parts["bits_per_byte"]
    assert (tmp_path / "whole" / "tokenizer.json").exists()
    assert "bits per byte" in (tmp_path / "whole" / "README.md").read_text()


def standing(output, *arguments):
    return train.standing(train.parse(["m", "--data", "d", "--output_dir", str(output), *arguments])[1])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Data, a model ``m`` with a tokenizer, and two runs of two saved steps: the whole model and an adapter."""
    folder = tmp_path_factory.mktemp("runs")
    data = corpus_folder(folder / "data")
    tiny().save_pretrained(folder / "m")
    text.train_tokenizer(["def function"], 300).save_pretrained(folder / "m")
    for name, more in (("whole", ()), ("adapter", ("--lora",))):
        run(folder / "m", data, folder / name, "--max_steps", "2", "--save_steps", "1", *more)
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of ``trained`` that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


@pytest.mark.parametrize("goal", [("--max_steps", "2"), ("--max_steps", "1"), ("--num_train_epochs", "0.01")])
@pytest.mark.parametrize("name", ["whole", "adapter"])
def test_what_is_finished_trains_no_further(runs, name, goal):
    """The same command runs no further step; an unwritten model is written from the last checkpoint."""
    output, lora = runs / name, ["--lora"] if name == "adapter" else []
    found = standing(output, *goal)
    assert found.finished
    assert found.steps == 2
    before = contents(output)
    weights = next(file for file in before if file.endswith("model.safetensors"))
    for lost in ([], ["trainer_state.json"], [weights]):
        for file in lost:
            (output / file).unlink()
        found = standing(output, *goal)
        assert (found.reached, found.finished) == (True, not lost)
        assert found.checkpoint == str(output / "checkpoint-2" if lost else output)
        results = run(runs / "m", runs / "data", output, *goal, *lora)
        assert "train_loss" not in results
        assert results["bits_per_byte"] > 0
        assert contents(output)[weights] == before[weights]
        assert standing(output, *goal).finished
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_larger_goal_goes_on_and_a_push_is_made_again(runs):
    for goal in (("--max_steps", "3"), ("--num_train_epochs", "9")):
        found = standing(runs / "whole", *goal)
        assert found == train.Standing(str(runs / "whole" / "checkpoint-2"), (), 2)
    found = standing(runs / "whole", "--max_steps", "2", "--push_to_hub", "true")
    assert (found.reached, found.finished) == (True, False)
    earlier = str(runs / "whole" / "checkpoint-1")  # training resumes from the given checkpoint
    assert standing(runs / "whole", "--max_steps", "2", "--resume_from_checkpoint", earlier).checkpoint == earlier
    assert not standing(runs / "whole", "--max_steps", "2", "--resume_from_checkpoint", earlier).reached


@pytest.mark.parametrize(
    ("file", "kept", "said"),
    [
        ("trainer_state.json", None, "it has no trainer_state.json"),
        ("trainer_state.json", 0.5, "its trainer_state.json is cut off"),
        ("trainer_state.json", 0, "its trainer_state.json is cut off"),
        ("optimizer.pt", 0.9, "its optimizer.pt is cut off"),
        ("rng_state.pth", 0.5, "its rng_state.pth is cut off"),
        ("model.safetensors", 0.9, "is corrupt or truncated"),
        ("model.safetensors", None, "it has no weights"),
    ],
)
def test_the_newest_whole_checkpoint_is_taken(runs, file, kept, said):
    """The folder of an interrupted save is skipped, with a reason, and the one before it is resumed."""
    output = runs / "whole"
    uninterrupted = contents(output / "checkpoint-2")["model.safetensors"]
    broken = output / "checkpoint-2" / file
    if kept is None:
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[: int(kept * broken.stat().st_size)])
    (output / "trainer_state.json").unlink()  # the run is not finished
    found = standing(output, "--max_steps", "2")
    assert found.checkpoint == str(output / "checkpoint-1")
    assert (found.steps, found.reached) == (1, False)
    assert len(found.skipped) == 1
    assert f"{output / 'checkpoint-2'}', which is not whole: " in found.skipped[0]
    assert said in found.skipped[0]
    with pytest.raises(OSError, match=r"resume_from_checkpoint is .*checkpoint-2', which is not whole"):
        standing(output, "--resume_from_checkpoint", str(output / "checkpoint-2"))
    if kept != 0.9:  # two cases are enough
        return
    run(runs / "m", runs / "data", output, "--max_steps", "2", "--save_steps", "1")
    assert contents(output / "checkpoint-2")["model.safetensors"] == uninterrupted
    assert train.why_not_whole(output / "checkpoint-2") is None


def test_a_model_in_the_folder_is_not_trained_over(runs):
    before = contents(runs / "m")
    with pytest.raises(FileExistsError, match="holds a model and no whole checkpoint to continue from"):
        run(runs / "m", runs / "data", runs / "m", "--max_steps", "1")
    assert contents(runs / "m") == before
    run(runs / "m", runs / "data", runs / "m", "--max_steps", "1", "--resume_from_checkpoint", "false")
    assert contents(runs / "m")["model.safetensors"] != before["model.safetensors"]
    for checkpoint in (runs / "whole").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert standing(runs / "whole", "--max_steps", "2").finished
    with pytest.raises(FileExistsError, match="no whole checkpoint"):
        standing(runs / "whole", "--max_steps", "3")


def test_room_is_looked_for_before_anything_is_read(runs, monkeypatch):
    """It must hold the model, and all checkpoints with AdamW's states that are kept at once."""
    model = loading.load_model(str(runs / "m"))
    size = 4 * model.num_parameters()

    def needed(*arguments, model=model, output="new", steps=0):
        options = ["m", "--data", "d", "--output_dir", str(runs / output), *arguments]
        return train._bytes_to_write(model, train.parse(options)[1], steps)

    assert needed("--save_strategy", "no") == size
    assert needed() == needed("--max_steps", "9") == size + 3 * size
    assert needed("--save_only_model", "true") == needed("--optim", "sgd") == 2 * size
    assert needed("--max_steps", "9", "--save_steps", "1", "--save_total_limit", "4") == size + 4 * 3 * size
    assert needed("--max_steps", "9", "--save_steps", "5", "--save_total_limit", "4") == size + 2 * 3 * size
    assert needed("--max_steps", "9", "--save_steps", "1", "--save_total_limit", "4", steps=8) == size + 3 * size
    # two of them are there
    again = needed("--max_steps", "99", "--save_steps", "1", "--save_total_limit", "4", output="whole", steps=2)
    assert again == size + 2 * 3 * size
    adapted = training.add_lora(model)
    own = 4 * sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert needed(model=adapted) == own + 3 * own

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * size))
    with pytest.raises(OSError, match=r"MiB are to be written there, and .* MiB are free; make room"):
        run(runs / "m", runs / "data", runs / "new", "--max_steps", "1")
    assert not (runs / "new").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * size))
    run(runs / "m", runs / "data", runs / "new", "--max_steps", "1")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no device that is always full")
def test_a_full_disk_is_said_in_a_sentence_and_the_run_goes_on(runs):
    """The optimizer's states are written to a device that is always full, so that PyTorch fails."""
    output = runs / "full"
    (output / "checkpoint-1").mkdir(parents=True)
    (output / "checkpoint-1" / "optimizer.pt").symlink_to("/dev/full")
    goal = ("--max_steps", "2", "--save_steps", "1")
    with pytest.raises(OSError, match=r"the disk of output_dir = .* is full; make room, and the same command goes on"):
        run(runs / "m", runs / "data", output, *goal)
    assert "has no trainer_state.json" in standing(output, *goal).skipped[0]
    (output / "checkpoint-1" / "optimizer.pt").unlink()
    run(runs / "m", runs / "data", output, *goal)
    assert contents(output)["model.safetensors"] == contents(runs / "whole")["model.safetensors"]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("out of memory"), False),
    ],
)
def test_words_of_a_full_disk(error, full):
    assert sentences.is_full_disk(error) == full
    wrapped = ValueError("it failed")
    wrapped.__cause__ = error
    assert sentences.is_full_disk(wrapped) == full


@pytest.mark.parametrize(
    "name",
    sorted({*INTEGRATION_TO_CALLBACK} - {*get_available_reporting_integrations()} - {*train.UNTOLD_REPORTERS}),
)
def test_a_reporter_that_is_not_installed_is_missed_at_once(name):
    with pytest.raises(ImportError, match=f"report_to is '{name}', which is not installed here"):
        train.parse(["m", "--data", "d", "--output_dir", "o", "--report_to", name])


def test_an_adapter_is_trained_on_a_trained_model(tmp_path):
    data = corpus_folder(tmp_path / "data")
    tiny().save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="no tokenizer, so it was never trained"):
        run(tmp_path / "m", data, tmp_path / "a", "--max_steps", "1", "--lora")
    run(tmp_path / "m", data, tmp_path / "t", "--max_steps", "1")
    run(
        tmp_path / "t",
        data,
        tmp_path / "a",
        "--max_steps",
        "1",
        "--lora",
        "in_proj",
        "out_proj",
        "--learning_rate",
        "1",
    )
    model = loading.load_model(str(tmp_path / "t"))
    tokens = torch.arange(9)[None]
    before = model(tokens).logits
    adapted = loading.load_adapter(model, str(tmp_path / "a"))
    assert set(adapted.active_peft_config.target_modules) == {"in_proj", "out_proj"}
    assert "base_model" not in ModelCard.load(tmp_path / "a" / "README.md").data.to_dict()  # the Hub refuses paths
    assert not torch.allclose(adapted(tokens).logits, before)


def test_a_save_that_fails_leaves_a_checkpoint_that_loads(tmp_path, monkeypatch):
    data = corpus_folder(tmp_path / "data")
    tiny().save_pretrained(tmp_path / "m")
    text.train_tokenizer(["a"], 300).save_pretrained(tmp_path / "m")
    run(tmp_path / "m", data, tmp_path / "out", "--max_steps", "1", "--save_strategy", "no")
    before = loading.load_model(str(tmp_path / "out")).state_dict()
    cls = hf_archs.get_architecture("mamba").causal_lm_class
    save = cls.save_pretrained

    def breaks(self, folder, **kwargs):
        save(self, folder, **kwargs)
        (Path(folder) / "model.safetensors").write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(cls, "save_pretrained", breaks)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "m", data, tmp_path / "out", "--max_steps", "1", "--save_strategy", "no")
    after = loading.load_model(str(tmp_path / "out")).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--learnig_rate", "1"], "no argument '--learnig_rate'; did you mean --learning_rate"),
        (["--max_steps", "many"], "--max_steps"),
        (["--block_size", "1"], "block_size is 1; allowed are 2"),
        (["--report_to", "tensorbored"], "report_to is 'tensorbored'; allowed are none, all, azure_ml"),
        (["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint is 'nowhere'"),
        (["--lora", "in_proj", "--lora_rank", "0"], "LoRA rank is 0"),
    ],
)
def test_wrong_arguments_of_train(tmp_path, arguments, said):
    data = corpus_folder(tmp_path / "data")
    tiny().save_pretrained(tmp_path / "m")
    text.train_tokenizer(["a"], 300).save_pretrained(tmp_path / "m")
    with pytest.raises((ValueError, OSError), match=said):
        run(tmp_path / "m", data, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()
