"""Layers that share their weights, and what each of them may have of its own (Zamba2, Glorioso et al. 2024, section 2).

The layers share the modules themselves, so an adapter on one is on all of them, and merges.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from hf_archs.cache.call import call


class SiteLinear(nn.Linear):
    """A shared linear layer with a low-rank one beside it for each layer that uses it.

    Args:
        linear: the layer that becomes the shared part; its shape, bias, device and dtype are taken over.
        rank: of the low-rank parts.
        sites: number of layers.
    """

    def __init__(self, linear: nn.Linear, rank: int, sites: int):
        place: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        shape = linear.in_features, linear.out_features
        super().__init__(*shape, bias=linear.bias is not None, **place)
        # parameters and no layers: PEFT cannot adapt a layer inside of one that it adapts
        self.site_down = nn.Parameter(torch.empty(sites, rank, shape[0], **place))
        self.site_up = nn.Parameter(torch.empty(sites, shape[1], rank, **place))

    def init_weights(self) -> None:
        """Every layer begins with the shared weights alone (LoRA, Hu et al. 2021, section 4.1)."""
        init.normal_(self.site_down, std=self.in_features**-0.5)
        init.zeros_(self.site_up)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(..., in)`` to ``(..., out)``, with what the running layer adds."""
        own = F.linear(F.linear(input, self.site_down[call.site]), self.site_up[call.site])
        return super().forward(input) + own


def add_sites(module: nn.Module, rank: int, sites: int) -> None:
    """Make every linear layer in ``module`` a `SiteLinear`."""
    for name, child in [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]:
        module.set_submodule(name, SiteLinear(child, rank, sites))


def share_layers(layers: nn.ModuleList, plans: list[Any]) -> dict[str, str]:
    """Give blocks whose plans share a mixer or a feed-forward the module of the first of them.

    Returns:
        the names of the parameters of all others, and those of the first, which files hold alone.
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
