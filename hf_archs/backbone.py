"""The one backbone: pre-norm blocks over registered mixers, and the heads.

Letters in shapes: b batch, l length, d hidden size, v vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.generation import GenerationMode
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import auto_docstring, can_return_tuple, is_tracing, logging
from transformers.utils.output_capturing import capture_outputs

from hf_archs import conversion
from hf_archs.cache import ArchDynamicCache, ArchStaticCache, RecurrentCache, Slot, adopt
from hf_archs.configuration import ArchConfig
from hf_archs.errors import CheckFailed
from hf_archs.kernels.numerics import below_autograd, wide
from hf_archs.norm import NORMS
from hf_archs.registry import get_feed_forward, get_mixer
from hf_archs.sharing import SiteLinear, share_layers

logger = logging.get_logger(__name__)


class Layout(NamedTuple):
    """Where the real tokens and the documents of a batch are.

    Mixers see every row with its real tokens first and its pads last: ``order`` brings a row into that order,
    ``restore`` takes it back, ``lengths`` counts the real tokens. All None where nothing is padded.
    """

    order: torch.Tensor | None = None  # (b, l)
    restore: torch.Tensor | None = None  # (b, l)
    lengths: torch.Tensor | None = None  # (b,)
    seq_idx: torch.Tensor | None = None  # (b, l), in mixer order: the document of each token

    @classmethod
    def build(cls, mask: torch.Tensor | None, seq_idx: torch.Tensor | None) -> Layout:
        """From a mask of real tokens ``(b, l)`` and document numbers ``(b, l)``."""
        if mask is None:
            return cls(seq_idx=seq_idx)
        order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)
        restore = torch.argsort(order, dim=1)
        return cls(order, restore, mask.sum(1), None if seq_idx is None else seq_idx.gather(1, order))

    def mask(self) -> torch.Tensor | None:
        """The real tokens in the user's order, ``(b, l)`` bool; None where nothing is padded."""
        if self.restore is None or self.lengths is None:
            return None
        return self.restore < self.lengths[:, None]


def _permute(hidden_states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    if index is None:
        return hidden_states
    return hidden_states.gather(1, index.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))


class AttentionWeights(nn.Identity):
    """Sees the weights of a layer's attention in the user's order, and transformers records them from it.

    (b, heads, l, columns): the last l columns are the tokens of this forward, and before them are earlier ones. (A
    static cache has as many columns as it has room, each position at its own place; behind them stand the tokens of a
    forward that is padded or packed.) What a memory or global tokens in the cache are given is left out.
    """


