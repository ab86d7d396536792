"""Rows: every source gives the same tokens and loss, labels are where the answer is, and each fault has its sentence."""

import csv
import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict

import hf_archs
from hf_archs import errors
from hf_archs.commands import loading, train
from hf_archs.data import examples, sources, text
from hf_archs.data.examples import Found
from hf_archs.testing.contract.models import assert_close, lively

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
        with pytest.raises(ValueError, match="streaming is True, and data = .* is plain text"):
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
    """``hf-archs train`` with two steps on blocks of 32 tokens in their order; its results, and the line on the data."""
    said = []
    options = ["--per_device_train_batch_size", "2", "--block_size", "32", "--disable_tqdm", "true"]
    options += ["--train_sampling_strategy", "sequential", "--max_steps", "2", *arguments]
    run = train.parse([str(model), "--data", data, "--output_dir", str(output), *map(str, options)])
    results = train.train(*run, said.append)
    assert len(said) == 1
    return results, said[0]


def test_every_form_gives_the_same_loss_and_model(tmp_path, model):
    """Bit by bit, streamed or not; measured on data that is given, because documents of a folder are held out by name."""
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
        assert said == f"{data}: {counted}; 10 others to measure with"
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
        {"messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "22"}]},
        [(END, 0), (USER, 0), ("2", 0), ("?", 0), (ASSISTANT, 0), ("2", 1), ("2", 1), (END, 1)],
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
        "{} has the columns question, n; needed are 'messages', or 'prompt' and 'completion', or 'text', or the name of "
        "the column with the text: --column NAME",
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
    ("a.txt", b"one\n\xe4\n", {}, "line 2 of {}: it is not UTF-8 text: it has the byte 0xe4", None),
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
    for streaming in [False, True] if options.get("streaming") is None and name != "a.txt" else [False]:
        given = {"streaming": streaming, **options}

        def read(**more):
            rows = sources.read_rows(str(path), **given, **more)
            return rows, [*examples.training_rows(rows, letters, 32, Found())]

        with pytest.raises((ValueError, OSError)) as error:
            read()
        said = errors.reason(error.value)
        assert said.startswith(sentence.format(repr(str(path)))), said
        assert said.count("--skip-bad") == (left is not None)
        if left:
            rows, blocks = read(skip_bad=True)
            assert [*rows.left_out] == [sentence.format(repr(str(path))).partition(": ")[0]]
            assert len([*rows]) - (len(rows.left_out) if "block" in sentence or "template" in sentence else 0) == left
            assert blocks
        else:
            with pytest.raises((ValueError, OSError)):
                read(skip_bad=True)
