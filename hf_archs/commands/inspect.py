"""Statistics of a model's routers over a text: load, entropy and drops of every layer, as numbers and as a heat map."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from hf_archs.commands.loading import load_ready
from hf_archs.data import examples, text
from hf_archs.data.sources import read_rows


def read_figures(model: str, data: str, tokens: int, tokenizer: str | None) -> dict[int, dict[str, torch.Tensor]]:
    """`router_figures` over the first ``tokens`` tokens of a source; see `read_rows`."""
    loaded, encoder = load_ready(model, tokenizer=tokenizer)
    return router_figures(loaded, (block.to(loaded.device) for block in token_blocks(data, encoder, tokens)))


def token_blocks(data: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Iterator[torch.Tensor]:
    """At most so many tokens of a source (`read_rows`), all joined, in blocks (1, length) of up to 512."""
    length = min(512, tokens)
    rows = (row.input_ids for row in examples.examples(read_rows(data), tokenizer))
    return (torch.from_numpy(block)[None].long() for block in islice(text.joined(rows, length), tokens // length))


@torch.no_grad()
def router_figures(model: Any, batches: Iterable[torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    """The router statistics of every layer with a router, over a text.

    Args:
        model: a causal language model of this library.
        batches: token ids, (batch, length) each.

    Returns:
        layer -> ``figures`` of its feed-forward, computed from the sums over all batches.

    Raises:
        ValueError: for a model without routers, or no batches.
    """
    routers = model.model.routers()
    if not routers:
        raise ValueError(f"inspect: a {type(model).__name__} without routers; allowed is a model with experts")
    total: list[torch.Tensor] = []
    for ids in batches:
        found = model.model(ids.to(model.device), output_router_statistics=True, use_cache=False).router_statistics
        total = [a + b for a, b in zip(total, found)] if total else list(found)
    if not total:
        raise ValueError("inspect: the text is empty; allowed is one of some tokens")
    return {i: router.figures(counted) for (i, router), counted in zip(routers.items(), total)}


def table(figures: dict[int, dict[str, torch.Tensor]]) -> Table:
    """A row for each layer with a router."""
    found = Table("layer", "busiest expert", "its load / mean load", "entropy", "dropped")
    for layer, figure in figures.items():
        numbers = f"{figure['max_load']:.2f}", f"{figure['entropy']:.3f}", f"{figure['drop_rate']:.1%}"
        found.add_row(str(layer), str(int(figure["load"].argmax())), *numbers)
    return found


def draw(figures: dict[int, dict[str, torch.Tensor]], path: Path) -> None:
    """Draw a heat map, layers by experts, of each expert's load over the even load; biases, if any, in a second one."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    def rows(name: str) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [found[name].float().cpu() for found in figures.values()], batch_first=True, padding_value=float("nan")
        )

    load = rows("load")
    panels: list[Any] = [("load over the even load", load * load.isfinite().sum(1, keepdim=True), "viridis", 0.0, None)]
    if all("bias" in found for found in figures.values()):
        bias = rows("bias")
        reach = float(bias.nan_to_num().abs().max()) or 1.0
        panels.append(("correction of the score", bias, "RdBu", -reach, reach))
    height = 1.2 + 0.35 * len(figures)
    size = (max(5.0, 1.5 + 0.3 * load.shape[1]), height * len(panels))
    figure, axes = plt.subplots(len(panels), 1, figsize=size, squeeze=False, layout="constrained")
    for ax, (title, values, colours, low, high) in zip(axes[:, 0], panels):
        image = ax.imshow(values.numpy(), cmap=colours, vmin=low, vmax=high, aspect="auto")
        ax.set_yticks(range(len(figures)), [str(i) for i in figures])
        ax.set_ylabel("layer")
        ax.set_title(title, loc="left", fontsize=10)
        figure.colorbar(image, ax=ax)
    axes[-1, 0].set_xlabel("expert")
    figure.savefig(path, dpi=150)
    plt.close(figure)
