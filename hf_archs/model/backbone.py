"""The backbone of every model: pre-norm blocks of registered mixers and feed-forwards.

Letters in shapes: b batch, l length, d hidden size, v vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import TransformersKwargs, auto_docstring, logging
from transformers.utils.output_capturing import capture_outputs

from hf_archs.cache import ArchDynamicCache, RecurrentCache, adopt
from hf_archs.cache.call import NAME, NEW_NAME, OLD_NAME, during
from hf_archs.config.model import ArchConfig
from hf_archs.kernels.numerics import below_autograd
from hf_archs.layers.masks import read_documents, read_mask, read_pairs
from hf_archs.layers.norm import NORMS
from hf_archs.model.block import ArchBlock
from hf_archs.model.layout import Layout
from hf_archs.model.outputs import ArchModelOutput
from hf_archs.model.pretrained import ArchPreTrainedModel
from hf_archs.model.shared_weights import share_layers
from hf_archs.parts import RoutedFeedForward

logger = logging.get_logger(__name__)


class ScaledEmbedding(nn.Embedding):
    """An embedding multiplied by ``embed_scale``, an attribute that PEFT applies to its adapters too."""

    def __init__(self, num_embeddings: int, embedding_dim: int, embed_scale: float):
        super().__init__(num_embeddings, embedding_dim)
        self.embed_scale = embed_scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Token ids ``(b, l)`` to scaled embeddings ``(b, l, d)``."""
        return super().forward(input) * self.embed_scale


# Arguments that transformers, its Trainer and its tokenizers pass to any model, besides those that our forwards name.
# The loss and the recording of outputs read some of them. The others have no effect: the cache counts its positions,
# there are no token types, keys have the boundaries of queries, stop strings concern `generate`, and TRL passes the
# head's `logits_to_keep` to backbones, and the `margin` of its own loss to reward models.
HOST_ARGUMENTS = frozenset(TransformersKwargs.__optional_keys__) | {
    "return_dict",
    "shift_labels",
    "logits_to_keep",
    "margin",
    "ignore_index",
    "cache_position",
    "token_type_ids",
    "tokenizer",
    "assistant_tokenizer",
}


