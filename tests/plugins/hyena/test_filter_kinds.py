"""The contract's promises about states, for every filter type and for several convolutions."""

import dataclasses

import pytest
import torch

import hf_archs
from hf_archs.testing.contract import CacheContract, PackingContract, PaddingContract
from hf_archs.testing.contract.caching import continued
from hf_archs.testing.contract.models import assert_close, lively, logits, tokens
from hf_archs.testing.contract.padding import padded

KINDS = {
    "modal": {"filter_types": ("modal",), "modes": 4},
    "short, medium": {"filter_types": ("short", "medium"), "medium_taps": 40, "filter_group_size": 2},
}


class TestEveryKind(CacheContract, PackingContract, PaddingContract):
    @pytest.fixture(scope="class", params=KINDS)
    @classmethod
    def architecture(cls, request):
        base = hf_archs.get_architecture("hyena")
        return dataclasses.replace(base, tiny={**base.tiny, **KINDS[request.param]})


class TestHigherOrders:
    """In float64: products of three or four gates have rare large values, next to which float32 rounds others."""

    @pytest.fixture(scope="class", params=[3, 4])
    @classmethod
    def model(cls, request):
        architecture = hf_archs.get_architecture("hyena")
        kinds = ("implicit", "modal", "medium")
        config = architecture.tiny_config(order=request.param, filter_types=kinds, num_hidden_layers=3, modes=3)
        return lively(architecture.causal_lm_class, config).double()

    @pytest.mark.parametrize("sizes", [[30], [1] * 30, [7, 1, 15, 7]], ids=str)
    def test_pieces(self, model, sizes):
        ids = tokens(2, 30)
        assert_close(continued(model, ids, sizes), logits(model, ids, use_cache=False), "pieces", 1e-10)

    def test_pads_and_documents(self, model):
        ids, mask = padded([tokens(1, 20)[0]], "interior", 26)
        real = mask[0].bool()
        seq_idx = torch.zeros(1, 26, dtype=torch.int32)
        seq_idx[0, real] = (torch.arange(20) >= 8).int()
        found = logits(model, ids, attention_mask=mask, seq_idx=seq_idx)[0, real]
        for part, document in zip(found.split((8, 12)), tokens(1, 20)[0].split((8, 12))):
            assert_close(part, logits(model, document[None])[0], "document", 1e-10)
