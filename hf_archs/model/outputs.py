"""The outputs of the backbone and of the heads."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput

from hf_archs.cache.call import NAME, NEW_NAME, OLD_NAME


class CacheNames:
    """An output of transformers whose cache is found under both of its names, whichever the installed release has."""

    def _replace_old_cache_name(self, key: Any) -> Any:  # which warns, in the release that has it
        return NAME if key in (OLD_NAME, NEW_NAME) else key

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._replace_old_cache_name(key))  # type: ignore[misc]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(self._replace_old_cache_name(key))  # type: ignore[misc]

    def get(self, key: Any, default: Any = None) -> Any:
        """As a dict's, by either name of the cache."""
        return super().get(self._replace_old_cache_name(key), default)  # type: ignore[misc]


setattr(CacheNames, OLD_NAME if NAME == NEW_NAME else NEW_NAME, property(lambda output: getattr(output, NAME)))


@dataclass
class ArchModelOutput(CacheNames, BaseModelOutputWithPast):
    """Output of the backbone.

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