def _check_arguments(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Refuse unknown arguments, since a misspelt one would silently have no effect.

    Raises:
        TypeError: naming the argument.
        ValueError: for an ``is_causal`` that contradicts the config's ``bidirectional``.
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
    """The cache that was passed under one of its two names, as a cache of this library; see `adopt`.

    Raises:
        ValueError: if two caches are passed, or one that was made for another model.
    """
    if cache is None:
        cache = past_key_values
    elif past_key_values is not None and cache is not past_key_values:
        if not (isinstance(cache, RecurrentCache) and cache.is_empty):
            raise ValueError("cache and past_key_values were both passed, and are names of the same; allowed is one")
        cache = past_key_values  # PEFT passes its prefix beside the empty cache that `generate` made
    return None if cache is None else adopt(cache, config)


def _accepts_no_rows(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Run a batch without rows as one row of padding, and drop that row from the outputs.

    No mixer has to handle the case, and every parameter gets a zero gradient, which data-parallel processes wait for.

    Raises:
        ValueError: for rows without tokens; and for a batch without rows if the cache has rows.
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
            elif name != "router_statistics":  # zeros, one tensor per layer and not per row
                outputs[name] = value[:0] if isinstance(value, torch.Tensor) else tuple(t[:0] for t in value)
        return outputs if kwargs.get("return_dict", self.config.return_dict) is not False else outputs.to_tuple()

    return wrapper


@contextlib.contextmanager
def _step() -> Iterator[None]:
    """The context of a forward of one token: no autograd in inference, and layers share values by `once`."""
    with below_autograd(), contextlib.nullcontext() if torch.compiler.is_compiling() else during(shared={}):
        yield


class ArchModel(ArchPreTrainedModel):
    """The backbone: embedding, blocks and final norm."""

    def __init__(self, config: ArchConfig):
        super().__init__(config)
        scale, sizes = config.embedding_multiplier, (config.vocab_size, config.hidden_size)
        # the embedding scales, since inputs_embeds may be the output of an earlier pipeline stage
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
        """Parameter names of layers that share a module, mapped to the names in the first of them, as in files.

        (transformers ties nothing if the embeddings are untied.)
        """
        return dict(self._tied_weights_keys or {})

    @_accepts_no_rows
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
            The states after the previous tokens. In training no cache is made unless ``use_cache=True``.
        past_key_values ([`~cache_utils.Cache`], *optional*):
            The same, under its name in transformers up to 5.23.
        seq_idx (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            The document number of each token: documents packed into one row do not see each other.
        cu_seq_lens_q (`torch.Tensor` of shape `(documents + 1,)`, *optional*):
            The document boundaries in a single packed row.
        output_router_logits (`bool`, *optional*):
            Whether to return the logits of the routers.
        output_router_statistics (`bool`, *optional*):
            Whether to return the statistics of the routers, for the losses that balance their load; None for the value
            of ``output_router_logits``.
        kept_logits (`int` or `torch.Tensor`, *optional*, defaults to 1):
            The head's ``logits_to_keep``, for `RecurrentCache.begin`; hidden states are returned for all tokens.
        """
        kwargs |= kwargs.pop("kwargs", {})  # transformers' pipelines nest unnamed arguments in it
        _check_arguments(self, kwargs)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        training = self.training and torch.is_grad_enabled()
        if use_cache is None:  # transformers' merge_with_config_defaults would take 20 microseconds per token
            # not in training: a layer that activation checkpointing runs again would read its own states
            use_cache = self.config.use_cache and not training
        # in later stages of a pipeline the embedding is an Identity, and its input is normed already
        if self.embed_norm is not None and not isinstance(self.embed_tokens, nn.Identity):
            inputs_embeds = self.embed_norm(inputs_embeds)
        output_attentions = bool(kwargs.get("output_attentions", self.config.output_attentions)) and any(
            getattr(layer, "attention_weights", None) is not None for layer in self.layers
        )
        if output_attentions and self.config._attn_implementation != "eager":
            logger.warning_once(
                f"output_attentions: attention is computed by {self.config._attn_implementation!r}, which has no "
                "weights to show; call set_attn_implementation('eager') for them"
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
        if output_router_logits is None:  # from `vars`, since a hybrid's property looks through all layers
            output_router_logits = self.has_routers and vars(self.config).get("output_router_logits", True)
        elif output_router_logits and not self.has_routers:
            raise ValueError(
                f"output_router_logits is True, but a {type(self).__name__} of this config has no router; "
                "allowed is False"
            )
        if output_router_statistics is None:
            output_router_statistics = output_router_logits

        batch, length = inputs_embeds.shape[:2]
        mask, pairs = read_mask(attention_mask, batch, length, states), None
        # positions also restart after left padding, and in a continuation they do not start at 0
        alone = attention_mask is None and (states is None or states.is_empty)
        marks = position_ids if alone else None
        seq_idx = read_documents(seq_idx, cu_seq_lens_q, mask.documents, marks, inputs_embeds)
        if mask.seen is not None:
            pairs = read_pairs(mask.seen, batch, length, states, seq_idx, position_ids, self._check_following())
        if states is not None:
            keep = kept_logits if isinstance(kept_logits, int) else 1
            states.begin(length, mask.real, inputs_embeds.device, keep)
        layout = Layout.build(mask.real, seq_idx)._replace(pairs=pairs)

        hidden_states: Any = inputs_embeds
        statistics: list[torch.Tensor] = []
        router_logits: list[torch.Tensor] = []
        count = output_router_logits or output_router_statistics
        # `assistant_early_exit` of transformers lowers the number, to draft with the first layers
        number = self.config.num_hidden_layers
        layers = self.layers if number == len(self.layers) else self.layers[:number]
        with _step() if length == 1 else contextlib.nullcontext():
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
        """Whether any mixer has a window; raises a `ValueError` unless all can follow a mask of four dimensions."""
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
        """The feed-forwards with a router, by layer. (A pipeline stage has placeholders for the layers of others.)"""
        parts = {i: getattr(layer, "feed_forward", None) for i, layer in enumerate(self.layers)}
        return {i: part for i, part in parts.items() if isinstance(part, RoutedFeedForward)}

    def auxiliary_losses(self, statistics: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses of the routers from the statistics of one forward; layers with one config are balanced together.

        Returns:
            ``aux_loss``, and its product with the config's ``router_aux_loss_coef``.
        """
        groups: dict[int, tuple[Any, list[torch.Tensor]]] = {}
        for router, counted in zip(self.routers().values(), statistics):
            groups.setdefault(id(router.config), (router, []))[1].append(counted)

        def summed(loss: str) -> torch.Tensor:
            return torch.stack([getattr(router, loss)(counted) for router, counted in groups.values()]).sum()

        added, coefficient = summed("auxiliary_loss"), getattr(self.config, "router_aux_loss_coef", 0.0)
        return (added / coefficient if coefficient else summed("balance_loss")), added
