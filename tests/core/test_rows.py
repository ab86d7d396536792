"""Rows: every source gives the same tokens and loss, labels are on the answers, and each fault has its sentence."""

import copy
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from trl import SFTConfig, SFTTrainer

import hf_archs
from hf_archs import errors
from hf_archs.commands import loading, train
from hf_archs.commands.evaluate import evaluate
from hf_archs.commands.inspect import token_blocks
from hf_archs.data import examples, sources, text
from hf_archs.data import rows as rows_module
from hf_archs.data.examples import Found
from hf_archs.testing.contract.models import assert_close, lively
from hf_archs.testing.hub import EmbeddedHub

# `datasets` leaves the file of a streamed CSV open until it is collected
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
TEXTS = [
    *(
        "NA",
        "007",
        "null",
        "1,5",
        'said "so"',
        " both sides ",
        "line\nline\n",
        "tab\there",
        "häuser 漢字 🙂",
        "2020-01-01",
    ),
    *("\r\n after", "'", '""', "#no comment", "a\\nb", "{}", "[1]", "true", "-", "x" * 200),
    *(f"The number {i} times {i} is {i * i}." for i in range(20)),
]
FORMATS = ("folder", "csv", "tsv", "jsonl", "json", "ndjson", "parquet", "arrow", "saved", "splits", "folder of rows")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(folder: Path, form: str, rows: list[dict]) -> str:
    """The rows in a file or folder of this form; returns its name."""
    path = folder / f"rows.{form}"
    table = Dataset.from_list(rows)
    if form == "folder":
        path.mkdir()
        for i, row in enumerate(rows):
            (path / f"{i:02}.txt").write_bytes(row["text"].encode())
    elif form in ("csv", "tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if form == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif form in ("jsonl", "ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif form == "json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    elif form == "parquet":
        table.to_parquet(path)
    elif form == "arrow":
        table.save_to_disk(folder / "whole")
        (folder / "whole" / "data-00000-of-00001.arrow").rename(path)
    elif form == "saved":
        table.save_to_disk(path)
    elif form == "splits":
        DatasetDict(train=table, test=table.select(range(3))).save_to_disk(path)
    elif form == "folder of rows":  # three files of two kinds, and a split that is not read
        path.mkdir()
        for name, part in {
            "train-0.jsonl": rows[:11],
            "train-1.jsonl": rows[11:20],
            "train-2.jsonl": rows[20:],
        }.items():
            (path / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        (path / "test-0.jsonl").write_text(json.dumps(rows[0]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    return text.train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    architecture = hf_archs.get_architecture("mamba")
    torch.manual_seed(0)
    architecture.causal_lm_class(architecture.tiny_config(vocab_size=300)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# -- the same rows in every form ---------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_every_form_gives_the_same_tokens(tmp_path, tokenizer, form, streaming):
    rows = [{"text": value, "source": "here"} for value in TEXTS]
    data = write(tmp_path, form, rows)
    if form == "folder" and streaming:
        with pytest.raises(ValueError, match=r"streaming is True, and data = .* is plain text"):
            sources.read_rows(data, streaming=True)
        return
    read = sources.read_rows(data, streaming=streaming)
    assert [*read.texts()] == TEXTS
    expected = text.token_blocks(tokenizer, TEXTS, 32)[:]
    blocks = [*examples.training_rows(read, tokenizer, 32, Found())]
    for name in ("input_ids", "labels"):
        assert [block[name] for block in blocks] == expected[name]
    assert [row["text"] for row in read.dataset] == TEXTS
    assert read.streamed is streaming
    if form != "folder":  # documents have names of their own, by which others are held out
        training, held_out = read.split()
        kept, others = text.split({str(i): value for i, value in enumerate(TEXTS)})
        assert ([*training.texts()], [*held_out.texts()]) == ([*kept.values()], [*others.values()])
        assert ([row["text"] for row in part.dataset] for part in (training, held_out))


def train_on(model, data, output, *arguments):
    """``hf-archs train`` with two steps on blocks of 32 tokens in their order; its results and the line on the data."""
    said = []
    options = ["--per_device_train_batch_size", "2", "--block_size", "32", "--disable_tqdm", "true"]
    options += ["--train_sampling_strategy", "sequential", "--max_steps", "2", *arguments]
    run = train.parse([str(model), "--data", data, "--output_dir", str(output), *map(str, options)])
    results = train.train(*run, said.append)
    assert len(said) == 1
    return results, said[0]


def test_every_form_gives_the_same_loss_and_model(tmp_path, model):
    """Bit by bit; measured on data that is given, because documents of a folder are held out by their names."""
    rows = [{"text": value} for value in TEXTS]
    (tmp_path / "held out").mkdir()
    held_out = write(tmp_path / "held out", "jsonl", rows[30:])
    runs = {}
    tokens = sum(map(len, text_tokens(model, TEXTS)))
    for form, streaming in [*((form, False) for form in ("folder", "csv", "jsonl", "parquet", "saved")), ("csv", True)]:
        data = write(tmp_path, form, rows)
        output = tmp_path / f"{form} {streaming}"
        results, said = train_on(model, data, output, "--eval-data", held_out, *["--streaming"] * streaming)
        runs[form, streaming] = results, loading.load_model(str(output)).state_dict()
        what = "documents" if form == "folder" else "rows with text"
        counted = f"40 {what} to learn from all tokens, {tokens:,} tokens"
        if streaming:
            counted = f"a stream of {what}, learnt from all tokens"
        assert said == f"{data}: {counted}; 10 to measure with"
    expected, weights = runs["folder", False]
    for results, found in runs.values():
        assert results == expected
        assert all(torch.equal(found[name], weights[name]) for name in weights)


def text_tokens(model, texts):
    tokenizer = loading.load_tokenizer(str(model))
    return [text.begin(tokenizer, value) for value in texts]


# -- labels --------------------------------------------------------------------------------------------------------

# five rows by hand: each token, and whether it is learnt
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|endoftext|>"
FIVE = [
    (
        {"prompt": "1+1=", "completion": "2"},
        [(END, 0), ("1", 0), ("+", 0), ("1", 0), ("=", 0), ("2", 1), (END, 1)],
    ),
    (
        {"prompt": "ä", "completion": " o!"},
        [(END, 0), ("Ã", 0), ("¤", 0), ("Ġ", 1), ("o", 1), ("!", 1), (END, 1)],
    ),
    (
        {"messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "ä"}]},
        [(END, 0), (USER, 0), ("2", 0), ("?", 0), (ASSISTANT, 0), ("Ã", 1), ("¤", 1), (END, 1)],
    ),
    (
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "c"},
            ]
        },
        [
            *((END, 0), ("<|system|>", 0), ("s", 0)),
            *((USER, 0), ("a", 0), (ASSISTANT, 0), ("b", 1), (END, 1)),
            *((USER, 0), ("a", 0), (ASSISTANT, 0), ("c", 1), (END, 1)),
        ],
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ]
        },
        [(END, 0), (USER, 0), ("a", 0), (ASSISTANT, 0), ("b", 1), (END, 1), (USER, 0), ("c", 0)],
    ),
]


@pytest.fixture(scope="module")
def letters():
    """A tokenizer with a token for each byte."""
    return text.train_tokenizer([""], text.SMALLEST_VOCABULARY)


@pytest.mark.parametrize(("row", "written"), FIVE)
def test_labels_are_where_the_answer_is(tmp_path, letters, row, written):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    [found] = examples.examples(sources.read_rows(str(tmp_path / "rows.jsonl")), letters)
    ids = letters.convert_tokens_to_ids([token for token, _ in written])
    assert found.input_ids == ids
    assert found.labels == [token if learnt else -100 for token, (_, learnt) in zip(ids, written)]
    # generation begins in the same way
    if "prompt" in row:
        begin = letters(row["prompt"])["input_ids"]
    else:
        last = max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        begin = letters.apply_chat_template(row["messages"][:last], add_generation_prompt=True)["input_ids"]
    assert found.input_ids[: len(begin)] == begin
    assert found.labels[len(begin)] == found.input_ids[len(begin)] != -100


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's own
@pytest.mark.parametrize(("five", "options"), [(FIVE[:2], {}), (FIVE[2:], {"assistant_only_loss": True})])
def test_tokens_and_labels_are_those_of_trl(tmp_path, letters, five, options):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row, _ in five))
    rows = sources.read_rows(str(tmp_path / "rows.jsonl"))
    architecture = hf_archs.get_architecture("mamba")
    trainer = SFTTrainer(
        architecture.causal_lm_class(architecture.tiny_config(vocab_size=text.SMALLEST_VOCABULARY)),
        SFTConfig(str(tmp_path / "out"), report_to="none", use_cpu=True, **options),
        train_dataset=rows.dataset,
        processing_class=letters,
    )
    theirs = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]
    assert [(row.input_ids, row.labels) for row in examples.examples(rows, letters)] == theirs


