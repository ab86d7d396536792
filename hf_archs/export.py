"""Models as functions of tensors, for `torch.export.export` and `torch.onnx.export(..., dynamo=True)`.

Batch and length may be dynamic: a graph that is exported with one size is right for any other.

Letters in shapes: b batch, l length, v vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.export import Dim

from hf_archs.cache import ArchDynamicCache, States
from hf_archs.parts import StateSpec


class Logits(nn.Module):
    """A language model as a function from token ids to logits.

    Args:
        model: a causal or masked language model.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids (b, l), and a mask (b, l) of real tokens or None, to logits (b, l, v)."""
        return self.model(input_ids, attention_mask=attention_mask, **_logits_only(self.model, use_cache=False)).logits


class Step(nn.Module):
    """A causal language model as a function from tokens and states to logits and new states.

    One token is a decode step; several are a prefill, or a chunk of one. The first call takes the `empty` states.

    Attributes:
        input_names: ``input_ids`` and every ``past.layers.<i>.<state>``, in the order of an exported graph's inputs.
        output_names: ``logits`` and every ``present.layers.<i>.<state>``, in the order of its outputs.
        specs: the specification of every state, by name.

    Args:
        model: a causal language model.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.specs: dict[str, StateSpec] = ArchDynamicCache(model.config).specs()
        self.input_names = ["input_ids", *(f"past.{name}" for name in self.specs)]
        self.output_names = ["logits", *(f"present.{name}" for name in self.specs)]

    def forward(
        self, input_ids: torch.Tensor, states: States, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, States]:
        """
        Args:
            input_ids: (b, l).
            states: the states before these tokens, (b, *shape) by the names and shapes in ``specs``. The last dimension
                of a growing state has a column for each earlier position.
            attention_mask: (b, l), the real tokens among these; None without padding.

        Returns:
            Logits (b, l, v), and the states after these tokens by the same names.
        """
        cache = ArchDynamicCache(self.model.config)
        # an int, since a graph does not know the value of a tensor
        cache.load_state_dict({**states, "length": 0})  # type: ignore[dict-item]
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            **_logits_only(self.model, use_cache=True),
        )
        return output.logits, dict(cache.held())

    def empty(self, batch: int, columns: int = 0) -> States:
        """The states before the first token; growing states have ``columns`` columns of zeros."""
        dtype, device = self.model.dtype, self.model.device
        shapes = {name: [columns if n is None else n for n in spec.shape] for name, spec in self.specs.items()}
        return {
            name: torch.zeros(batch, *shapes[name], dtype=spec.dtype or dtype, device=device)
            for name, spec in self.specs.items()
        }

    def example(self, tokens: int | None = 1) -> dict[str, Any]:
        """Example arguments for the export, with two rows of ``tokens``; None for a dynamic number of tokens."""
        ids = torch.zeros(2, tokens or 7, dtype=torch.int64, device=self.model.device)
        return {"input_ids": ids, "states": self.empty(2, columns=5)}

    def dynamic_shapes(self, tokens: int | None = 1) -> dict[str, Any]:
        """The dynamic dimensions of the arguments of `example`."""
        batch, columns, length = Dim("batch"), Dim("columns", min=0), Dim("length")
        ids = {0: batch} | ({1: length} if tokens is None else {})
        states = {
            name: {0: batch} | ({len(spec.shape): columns} if spec.grows else {}) for name, spec in self.specs.items()
        }
        return {"input_ids": ids, "states": states}


def _logits_only(model: Any, use_cache: bool) -> dict[str, Any]:
    """Arguments with which a forward returns no router logits, and no cache unless ``use_cache``."""
    return {"use_cache": use_cache} | ({"output_router_logits": False} if model.base_model.has_routers else {})
