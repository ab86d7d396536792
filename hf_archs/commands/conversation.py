"""A conversation with a model through its chat template, of which no token is read twice."""

import dataclasses
import json
import os
import time
from typing import Any

import jinja2
import torch
from transformers import PreTrainedTokenizerBase, set_seed

from hf_archs.cache import ArchDynamicCache, StateCache, stored
from hf_archs.cache.call import NAME
from hf_archs.cache.prefixes import common_prefix
from hf_archs.data import text
from hf_archs.errors import reason


@dataclasses.dataclass(frozen=True)
class Turn:
    """A message and its answer; the tokens are kept as their difference from those of the turn before.

    Attributes:
        message: the user's text.
        answer: the model's text with its special tokens, without the end token.
        common: number of first tokens that are those of the conversation up to the turn before.
        ids: the tokens after these, up to the end of the answer.
    """

    message: str
    answer: str
    common: int
    ids: list[int]


@dataclasses.dataclass
class Counts:
    """Tokens of prompts that the model has read, and tokens that it has written, each with its seconds.

    Attributes:
        again: tokens among ``read`` that stand where the model had read before: the chat template rendered earlier
            turns differently, or the state before them was dropped.
    """

    read: int = 0
    again: int = 0
    written: int = 0
    reading: float = 0.0
    writing: float = 0.0


