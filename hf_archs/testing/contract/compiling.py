"""torch.compile: one graph without a break for training at any length, and one for decoding."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch._dynamo import lookup_backend
from torch.func import functional_call, jvp
from transformers import CompileConfig

from hf_archs.registry import Architecture
from hf_archs.testing.contract.generation import generate
from hf_archs.testing.contract.models import Contract, assert_all_close, assert_close, gradients, lively, tokens
from hf_archs.testing.contract.padding import padded


def counted(name: str) -> tuple[list[Any], Callable[..., Any]]:
    """A backend of torch.compile that collects its graphs; a function, since configs are copied."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend(name)(graph, inputs)

    return graphs, backend


class CompileContract(Contract):
    """Promises about torch.compile."""

    @pytest.fixture(autouse=True)
    def _no_graphs_from_before(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.fixture
    def small(self, architecture: Architecture) -> Any:
        """A model of one layer, since compilers are slow and treat all layers alike."""
        return lively(architecture.causal_lm_class, architecture.tiny_config(num_hidden_layers=1))

    @pytest.mark.parametrize("batches", ["plain", "padded"])
    def test_one_graph_trains_at_every_length(self, small: Any, batches: str) -> None:
        """Loss and gradients equal the eager model's, and the second and third length compile nothing."""
        small.train()
        eager = copy.deepcopy(small)
        graphs, backend = counted("aot_eager")
        small.compile(backend=backend, fullgraph=True, dynamic=True)
        compiled = []
        for length in (24, 70, 37):
            ids, mask = padded([tokens(1, length)[0], tokens(1, length - 9)[0]], "interior", length)
            inputs = {"input_ids": ids, "labels": ids} | ({} if batches == "plain" else {"attention_mask": mask})
            found, expected = small(**inputs).loss, eager(**inputs).loss
            assert_close(found, expected, f"loss at {length}")
            assert_all_close(gradients(small, found), gradients(eager, expected), f"gradient at {length}")
            compiled.append(len(graphs))  # dynamo may trace one graph twice, so the first is 1 or 2
        assert 0 < compiled[0] == compiled[-1], f"{compiled} graphs after each length"

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, on first use of jvp
    def test_a_compiled_slope(self, small: Any) -> None:
        """`jvp` is the same under torch.compile, where an op without a rule for tangents would drop them silently."""
        fixed = {name: parameter.detach() for name, parameter in small.named_parameters()}
        ids, forwards = tokens(1, 9), cast(Any, jvp)

        def answers(parameters: Any) -> torch.Tensor:
            return functional_call(small, parameters, (ids,), {"use_cache": False}).logits

        def slopes(along: Any) -> torch.Tensor:
            return forwards(answers, (fixed,), (along,))[1]

        assert_close(torch.compile(slopes, backend="eager")(fixed), slopes(fixed), "slope")

    def test_compiled_static_decoding(self, small: Any) -> None:
        """`generate` with a static cache compiles its step once, for any number of tokens and for later calls."""
        graphs, backend = counted("inductor")
        compiled: Any = CompileConfig(fullgraph=True, backend=backend, mode=None)  # type: ignore[arg-type]
        compiled._compile_all_devices = True
        eager = copy.deepcopy(small)
        counts = []
        for length, new in ((11, 24), (7, 9)):
            prompt = tokens(2, length)
            options = {"cache_implementation": "static", "compile_config": compiled, "max_new_tokens": new}
            assert torch.equal(generate(small, prompt, **options), generate(eager, prompt, max_new_tokens=new))
            counts.append(len(graphs))
        assert 0 < counts[0] == counts[1] <= 2, f"{counts} graphs after each call"
