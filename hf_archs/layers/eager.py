"""Attention as two matrix products around a softmax, which exposes its weights.

Letters are those of `hf_archs.layers.attention`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_archs.kernels.numerics import cast, full_precision, wide


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    show: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in at least float32, as transformers' ``eager``.

    Args:
        query: (b, h, l, n).
        key, value: (b, k, columns, n).
        attention_mask: (b or 1, 1, l, columns), bool, True for visible columns, or floats that are added to the
            scores; None for causal attention.
        scaling: factor of the scores.
        show: receives the weights and returns the weights to use.

    Returns:
        (b, l, h, n) in the dtype of ``query``, and the weights (b, h, l, columns).
    """
    groups = query.shape[1] // key.shape[1]
    with full_precision(query):
        key, value = (wide(t).repeat_interleave(groups, 1) for t in (key, value))
        scores = wide(query) @ key.mT * scaling
        if attention_mask is None:
            attention_mask = torch.ones_like(scores[:1, :1], dtype=torch.bool).tril()
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, -math.inf)
        else:
            scores = scores + attention_mask
        weights = scores.softmax(-1)
        if show is not None:
            weights = show(weights)
        return cast((weights @ value).transpose(1, 2), query.dtype), weights