class Conversation:
    """Messages and answers, the tokens that the model has read and written, and the states at the ends of turns.

    The tokens of an answer stay as generated where encoding its text would give others. If the chat template renders
    earlier turns differently as the conversation grows, the rendered tokens are read from the longest prefix whose
    state is kept.

    Args:
        model: a causal language model of this library, or a PEFT model of one.
        tokenizer: its tokenizer, with a chat template.
        system: the system message; None for none.
        seed: of sampling. An answer depends on the seed and on the number of answers before it, undone ones included.
        max_bytes: upper limit of the bytes of the states that `undo` returns to; the present one is not counted.
        options: further arguments of `generate`.

    Attributes:
        turns: the turns so far.
        counts: the tokens read and written through this object.
        stopping: set to True, from a signal handler or a thread, it ends the answer after the token in computation.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        seed: int = 0,
        max_bytes: int = 2**30,
        **options: Any,
    ):
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template; allowed is one with a template, as "
                "`hf-archs train` makes it and --tokenizer takes it from another checkpoint"
            )
        self.model, self.tokenizer, self.system, self.seed, self.options = model, tokenizer, system, seed, options
        self.turns: list[Turn] = []
        self.counts = Counts()
        self.stopping = False
        self._answers = 0  # undone ones included
        self._states = StateCache(model, max_bytes)
        self._present: tuple[list[int], ArchDynamicCache] | None = None  # the cache after a turn, and its tokens
        ends = model.generation_config.eos_token_id
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation in the form that chat templates take."""
        found = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            found += [{"role": "user", "content": turn.message}, {"role": "assistant", "content": turn.answer}]
        return found

    @property
    def ids(self) -> list[int]:
        """All tokens of the conversation; the model has read all but the last."""
        return _joined(self.turns)

    @property
    def num_bytes(self) -> int:
        """Bytes of the present state; 0 before the first turn and after `undo` and an answer that failed."""
        return 0 if self._present is None else self._present[1].num_bytes()

    def say(self, message: str, streamer: Any = None) -> Turn:
        """Answer a message.

        A call that raises leaves the conversation as it was.

        Args:
            message: the user's text.
            streamer: receives the tokens as `generate` gives them.

        Returns:
            the turn, which is the last of ``turns`` now.

        Raises:
            ValueError: if the chat template refuses the messages.
        """
        before = self.ids
        messages = [*self.messages, {"role": "user", "content": message}]
        prompt = self._encode(messages, before, answering=True)
        # without the beginning of an answer, which some templates write for the last turn alone
        lasting = common_prefix(prompt[:-1], self._encode(messages, before, answering=False))
        ids = torch.tensor([prompt], device=self.model.device)
        self.stopping = False
        began = time.perf_counter()
        cache, start = self._read(ids, lasting)
        read = time.perf_counter()
        set_seed(self.seed + self._answers)
        found = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),  # `generate` would guess one from pad tokens
            past_key_values=cache,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=self.tokenizer.pad_token_id,
            stopping_criteria=[lambda rows, *_, **__: torch.full((len(rows),), self.stopping, device=rows.device)],
            streamer=streamer,
            **self.options,
        )
        self._keep(found[0].tolist(), cache)
        common = common_prefix(before, found[0].tolist())
        answer = found[0, len(prompt) :].tolist()
        self.counts.read += len(prompt) - start
        self.counts.again += max(0, len(before) - 1 - start)
        self.counts.written += len(answer)
        self.counts.reading += read - began
        self.counts.writing += time.perf_counter() - read
        self._answers += 1
        shown = self._decode(answer[:-1] if answer[-1] in self._ends else answer)
        self.turns.append(Turn(message, shown, common, found[0, common:].tolist()))
        return self.turns[-1]

    def undo(self) -> Turn:
        """Take the last turn back, and return it. Raises `ValueError` if there is none."""
        if not self.turns:
            raise ValueError("the conversation has no turn; /undo needs one")
        self._present = None
        return self.turns.pop()

    def save(self, path: str | os.PathLike) -> None:
        """Write the conversation and its state to a file, which `ArchDynamicCache.load` can read too.

        Raises:
            ValueError: before the first turn.
        """
        if not self.turns:
            raise ValueError("the conversation has no turn; /save needs one")
        if self._present is None:
            ids = torch.tensor([self.ids], device=self.model.device)
            self._keep(self.ids, self._states.read(ids))
        assert self._present is not None
        told = {"system": self.system, "answers": self._answers, "turns": [*map(dataclasses.asdict, self.turns)]}
        stored.save(self._present[1], path, self.model, {"conversation": json.dumps(told)})

    def load(self, path: str | os.PathLike) -> None:
        """Go on with the conversation of a file of `save`, in place of this one.

        Args:
            path: a file, or a repository on the Hub with a ``state.safetensors``.

        Raises:
            OSError: if there is no such file.
            ValueError: for a damaged file, another format or version, another model, or a state without a
                conversation; this conversation stays as it was.
        """
        file = stored.find(path)
        cache = ArchDynamicCache(self._states.backbone.config)
        about = stored.load(cache, file, self.model)
        if "conversation" not in about:
            raise ValueError(f"{file} holds a state without a conversation; allowed is a file that /save wrote")
        try:
            told = json.loads(about["conversation"])
            system, answers, turns = told["system"], int(told["answers"]), [Turn(**turn) for turn in told["turns"]]
            ids = _joined(turns)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} holds a damaged conversation ({reason(error)}); allowed is one of /save"
            ) from error
        if len(ids) != cache.get_seq_length() + 1:
            raise ValueError(
                f"{file} holds a conversation of {len(ids)} tokens and a state of {cache.get_seq_length()}; allowed is "
                "one token more than the state has read"
            )
        self.system, self._answers, self.turns = system, answers, turns
        self._keep(ids, cache)

    def _encode(self, messages: list[dict[str, str]], before: list[int], answering: bool) -> list[int]:
        """The tokens of messages, with the beginning of an answer if ``answering``.

        They begin with ``before`` if these tokens are, or spell, the beginning of the rendered messages.
        """
        try:
            rendered: Any = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answering
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        encoded = text.encode(self.tokenizer, rendered)
        spelt = self._decode(before)
        if encoded[: len(before)] != before and rendered.startswith(spelt):
            return before + text.encode(self.tokenizer, rendered[len(spelt) :])
        return encoded

    def _read(self, ids: torch.Tensor, lasting: int) -> tuple[ArchDynamicCache, int]:
        """A cache that has read a prompt except its last token, and the number of tokens that were read before.

        The present state goes into it, since `generate` changes it.

        Args:
            ids: (1, l).
            lasting: number of tokens, less than l, after which the state is kept for another rendering of this turn.
        """
        present, self._present = self._present, None
        if present is None or present[0] != ids[0, : min(lasting, len(present[0]))].tolist():
            start = self._states.known(ids[:, : lasting + 1])
            cache = self._states.read(ids[:, : lasting + 1])
        else:
            start, cache = len(present[0]), present[1]
            self._extend(cache, ids[:, :lasting])
            self._states.keep(ids[:, :lasting], cache)
        self._extend(cache, ids[:, :-1])
        return cache, start

    def _extend(self, cache: ArchDynamicCache, ids: torch.Tensor) -> None:
        """Read the tokens of ``ids``, (1, l), that come after those in the cache."""
        rest = ids[:, cache.get_seq_length() :]
        if rest.shape[1]:
            with torch.no_grad():
                self._states.backbone(rest, use_cache=True, **{NAME: cache})

    def _keep(self, ids: list[int], cache: ArchDynamicCache) -> None:
        """Keep the state of a turn's end, for the next turn and for `undo`."""
        read = ids[: cache.get_seq_length()]
        self._states.keep(torch.tensor([read]), cache)
        self._present = read, cache

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _joined(turns: list[Turn]) -> list[int]:
    """All tokens up to the end of the last turn."""
    found: list[int] = []
    for turn in turns:
        found = found[: turn.common] + turn.ids
    return found
