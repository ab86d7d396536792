"""The metadata of a repository's card."""

import re
from typing import Any

import yaml


def card_metadata(card: str) -> dict[str, Any]:
    """The YAML block at a card's head, empty where there is none; ValueError for one that the Hub would refuse."""
    block = re.match(r"\s*---\r?\n(.*?\n)??---\s*(\n|$)", card, re.DOTALL)
    try:
        metadata = yaml.safe_load(block[1] or "") if block else None
    except yaml.YAMLError as error:
        raise ValueError(f"YAML: {error}") from error
    if not isinstance(metadata, dict | None):
        raise ValueError("the metadata must be a mapping")
    texts, lists = (
        ("pipeline_tag", "library_name"),
        ("license", "language", "tags", "datasets", "base_model", "metrics"),
    )
    for key, value in (metadata or {}).items():
        if key in texts and not isinstance(value, str):
            raise ValueError(f'"{key}" must be a string')
        values = value if isinstance(value, list) and key != "license" else [value]
        if key in lists and not all(isinstance(item, str) for item in values):
            raise ValueError(f'"{key}" must be a string' + ("" if key == "license" else " or a list of strings"))
    return metadata or {}
