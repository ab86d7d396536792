"""Tokens and labels of rows, and training rows made of them: rows of text joined, others side by side in a block."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hf_archs.data import text
from hf_archs.data.rows import Row, Rows

IGNORED = -100
MEASURED = {"text": "text", "completion": "completions", "messages": "answers"}


class Example(NamedTuple):
    """The tokens of a row, and its labels: the tokens to learn, and -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    """Raise `ValueError` if a tokenizer cannot mark the beginnings, the ends or the answers of such rows."""
    if kind != "messages":
        text.start_token(tokenizer)
    if kind == "completion" and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, which must end a completion")
    if kind == "messages":
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template, which messages need; a tokenizer made here has one")
        if not (_marks_answers(tokenizer) or tokenizer.is_fast):
            raise ValueError(
                f"the tokenizer is a {type(tokenizer).__name__}, without places of tokens in the text, and the chat "
                "template does not mark the answers; allowed is a fast tokenizer, or a template with {% generation %}"
            )


def _marks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    return re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template)) is not None


def example(tokenizer: PreTrainedTokenizerBase, row: Row, rows: Rows) -> Example:
    """The tokens and labels of a row; they begin as a prompt does in generation.

    - text: a start token (`text.start_token`) and the text; all of it is learnt.
    - completion: a start token, the prompt, the completion and the eos token; the last two are learnt.
    - messages: the chat template's. The answers are learnt, as the template marks them with ``{% generation %}``; of a
      template without marks, each answer up to its end token.

    Raises:
        ValueError: if the chat template refuses the messages, or no answer is found in them.
    """
    if rows.kind == "messages":
        try:
            tokens, answers = (_marked if _marks_answers(tokenizer) else _located)(tokenizer, row["messages"])
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        if not any(answers):
            raise ValueError("the chat template marks no answer in it")
        return Example(tokens, [token if answer else IGNORED for token, answer in zip(tokens, answers)])
    if rows.kind == "completion":
        prompt = text.begin(tokenizer, row["prompt"])
        completion = [*text.encode(tokenizer, row["completion"]), tokenizer.eos_token_id]
        return Example(prompt + completion, [IGNORED] * len(prompt) + completion)
    tokens = text.begin(tokenizer, row[rows.columns[0]])
    return Example(tokens, tokens)


def _marked(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """The tokens of messages, and a 1 for each token that the chat template marks as a part of an answer."""
    found: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], found["assistant_masks"]


