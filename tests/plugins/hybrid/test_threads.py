"""Every published pattern generates in several threads at once."""

import pytest
import torch

from hf_archs.testing.contract.generation import generate, generate_in_threads
from hf_archs.testing.contract.models import lively, tokens
from hf_archs_hybrid import ArchHybridForCausalLM, preset
from hf_archs_hybrid.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_threads(name):
    """A shared layer has a low-rank part for each of its positions."""
    model = lively(ArchHybridForCausalLM, preset(name, hidden_size=64, vocab_size=128))
    prompts = [tokens(1, 5 + i, seed=i) for i in range(4)]
    expected = [generate(model, prompt) for prompt in prompts]
    for i, found in enumerate(generate_in_threads(model, prompts, 1)):
        assert torch.equal(found[0], expected[i]), f"thread {i}"
