"""Text for training and evaluation: documents, the held-out rule, tokenizers, bits per byte.

A corpus is a dict from the name of a document to its text. A document is held out of training if the sha256 of its name
is divisible by 20, so the held-out documents are the same on every machine.

Letters in shapes: b batch, l length, v vocabulary.
"""

import hashlib
import importlib
import math
import sysconfig
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

T = TypeVar("T")
Corpus = dict[str, str]
Progress = Callable[[int, int], object]  # called with (done, total)

END_OF_TEXT = "<|endoftext|>"  # begins every document, and so ends the one before
PAD = "<|pad|>"  # not the end of text: labels of pads are masked, and a model must learn where its answer ends
ROLES = ("system", "user", "assistant")  # of messages; each begins with a token of its own, <|user|>
SPECIAL_TOKENS = (END_OF_TEXT, PAD, *(f"<|{role}|>" for role in ROLES))
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # every byte
# no character between a special token and a message: it could merge with the message's first one
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role not in ("system", "user", "assistant") -%}
{{- raise_exception("role is " ~ message.role ~ "; allowed are system, user and assistant") -}}
{%- endif -%}
{{- "<|" ~ message.role ~ "|>" -}}
{%- if message.role == "assistant" -%}
{%- generation -%}{{- message.content ~ eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- message.content -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant|>" -}}{%- endif -%}"""
PIECE = 8192  # characters of a piece of a single file
# folders of the standard library that hold tests, other packages, or text unlike its source
NOT_LIBRARY = frozenset(["test", "idlelib", "pydoc_data", "lib2to3", "site-packages", "dist-packages"])


def read_text_files(
    folder: Path, skip: frozenset[str] = frozenset(), left_out: dict[str, None] | None = None
) -> Corpus:
    """The text files (UTF-8, no zero byte) below ``folder``, by relative path; ``skip`` names top-level folders.

    Args:
        left_out: takes the first place that is no UTF-8 in each file without a zero byte.
    """
    corpus = {}
    below = [path for top in folder.iterdir() if top.name not in skip for path in (top, *top.rglob("*"))]
    for path in sorted(below):
        name = path.relative_to(folder)
        if not path.is_file():
            continue
        with path.open("rb") as file:
            content = file.read(8192)
            if b"\0" in content:  # a binary file: the rest need not be read
                continue
            content += file.read()
        if b"\0" not in content:
            try:
                corpus[name.as_posix()] = content.decode()
            except UnicodeDecodeError as error:
                if left_out is not None:
                    left_out[f"line {_line_of(error)} of {str(path)!r}"] = None
    return corpus


def standard_library() -> Corpus:
    """The source of this interpreter's standard library, without its tests and IDLE."""
    return read_text_files(Path(sysconfig.get_path("stdlib")), NOT_LIBRARY)


def python_topics() -> Corpus:
    """English text: the topics of the interpreter's ``help()``."""
    return dict(importlib.import_module("pydoc_data.topics").topics)


OURS: dict[str, Callable[[], Corpus]] = {"stdlib": standard_library, "topics": python_topics}


def read_corpus(data: str, left_out: dict[str, None] | None = None) -> Corpus:
    """`read_documents`, a single document cut into pieces, so that some can be held out."""
    corpus = read_documents(data, left_out)
    return _pieces(*corpus.popitem()) if len(corpus) == 1 else corpus


def read_documents(data: str, left_out: dict[str, None] | None = None) -> Corpus:
    """Read the documents of plain text.

    Args:
        data: ``stdlib`` (`standard_library`), ``topics`` (`python_topics`), or the path of a UTF-8 text file or of a
            folder of text files, each of them a document.
        left_out: see `read_text_files`.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if there is no text.
    """
    path = Path(data).expanduser()
    if data in OURS:
        corpus = OURS[data]()
    elif path.is_dir():
        corpus = read_text_files(path, left_out=left_out)
    else:
        corpus = {path.name: _read(path)}
    corpus = {name: text for name, text in corpus.items() if text}
    if not corpus:
        raise ValueError(f"data is {data!r}, which holds no text; allowed is UTF-8 text")
    return corpus


def _line_of(error: UnicodeDecodeError) -> int:
    return error.object.count(b"\n", 0, error.start) + 1


def _read(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"line {_line_of(error)} of {str(path)!r}: it is not UTF-8: it has the byte 0x{content[error.start]:02x}"
        ) from error


def _pieces(name: str, text: str) -> Corpus:
    """Cut a single document into pieces, so that some can be held out."""
    size = max(1, min(PIECE, len(text) // 20))
    return {f"{name}#{i}": text[i : i + size] for i in range(0, len(text), size)}


def is_held_out(name: str) -> bool:
    """Whether the document of this name is held out for evaluation."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0


def split(corpus: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """The documents (or others) of these names for training, and the held-out ones.

    If the rule holds out no document or every document, the one with the smallest sha256 is held out.

    Raises:
        ValueError: if there are fewer than two documents.
    """
    if len(corpus) < 2:
        raise ValueError(f"the data has {len(corpus)} document; two are needed, one of them to measure with")
    held_out = {name for name in corpus if is_held_out(name)}
    if not held_out or len(held_out) == len(corpus):
        held_out = {min(corpus, key=lambda name: hashlib.sha256(name.encode()).hexdigest())}
    return (
        {name: text for name, text in corpus.items() if name not in held_out},
        {name: text for name, text in corpus.items() if name in held_out},
    )


def sample(corpus: Mapping[str, str], size: int, longest: int = 4 * PIECE) -> Corpus:
    """A sample of at most ``size`` characters from the whole corpus, the same on every machine.

    Documents are taken in the order of the sha256 of their names, each up to ``longest`` characters, and the last one
    is cut where ``size`` is reached. Short beginnings would be no fair sample: licences and imports are harder to
    predict than the rest.
    """
    chosen: Corpus = {}
    for name in sorted(corpus, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if size <= 0:
            break
        chosen[name] = corpus[name][: min(longest, size)]
        size -= len(chosen[name])
    return chosen


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer (Sennrich et al. 2016) on bytes, as in GPT-2, which can encode any text.

    ``<|endoftext|>``, with id 0, is the bos and eos token, and ``<|pad|>`` the pad token. Calling the tokenizer puts
    the bos token before the text, so that a prompt begins like a document of `token_blocks`; the chat template puts it
    before a conversation, and the eos token after each answer.

    Raises:
        ValueError: if ``vocab_size`` has no room for all bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size is {vocab_size}; allowed are {SMALLEST_VOCABULARY} (every byte, and special tokens) or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT}:1 $B:1",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=[*SPECIAL_TOKENS[2:]],
        chat_template=CHAT_TEMPLATE,
    )


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of the text, without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before the first token of a document: bos or else eos. Raises `ValueError` if there is neither."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError("the tokenizer has neither a bos_token nor an eos_token; one of them must begin a document")


def begin(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a document: a start token, and those of the text."""
    return [start_token(tokenizer), *encode(tokenizer, text)]


def token_blocks(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], length: int, progress: Progress | None = None
) -> Dataset:
    """Join all documents into one stream, each after a start token, and cut it into blocks of ``length`` tokens.

    Args:
        progress: called after each document with the number of characters encoded, and of all.

    Returns:
        a dataset of ``input_ids`` and ``labels``. The last block is dropped if it is shorter and not the only one.
    """
    texts = list(texts)
    characters, total = 0, sum(map(len, texts))

    def documents() -> Iterator[list[int]]:
        nonlocal characters
        for text in texts:
            yield begin(tokenizer, text)
            characters += len(text)
            if progress is not None:
                progress(characters, total)

    blocks = np.stack([*joined(documents(), length)])
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def joined(documents: Iterable[list[int]], length: int) -> Iterator[np.ndarray]:
    """Join the tokens of documents into one stream, and cut it into blocks of ``length`` tokens, int32.

    The last block is dropped if it is shorter and not the only one.
    """
    stream = array("i")
    whole = False
    for tokens in documents:
        stream.extend(tokens)
        whole = whole or len(stream) >= length
        end = len(stream) // length * length
        yield from np.array(stream[:end], dtype=np.int32).reshape(-1, length)
        del stream[:end]
    if stream and not whole:
        yield np.array(stream, dtype=np.int32)


def _batches(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


@dataclass(frozen=True)
class Measured:
    """The total loss of a text, in nats, and its sizes."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Per token: it compares models of one tokenizer only."""
        return math.exp(min(self.loss, 700.0))  # e to the 710 is no float

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of UTF-8, which compares all models."""
        return self.nats / math.log(2) / self.bytes


def bits_per_byte(model: Any, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], **options: Any) -> float:
    """The total loss of a causal language model in bits, divided by the bytes of UTF-8; see `measure`."""
    return measure(model, tokenizer, texts, **options).bits_per_byte


def measure(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    batch_size: int = 8,
    chunk: int = 512,
    progress: Progress | None = None,
) -> Measured:
    """The total loss of a causal language model on texts.

    Each text is read from an empty context, after a start token, so its first token counts too. Long texts are read in
    chunks with a cache: the context of a token is all the text before it.

    Args:
        model: a causal language model of transformers, or a PEFT model.
        batch_size: texts in a batch; only the speed depends on it.
        chunk: tokens of a text in one forward; only the speed depends on it.
        progress: called after each chunk with the number of tokens measured, and of all.
    """
    texts = [text for text in texts if text]
    rows = [(tokens := begin(tokenizer, text), tokens) for text in texts]
    size = sum(len(text.encode()) for text in texts)
    return measure_rows(model, rows, size, batch_size=batch_size, chunk=chunk, progress=progress)


@torch.no_grad()
def measure_rows(
    model: Any,
    rows: Iterable[tuple[list[int], list[int]]],
    size: int,
    *,
    batch_size: int = 8,
    chunk: int = 512,
    progress: Progress | None = None,
) -> Measured:
    """The total loss of a causal language model on rows of tokens, each from an empty context; see `measure`.

    Args:
        rows: the tokens of each, and its labels, of which -100 is not measured, nor is the first.
        size: bytes of text of the measured tokens.
    """
    nats = 0.0
    was_training = model.training
    model.eval()
    longest_first = sorted(rows, key=lambda row: len(row[0]), reverse=True)
    measured, total = 0, sum(label != -100 for _, labels in longest_first for label in labels[1:])
    for batch in _batches(longest_first, batch_size):
        lengths = torch.tensor([len(tokens) - 1 for tokens, _ in batch])
        padded, labels = (
            nn.utils.rnn.pad_sequence([torch.tensor(row[i]) for row in batch], batch_first=True, padding_value=pad)
            for i, pad in ((0, 0), (1, -100))
        )  # (b, l + 1)
        cache = None
        for begin in range(0, int(lengths[0]), chunk):
            active = int((lengths > begin).sum())  # the shorter rows have ended
            if cache is not None and active < lengths.shape[0]:
                cache.batch_select_indices(torch.arange(active, device=model.device))
            lengths, padded, labels = lengths[:active], padded[:active], labels[:active]
            seen = torch.arange(min(begin + chunk, padded.shape[1] - 1))
            mask = (seen < lengths[:, None]).long()
            inputs = padded[:, begin : len(seen)]
            targets = labels[:, begin + 1 : len(seen) + 1]
            output = model(
                input_ids=inputs.to(model.device),
                attention_mask=mask.to(model.device),
                past_key_values=cache,
                use_cache=True,
            )
            logits = output.logits.float().flatten(0, 1)  # (b * l, v)
            nats += F.cross_entropy(logits, targets.flatten().to(logits.device), reduction="sum").item()
            cache = output.past_key_values
            measured += int((targets != -100).sum())
            if progress is not None:
                progress(measured, total)
    model.train(was_training)
    return Measured(nats, measured, size)
