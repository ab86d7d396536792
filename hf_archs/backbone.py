"""The one backbone: pre-norm blocks over registered mixers, and the heads.

Letters in shapes: b batch, l length, d hidden size, v vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.constants import REPOCARD_NAME
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
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from hf_archs import conversion, model_card
from hf_archs.cache import ArchDynamicCache, ArchStaticCache, RecurrentCache, adopt
from hf_archs.call import NAME, NEW_NAME, OLD_NAME, call, during
from hf_archs.configuration import ArchConfig
from hf_archs.kernels.numerics import below_autograd, wide
from hf_archs.masks import Pairs, read_documents, read_mask, read_pairs
from hf_archs.norm import NORMS
from hf_archs.parts import RoutedFeedForward, SelfInitialized
from hf_archs.registry import get_feed_forward, get_mixer
from hf_archs.sharding import Shardable
from hf_archs.sharing import share_layers
from hf_archs.watching import watch_trainers

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
    pairs: Pairs | None = None  # of a mask of four dimensions, beside which there is nothing else

    @classmethod
    def build(cls, mask: torch.Tensor | None, seq_idx: torch.Tensor | None) -> Layout:
        """From a mask of real tokens ``(b, l)`` and document numbers ``(b, l)``."""
        if mask is None:
            return cls(seq_idx=seq_idx)
        # by counting, since ONNX has no stable sort
        real = mask.cumsum(1)
        lengths = real[:, -1]
        restore = torch.where(mask, real, lengths.unsqueeze(1) + (~mask).cumsum(1)) - 1
        order = _inverse(restore)
        return cls(order, restore, lengths, None if seq_idx is None else seq_idx.gather(1, order))

    def mask(self) -> torch.Tensor | None:
        """The real tokens in the user's order, ``(b, l)`` bool; None where nothing is padded."""
        if self.pairs is not None:
            return self.pairs.real
        if self.restore is None or self.lengths is None:
            return None
        return self.restore < self.lengths[:, None]


def _inverse(order: torch.Tensor) -> torch.Tensor:
    """The permutations (b, l) that undo these."""
    return torch.zeros_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))


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


class ArchBlock(Shardable, GradientCheckpointingLayer):
    """One layer: ``x + mixer(norm(x))`` and ``x + feed_forward(norm(x))``, as far as the plan has them.

    Its mixer is a `hf_archs.parts.TokenMixer`, its feed-forward a module over the hidden states or a
    `hf_archs.parts.RoutedFeedForward`.
    """

    def __init__(self, config: ArchConfig, layer_idx: int):
        super().__init__()
        plan = config.layer_plan(layer_idx)
        self.layer_idx = layer_idx
        self.bidirectional = config.bidirectional
        self.residual_in_fp32 = config.residual_in_fp32
        self.sites: dict[str, int] = {}  # of the parts that it shares with other layers, see `share_layers`
        self.mixer = self.feed_forward = None
        self.norm = NORMS[config.norm_type](config.hidden_size, config.norm_eps)  # of whatever comes first
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
        """``(b, l, d)`` to the same; beside it the statistics and the logits of the feed-forward's router where it has
        one and they are asked for.

        (A flat tuple of tensors: activation checkpointing in its older form follows no others.)
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
        """Without the parts that are another layer's: tools that go from child to child would change those twice, as
        torchao's ``quantize_`` does. (Lists of all modules name a shared one once in any case.)
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
        looked_at: contextlib.AbstractContextManager = contextlib.nullcontext()
        if output_attentions and recorder is not None:
            total = None if cache is None or cache.is_static else cache.get_seq_length()
            looked_at = during(show=partial(_show, recorder=recorder, layout=layout, total=total))
        forwards = pairs if pairs is None or not self.bidirectional else pairs.in_direction(backwards=False)
        with looked_at, _following(forwards):
            mixed = self.mixer(_permute(hidden_states, order), state=state, lengths=lengths, seq_idx=seq_idx)
        mixed = _permute(mixed, restore)
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
            with _following(pairs if pairs is None else pairs.in_direction(backwards=True)):
                backward = self.mixer(_permute(hidden_states, back), state=None, lengths=lengths, seq_idx=seq_idx)
            mixed = mixed + _permute(backward, _inverse(back))
        mask = layout.mask()
        return mixed if mask is None else mixed.masked_fill(~mask.unsqueeze(-1), 0.0)


