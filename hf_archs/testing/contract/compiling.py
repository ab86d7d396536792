"""torch.compile: one graph without a break for training at any length, and one for decoding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig

from hf_archs.testing.contract.generation import generate
from hf_archs.testing.contract.models import Contract, assert_all_close, assert_close, gradients, tokens
from hf_archs.testing.contract.padding import padded


class CompileContract(Contract):
    """Promises about torch.compile."""

    @pytest.fixture(autouse=True)
    def _no_graphs_from_before(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("batches", ["plain", "padded"])
    def test_one_graph_trains_at_every_length(self, model: Any, batches: str) -> None:
        """Loss and gradients are the eager ones, and the second and third length compile nothing."""
        model.train()
        eager = copy.deepcopy(model)
        counter = CompileCounterWithBackend("aot_eager")
        model.compile(backend=counter, fullgraph=True, dynamic=True)
        compiled = []
        for length in (24, 70, 37):
            ids, mask = padded([tokens(1, length)[0], tokens(1, length - 9)[0]], "interior", length)
            inputs = {"input_ids": ids, "labels": ids} | ({} if batches == "plain" else {"attention_mask": mask})
            found, expected = model(**inputs).loss, eager(**inputs).loss
            assert_close(found, expected, f"loss at {length}")
            assert_all_close(gradients(model, found), gradients(eager, expected), f"gradient at {length}")
            compiled.append(counter.frame_count)  # dynamo may trace a graph twice, so the first is 1 or 2
        assert compiled[0] == compiled[-1], f"{compiled} graphs after each length"

    def test_compiled_static_decoding(self, model: Any) -> None:
        """`generate` with a static cache compiles its step once, for any number of tokens and a second call."""
        prompt = tokens(2, 11)
        counter = CompileCounterWithBackend("inductor")
        compiled: Any = CompileConfig(fullgraph=True, backend=counter, mode=None)  # type: ignore[arg-type]
        compiled._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": compiled}
        expected = generate(copy.deepcopy(model), prompt)
        assert torch.equal(generate(model, prompt, **options), expected)
        once = counter.frame_count
        assert once == 1, f"{once} graphs"
        assert torch.equal(generate(model, prompt[:, :7], **options, max_new_tokens=9)[:, :7], prompt[:, :7])
        assert counter.frame_count == once, "the second call compiled again"
