"""The cache of recurrent models: states, rollback, save and load.

`ArchDynamicCache` and `ArchStaticCache` are for users, the other types for mixers.
"""

from hf_archs.cache.prefixes import StateCache
from hf_archs.cache.recurrent import ArchDynamicCache, ArchStaticCache, RecurrentCache, adopt
from hf_archs.cache.slot import KINDS, Once, Place, Record, Replay, Segment, Slot, States, Timeline

__all__ = [
    "KINDS",
    "ArchDynamicCache",
    "ArchStaticCache",
    "Once",
    "Place",
    "Record",
    "RecurrentCache",
    "Replay",
    "Segment",
    "Slot",
    "StateCache",
    "States",
    "Timeline",
    "adopt",
]
