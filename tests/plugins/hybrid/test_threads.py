"""Every published pattern generates in several threads at once."""

import threading

import pytest
import torch

from hf_archs.testing.contract.generation import generate
from hf_archs.testing.contract.models import lively, tokens
from hf_archs_hybrid import ArchHybridForCausalLM, preset
from hf_archs_hybrid.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_threads(name):
    """With a layer that is shared, each has parts for every place where it stands."""
    model = lively(ArchHybridForCausalLM, preset(name, hidden_size=64, vocab_size=128))
    prompts = [tokens(1, 5 + i, seed=i) for i in range(4)]
    expected = [generate(model, prompt, max_new_tokens=12) for prompt in prompts]
    found = {}

    def run(i):
        found[i] = [generate(model, prompts[i], max_new_tokens=12) for _ in range(2)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, expected[i]) for i in range(4) for one in found[i])
