"""A training step saves memory in proportion to the length for its backward, and no state per token."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_archs

# a state per token would be larger than all else that these save
WIDE_STATES = {"mamba": {"state_size": 256}, "mamba2": {"state_size": 256, "n_groups": 1}}


def kept_bytes(model, length):
    """Bytes of the distinct storages that the graph of one training step holds on to, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(3, 128, (1, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, labels=ids, use_cache=False).loss
        total = sum(storage.nbytes() for storage in storages.values())
        loss.backward()
    return total


@pytest.mark.parametrize("name", hf_archs.architectures())
def test_linear_and_no_state_per_token(name):
    config = hf_archs.get_architecture(name).tiny_config(**WIDE_STATES.get(name, {}))
    model = AutoModelForCausalLM.from_config(config).train()
    short, middle, long = (kept_bytes(model, length) for length in (256, 512, 1024))
    assert long - middle <= 2.02 * (middle - short)
    if name in WIDE_STATES:
        recurrent = next(s for s in config.layer_plan(0).states().values() if s.kind == "recurrent")
        state = config.num_hidden_layers * 4 * math.prod(recurrent.shape)
        assert (long - middle) / 512 < state / 4
