"""Fixtures of several tests of the core."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def word_tokenizer():
    """A tokenizer of 64 tokens: numbers as words, and special tokens."""
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk", "mask")}
    words = {word: i for i, word in enumerate([*special.values(), *map(str, range(59))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)