def _located(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """As `_marked`. An answer begins where the prompt before it ends, which is rendered alone, and ends with its turn,
    without white space.

    Raises:
        ValueError: if the template renders a turn differently once others follow, as templates do that drop thoughts.
    """

    def rendered(number: int, answering: bool = False) -> str:
        first: Any = messages[:number]
        return str(tokenizer.apply_chat_template(first, tokenize=False, add_generation_prompt=answering))

    whole, places = rendered(len(messages)), []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = rendered(number, answering=True), rendered(number + 1)
            if not (whole.startswith(after) and after.startswith(before)):
                raise ValueError(
                    "the chat template does not mark its answers, and renders a turn differently once others follow; "
                    "allowed is a template with {% generation %} and {% endgeneration %} around the answers"
                )
            places.append((len(before), len(after.rstrip())))
    found: Any = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    answers = [any(start <= first < last <= end for start, end in places) for first, last in found["offset_mapping"]]
    return found["input_ids"], answers


def examples(rows: Rows, tokenizer: PreTrainedTokenizerBase, longest: int | None = None) -> Iterator[Example]:
    """The tokens and labels of each row; a row with more than ``longest`` tokens is refused, and not cut."""
    check_tokenizer(tokenizer, rows.kind)
    for number, row in rows:
        try:
            found = example(tokenizer, row, rows)
        except ValueError as error:
            rows.refuse(number, str(error))
            continue
        if longest is not None and len(found.input_ids) > longest:
            rows.refuse(number, f"it has {len(found.input_ids)} tokens, and block_size is {longest}")
        else:
            yield found


def packed(found: Iterable[Example], length: int, pad: int) -> Iterator[dict[str, list[int]]]:
    """Put rows side by side, whole and in their order, into blocks of ``length`` tokens.

    Args:
        found: rows of at most ``length`` tokens.
        pad: the token at the end of a block that has room for no further row.

    Returns:
        blocks of ``input_ids``, ``labels`` (-100 at the first token of a row, which no token predicts, and at pads),
        ``attention_mask`` (0 at pads) and ``seq_idx``, the number of the row in its block.
    """
    block: list[Example] = []
    size = 0
    for row in found:
        if size + len(row.input_ids) > length:
            yield _block(block, length, pad)
            block, size = [], 0
        block.append(row)
        size += len(row.input_ids)
    if block:
        yield _block(block, length, pad)


def _block(rows: list[Example], length: int, pad: int) -> dict[str, list[int]]:
    tokens = [token for row in rows for token in row.input_ids]
    labels = [label for row in rows for label in (IGNORED, *row.labels[1:])]
    numbers = [number for number, row in enumerate(rows) for _ in row.input_ids]
    pads = length - len(tokens)
    return {
        "input_ids": tokens + [pad] * pads,
        "labels": labels + [IGNORED] * pads,
        "attention_mask": [1] * len(tokens) + [0] * pads,
        "seq_idx": numbers + [len(rows)] * pads,
    }


@dataclass
class Found:
    """Sizes of rows that were encoded.

    Attributes:
        rows, tokens, learnt: numbers of rows, of their tokens, and of the tokens to learn.
    """

    rows: int = 0
    tokens: int = 0
    learnt: int = 0

    def counting(self, found: Iterable[Example]) -> Iterator[Example]:
        """The same examples, each of which is counted."""
        for row in found:
            self.rows += 1
            self.tokens += len(row.input_ids)
            self.learnt += sum(label != IGNORED for label in row.labels)
            yield row


def blocks(rows: Rows, tokenizer: PreTrainedTokenizerBase, length: int, found: Found) -> Iterator[dict[str, list[int]]]:
    """Training rows of ``length`` tokens: rows of text joined and cut (`text.joined`), others `packed`.

    Args:
        found: counts the rows.

    Raises:
        ValueError: if a row is wrong, or is no text and longer than ``length``, and is not left out; if there is none.
    """
    if rows.kind == "text":
        for block in text.joined((row.input_ids for row in found.counting(examples(rows, tokenizer))), length):
            yield {"input_ids": block.tolist(), "labels": block.tolist()}
    else:
        pad = text.start_token(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        yield from packed(found.counting(examples(rows, tokenizer, length)), length, pad)
    _check_any(rows, found)


def _check_any(rows: Rows, found: Found) -> None:
    if not found.rows:
        raise ValueError(f"data is {rows.source!r}, of which every row was left out; allowed is one row or more")


def training_rows(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, length: int, found: Found
) -> Dataset | IterableDataset:
    """The `blocks` as a dataset; a single block ends with its last token."""
    made = partial(blocks, rows, tokenizer, length, found)
    if rows.streamed:
        return IterableDataset.from_generator(made)
    table = [{name: np.asarray(values, dtype=np.int32) for name, values in block.items()} for block in made()]
    columns = {name: np.stack([block[name] for block in table]) for name in table[0]}
    if len(table) == 1 and "attention_mask" in columns:
        columns = {name: values[:, : columns["attention_mask"].sum()] for name, values in columns.items()}
    return Dataset.from_dict(columns)


def measure(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    found: Found,
    *,
    most: int | None = None,
    chunk: int = 512,
) -> text.Measured:
    """The total loss of a causal language model on the tokens to learn of each row; its bytes are those of their text.

    Args:
        found: counts the rows.
        most: characters of text after which the text is cut, and bytes to learn after which no other row is read.
        chunk: see `text.measure`.

    Raises:
        ValueError: if a row is wrong, and not left out, or if there is none.
    """
    size = math.inf if most is None else most
    texts: list[str] = []
    chosen: list[Example] = []
    written = 0
    if rows.kind == "text":
        texts = [*up_to(size, rows.texts())]
        found.rows += len(texts)
    else:
        for row in found.counting(examples(rows, tokenizer)):
            chosen.append(row)
            learnt = [label for label in row.labels if label != IGNORED]
            written += len(str(tokenizer.decode(learnt, skip_special_tokens=True)).encode())
            if written >= size:
                break
    _check_any(rows, found)
    if texts:
        return text.measure(model, tokenizer, texts, chunk=chunk)
    return text.measure_rows(model, chosen, written, chunk=chunk)


def up_to(size: float, texts: Iterable[str]) -> Iterator[str]:
    """The texts up to ``size`` characters; the last one is cut there."""
    for document in texts:
        yield document if size >= len(document) else document[: int(size)]
        size -= len(document)
        if size <= 0:
            return


def described(rows: Rows, count: int, measured: int | None, learnt: str = "") -> str:
    """A line on the data.

    Args:
        count: number of rows; a stream has none.
        measured: number of rows to measure with; None if nothing is measured.
        learnt: the tokens to learn from, in words; see `to_learn`.
    """
    documents = rows.names is not None
    columns = "" if documents else f" with {' and '.join(rows.columns)}"
    line = f"{rows.source}: {'a stream of' if rows.streamed else f'{count:,}'} {'documents' if documents else 'rows'}"
    line += columns + learnt
    if measured is not None:
        line += f"; {measured:,} to measure with"
    return f"{line}; {left_out(rows)}" if rows.left_out else line


def to_learn(rows: Rows, found: Found) -> str:
    """The tokens to learn from, in words for `described`."""
    learnt = "all tokens" if rows.kind == "text" else f"the {MEASURED[rows.kind]}"
    if rows.streamed:
        return f", learnt from {learnt}"
    share = "" if rows.kind == "text" else f", {found.learnt:,} of them learnt from"
    return f" to learn from {learnt}, {found.tokens:,} tokens{share}"


def left_out(rows: Rows) -> str:
    """The number of rows that were left out, and the places of the first ones."""
    places = [*rows.left_out]
    return f"{len(places):,} left out: {', '.join(places[:3])}{', ...' if len(places) > 3 else ''}"
