"""The outputs of the backbone and of the heads."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput

from hf_archs.cache.call import NAME, NEW_NAME, OLD_NAME


class CacheNames:
    """An output of transformers that gives its cache under both names, in every release."""

    def _replace_old_cache_name(self, key: Any) -> Any:  # transformers' own warns
        return NAME if key in (OLD_NAME, NEW_NAME) else key

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers' own makes a set of all fields for each of them, which takes 15 microseconds of every token
        name = self._replace_old_cache_name(name)
        if value is not None and name in self.__dataclass_fields__:  # type: ignore[attr-defined]
            OrderedDict.__setitem__(self, name, value)  # type: ignore[index]
        object.__setattr__(self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._replace_old_cache_name(key))  # type: ignore[misc]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(self._replace_old_cache_name(key))  # type: ignore[misc]

    def get(self, key: Any, default: Any = None) -> Any:
        """As `dict.get`, with either name for the cache."""
        return super().get(self._replace_old_cache_name(key), default)  # type: ignore[misc]


setattr(CacheNames, OLD_NAME if NAME == NEW_NAME else NEW_NAME, property(lambda output: getattr(output, NAME)))


@dataclass
class ArchModelOutput(CacheNames, BaseModelOutputWithPast):
    """Output of the backbone.

    Attributes:
        router_logits: the logits ``(b * l, experts)`` of each layer with a router, if requested.
        router_statistics: the statistics of each layer with a router in this forward, if requested.
    """

    router_logits: tuple[torch.Tensor, ...] | None = None
    router_statistics: tuple[torch.Tensor, ...] | None = None


@dataclass
class ArchCausalLMOutput(CacheNames, CausalLMOutputWithPast):
    """Output of the causal language model, with Mixtral's names. (As a tuple it begins with loss and logits.)

    Attributes:
        aux_loss: the losses of the routers, if router logits were requested; ``loss`` includes them, times the config's
            ``router_aux_loss_coef``.
        router_logits: the logits ``(b * l, experts)`` of each layer with a router, if requested.
    """

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class ArchMaskedLMOutput(MaskedLMOutput):
    """Output of the masked language model.

    Attributes:
        aux_loss, router_logits: as in `ArchCausalLMOutput`.
    """

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