def test_packed_rows_stand_apart(letters):
    rows = [examples.Example([1, 2, 3], [1, -100, 3]), examples.Example([4, 5], [-100, 5]), examples.Example([6], [6])]
    first, second = examples.packed([*rows, rows[0]], 7, pad=9)
    assert first == {
        "input_ids": [1, 2, 3, 4, 5, 6, 9],
        "labels": [-100, -100, 3, -100, 5, -100, -100],
        "attention_mask": [1, 1, 1, 1, 1, 1, 0],
        "seq_idx": [0, 0, 0, 1, 1, 2, 3],
    }
    assert second["input_ids"] == [1, 2, 3, 9, 9, 9, 9]


@pytest.mark.parametrize("name", hf_archs.architectures())
def test_packed_rows_learn_what_each_learns_alone(name, letters, tmp_path):
    """The sum of the losses of all answers, and its gradients."""
    architecture = hf_archs.get_architecture(name)
    config = architecture.tiny_config(vocab_size=text.SMALLEST_VOCABULARY)
    model = lively(architecture.causal_lm_class, config)
    options = {"output_router_logits": False} if model.model.has_routers else {}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row, _ in FIVE[2:]))
    rows = sources.read_rows(str(tmp_path / "rows.jsonl"))
    alone = [*examples.examples(rows, letters)]
    blocks = examples.training_rows(rows, letters, 21, Found()).with_format("torch")
    assert len(blocks) == 2

    def learnt(batches):
        model.zero_grad()
        nats = 0
        for batch in batches:
            learnt = sum(label != -100 for row in batch["labels"] for label in row[1:])
            nats += model(**batch, **options).loss * learnt
        nats.backward()
        return nats.item(), {name: p.grad.clone() for name, p in model.named_parameters()}

    nats, expected = learnt(
        {"input_ids": torch.tensor([r.input_ids]), "labels": torch.tensor([r.labels])} for r in alone
    )
    packed, found = learnt([blocks[:]])
    assert packed == pytest.approx(nats, rel=1e-5)
    for parameter, gradient in expected.items():
        assert_close(found[parameter], gradient, parameter)