def _following(pairs: Pairs | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if pairs is None else during(pairs=pairs)


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


class ScaledEmbedding(nn.Embedding):
    """An embedding times ``embed_scale``, by which PEFT multiplies its adapters too."""

    def __init__(self, num_embeddings: int, embedding_dim: int, embed_scale: float):
        super().__init__(num_embeddings, embedding_dim)
        self.embed_scale = embed_scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.embed_scale


class ArchPreTrainedModel(Shardable, PreTrainedModel):
    """Base of every model class of this library."""

    config_class = ArchConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ArchBlock"]
    _skip_keys_device_placement = [OLD_NAME, NEW_NAME]
    _is_stateful = False  # the cache can roll back, so assisted decoding works
    _can_compile_fullgraph = True
    _supports_sdpa = True
    _supports_context_parallel = False  # neither states nor padding settled in the backbone can be cut up by rank
    # states, decays and step biases, which every mixer keeps in a submodule of this name; what balances routers
    _keep_in_fp32_modules_strict = ["ssm", "e_score_correction_bias"]

    @property
    def _can_record_outputs(self) -> dict[str, type[nn.Module]]:  # type: ignore[override]
        mixer = getattr(self.config, "mixer_type", None)
        shown = mixer is None or get_mixer(mixer).shows_weights
        return {"hidden_states": ArchBlock, **({"attentions": AttentionWeights} if shown else {})}

    def post_init(self) -> None:
        super().post_init()
        model_card.tag(self)
        # whoever reads the list may rely on every name in it to stand for something in this model
        names = {part for name in self.state_dict() for part in name.split(".")}
        kept: Any = set(self._keep_in_fp32_modules_strict or ()) & names
        self._keep_in_fp32_modules_strict = kept
        # quantisers ask for modules to leave alone, and match their whole names
        states = {name: module for name, module in self.named_modules() if name.rpartition(".")[2] == "ssm"}
        self._keep_in_fp32_modules = {*states, *(self._keep_in_fp32_modules or ())}
        for module in states.values():  # a model that is made in half precision has them wide as well
            if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in module.parameters()):
                module.float()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers passes over modules without parameters of their own (mixers, blocks) in code outside of it, lest
        # they overwrite what was loaded; ours all use `transformers.initialization`, which never does
        super()._initialize_weights(module)

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """As in transformers, which compares weights that a file has under both names; those of layers that share a
        module are one already, and quantised ones cannot be compared.
        """
        if missing_keys is not None:
            weights = dict(self.named_parameters(remove_duplicate=False))
            pairs = self.all_tied_weights_keys.items()
            missing_keys |= {name for name, first in pairs if name in weights and weights[name] is weights.get(first)}
        super().tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """True: the loss takes ``num_items_in_batch``. Every `Trainer` asks this while it is made."""
        watch_trainers()
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SelfInitialized) and not isinstance(module, PreTrainedModel):
            module.init_weights()
        if isinstance(module, ArchBlock) and self.config.rescale_prenorm_residual:
            # modules are initialised children first, so the projections have their plain values here
            plans = self.config.layer_plans()
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
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        checkpoint: conversion.Checkpoint | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; native checkpoints are read as well, see `hf_archs.conversion`.

        Args:
            checkpoint: that of the folder or repository, where the caller has looked at it.

        Raises:
            ValueError: for a checkpoint of another architecture, or an option that ours cannot represent; for weights
                in a pickle, unless ``use_safetensors=False`` asks for them.
            CheckFailed: a RuntimeError, where a tensor has another shape than the config asks for, is missing, or is
                left over (the latter two unless ``output_loading_info=True`` asks for a list of them); see
                `hf_archs.conversion.Reading.check`.
            SafetensorError: where a weights file is corrupt or truncated.
        """
        checkpoint = conversion.prepare(cls, pretrained_model_name_or_path, kwargs, checkpoint)
        with conversion.unpickled(checkpoint, pretrained_model_name_or_path, kwargs) as moved:
            if moved is not None:
                loaded: Any = cls.from_pretrained(moved.source, *model_args, checkpoint=moved, **kwargs)
                model = loaded[0] if isinstance(loaded, tuple) else loaded
                model.config.name_or_path = str(pretrained_model_name_or_path)
                return loaded
        reading = None
        if kwargs.get("state_dict") is None:  # which a caller may have made of some weights alone
            reading = conversion.Reading(
                pretrained_model_name_or_path,
                checkpoint,
                any_shape=kwargs.get("ignore_mismatched_sizes", False),
                reported=kwargs.get("output_loading_info", False),
            )
        try:
            with during(reading=reading):
                loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise SafetensorError(
                f"the weights of {pretrained_model_name_or_path} are corrupt or truncated ({error}); "
                "restore them from where they came"
            ) from error
        if checkpoint is not None and checkpoint.native is not None:
            # transformers would save under the names it has read
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model._weight_conversions = get_model_conversion_mapping(model)
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As in transformers; a card stands beside the weights, unless the folder has one that somebody wrote."""
        path = Path(save_directory) / REPOCARD_NAME
        own = path.read_bytes() if path.is_file() else None
        if own is not None and model_card.is_automatic(own.decode(errors="replace")):
            own = None
        with during(card=own):
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, *args, **kwargs)
        if not is_main_process or os.path.isfile(save_directory):
            return
        if own is not None:
            path.write_bytes(own)  # transformers has written that of the repository over it
        elif not push_to_hub and not getattr(self, "_hf_peft_config_loaded", False):
            model_card.save_card(self, save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # the card there is the repository's, or an empty one of transformers where it has none
        path = Path(working_dir) / REPOCARD_NAME
        if call.card is not None and model_card.is_automatic(path.read_text(encoding="utf-8")):
            path.write_bytes(call.card)
        elif not getattr(self, "_hf_peft_config_loaded", False):
            model_card.save_card(self, working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        super().mark_tied_weights_as_initialized(loading_info)
        # here, before memory is taken for tensors that a wrong config asks for
        if call.reading is not None and getattr(self, "hf_quantizer", None) is None:  # which stores weights in parts
            self._adjust_missing_and_unexpected_keys(loading_info)
            call.reading.check(self, loading_info)

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: where a pipeline would part layers that share weights.
        """
        if mesh_manager is not None and distributed_config.pp_size > 1 and model.base_model._tied_weights_keys:
            raise ValueError(
                f"pp_size is {distributed_config.pp_size}, and layers of this {cls.__name__} share weights, which one "
                "stage of a pipeline would hold and another use; allowed is 1"
            )
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do: the stub that is always saved serves every Auto class."""


class CacheNames:
    """An output of transformers whose cache is found under both of its names, whichever the installed release has."""

    def _replace_old_cache_name(self, key: Any) -> Any:  # which warns, in the release that has it
        return NAME if key in (OLD_NAME, NEW_NAME) else key

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._replace_old_cache_name(key))  # type: ignore[misc]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(self._replace_old_cache_name(key))  # type: ignore[misc]

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(self._replace_old_cache_name(key), default)  # type: ignore[misc]


setattr(CacheNames, OLD_NAME if NAME == NEW_NAME else NEW_NAME, property(lambda output: getattr(output, NAME)))


@dataclass
class ArchModelOutput(CacheNames, BaseModelOutputWithPast):
    """What the backbone gives.

    Attributes:
        router_logits: for each layer with a router its logits ``(b * l, experts)``, where they were asked for.
        router_statistics: for each layer with a router the statistics of this forward, where they were asked for.
    """

    router_logits: tuple[torch.Tensor, ...] | None = None
    router_statistics: tuple[torch.Tensor, ...] | None = None


@dataclass
class ArchCausalLMOutput(CacheNames, CausalLMOutputWithPast):
    """Output of the causal language model, under Mixtral's names. (As a tuple it begins with loss and logits.)

    Attributes:
        aux_loss: the routers' own losses, where their logits were asked for; ``loss`` holds it times the config's
            ``router_aux_loss_coef``.
        router_logits: for each layer with a router its logits ``(b * l, experts)``, where they were asked for.
    """

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class ArchMaskedLMOutput(MaskedLMOutput):
    """Output of the masked language model.

    Attributes:
        aux_loss, router_logits: as those of `ArchCausalLMOutput`.
    """

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


# Arguments of transformers, its Trainer and its tokenizers to any model, beside those that our forwards name. Some
# are read where the loss is computed or outputs are recorded; the others mean nothing here: positions in the cache are
# counted, there is one segment, boundaries of keys and queries are the same, and stop strings are for `generate`.
HOST_ARGUMENTS = frozenset(TransformersKwargs.__optional_keys__) | {
    "return_dict",
    "shift_labels",
    "ignore_index",
    "cache_position",
    "token_type_ids",
    "tokenizer",
    "assistant_tokenizer",
}


def _check_arguments(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Refuse what no host hands to every model: a misspelt argument would have no effect, and nobody would know.

    Raises:
        TypeError: naming the argument.
        ValueError: for ``is_causal`` where the model was made for the other direction.
    """
    for name in arguments:
        if name not in HOST_ARGUMENTS:
            raise TypeError(f"{type(model).__name__}.forward() has no argument {name!r}")
    causal, config = arguments.get("is_causal"), model.config
    if causal is not None and causal == config.bidirectional:
        raise ValueError(
            f"is_causal is {causal}, and the config of this {type(model).__name__} says bidirectional = {not causal}; "
            "allowed is a model that was made for that direction"
        )


def _given_cache(cache: Any, past_key_values: Any, config: Any) -> RecurrentCache | None:
    """The cache, under whichever of its names it was passed, as one of ours: see `adopt`.

    Raises:
        ValueError: where two are passed, or one that was not made for this model.
    """
    if cache is None:
        cache = past_key_values
    elif past_key_values is not None and cache is not past_key_values:
        if not (isinstance(cache, RecurrentCache) and cache.is_empty):
            raise ValueError("cache and past_key_values were both passed, and are names of the same; allowed is one")
        cache = past_key_values  # PEFT puts that of its prefix in the place of the one that `generate` has made
    return None if cache is None else adopt(cache, config)


def _also_without_rows(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A batch of no rows runs as one of pads, of which no row is kept: no mixer has to know it, and every parameter has
    a gradient, zero, which processes that share out rows wait for.

    Raises:
        ValueError: for rows of no tokens; and for no rows beside a cache that has some.
    """

    @wraps(forward)
    def wrapper(self: Any, input_ids: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        if given is None or torch.compiler.is_compiling() or given.numel() > 0:
            return forward(self, input_ids, *args, **kwargs)
        if given.shape[1] == 0:
            raise ValueError(f"the input has shape {tuple(given.shape[:2])}; allowed are rows of one token or more")
        options = inspect.signature(forward).bind(self, input_ids, *args, **kwargs).arguments
        options = {**options.pop("kwargs", {}), **options, "return_dict": True}
        del options["self"]
        cache = _given_cache(options.pop(NEW_NAME, None), options.pop(OLD_NAME, None), self.config)
        if cache is not None:
            options[NAME] = cache
            if cache.batch_size > 0:
                raise ValueError(f"the input has no rows, and the cache holds {cache.batch_size}; allowed is as many")
            cache._map_rows(lambda t: t.new_zeros(1, *t.shape[1:]))
        for name in ("input_ids", "inputs_embeds"):
            if options.get(name) is not None:
                options[name] = torch.cat([options[name], given.new_zeros(1, *given.shape[1:])])
        for name in ("seq_idx", "cu_seq_lens_q", "position_ids"):
            options[name] = None
        options["attention_mask"] = torch.zeros(1, given.shape[1], dtype=torch.bool, device=given.device)
        outputs = forward(self, **options)
        for name, value in outputs.items():
            if isinstance(value, RecurrentCache):
                value.batch_select_indices(torch.zeros(0, dtype=torch.int64))
            elif name != "router_statistics":  # zeros, of the layer
                outputs[name] = value[:0] if isinstance(value, torch.Tensor) else tuple(t[:0] for t in value)
        return outputs if kwargs.get("return_dict", self.config.return_dict) is not False else outputs.to_tuple()

    return wrapper


class ArchModel(ArchPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: ArchConfig):
        super().__init__(config)
        scale, sizes = config.embedding_multiplier, (config.vocab_size, config.hidden_size)
        # in the embedding, since inputs_embeds may be what the stage of a pipeline before this one leaves
        self.embed_tokens = nn.Embedding(*sizes) if scale == 1.0 else ScaledEmbedding(*sizes, scale)
        self.embed_norm = None
        if config.embedding_norm:
            self.embed_norm = NORMS[config.norm_type](config.hidden_size, config.norm_eps)
        self.layers = nn.ModuleList(ArchBlock(config, i) for i in range(config.num_hidden_layers))
        self._tied_weights_keys = share_layers(self.layers, config.layer_plans())
        self.norm = NORMS[config.norm_type](config.hidden_size, config.norm_eps)
        self.has_routers = bool(self.routers())
        self.gradient_checkpointing = False
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Parameters of layers that share a module, and those of the first such layer, which files hold alone.

        (In transformers untied embeddings untie everything.)
        """
        return dict(self._tied_weights_keys or {})

    @_also_without_rows
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        output_router_statistics: bool | None = False,
        past_key_values: Cache | None = None,
        kept_logits: int | torch.Tensor = 1,
        **kwargs: Any,
    ) -> ArchModelOutput:
        r"""
        cache ([`~cache_utils.Cache`], *optional*):
            What the tokens before these left behind. In training none is made unless ``use_cache=True``.
        past_key_values ([`~cache_utils.Cache`], *optional*):
            The same, under the name that transformers had for it to 5.23.
        seq_idx (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            The number of the document that each token belongs to: several documents packed into one row stay apart.
        cu_seq_lens_q (`torch.Tensor` of shape `(documents + 1,)`, *optional*):
            Where the documents of a single packed row begin and end.
        output_router_logits (`bool`, *optional*):
            Whether to return the logits of the routers.
        output_router_statistics (`bool`, *optional*):
            Whether to return what the routers of the layers counted, for the losses that balance their load; None for
            where their logits are asked for.
        kept_logits (`int` or `torch.Tensor`, *optional*, defaults to 1):
            The ``logits_to_keep`` of a head above, for `RecurrentCache.begin`; hidden states are of all tokens.
        """
        kwargs |= kwargs.pop("kwargs", {})  # where transformers' pipelines put what a forward does not name
        _check_arguments(self, kwargs)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        training = self.training and torch.is_grad_enabled()
        if use_cache is None:  # transformers' merge_with_config_defaults takes 20 microseconds a token for it
            # a layer that is run again in the backward, by whatever checkpoints activations, would find its own states
            use_cache = self.config.use_cache and not training
        if self.embed_norm is not None and not isinstance(
            self.embed_tokens, nn.Identity
        ):  # as in a pipeline's later stage
            inputs_embeds = self.embed_norm(inputs_embeds)
        asked = kwargs.get("output_attentions", self.config.output_attentions)
        output_attentions = bool(asked) and any(
            getattr(layer, "attention_weights", None) is not None for layer in self.layers
        )
        if output_attentions:
            implementation = self.config._attn_implementation
            if implementation != "eager":
                logger.warning_once(
                    f"output_attentions: attention is computed by {implementation!r}, which has no weights to show; "
                    "call set_attn_implementation('eager') for them"
                )
        given = cache is not None or past_key_values is not None
        if self.config.bidirectional:
            if given:
                raise ValueError("a bidirectional model has no cache: every token depends on those after it")
            use_cache = False
        if self.gradient_checkpointing and training:
            if given or use_cache:
                warnings.warn(
                    "gradient checkpointing runs every layer twice, so in training no cache is read or made: these "
                    "tokens do not see those before them",
                    stacklevel=2,
                )
            use_cache, cache, past_key_values = False, None, None
        states = _given_cache(cache, past_key_values, self.config)
        if states is None and use_cache:
            states = ArchDynamicCache(self.config)
        if output_router_logits is None:  # of the dict, since a hybrid goes through all its layers to answer
            output_router_logits = self.has_routers and vars(self.config).get("output_router_logits", True)
        elif output_router_logits and not self.has_routers:
            raise ValueError(
                f"output_router_logits is True, but a {type(self).__name__} of this config has no router; "
                "allowed is False"
            )

        if output_router_statistics is None:
            output_router_statistics = output_router_logits

        length = inputs_embeds.shape[1]
        batch = inputs_embeds.shape[0]
        mask, pairs = read_mask(attention_mask, batch, length, states), None
        # positions restart after left pads and differ from zero in a continuation too: they mark documents only alone
        alone = attention_mask is None and (states is None or states.is_empty)
        marks = position_ids if alone else None
        seq_idx = read_documents(seq_idx, cu_seq_lens_q, mask.documents, marks, inputs_embeds)
        if mask.seen is not None:
            windows = self._check_following()
            pairs = read_pairs(mask.seen, batch, length, states, seq_idx, position_ids, windows)
        if states is not None:
            keep = kept_logits if isinstance(kept_logits, int) else 1
            states.begin(length, mask.real, inputs_embeds.device, keep)
        layout = Layout.build(mask.real, seq_idx)._replace(pairs=pairs)

        hidden_states: Any = inputs_embeds
        statistics: list[torch.Tensor] = []
        router_logits: list[torch.Tensor] = []
        count = output_router_logits or output_router_statistics
        # fewer layers than there are where transformers drafts with the first ones, for `assistant_early_exit`
        number = self.config.num_hidden_layers
        layers = self.layers if number == len(self.layers) else self.layers[:number]
        with below_autograd() if length == 1 else contextlib.nullcontext():
            for layer in layers:
                hidden_states = layer(
                    hidden_states, layout, cache=states, output_attentions=output_attentions, count=count
                )
                if isinstance(hidden_states, tuple):
                    hidden_states, counted, logits = hidden_states
                    statistics.append(counted)
                    router_logits.append(logits)
        fields: dict[str, Any] = {NAME: states if use_cache else None}
        if router_logits and output_router_logits:
            fields["router_logits"] = tuple(router_logits)
        if statistics and output_router_statistics:
            fields["router_statistics"] = tuple(statistics)
        return ArchModelOutput(last_hidden_state=self.norm(hidden_states), **fields)

    def _check_following(self) -> bool:
        """Whether any of the mixers has a window; a `ValueError` unless all can follow a mask of four dimensions."""
        mixers = [(i, *mixer) for i, plan in enumerate(self.config.layer_plans()) for mixer in plan.mixers()]
        for i, entry, config in mixers:
            if not entry.follows_pairs(config):
                raise ValueError(
                    f"attention_mask has four dimensions, and layer {i}, a {entry.module_class.__name__}, cannot "
                    "follow it; allowed are masks of two dimensions, and documents are marked by seq_idx, "
                    "position_ids, cu_seq_lens_q, or numbers from 1 on in such a mask"
                )
        return any(entry.window is not None for _, entry, _ in mixers)

    def routers(self) -> dict[int, RoutedFeedForward]:
        """The feed-forwards with a router, by their layers. (A stage of a pipeline has other modules for the rest.)"""
        parts = {i: getattr(layer, "feed_forward", None) for i, layer in enumerate(self.layers)}
        return {i: part for i, part in parts.items() if isinstance(part, RoutedFeedForward)}

    def auxiliary_losses(self, statistics: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The routers' own losses, from the statistics of one forward, those of one config together.

        Returns:
            ``aux_loss``, which the config's ``router_aux_loss_coef`` multiplies, and the product.
        """
        groups: dict[int, tuple[Any, list[torch.Tensor]]] = {}
        for router, counted in zip(self.routers().values(), statistics):
            groups.setdefault(id(router.config), (router, []))[1].append(counted)

        def summed(loss: str) -> torch.Tensor:
            return torch.stack([getattr(router, loss)(counted) for router, counted in groups.values()]).sum()

        added, coefficient = summed("auxiliary_loss"), getattr(self.config, "router_aux_loss_coef", 0.0)
        return (added / coefficient if coefficient else summed("balance_loss")), added


def _with_router_losses(
    model: ArchModel, outputs: ArchModelOutput, loss: torch.Tensor | None, targets: torch.Tensor | None, items: Any
) -> dict[str, Any]:
    """The fields of an output that routers have a part in.

    Args:
        loss: of the predictions, where there are ``targets``; -100 stands for none.
        items: predicted tokens of all batches of the step, where the Trainer says so. It adds up the losses of a step's
            batches as they are, so their means must be weighed.
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

    Concrete classes name `GenerationMixin` in their bases once more: transformers looks for it there.
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
            What the tokens before these left behind. In training none is made unless ``use_cache=True``.
        past_key_values ([`~cache_utils.Cache`], *optional*):
            The same, under the name that transformers had for it to 5.23.
        output_router_logits (`bool`, *optional*):
            Whether to return the logits of the routers and their own loss, which is then part of ``loss``; None for
            the config's, which is True unless a checkpoint of another model says otherwise.
        """
        kwargs |= kwargs.pop("kwargs", {})  # see the backbone's
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
        given = _given_cache(cache, past_key_values, self.config)
        if given is not None:
            kwargs[NAME] = given
        if self.model.has_routers:
            kwargs.setdefault("output_router_logits", False)  # a step has better to do; they are given where asked for
        layers = self.config.num_hidden_layers
        try:
            with during(generating=True):
                return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            # which transformers lowers for the drafts of `assistant_early_exit`, and not back where one fails
            if self.config.num_hidden_layers != layers:
                self.config.num_hidden_layers = layers

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(  # type: ignore[override]
        self: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        if NAME in inputs:
            inputs[OLD_NAME] = inputs[NAME]  # where PEFT looks, whatever the release of transformers
        return inputs

    def _assisted_decoding(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._assisted_decoding(*args, **kwargs)  # type: ignore[misc]
        finally:  # the cache may outlive this, and would record every token to come
            if isinstance(kwargs.get(NAME), RecurrentCache):
                kwargs[NAME].stop_recording()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse what ``generate_batch`` and a server's continuous batching begin with.

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
        """The part of `generate`'s mask for these tokens: a mixer makes its own of where the real ones are.

        (One token is a real one, or nobody looks at what comes of it.)
        """
        length = inputs_embeds.shape[1]
        return None if attention_mask is None or length == 1 else attention_mask[:, -length:]

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
            cache.forget_derived()  # the weights may be others than in the last call
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
            self._longest_cache = length  # one size for all calls, so that a shorter one does not compile again
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
    """The backbone with a masked-language-model head; it reads in both directions."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    _pp_plan: dict[str, Any] = {"lm_head": (["hidden_states"], ["logits"])}
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
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> ArchMaskedLMOutput:
        r"""
        output_router_logits (`bool`, *optional*):
            Whether to return the logits of the routers and their own loss, which is then part of ``loss``; None for
            the config's.
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
