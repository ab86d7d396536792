"""hf-archs: architectures beyond the Transformer, as ordinary models of the Hugging Face libraries.

Importing this package registers every installed plugin with transformers' Auto classes.
"""

from typing import Any

import hf_archs.layers.attention
import hf_archs.layers.memory_attention
import hf_archs.layers.mlp
import hf_archs.layers.side_by_side  # noqa: F401 - these register mixers and feed-forwards
from hf_archs.cache import StateCache
from hf_archs.errors import moved
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
    "StateCache",
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
    if name in ("ArchTrainer", "callbacks", "parameter_groups"):
        from hf_archs import training  # on use only, since transformers' Trainer is slow to import

        return getattr(training, name)
    raise AttributeError(f"module 'hf_archs' has no attribute {name!r}")


# the modules of 0.1
moved("hf_archs.attention", "hf_archs.layers.attention", "hf_archs.layers.attention_config")
moved(
    "hf_archs.backbone",
    "hf_archs.model.backbone",
    "hf_archs.model.heads",
    "hf_archs.model.pretrained",
    "hf_archs.model.block",
    "hf_archs.model.outputs",
)
moved("hf_archs.backend", "hf_archs.kernels.backend")
moved("hf_archs.bench", "hf_archs.testing.measuring")
moved("hf_archs.call", "hf_archs.cache.call")
moved("hf_archs.composition", "hf_archs.config.composed", "hf_archs.config.pattern")
moved("hf_archs.configuration", "hf_archs.config.model", "hf_archs.parts", MixerConfig="PartConfig")
moved("hf_archs.convolution", "hf_archs.layers.convolution")
moved("hf_archs.formats", "hf_archs.native.formats", "hf_archs.native.state_spaces")
moved("hf_archs.mlp", "hf_archs.layers.mlp")
moved("hf_archs.norm", "hf_archs.layers.norm")
moved("hf_archs.watching", "hf_archs.model.watching")

load_plugins()
