"""Models as functions of tensors alone, as `torch.export.export` and `torch.onnx.export(..., dynamo=True)` take them.

Rows and tokens may be dynamic: a graph that was made with one number of them is right with any other.

Letters in shapes: b batch, l length, v vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.export import Dim

from hf_archs.cache import ArchDynamicCache, States
from hf_archs.parts import StateSpec


class Logits(nn.Module):
    """A language model from token ids to logits.

    Args:
        model: one with a language-model head, causal or masked.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids (b, l) and a mask of the real ones (b, l), or None for all, to logits (b, l, v)."""
        return self.model(input_ids, attention_mask=attention_mask, **_plain(self.model)).logits


class Step(nn.Module):
    """A causal language model from tokens, and the states before them, to logits, and the states after them.

    Of one token it is a step of a decoder, of more the beginning of a prompt or more of it. The first tokens begin with
    `empty` states. Tensors are named by ``input_names`` and ``output_names``, in the order in which an exported graph
    takes and gives them: ``input_ids`` and every ``past.layers.<i>.<state>``, ``logits`` and every
    ``present.layers.<i>.<state>``.

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
            states: by the names of ``specs``, shapes as there, after the batch. A last dimension of None is as long as
                what was read before.
            attention_mask: the real ones of these tokens, (b, l), or None for all.

        Returns:
            logits (b, l, v), and the states after these tokens by the same names.
        """
        cache = ArchDynamicCache(self.model.config)
        cache.load_state_dict({**states, "length": 0})  # type: ignore[dict-item]  # no tensor, whose value no graph knows
        output = self.model(
            input_ids, attention_mask=attention_mask, past_key_values=cache, **{**_plain(self.model), "use_cache": True}
        )
        return output.logits, dict(cache.held())

    def empty(self, batch: int, columns: int = 0) -> States:
        """The states before the first token, with so many columns where they grow."""
        dtype, device = self.model.dtype, self.model.device
        shapes = {name: [columns if n is None else n for n in spec.shape] for name, spec in self.specs.items()}
        return {
            name: torch.zeros(batch, *shapes[name], dtype=spec.dtype or dtype, device=device)
            for name, spec in self.specs.items()
        }

    def example(self, tokens: int | None = 1) -> dict[str, Any]:
        """Keyword arguments to export with: ``tokens`` of two rows, or None for any number of them."""
        ids = torch.zeros(2, tokens or 7, dtype=torch.int64, device=self.model.device)
        return {"input_ids": ids, "states": self.empty(2, columns=5)}

    def dynamic_shapes(self, tokens: int | None = 1) -> dict[str, Any]:
        """Which dimensions of `example` may be others in the exported graph."""
        batch, columns, length = Dim("batch"), Dim("columns", min=0), Dim("length")
        ids = {0: batch} | ({1: length} if tokens is None else {})
        states = {
            name: {0: batch} | ({len(spec.shape): columns} if spec.grows else {}) for name, spec in self.specs.items()
        }
        return {"input_ids": ids, "states": states}


def _plain(model: Any) -> dict[str, Any]:
    """Arguments that keep a forward to its logits."""
    return {"use_cache": False} | ({"output_router_logits": False} if model.base_model.has_routers else {})
