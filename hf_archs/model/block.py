"""One layer: a mixer and a feed-forward, each with a norm before it and a residual connection.

Letters in shapes: b batch, l length, d hidden size.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_archs.cache import RecurrentCache
from hf_archs.cache.call import during
from hf_archs.config.model import ArchConfig
from hf_archs.kernels.numerics import wide
from hf_archs.layers.masks import Pairs
from hf_archs.layers.norm import NORMS
from hf_archs.model.layout import Layout, inverse, permute, reverse_real
from hf_archs.model.sharding import Shardable
from hf_archs.parts import RoutedFeedForward
from hf_archs.registry import get_feed_forward, get_mixer


class AttentionWeights(nn.Identity):
    """Receives a layer's attention weights, (b, heads, l, columns), in the user's order; transformers records them.

    The last l columns are the tokens of this forward, after those of earlier tokens. (With a static cache the columns
    are those of its buffer, column i for position i, followed by the tokens of this forward if it is padded or packed.)
    Extra columns, of a memory or of global tokens in the cache, are left out.
    """


class ArchBlock(Shardable, GradientCheckpointingLayer):
    """One layer: ``x + mixer(norm(x))``, then ``x + feed_forward(norm(x))``; a plan may omit either.

    Its mixer is a `hf_archs.parts.TokenMixer`, its feed-forward a module over the hidden states or a
    `hf_archs.parts.RoutedFeedForward`.
    """

    def __init__(self, config: ArchConfig, layer_idx: int):
        super().__init__()
        plan = config.layer_plan(layer_idx)
        self.layer_idx = layer_idx
        self.bidirectional = config.bidirectional
        self.residual_in_fp32 = config.residual_in_fp32
        self.sites: dict[str, int] = {}  # the site of each part shared with other layers, see `share_layers`
        self.mixer = self.feed_forward = None
        self.norm = NORMS[config.norm_type](config.hidden_size, config.norm_eps)  # of the first part
        self.attention_weights: AttentionWeights | None = None
        if plan.mixer is not None:
            self.mixer = get_mixer(plan.mixer).module_class(plan.mixer_config)
            if any(entry.shows_weights for entry, _ in plan.mixers()):
                self.attention_weights = AttentionWeights()
        if plan.feed_forward is not None:
            if plan.mixer is not None:
                self.feed_forward_norm = NORMS[config.norm_type](config.hidden_size, config.norm_eps)
            self.feed_forward = get_feed_forward(plan.feed_forward).module_class(plan.feed_forward_config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: Layout,
        cache: RecurrentCache | None = None,
        output_attentions: bool = False,
        count: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(b, l, d)`` to the same; with ``count``, also the statistics and logits of the router, if there is one.

        (A flat tuple, since reentrant activation checkpointing tracks no nested tensors.)
        """
        residual = wide(hidden_states) if self.residual_in_fp32 else hidden_states
        if self.mixer is not None:
            with self._site("mixer"):
                residual = residual + self._mix(self.norm(residual), layout, cache, output_attentions)
        if self.feed_forward is None:
            return residual
        normed = (self.norm if self.mixer is None else self.feed_forward_norm)(residual)
        with self._site("feed_forward"):
            if not isinstance(self.feed_forward, RoutedFeedForward):
                return residual + self.feed_forward(normed)
            output, statistics, logits = self.feed_forward(normed, mask=layout.mask(), count=count)
        return (residual + output, statistics, logits) if count else residual + output

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As in torch, without parts that an earlier layer has too.

        Tools that recurse over children, such as torchao's ``quantize_``, would convert those twice. (`named_modules`
        lists a shared module once.)
        """
        return ((name, child) for name, child in super().named_children() if not self.sites.get(name))

    def _site(self, part: str) -> contextlib.AbstractContextManager:
        site = self.sites.get(part, 0)
        return during(site=site) if site else contextlib.nullcontext()

    def _mix(
        self, hidden_states: torch.Tensor, layout: Layout, cache: RecurrentCache | None, output_attentions: bool
    ) -> torch.Tensor:
        assert self.mixer is not None
        order, restore, lengths, seq_idx, pairs = layout
        state = None if cache is None else cache.slot(self.layer_idx)
        recorder = self.attention_weights
        recording: contextlib.AbstractContextManager = contextlib.nullcontext()
        if output_attentions and recorder is not None:
            total = None if cache is None or cache.is_static else cache.get_seq_length()
            recording = during(show=partial(_show, recorder=recorder, layout=layout, total=total))
        forwards = pairs if pairs is None or not self.bidirectional else pairs.in_direction(backwards=False)
        with recording, _using(forwards):
            mixed = self.mixer(permute(hidden_states, order), state=state, lengths=lengths, seq_idx=seq_idx)
        mixed = permute(mixed, restore)
        if self.bidirectional:
            # the same mixer from right to left: reversed rows keep their real tokens first
            shape = hidden_states.shape[:2]
            order = torch.arange(shape[1], device=hidden_states.device).expand(shape) if order is None else order
            back = reverse_real(order, lengths)
            seq_idx = None if seq_idx is None else reverse_real(seq_idx, lengths)
            with _using(pairs if pairs is None else pairs.in_direction(backwards=True)):
                backward = self.mixer(permute(hidden_states, back), state=None, lengths=lengths, seq_idx=seq_idx)
            mixed = mixed + permute(backward, inverse(back))
        mask = layout.mask()
        return mixed if mask is None else mixed.masked_fill(~mask.unsqueeze(-1), 0.0)


def _using(pairs: Pairs | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if pairs is None else during(pairs=pairs)


def _show(weights: torch.Tensor, recorder: Any, layout: Layout, total: int | None) -> torch.Tensor:
    """Show weights (b, h, l, columns) to ``recorder`` in the user's order; returns its output in mixer order.

    ``total`` is the number of positions so far, or None: the shown weights are padded or cut on the left to as many
    columns. Gradients pass through.
    """
    length, missing = weights.shape[2], 0 if total is None else total - weights.shape[3]
    shown = nn.functional.pad(weights, (missing, 0))
    mask = layout.mask()
    if mask is None or layout.order is None or layout.restore is None:
        return nn.functional.pad(recorder(shown), (-missing, 0))

    def ordered(w: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        before, here = w.gather(2, index[:, None, :, None].expand_as(w)).tensor_split([w.shape[3] - length], 3)
        return torch.cat([before, here.gather(3, index[:, None, None].expand_as(here))], 3)

    shown = ordered(shown, layout.restore).masked_fill(~mask[:, None, :, None], 0)
    return nn.functional.pad(ordered(recorder(shown), layout.order), (-missing, 0))
