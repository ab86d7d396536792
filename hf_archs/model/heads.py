"""The heads over the backbone.

Letters in shapes: b batch, l length, d hidden size, v vocabulary.
"""

from __future__ import annotations

import copy
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import auto_docstring, can_return_tuple

from hf_archs.cache import ArchDynamicCache, ArchStaticCache, RecurrentCache
from hf_archs.cache.call import NAME, OLD_NAME, call, during
from hf_archs.config.model import ArchConfig
from hf_archs.model.backbone import ArchModel, _given_cache
from hf_archs.model.outputs import ArchCausalLMOutput, ArchMaskedLMOutput, ArchModelOutput
from hf_archs.model.pretrained import ArchPreTrainedModel


def _with_router_losses(
    model: ArchModel, outputs: ArchModelOutput, loss: torch.Tensor | None, targets: torch.Tensor | None, items: Any
) -> dict[str, Any]:
    """The output fields that depend on routers: ``loss``, ``aux_loss`` and ``router_logits``.

    Args:
        loss: the loss of the predictions, or None.
        targets: the labels behind ``loss``; -100 is ignored.
        items: number of targets in all batches of an optimizer step, if the Trainer gives it. The Trainer then sums the
            losses of the batches, so the routers' loss is weighted by the share of this batch.
    """
    if not outputs.router_statistics:
        return {"loss": loss}
    auxiliary, added = model.auxiliary_losses(outputs.router_statistics)
    if loss is not None and targets is not None:
        share = 1.0 if items is None else (targets != -100).sum() / items
        loss = loss + (added * share).to(loss.device)
    return {"loss": loss, "aux_loss": auxiliary, "router_logits": outputs.router_logits}