# -- what is wrong ---------------------------------------------------------------------------------------------------

TALK = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
WRONG = [
    # name, content, options, the sentence, rows that are left with skip_bad (None: it is refused all the same)
    ("a.csv", 'text,n\n"one\nmore",1\ntwo\nthree,3\n', {}, "line 4 of {}: it has 1 fields, and the header has 2", 2),
    ("a.csv", "text,n\none,1\ntwo,2,2\n", {}, "line 3 of {}: it has 3 fields, and the header has 2", 1),
    ("a.csv", b"text,n\none,1\n\xe4,2\n", {}, "line 3 of {}: it is not UTF-8: it has the byte 0xe4", 1),
    ("a.csv", 'text\none\n"two\nthree\n', {}, "lines 3 to 4 of {}: it is no CSV: unexpected end of data", 1),
    ("a.csv", "text,n\none,1\n,2\n", {}, "line 3 of {}: text is empty; allowed is text", 1),
    ("a.csv", "text\none\n\ntwo\n", {}, "line 3 of {}: it is empty", 2),
    (
        "a.csv",
        "text,text\none,1\n",
        {},
        "line 1 of {} names the column 'text' twice; allowed are different names",
        None,
    ),
    ("a.csv", "täxt\na\n".encode("latin-1"), {}, "line 1 of {}, which names the columns: it is not UTF-8", None),
    ("a.csv", "", {}, "{} begins with an empty line; its first line must name the columns", None),
    ("a.csv", "text,n\n", {}, "data is {}, which holds no rows; allowed is one row or more", None),
    (
        "a.tsv",
        "txet\tn\none\t1\n",
        {"column": "text"},
        "column is 'text', which {} does not have; did you mean txet?",
        None,
    ),
    (
        "a.tsv",
        "question\tn\none\t1\n",
        {},
        "{} has the columns question, n; needed are 'messages', or 'prompt' and 'completion', or 'text', or the name "
        "of the column with the text: --column NAME",
        None,
    ),
    (
        "a.jsonl",
        '{"text": "a"}\n{"text": "b"\n',
        {},
        "line 2 of {}: it is no JSON: Expecting ',' delimiter at column 13",
        1,
    ),
    ("a.jsonl", '{"text": "a"}\n["b"]\n', {}, "line 2 of {}: it is a JSON list; allowed is an object", 1),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', {}, "line 2 of {}: it is not UTF-8: it has the byte 0xff", 1),
    ("a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n\n', {}, "line 2 of {}: it is empty", 2),
    ("a.jsonl", '{"text": "a"}\n{"text": null}\n', {}, "line 2 of {}: text is empty; allowed is text", 1),
    ("a.jsonl", '{"text": "a"}\n{"n": 1}\n', {}, "line 2 of {}: text is empty; allowed is text", 1),
    ("a.jsonl", '{"text": "a"}\n{"text": 5}\n', {}, "line 2 of {}: text is 5, of type int; allowed is text", 1),
    ("a.jsonl", '{"text": "a"}\n{"text": NaN}\n', {}, "line 2 of {}: it is no JSON: it has the number NaN", 1),
    (
        "a.jsonl",
        '{"text": "a"}\n{"text": "\\ud800"}\n',
        {},
        "line 2 of {}: it is no Unicode: it has half a surrogate pair",
        1,
    ),
    ("a.jsonl", "", {}, "data is {}, which holds no rows; allowed is one row or more", None),
    ("a.json", '[{"text": "a"},\n{"text": }]', {}, "line 2 of {}: it is no JSON: Expecting value at column 10", None),
    ("a.json", '{"data":\n [{"text": "a"}]}', {}, "line 1 of {}: it is no JSON: Expecting value at column 9", 0),
    ("a.parquet", "PAR1 and no more", {}, "data is {}, which cannot be read: Parquet magic bytes not found", None),
    ("a.arrow", "no more", {}, "data is {}, which cannot be read: ", None),
    (
        "a.jsonl",
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n',
        {},
        "line 2 of {}: completion is empty; allowed is text",
        1,
    ),
    (
        "a.jsonl",
        '{"prompt": "a", "completion": "b"}\n{"prompt": "' + 40 * "a" + '", "completion": "b"}\n',
        {},
        "line 2 of {}: it has 43 tokens, and block_size is 32",
        1,
    ),
    ("a.jsonl", TALK + '{"messages": []}\n', {}, "line 2 of {}: messages is empty; allowed is a list of messages", 1),
    ("a.jsonl", TALK + TALK.replace("assistant", "user"), {}, "line 2 of {}: messages hold no answer; allowed are", 1),
    ("a.jsonl", TALK + TALK.replace('"b"', '""'), {}, "line 2 of {}: messages hold an empty answer; allowed are", 1),
    ("a.jsonl", TALK + TALK.replace('"user"', "null"), {}, "line 2 of {}: message 1 has no role that is text", 1),
    (
        "a.jsonl",
        TALK + TALK.replace('"user"', '"tool"'),
        {},
        "line 2 of {}: the chat template refuses it: role is tool; allowed are system, user and assistant",
        1,
    ),
    ("a.csv", "messages\na\n", {}, "line 2 of {}: messages is of type str; allowed is a list of messages", 0),
    ("a.txt", b"one\n\xe4\n", {}, "line 2 of {}: it is not UTF-8: it has the byte 0xe4", None),
    (
        "a.txt",
        "one\n",
        {"column": "text"},
        "column is 'text', and data = {} is plain text; allowed with rows only",
        None,
    ),
    ("a.txt", "one\n", {"streaming": True}, "streaming is True, and data = {} is plain text; allowed with rows", None),
]


@pytest.mark.parametrize(("name", "content", "options", "sentence", "left"), WRONG)
def test_a_wrong_input_is_one_sentence(tmp_path, letters, name, content, options, sentence, left):
    """With the file and the line; ``skip_bad`` leaves out the line and counts it, and the others keep their numbers."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    named = sentence.format(repr(str(path)))
    for streaming in (False, True):
        reading = {"streaming": streaming, **options}
        if name == "a.txt" and reading != {"streaming": False, **options}:
            continue
        with pytest.raises((ValueError, OSError)) as error:
            read(path, letters, reading)
        said = errors.reason(error.value)
        assert said.startswith(named), said
        assert said.count("--skip-bad") == (left is not None)
        if left:
            assert read(path, letters, {**reading, "skip_bad": True}) == ([named.partition(": ")[0]], left)
        else:
            with pytest.raises((ValueError, OSError)):
                read(path, letters, {**reading, "skip_bad": True})


def read(path, tokenizer, reading):
    """The places that are left out, and the number of rows that are not."""
    rows = sources.read_rows(str(path), **reading)
    found = Found()
    assert [*examples.training_rows(rows, tokenizer, 32, found)]
    return [*rows.left_out], found.rows


# -- the commands ------------------------------------------------------------------------------------------------


def answers_of(folder, count=40):
    """A file of prompts with completions."""
    return write(folder, "jsonl", [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(count)])


@pytest.mark.parametrize("lora", [False, True])
def test_training_learns_from_completions_alone(tmp_path, model, lora):
    """The loss of a step on all rows, packed, is that of each row alone."""
    data = answers_of(tmp_path)
    whole = ["--max_steps", 1, "--per_device_train_batch_size", 40]
    results, said = train_on(model, data, tmp_path / "out", *whole, *["--lora"] * lora)
    tokenizer = loading.load_tokenizer(str(model))
    training, held_out = sources.read_rows(data).split()
    rows, others = ([*examples.examples(part, tokenizer)] for part in (training, held_out))
    tokens = sum(len(row.input_ids) for row in rows)
    learnt = sum(label != -100 for row in rows for label in row.labels)
    assert said == (
        f"{data}: 39 rows with prompt and completion to learn from the completions, {tokens} tokens, {learnt} of them "
        "learnt from; 1 to measure with"
    )
    start = loading.load_model(str(model)).eval()
    assert results["train_loss"] == pytest.approx(text.measure_rows(start, rows, 1).loss, rel=1e-5)
    if not lora:
        [answer] = [row["completion"] for _, row in held_out]
        figure = text.measure_rows(loading.load_model(str(tmp_path / "out")), others, len(answer)).bits_per_byte
        assert results["bits_per_byte"] == pytest.approx(figure)


def test_a_stream_of_rows_is_trained_like_a_table(tmp_path, model):
    data = answers_of(tmp_path)
    table, _ = train_on(model, data, tmp_path / "table")
    stream, said = train_on(model, data, tmp_path / "stream", "--streaming")
    assert stream == table
    assert said == (
        f"{data}: a stream of rows with prompt and completion, learnt from the completions; 1 to measure with"
    )
    with pytest.raises(ValueError, match="max_steps is -1; allowed are 1 or more with --streaming"):
        train.parse([str(model), "--data", data, "--output_dir", "o", "--streaming"])


def test_held_out_rows_of_a_long_stream_are_its_first_ones(tmp_path, tokenizer, monkeypatch):
    """All rows that the rule holds out are passed over, also those that come after the measured ones."""
    data = answers_of(tmp_path, 200)
    monkeypatch.setattr(rows_module, "HELD_OUT", 12)
    training, held_out = sources.read_rows(data, streaming=True).split()
    by_rule = [i for i in range(200) if text.is_held_out(str(i))]
    assert [number for number, _ in training] == [i for i in range(200) if i not in by_rule]
    assert [number for number, _ in held_out] == by_rule[:1]
    assert len(by_rule) > 3
    assert [row["prompt"] for row in held_out.dataset] == [f"{by_rule[0]}+{by_rule[0]}="]


def test_a_row_that_is_left_out_is_counted(tmp_path, model):
    data = Path(answers_of(tmp_path))
    data.write_text(data.read_text().replace('"8+8="', '""').replace('{"prompt": "5+5', '"prompt": "5+5'))
    with pytest.raises(ValueError, match=r"line 6 of .*: it is no JSON"):
        train_on(model, str(data), tmp_path / "out")
    _, said = train_on(model, str(data), tmp_path / "out", "--skip-bad")
    assert said.endswith(f"; 2 left out: line 6 of '{data}', line 9 of '{data}'")


def test_a_model_without_a_tokenizer_trains_one_on_the_texts_of_the_rows(tmp_path, model):
    bare = tmp_path / "bare"
    loading.load_model(str(model)).save_pretrained(bare)
    (tmp_path / "talk.jsonl").write_text(TALK.replace('"b"', '"bcbcbcbc"') * 3)
    train_on(bare, str(tmp_path / "talk.jsonl"), tmp_path / "out")
    tokenizer = loading.load_tokenizer(str(tmp_path / "out"))
    assert len(tokenizer) > text.SMALLEST_VOCABULARY
    assert "bcbcbcbc" in tokenizer.get_vocab()


def test_a_text_that_is_no_utf8_is_counted(tmp_path, model):
    """In a folder; alone it is refused."""
    data = write(tmp_path, "folder", [{"text": value} for value in TEXTS])
    Path(data, "binary").write_bytes(b"\xe4\0")
    Path(data, "latin.txt").write_bytes("one\ntwo ä".encode("latin-1"))
    _, said = train_on(model, data, tmp_path / "out")
    assert said.startswith(f"{data}: 37 documents to learn from all tokens, ")
    assert said.endswith(f"; 3 to measure with; 1 left out: line 2 of '{data}/latin.txt'")


def test_a_config_or_split_that_plain_text_and_files_do_not_have(tmp_path):
    rows = [{"text": value} for value in TEXTS]
    for data in ("topics:small", f"{write(tmp_path, 'csv', rows)}:small"):
        with pytest.raises(ValueError, match="has no config 'small', which datasets of the Hub have alone"):
            sources.read_rows(data)
    for data in ("topics::test", f"{write(tmp_path, 'folder', rows)}::test"):
        with pytest.raises(ValueError, match=r"split is 'test', and data = .* is plain text"):
            sources.read_rows(data)


def test_a_name_with_brackets_is_no_pattern(tmp_path):
    for name, content in (("a[1].csv", "text\nbrackets\n"), ("a1.csv", "text\nnone\n")):
        (tmp_path / name).write_text(content)
    assert [*sources.read_rows(str(tmp_path / "a[1].csv")).texts()] == ["brackets"]


def test_a_split_is_named(tmp_path):
    rows = [{"text": value} for value in TEXTS]
    for form in ("csv", "saved"):
        with pytest.raises(ValueError, match="has no split 'test'"):
            sources.read_rows(f"{write(tmp_path, form, rows)}::test")
    for form in ("splits", "folder of rows"):
        data = write(tmp_path, form, rows)
        assert [*sources.read_rows(f"{data}::test").texts()] == TEXTS[: 3 if form == "splits" else 1]
        for streaming in (False, True):
            with pytest.raises(ValueError, match=r"has no split 'dev'; it has train, test, which '?.*::SPLIT'? names"):
                sources.read_rows(f"{data}::dev", streaming=streaming)


def test_a_trainer_may_read_rows_of_its_own(tmp_path):
    """Other columns are texts, or messages; all columns are in the dataset."""
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "", "rejected": "c"}]
    data = write(tmp_path, "jsonl", rows)
    options = ["m", "--data", data, "--output_dir", "o"]
    forms = {"preference": ("prompt", "chosen", "rejected")}
    with pytest.raises(ValueError, match="needed are 'messages', or 'prompt' and 'completion', or 'text'"):
        train.read_data(train.parse(options)[0])
    with pytest.raises(ValueError, match=r"line 2 of .*: chosen is empty"):
        train.read_data(train.parse(options)[0], forms)
    Path(data).write_text("".join(json.dumps(rows[0] | {"chosen": f"b{i}"}) + "\n" for i in range(3)))
    training, held_out = train.read_data(train.parse(options)[0], forms)
    assert training.kind == "preference"
    found = [*training.dataset, *held_out.dataset]
    assert sorted(found, key=str) == [rows[0] | {"chosen": f"b{i}"} for i in range(3)]


ON_A_HUB = """
from datasets import Dataset, DatasetDict
from hf_archs.data.sources import read_rows

for config, first in (("default", "a"), ("small", "c")):
    made = {split: Dataset.from_dict({"text": [f"{first} {split}", "b"]}) for split in ("train", "test")}
    DatasetDict(made).push_to_hub("me/set", config)
names = ("me/set", "me/set:small", "me/set:small:test", "me/set::test")
print([[*read_rows(name, streaming=streaming).texts()][0] for name in names for streaming in (False, True)])
"""


def test_a_name_of_the_hub_is_read_with_its_config_and_split(tmp_path):
    """On the embedded Hub, where another process's `datasets` has pushed."""
    with EmbeddedHub(tmp_path / "hub", users={"token": ("me", "write")}) as hub:
        environment = {**os.environ, **hub.environment(str(tmp_path / "home")), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-W", "ignore", "-c", ON_A_HUB]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = [text for text in ("a train", "c train", "c test", "a test") for _ in range(2)]
    assert done.stdout.strip().splitlines()[-1] == str(expected)


def test_evaluate_measures_the_tokens_to_learn(tmp_path, model):
    data = answers_of(tmp_path)
    tokenizer = loading.load_tokenizer(str(model))
    rows = [*examples.examples(sources.read_rows(data), tokenizer)]
    expected = text.measure_rows(loading.load_model(str(model)), rows, sum(len(str(2 * i)) for i in range(40)))
    said = []
    for streaming in (False, True):
        (table,) = evaluate(str(model), [data], say=said.append, streaming=streaming)
        cells = [next(iter(column.cells)) for column in table.columns]
        figures = (f"{expected.loss:.4f}", f"{expected.perplexity:.3f}", f"{expected.bits_per_byte:.4f}")
        assert cells == [data, "40", str(expected.tokens), str(expected.bytes), *figures]
    assert not said
    Path(data).write_text(Path(data).read_text() + '{"prompt": "a"}\n')
    evaluate(str(model), [data], say=said.append, skip_bad=True)
    assert said == [f"{data}: 1 left out: line 41 of '{data}'"]


def test_inspect_and_quickstart_read_rows(tmp_path, tokenizer):
    texts = [{"text": value} for value in TEXTS]
    stream = [token for value in TEXTS for token in text.begin(tokenizer, value)]
    for form in ("folder", "csv", "saved"):
        data = write(tmp_path, form, texts)
        assert torch.cat([*token_blocks(data, tokenizer, 128)], 1).tolist() == [stream[:128]]
        assert [*sources.read_corpus(data).values()] == TEXTS
    data = answers_of(tmp_path)
    [block] = token_blocks(data, tokenizer, 16)
    assert (
        block[0].tolist() == [t for row in examples.examples(sources.read_rows(data), tokenizer) for t in row[0]][:16]
    )
    with pytest.raises(ValueError, match="rows with prompt and completion; needed is text, or a column 'text'"):
        sources.read_corpus(data)


# as they are published: ChatML of many models, and that of Llama 2, without a beginning of answers
CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA_2 = """\
{% for message in messages %}{% if message['role'] == 'user' %}{{ '<s>[INST] ' + message['content'] + ' [/INST]' }}\
{% else %}{{ ' ' + message['content'] + ' </s>' }}{% endif %}{% endfor %}"""


@pytest.mark.parametrize(
    ("template", "learnt"),
    [(CHATML, ["yes<|im_end|>", "oh, no<|im_end|>"]), (LLAMA_2, [" yes </s>", " oh, no </s>"])],
)
def test_answers_of_templates_without_marks(tmp_path, letters, template, learnt):
    answers = [{"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "oh, no"}]
    messages = [{"role": "user", "content": "a?"}, answers[0], {"role": "user", "content": "b?"}, answers[1]]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": messages}))
    other = copy.deepcopy(letters)
    other.chat_template = template
    [(tokens, labels)] = examples.examples(sources.read_rows(str(tmp_path / "talk.jsonl")), other)
    assert other.decode(tokens) == other.apply_chat_template(messages, tokenize=False)
    assert all(label in (token, -100) for token, label in zip(tokens, labels))
    assert other.decode([label for label in labels if label != -100]) == "".join(learnt)


def test_a_tokenizer_that_cannot_mark_answers_is_refused(tmp_path, letters, monkeypatch):
    (tmp_path / "talk.jsonl").write_text(TALK)
    rows = sources.read_rows(str(tmp_path / "talk.jsonl"))
    other = copy.deepcopy(letters)
    for template, sentence in (
        (None, "the tokenizer has no chat template"),
        ("{% if add_generation_prompt %}{% endif %}", "the chat template marks no answer in it"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "renders a turn differently"),
    ):
        other.chat_template = template
        with pytest.raises(ValueError, match=sentence):
            [*examples.examples(rows, other)]
    with monkeypatch.context() as patch:
        patch.setattr(type(other), "is_fast", False)
        with pytest.raises(ValueError, match="without places of tokens in the text"):
            [*examples.examples(rows, other)]
    other.eos_token = None
    rows = sources.read_rows(answers_of(tmp_path), skip_bad=True)
    with pytest.raises(ValueError, match="the tokenizer has no eos_token, which must end a completion"):
        [*examples.examples(rows, other)]
    other.bos_token = None
    with pytest.raises(ValueError, match="the tokenizer has neither a bos_token nor an eos_token"):
        [*examples.examples(rows, other)]
