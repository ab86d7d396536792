"""The syntax of ``layer_pattern``, which places mixers and feed-forwards in layers."""

import re
from collections.abc import Collection

from hf_archs.errors import did_you_mean, similar

NONE = "none"


def near_or_all(name: str, names: Collection[str]) -> str:
    """The end of an error about ``name``: similar names, if there are any, and all allowed names."""
    return f"{did_you_mean(similar(name, names))} allowed are {', '.join(sorted(names)) or 'none'}".lstrip()


_RULE = re.compile(r"\s*(?P<entry>\S+)\s+every\s+(?P<step>\d+)(?:\s+from\s+(?P<start>\d+))?\s*")


def expand_pattern(field: str, pattern: str | list[str], names: Collection[str], layers: int) -> list[list[str]]:
    """The names of the instances in each layer; an empty list for an empty layer.

    Args:
        field: the config field with the pattern, for errors.
        pattern: a list with an entry for each layer, or a string. An entry is a name, several names joined by ``+``
            (side by side in one layer), or ``none``. The entries of a string are repeated over the layers; ``name*3``
            stands for three entries. Rules may follow, each after a semicolon: ``name every 8`` (layers 7, 15, ...,
            counted from 0), or ``name every 8 from 4`` (layers 4, 12, ...).
        names: the known instances.
        layers: number of layers.

    Returns:
        One list per layer. A pattern that is a longer list gives more: `assistant_early_exit` of transformers lowers
        the number of layers to use the first ones.

    Raises:
        ValueError: for an unknown or repeated name, a malformed string, or a list that is too short.
    """
    if isinstance(pattern, str):
        base, *rules = pattern.split(";")
        cycle: list[str] = []
        for entry in base.replace(",", " ").split():
            name, _, count = entry.partition("*")
            if count and not count.isdecimal():
                raise ValueError(f"{field} has {entry!r}; allowed after * is how often")
            cycle += [name] * int(count or 1)
        if not cycle:
            raise ValueError(f"{field} is {pattern!r}; allowed are entries such as {' '.join(sorted(names)) or NONE}")
        entries = [cycle[i % len(cycle)] for i in range(layers)]
        for rule in rules:
            match = _RULE.fullmatch(rule)
            if match is None or int(match["step"]) < 1:
                raise ValueError(f"{field} has the rule {rule.strip()!r}; allowed is 'name every 8' or with 'from 4'")
            step = int(match["step"])
            for i in range(int(match["start"] or step - 1), layers, step):
                entries[i] = match["entry"]
    else:
        entries = pattern
    if len(entries) < layers:
        raise ValueError(f"{field} has {len(entries)} entries; allowed are num_hidden_layers = {layers}")
    placed = []
    for entry in entries:
        parts = [] if entry == NONE else entry.split("+")
        for part in parts:
            if part not in names:
                raise ValueError(f"{field} has {part!r}; {near_or_all(part, {*names, NONE})}")
        if len(set(parts)) < len(parts):
            raise ValueError(f"{field} has {entry!r}; allowed is each name once in a layer")
        placed.append(parts)
    return placed
