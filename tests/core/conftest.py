"""Fixtures of several tests of the core."""

import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers.utils.hub
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_archs.training import add_lora


@pytest.fixture(scope="session")
def word_tokenizer():
    """A tokenizer of 64 tokens: numbers as words, and special tokens."""
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk", "mask")}
    words = {word: i for i, word in enumerate([*special.values(), *map(str, range(59))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


@pytest.fixture(scope="session")
def client_of():
    """Lets this process's client use a Hub and an empty cache, by LFS, and without waiting before a second attempt."""

    def client_of(hub, cache, patch):
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        url = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
        patch.setattr(transformers.utils.hub, "_hf_api", None)
        patch.setenv("HF_TOKEN", hub.token)
        patch.setenv("HF_HUB_OFFLINE", "0")  # PEFT reads it itself
        impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
        patch.setattr(_http, "time", impatient)
        patch.setattr(file_download, "time", impatient)

    return client_of


@pytest.fixture(scope="session")
def lora_of():
    """Makes an adapter that changes the logits, for a model with a name on the Hub."""

    def lora_of(model, name):
        adapted = add_lora(model)
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter)
        adapted.peft_config["default"].base_model_name_or_path = name
        return adapted.eval()

    return lora_of
