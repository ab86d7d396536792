"""Whole models on a real GPU: the same logits and gradients as on the CPU, and compiled static decoding."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_archs

pytestmark = pytest.mark.gpu


@pytest.fixture(params=hf_archs.architectures())
def models(request):
    config = hf_archs.get_architecture(request.param).tiny_config(initializer_range=0.2)
    on_cpu = AutoModelForCausalLM.from_config(config)
    return on_cpu, copy.deepcopy(on_cpu).cuda()


def test_equals_cpu(models):
    on_cpu, on_gpu = models
    ids = torch.randint(3, 128, (2, 300))
    expected, got = on_cpu(ids, labels=ids), on_gpu(ids.cuda(), labels=ids.cuda())
    expected.loss.backward()
    got.loss.backward()
    torch.testing.assert_close(got.logits.cpu(), expected.logits, rtol=1e-4, atol=1e-4)
    for (name, p), q in zip(on_gpu.named_parameters(), on_cpu.parameters()):
        difference = (p.grad.cpu() - q.grad).abs().max() / q.grad.abs().max()
        assert difference < 1e-3, name


def test_generates_the_same_tokens(models):
    on_cpu, on_gpu = models
    ids = torch.randint(3, 128, (2, 20))
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = on_cpu.generate(ids, **options)
    assert torch.equal(on_gpu.generate(ids.cuda(), **options).cpu(), expected)
    assert torch.equal(on_gpu.generate(ids.cuda(), cache_implementation="static", **options).cpu(), expected)