class ArchBlock(GradientCheckpointingLayer):
    """One layer: ``x + mixer(norm(x))`` and ``x + feed_forward(norm(x))``, as far as the plan has them.

    A mixer is called as ``mixer(hidden_states, state=slot, lengths=lengths, seq_idx=seq_idx)`` with real tokens
    first in every row; ``slot`` (a `hf_archs.cache.Slot`, or None without a cache) holds the states it continues.

    A feed-forward is called as ``feed_forward(hidden_states)``. One with a router has an attribute ``routes``; it is
    called with ``mask=``, the real tokens ``(b, l)`` or None, and gives a vector of statistics beside its output.
    """

    def __init__(self, config: ArchConfig, layer_idx: int):
        super().__init__()
        plan = config.layer_plan(layer_idx)
        self.layer_idx = layer_idx
        self.bidirectional = config.bidirectional
        self.residual_in_fp32 = config.residual_in_fp32
        self.sites: list[tuple[int, list[SiteLinear]]] = []  # see `share_layers`
        self.mixer = self.feed_forward = None
        self.norm = NORMS[config.norm_type](config.hidden_size, config.norm_eps)  # of whatever comes first
        self.attention_weights: AttentionWeights | None = None
        if plan.mixer is not None:
            self.mixer = get_mixer(plan.mixer).module_class(plan.mixer_config)
            if _attentions(self.mixer):
                self.attention_weights = AttentionWeights()
        if plan.feed_forward is not None:
            if plan.mixer is not None:
                self.feed_forward_norm = NORMS[config.norm_type](config.hidden_size, config.norm_eps)
            self.feed_forward = get_feed_forward(plan.feed_forward).module_class(plan.feed_forward_config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: Layout,
        past_key_values: RecurrentCache | None = None,
        output_attentions: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """``(b, l, d)`` to the same; beside it the statistics of the feed-forward's router where it has one.

        (A flat pair of tensors: activation checkpointing in its older form follows no others.)
        """
        for site, linear in self.sites:
            for layer in linear:
                layer.site = site
        residual = wide(hidden_states) if self.residual_in_fp32 else hidden_states
        if self.mixer is not None:
            state = None if past_key_values is None else past_key_values.slot(self.layer_idx)
            residual = residual + self._mix(self.norm(residual), layout, state, output_attentions)
        if self.feed_forward is None:
            return residual
        normed = (self.norm if self.mixer is None else self.feed_forward_norm)(residual)
        if not hasattr(self.feed_forward, "routes"):
            return residual + self.feed_forward(normed)
        output, statistics = self.feed_forward(normed, mask=layout.mask())
        return residual + output, statistics

    def _mix(
        self, hidden_states: torch.Tensor, layout: Layout, state: Slot | None, output_attentions: bool
    ) -> torch.Tensor:
        assert self.mixer is not None
        order, restore, lengths, seq_idx = layout
        recorder = self.attention_weights
        shown = _attentions(self.mixer) if output_attentions and recorder is not None else []
        for attention in shown:
            total = None if state is None or state.cache.is_static else state.cache.get_seq_length()
            attention.show = partial(_show, recorder=recorder, layout=layout, total=total)
        mixed = self.mixer(_permute(hidden_states, order), state=state, lengths=lengths, seq_idx=seq_idx)
        mixed = _permute(mixed, restore)
        for attention in shown:
            attention.show = None
        if self.bidirectional:
            # the same mixer from right to left: reversed rows keep their real tokens first
            flipped = None if order is None else _reverse_real(order, lengths)
            back = (
                flipped
                if flipped is not None
                else torch.arange(hidden_states.shape[1] - 1, -1, -1, device=hidden_states.device).expand(
                    hidden_states.shape[:2]
                )
            )
            if seq_idx is not None:
                seq_idx = _reverse_real(seq_idx, lengths) if lengths is not None else seq_idx.flip(1)
            backward = self.mixer(_permute(hidden_states, back), state=None, lengths=lengths, seq_idx=seq_idx)
            mixed = mixed + _permute(backward, torch.argsort(back, dim=1))
        mask = layout.mask()
        return mixed if mask is None else mixed.masked_fill(~mask.unsqueeze(-1), 0.0)


def _attentions(mixer: nn.Module) -> list[Any]:
    """The modules of a mixer that can show what they attend to."""
    return [module for module in mixer.modules() if hasattr(module, "show")]


def _show(weights: torch.Tensor, recorder: Any, layout: Layout, total: int | None) -> torch.Tensor:
    """Weights (b, h, l, columns) of real tokens first, shown in the user's order, and as they were: gradients pass.

    ``total`` is the number of all positions so far, where there may be fewer columns, of the last ones, or more, of
    nothing.
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


def _reverse_real(rows: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Reverse the first ``lengths`` entries of each row of ``(b, l)`` and leave the rest."""
    assert lengths is not None
    position = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    return rows.gather(1, torch.where(position < lengths[:, None], lengths[:, None] - 1 - position, position))


class ArchPreTrainedModel(PreTrainedModel):
    """Base of every model class of this library."""

    config_class = ArchConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ArchBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = False  # the cache can roll back, so assisted decoding works
    _can_compile_fullgraph = True
    _supports_sdpa = True
    # states, decays and step biases, which every mixer keeps in a submodule of this name; what balances routers
    _keep_in_fp32_modules_strict = ["ssm", "e_score_correction_bias"]
    _can_record_outputs = {"hidden_states": ArchBlock}

    def post_init(self) -> None:
        super().post_init()
        # whoever reads the list may rely on every name in it to stand for something in this model
        names = {part for name in self.state_dict() for part in name.split(".")}
        kept: Any = set(self._keep_in_fp32_modules_strict or ()) & names
        self._keep_in_fp32_modules_strict = kept

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers passes over modules without parameters of their own (mixers, blocks) in code outside of it, lest
        # they overwrite what was loaded; ours all use `transformers.initialization`, which never does
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        own = getattr(module, "init_weights", None)
        if own is not None and not isinstance(module, PreTrainedModel):
            own()
        if isinstance(module, ArchBlock) and self.config.rescale_prenorm_residual:
            # modules are initialised children first, so the projections have their plain values here
            plans = map(self.config.layer_plan, range(self.config.num_hidden_layers))
            additions = sum((plan.mixer is not None) + (plan.feed_forward is not None) for plan in plans)
            for name, parameter in module.named_parameters():
                if name.endswith(("out_proj.weight", "down_proj.weight", "experts.down_proj")):
                    init.normal_(parameter, std=self.config.initializer_range / math.sqrt(additions))

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers looks for the call in the module of the class, and ours stand in mixers

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.config_class.base_model_ep_plan is not None  # a class of configs without one has no experts

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As in transformers, with our own experts where nobody asks for others."""
        if requested_experts is None and self._can_set_experts_implementation() and "hf_archs" in ALL_EXPERTS_FUNCTIONS:
            return "hf_archs"
        return super().get_correct_experts_implementation(requested_experts)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers; native checkpoints are read as well, see `hf_archs.conversion`.

        Raises:
            ValueError: for a checkpoint of another architecture, or an option that ours cannot represent.
            CheckFailed: a RuntimeError, where a tensor has another shape than the config asks for.
            SafetensorError: where a weights file is corrupt or truncated.
        """
        native = conversion.prepare(cls, pretrained_model_name_or_path, kwargs)
        try:
            loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            # transformers has put the names into a table and not into the error
            kwargs |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
            name, found, expected = min(loaded[1]["mismatched_keys"])
            raise CheckFailed(
                f"{name} has shape {tuple(found)} in {pretrained_model_name_or_path}, and its config asks for "
                f"{tuple(expected)}; allowed is a checkpoint that fits its config"
            ) from error
        except SafetensorError as error:
            raise SafetensorError(
                f"the weights of {pretrained_model_name_or_path} are corrupt or truncated ({error}); "
                "restore them from where they came"
            ) from error
        if native is not None:
            # transformers would save under the names it has read
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model._weight_conversions = get_model_conversion_mapping(model)
        return loaded

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do: the stub that is always saved serves every Auto class."""


@dataclass
class ArchModelOutput(BaseModelOutputWithPast):
    """What the backbone gives.

    Attributes:
        router_statistics: for each layer with a router the statistics of this forward, where they were asked for.
    """

    router_statistics: tuple[torch.Tensor, ...] | None = None


@dataclass
class ArchCausalLMOutput(CausalLMOutputWithPast):
    """What the causal language model gives in training where layers have routers.

    Attributes:
        aux_loss: the routers' own losses, which are part of ``loss``.
    """

    aux_loss: torch.Tensor | None = None


class ArchModel(ArchPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: ArchConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ArchBlock(config, i) for i in range(config.num_hidden_layers))
        self._tied_weights_keys = share_layers(self.layers, [config.layer_plan(i) for i in range(len(self.layers))])
        self.norm = NORMS[config.norm_type](config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Parameters of layers that share a module, and those of the first such layer, which files hold alone.

        (In transformers untied embeddings untie everything.)
        """
        return dict(self._tied_weights_keys or {})

    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        output_router_statistics: bool = False,
        **kwargs: Any,
    ) -> ArchModelOutput:
        r"""
        seq_idx (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            The number of the document that each token belongs to: several documents packed into one row stay apart.
        cu_seq_lens_q (`torch.Tensor` of shape `(documents + 1,)`, *optional*):
            Where the documents of a single packed row begin and end.
        output_router_statistics (`bool`, *optional*):
            Whether to return what the routers of the layers counted, for the losses that balance their load.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache is None:  # transformers' merge_with_config_defaults takes 20 microseconds a token for it
            use_cache = self.config.use_cache
        if self.config.embedding_multiplier != 1.0:
            inputs_embeds = inputs_embeds * self.config.embedding_multiplier
        asked = kwargs.get("output_attentions", self.config.output_attentions)
        output_attentions = bool(asked) and any(layer.attention_weights is not None for layer in self.layers)
        if output_attentions:
            implementation = self.config._attn_implementation
            if implementation != "eager":
                logger.warning_once(
                    f"output_attentions: attention is computed by {implementation!r}, which has no weights to show; "
                    "call set_attn_implementation('eager') for them"
                )
        if self.config.bidirectional:
            if past_key_values is not None:
                raise ValueError("a bidirectional model has no cache: every token depends on those after it")
            use_cache = False
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None
        if past_key_values is not None:
            past_key_values = adopt(past_key_values, self.config)
        elif use_cache:
            past_key_values = ArchDynamicCache(self.config)

        length = inputs_embeds.shape[1]
        mask = _real_tokens(attention_mask, length)
        # positions restart after left pads and differ from zero in a continuation too: they mark documents only alone
        alone = attention_mask is None and (past_key_values is None or past_key_values.batch_size < 0)
        seq_idx = _documents(seq_idx, cu_seq_lens_q, position_ids if alone else None, inputs_embeds)
        if past_key_values is not None:
            past_key_values.begin(length, mask, inputs_embeds.device)
        layout = Layout.build(mask, seq_idx)

        hidden_states: Any = inputs_embeds
        statistics: list[torch.Tensor] = []
        with below_autograd() if length == 1 else contextlib.nullcontext():
            for layer in self.layers:
                hidden_states = layer(
                    hidden_states, layout, past_key_values=past_key_values, output_attentions=output_attentions
                )
                if isinstance(hidden_states, tuple):
                    hidden_states, counted = hidden_states
                    statistics.append(counted)
        return ArchModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
            router_statistics=tuple(statistics) if output_router_statistics else None,
        )

    def auxiliary_loss(self, statistics: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sum of the routers' own losses, from the statistics of one forward, those of one config together."""
        routers: list[Any] = [layer.feed_forward for layer in self.layers if hasattr(layer.feed_forward, "routes")]
        groups: dict[int, tuple[Any, list[torch.Tensor]]] = {}
        for router, counted in zip(routers, statistics, strict=True):
            groups.setdefault(id(router.config), (router, []))[1].append(counted)
        return torch.stack([router.auxiliary_loss(counted) for router, counted in groups.values()]).sum()


