"""Layers that share weights, with low-rank additions per layer (Zamba2, Glorioso et al. 2024, section 2).

A site is one of the layers that share a module. They share the module object, so that an adapter on it serves all of
them, and can be merged.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from hf_archs.cache.call import call


class SiteLinear(nn.Linear):
    """A shared linear layer with a low-rank addition for each site.

    Args:
        linear: the layer to replace, with the same shape, bias, device and dtype.
        rank: rank of the additions.
        sites: number of sites.
    """

    def __init__(self, linear: nn.Linear, rank: int, sites: int):
        place: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        shape = linear.in_features, linear.out_features
        super().__init__(*shape, bias=linear.bias is not None, **place)
        # parameters, since PEFT cannot adapt a linear layer inside an adapted one
        self.site_down = nn.Parameter(torch.empty(sites, rank, shape[0], **place))
        self.site_up = nn.Parameter(torch.empty(sites, shape[1], rank, **place))

    def init_weights(self) -> None:
        """Start with additions of zero (LoRA, Hu et al. 2021, section 4.1)."""
        init.normal_(self.site_down, std=self.in_features**-0.5)
        init.zeros_(self.site_up)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(..., in)`` to ``(..., out)``, with the addition of the running site."""
        own = F.linear(F.linear(input, self.site_down[call.site]), self.site_up[call.site])
        return super().forward(input) + own


def add_sites(module: nn.Module, rank: int, sites: int) -> None:
    """Replace every linear layer in ``module`` by a `SiteLinear`."""
    for name, child in [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]:
        module.set_submodule(name, SiteLinear(child, rank, sites))


def share_layers(layers: nn.ModuleList, plans: list[Any]) -> dict[str, str]:
    """Give all blocks whose plans share a mixer or a feed-forward the module of the first of them.

    Returns:
        The parameter names of the other blocks, mapped to the names in the first block, as in files.
    """
    tied: dict[str, str] = {}
    for part in ("mixer", "feed_forward"):
        groups: dict[str, list[int]] = {}
        for i, plan in enumerate(plans):
            shared = getattr(plan, f"shared_{part}")
            if shared is not None:
                groups.setdefault(shared.name, []).append(i)
        for first, *others in groups.values():
            module: Any = getattr(layers[first], part)
            rank = getattr(plans[first], f"shared_{part}").site_rank
            if rank:
                add_sites(module, rank, 1 + len(others))
            for site, i in enumerate((first, *others)):
                setattr(layers[i], part, module)
                layers[i].sites[part] = site  # type: ignore[union-attr, operator, index]
            for i in others:
                tied.update(
                    {f"layers.{i}.{part}.{n}": f"layers.{first}.{part}.{n}" for n, _ in module.named_parameters()}
                )
    return tied
