"""hf-archs: architectures beyond the Transformer, as ordinary models of the Hugging Face libraries.

Importing this package registers every installed plugin with transformers' Auto classes.
"""

from typing import Any

import hf_archs.layers.attention
import hf_archs.layers.memory_attention
import hf_archs.layers.mlp
import hf_archs.layers.side_by_side  # noqa: F401 - these register mixers and feed-forwards
from hf_archs.model.adapters import add_adapter
from hf_archs.model.sharding import fully_shard
from hf_archs.native.conversion import from_native, to_native
from hf_archs.parts import VERSION
from hf_archs.registry import (
    Architecture,
    architectures,
    failed_plugins,
    get_architecture,
    get_feed_forward,
    get_mixer,
    load_plugins,
    register,
    register_feed_forward,
    register_mixer,
)

__version__ = VERSION

__all__ = [
    "ArchTrainer",
    "Architecture",
    "add_adapter",
    "architectures",
    "callbacks",
    "failed_plugins",
    "from_native",
    "fully_shard",
    "get_architecture",
    "get_feed_forward",
    "get_mixer",
    "load_plugins",
    "parameter_groups",
    "register",
    "register_feed_forward",
    "register_mixer",
    "to_native",
]


def __getattr__(name: str) -> Any:
    if name in (
        "ArchTrainer",
        "callbacks",
        "parameter_groups",
    ):  # transformers' Trainer is slow to import, and few need it
        from hf_archs import training

        return getattr(training, name)
    raise AttributeError(f"module 'hf_archs' has no attribute {name!r}")


load_plugins()