def _real_tokens(attention_mask: Any, length: int) -> torch.Tensor | None:
    """The mask of real tokens in this segment, ``(b, length)`` bool; None where no token is padding.

    generate hands compiled forwards a dict with a mask for each layer type; masks of other ranks are attention's.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("linear_attention")
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    mask = attention_mask[:, -length:].bool()
    if mask.shape[1] < length:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns for {length} new tokens; allowed are {length} or more"
        )
    if not is_tracing(mask) and bool(mask.all()):
        return None  # outside a graph, spare an unpadded batch the sorting
    return mask


def _documents(
    seq_idx: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
) -> torch.Tensor | None:
    """The document of each token, ``(b, l)``, from whichever of the three signals is there, in this order."""
    batch, length = inputs_embeds.shape[:2]
    if seq_idx is not None:
        if seq_idx.shape != (batch, length):
            raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}; allowed is {(batch, length)}")
        return seq_idx
    if cu_seq_lens is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens describes one packed row, but the batch has {batch}; pass seq_idx instead")
        positions = torch.arange(length, device=inputs_embeds.device)
        return torch.bucketize(positions, cu_seq_lens[1:].to(positions), right=True).unsqueeze(0)
    if position_ids is not None and position_ids.ndim == 2 and position_ids.shape[1] == length:
        restarts = torch.zeros_like(position_ids)
        restarts[:, 1:] = (position_ids[:, 1:] != position_ids[:, :-1] + 1).to(restarts.dtype)
        if not is_tracing(restarts) and not bool(restarts.any()):
            return None
        return restarts.cumsum(1).expand(batch, length)
    return None


def _share_of_batch(labels: Any, kwargs: dict[str, Any]) -> torch.Tensor | float:
    """What part of the step's predicted tokens are here; 1 unless the Trainer says how many the step has.

    The Trainer adds up the losses of a step's batches as they are, so their means must be weighed.
    """
    items = kwargs.get("num_items_in_batch")
    if items is None:
        return 1.0
    targets = kwargs.get("shift_labels")
    return ((labels[:, 1:] if targets is None else targets) != -100).sum() / items


class ArchForCausalLM(ArchPreTrainedModel, GenerationMixin):
    """The backbone with a language-model head.

    Concrete classes name `GenerationMixin` in their bases once more: transformers looks for it there.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan: dict[str, Any] = {"lm_head": (["hidden_states"], ["logits"])}
    _model_class: type[ArchModel]

    def __init__(self, config: ArchConfig):
        super().__init__(config)
        if config.bidirectional:
            raise ValueError(
                "bidirectional is True, but a causal language model reads from left to right; allowed is False"
            )
        self.model = self._model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if isinstance(past_key_values, RecurrentCache) and isinstance(logits_to_keep, int):
            # assisted decoding keeps the logits of all candidates, and takes back no more than those and one
            past_key_values.rollback_window = max(logits_to_keep, 1) + 1
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_statistics=self.training and labels is not None,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = {
            "loss": loss,
            "logits": logits,
            "past_key_values": outputs.past_key_values,
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
        }
        if not outputs.router_statistics:
            return CausalLMOutputWithPast(**output)
        auxiliary = self.model.auxiliary_loss(outputs.router_statistics)
        output["loss"] = loss + auxiliary * _share_of_batch(labels, kwargs)
        return ArchCausalLMOutput(**output, aux_loss=auxiliary)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return True  # whatever the class is called: transformers looks for other families' names in it

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """The cache for `generate`: handed in, static, dynamic or offloaded.

        Raises:
            ValueError: where a layer cannot generate, or the cache asked for cannot be made.
        """
        for layer in self.model.layers:
            if hasattr(layer.feed_forward, "check_generation"):
                layer.feed_forward.check_generation()
        implementation = generation_config.cache_implementation
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            if implementation is not None:
                raise ValueError(
                    f"cache_implementation={implementation!r} and past_key_values were both passed; allowed is one"
                )
            if not isinstance(cache, Cache):
                raise ValueError(f"past_key_values is a {type(cache).__name__}; allowed is a Cache")
            cache = adopt(cache, self.config)
            if generation_mode != GenerationMode.ASSISTED_GENERATION and not generation_config.is_assistant:
                cache.stop_recording()
            cache._is_user_defined = True  # type: ignore[attr-defined]
            return
        if generation_config.use_cache is False:
            return
        if implementation == "quantized":
            raise ValueError("cache_implementation='quantized' needs keys and values, and a recurrent state has none")
        if implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS:
            length = max(max_cache_length, generation_config.max_cache_len or 0, getattr(self, "_longest_cache", 0))
            self._longest_cache = length  # one size for all calls, so that a shorter one does not compile again
            cache = ArchStaticCache(self.config, max_cache_len=length, offloading="offloaded" in implementation)
            if generation_config.prefill_chunk_size is not None:
                rows = max(generation_config.num_beams, generation_config.num_return_sequences) * batch_size
                cache.early_initialization(rows, 1, 1, self.dtype, self.device)
        else:
            cache = ArchDynamicCache(self.config, offloading=implementation == "offloaded")
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache


class ArchForMaskedLM(ArchPreTrainedModel):
    """The backbone with a masked-language-model head; it reads in both directions."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _model_class: type[ArchModel]

    def __init__(self, config: ArchConfig):
        config = copy.deepcopy(config)  # the caller's own may become a causal model yet
        config.bidirectional = True
        super().__init__(config)
        self.model = self._model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_router_statistics=self.training and labels is not None,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if outputs.router_statistics:
            loss = loss + self.model.auxiliary_loss(outputs.router_statistics)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