class ArchForCausalLM(ArchPreTrainedModel, GenerationMixin):
    """The backbone with a language-model head.

    Subclasses must repeat `GenerationMixin` among their bases, where transformers looks for it.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
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
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> ArchCausalLMOutput:
        r"""
        cache ([`~cache_utils.Cache`], *optional*):
            The states after the previous tokens. In training no cache is made unless ``use_cache=True``.
        past_key_values ([`~cache_utils.Cache`], *optional*):
            The same, under its name in transformers up to 5.23.
        output_router_logits (`bool`, *optional*):
            Whether to return the logits and the loss of the routers, and to add that loss to ``loss``; None for the
            config's value, which is True unless a converted checkpoint has another.
        """
        kwargs |= kwargs.pop("kwargs", {})  # as in the backbone
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_router_statistics=None,
            kept_logits=logits_to_keep,
            past_key_values=past_key_values,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = targets = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            targets = kwargs.get("shift_labels")
            targets = labels[:, 1:] if targets is None else targets
        return ArchCausalLMOutput(
            **_with_router_losses(self.model, outputs, loss, targets, kwargs.get("num_items_in_batch")),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{NAME: getattr(outputs, NAME)},
        )

    @wraps(GenerationMixin.generate)
    def generate(  # type: ignore[override]  # by the types of 5.23
        self: Any, *args: Any, cache: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        """As in transformers, with the cache under either name, and no router logits unless requested."""
        given = _given_cache(cache, past_key_values, self.config)
        if given is not None:
            kwargs[NAME] = given
        if self.model.has_routers:
            kwargs.setdefault("output_router_logits", False)  # they cost time at each step
        layers = self.config.num_hidden_layers
        try:
            with during(generating=True, drawn=0):
                return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            # `assistant_early_exit` of transformers lowers it for drafts, and a failing draft does not restore it
            if self.config.num_hidden_layers != layers:
                self.config.num_hidden_layers = layers

    @wraps(GenerationMixin._update_model_kwargs_for_generation)
    def _update_model_kwargs_for_generation(  # type: ignore[override]
        self: Any, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        before = model_kwargs.get("attention_mask")
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if before is not None:
            call.drawn += updated["attention_mask"].shape[1] - before.shape[1]
        return updated

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(  # type: ignore[override]
        self: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, with the cache also under its old name, where PEFT looks for it."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        if NAME in inputs:
            inputs[OLD_NAME] = inputs[NAME]
        return inputs

    def _assisted_decoding(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._assisted_decoding(*args, **kwargs)  # type: ignore[misc]
        finally:  # else a cache that outlives the call would record all later tokens
            if isinstance(kwargs.get(NAME), RecurrentCache):
                kwargs[NAME].stop_recording()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse continuous batching (``generate_batch``, and the server of transformers).

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"continuous batching (generate_batch) keeps pages of keys and values, and a {type(self).__name__} has "
            "states in a cache of its own; allowed is generate, with a batch at a time"
        )

    @staticmethod
    def create_masks_for_generate(
        config: Any, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor | None:
        """The columns of `generate`'s mask for these tokens; None for a single token.

        (A single token is real, or its output is not used.)
        """
        length = inputs_embeds.shape[1]
        return None if attention_mask is None or length == 1 else attention_mask[:, -length:]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return True  # transformers would decide by the class name, which may contain another family's

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Set the cache of `generate` in ``model_kwargs``: the given one, or a static, dynamic or offloaded one.

        Raises:
            ValueError: if a layer cannot generate, or the requested cache cannot be made.
        """
        for router in self.model.routers().values():
            router.check_generation()
        mask = model_kwargs.get("attention_mask")
        if generation_config.prefill_chunk_size is not None and mask is not None and bool((mask > 1).any()):
            raise ValueError(
                f"attention_mask numbers documents, and prefill_chunk_size is {generation_config.prefill_chunk_size}, "
                "which may cut between two of them; allowed is None"
            )
        implementation = generation_config.cache_implementation
        cache = model_kwargs.get(NAME)
        if cache is not None:
            if implementation is not None:
                raise ValueError(f"cache_implementation={implementation!r} and {NAME} were both passed; allowed is one")
            cache.forget_derived()  # the weights may have changed since the last call
            if generation_mode != GenerationMode.ASSISTED_GENERATION and not generation_config.is_assistant:
                cache.stop_recording()
            cache._is_user_defined = True  # type: ignore[attr-defined]
            return
        if generation_config.use_cache is False:
            return
        if implementation == "quantized":
            raise ValueError(
                "cache_implementation='quantized' is for keys and values alone, and this model keeps states in a cache "
                "of its own; allowed are dynamic, offloaded and static"
            )
        if implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS:
            length = max(max_cache_length, generation_config.max_cache_len or 0, getattr(self, "_longest_cache", 0))
            self._longest_cache = length  # the largest so far, so that a shorter call does not compile again
            cache = ArchStaticCache(self.config, max_cache_len=length, offloading="offloaded" in implementation)
            if generation_config.prefill_chunk_size is not None:
                rows = max(generation_config.num_beams, generation_config.num_return_sequences) * batch_size
                cache.early_initialization(rows, 1, 1, self.dtype, self.device)
        else:
            cache = ArchDynamicCache(self.config, offloading=implementation == "offloaded")
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[NAME] = cache


class ArchForMaskedLM(ArchPreTrainedModel):
    """The backbone, bidirectional, with a masked-language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    _pp_plan: dict[str, Any] = {"lm_head": (["hidden_states"], ["logits"])}
    _model_class: type[ArchModel]

    def __init__(self, config: ArchConfig):
        config = copy.deepcopy(config)  # the caller may use it for a causal model
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
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> ArchMaskedLMOutput:
        r"""
        output_router_logits (`bool`, *optional*):
            Whether to return the logits and the loss of the routers, and to add that loss to ``loss``; None for the
            config's value.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_router_logits=output_router_logits,
            output_router_statistics=None,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return ArchMaskedLMOutput(
            **_with_router_losses(self.model, outputs, loss, labels, kwargs.get("num_items_in_batch")),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ArchForSequenceClassification(GenericForSequenceClassification, ArchPreTrainedModel):
    """The backbone with a classification head on the last token of a row."""


class ArchForTokenClassification(GenericForTokenClassification, ArchPreTrainedModel):
    """The backbone with a classification head on every token."""


class ArchForQuestionAnswering(GenericForQuestionAnswering, ArchPreTrainedModel):
    """The backbone with a head for the start and the end of an answer."""
