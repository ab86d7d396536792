"""The cost of a model by layer, without training it, beside that of the same model with attention in every layer."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from hf_archs.config.model import ArchConfig, LayerPlan
from hf_archs.layers.attention_config import AttentionConfig
from hf_archs.model.block import ArchBlock
from hf_archs.parts import RoutedFeedForward, StateSpec

# operations per token and element of a recurrent state: decay, write and read are one product and one sum each
PER_STATE = 6


@dataclass(frozen=True)
class LayerCost:
    """The parts and the cost of one layer.

    Attributes:
        mixer, feed_forward: registered names, or ``none``.
        parameters: parameters of the layer, except those shared with an earlier layer.
        active_parameters: parameters that one token uses.
        flops: floating-point operations of one decode step at the given length; a product and a sum are two.
        state_bytes: size of the layer's cache at that length for one batch row, in the given dtype unless the mixer
            sets another.
    """

    mixer: str
    feed_forward: str
    parameters: int
    active_parameters: int
    flops: int
    state_bytes: int


def layer_costs(config: ArchConfig, length: int, dtype: torch.dtype = torch.bfloat16) -> list[LayerCost]:
    """The cost of every layer after ``length`` tokens; no weights are allocated.

    Raises:
        ValueError: for a length below 1.
    """
    if length < 1:
        raise ValueError(f"length is {length}; allowed are 1 and more")
    return _costs(config, config.layer_plans(), length, dtype)


def attention_costs(config: ArchConfig, length: int, dtype: torch.dtype = torch.bfloat16) -> list[LayerCost]:
    """The same if all mixers were attention, with the heads of the model's own attention, or heads of 64 channels."""
    plans = config.layer_plans()
    found = [p.mixer_config for p in plans if isinstance(p.mixer_config, AttentionConfig)]
    heads = found[0].num_heads if found else math.gcd(max(config.hidden_size // 64, 1), config.hidden_size)
    groups = found[0].num_key_value_heads if found else None
    attention = AttentionConfig(hidden_size=config.hidden_size, num_heads=heads, num_key_value_heads=groups)
    attention.belongs_to(config)
    everywhere = [p if p.mixer is None else replace(p, mixer="attention", mixer_config=attention) for p in plans]
    return _costs(config, everywhere, length, dtype)


def total(costs: list[LayerCost]) -> LayerCost:
    """The sum over layers."""
    fields = ("parameters", "active_parameters", "flops", "state_bytes")
    return LayerCost("", "", *(sum(getattr(cost, field) for cost in costs) for field in fields))


def numbers(cost: LayerCost) -> list[str]:
    """The numbers of a table row, to four digits, in units, thousands (k), millions (M) and so on."""

    def short(n: float) -> str:
        thousands = min((len(str(int(n))) - 1) // 3, 4)
        return f"{n / 1000**thousands:.4g}{('', ' k', ' M', ' G', ' T')[thousands]}"

    return [short(n) for n in (cost.parameters, cost.active_parameters, cost.flops, cost.state_bytes)]


def _costs(config: ArchConfig, plans: list[LayerPlan], length: int, dtype: torch.dtype) -> list[LayerCost]:
    seen: set[tuple[str, Any]] = set()
    costs = []
    for i, plan in enumerate(plans):
        with torch.device("meta"):
            block = ArchBlock(_Planned(config, plan), i)  # type: ignore[arg-type]
        counted = {name: p.numel() for name, p in block.named_parameters()}
        active = sum(counted.values())
        if isinstance(block.feed_forward, RoutedFeedForward):
            experts = sum(n for name, n in counted.items() if ".experts." in name)
            active -= round(experts * (1 - block.feed_forward.active_fraction()))
        own = sum(counted.values())
        for part, name in (("mixer", plan.shared_mixer), ("feed_forward", plan.shared_feed_forward)):
            if name is not None and (part, name) in seen:
                own -= sum(n for full, n in counted.items() if full.startswith(f"{part}."))
            seen.add((part, name))
        states = plan.states()
        elements = {name: math.prod(length if n is None else n for n in spec.shape) for name, spec in states.items()}
        flops = 2 * active + sum(_state_flops(spec, elements[name], plan) for name, spec in states.items())
        held = sum(n * (states[name].dtype or dtype).itemsize for name, n in elements.items())
        costs.append(LayerCost(plan.mixer or "none", plan.feed_forward or "none", own, active, flops, held))
    return costs


def _state_flops(spec: StateSpec, elements: int, plan: LayerPlan) -> int:
    """Operations on a state: each query head reads every cached token once; a recurrent state is also written."""
    if spec.dtype is not None and not spec.dtype.is_floating_point:
        return 0
    if spec.kind == "recurrent" and spec.dtype is not None:
        return PER_STATE * elements
    heads = plan.mixer_config.num_heads if plan.mixer_config is not None else 1
    return 2 * elements * max(heads // (spec.shape[0] or 1), 1)


class _Planned:
    """A config whose layers all have the given plan."""

    def __init__(self, config: ArchConfig, plan: LayerPlan):
        self._config, self._plan = config, plan

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def layer_plan(self, layer_idx: int) -> LayerPlan:
        return self._plan


def table(title: str, costs: list[LayerCost], attention: list[LayerCost]) -> Table:
    """A row for each layer, and the totals of the model and of the one with attention everywhere."""
    found = Table("layer", "mixer", "feed-forward", title=title, title_justify="left")
    for column in ("parameters", "active", "ops per token", "state, bytes"):
        found.add_column(column, justify="right")
    for i, cost in enumerate(costs):
        found.add_row(str(i), cost.mixer, cost.feed_forward, *numbers(cost))
    found.add_section()
    found.add_row("all", "", "", *numbers(total(costs)))
    found.add_row("all", "attention everywhere", "", *numbers(total(attention)))
    return found


def draw(costs: list[LayerCost], attention: list[LayerCost], length: int, path: Path) -> None:
    """Draw bars of each layer's parameters, operations and state, and a line for attention in every layer."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    kinds = sorted({cost.mixer for cost in costs})
    colours = {kind: f"C{i}" for i, kind in enumerate(kinds)}
    figure, rows = plt.subplots(3, 1, figsize=(max(6.0, 0.35 * len(costs)), 7.5), sharex=True, layout="constrained")
    titles = {
        "parameters": "parameters",
        "flops": "operations per token",
        "state_bytes": f"bytes of state after {length:,} tokens",
    }
    places = range(len(costs))
    for axes, (field, title) in zip(rows, titles.items()):
        axes.bar(places, [getattr(c, field) for c in costs], color=[colours[c.mixer] for c in costs])
        axes.step(
            [-0.5, *(i + 0.5 for i in places)],
            [getattr(c, field) for c in (attention[0], *attention)],
            where="pre",
            color="black",
            linewidth=0.8,
            label="with attention everywhere",
        )
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_yscale("log" if field == "state_bytes" else "linear")
        axes.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[kind]) for kind in kinds]
    line = rows[0].get_legend_handles_labels()
    figure.legend([*handles, *line[0]], [*kinds, *line[1]], loc="outside lower center", ncols=4, fontsize=9)
    rows[-1].set_xlabel("layer")
    figure.savefig(path, dpi=150)
    plt.close(figure)
