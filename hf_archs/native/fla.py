"""Checkpoints of flash-linear-attention (github.com/fla-org/flash-linear-attention): configs and state dicts."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from hf_archs.native.formats import StateDictFormat, TransformersFormat

# config fields that select kernels and the form of the training loss
KERNELS = ("fuse_norm", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp")


@dataclass(frozen=True, kw_only=True)
class FlaFormat(StateDictFormat):
    """The format of one model of flash-linear-attention; another package may use the same ``model_type``.

    The ``model_type`` is one of the ``defaults``.

    Attributes:
        alone: config fields that the other package's files do not have; one of them is enough to tell the two apart.
        earlier: field names before April 2025 or 2026, and the present ones.
        derived: config fields of theirs, and the attribute of our config that gives the value when writing; when
            reading, "auto" becomes None.
    """

    alone: Collection[str] = ()
    earlier: Mapping[str, str] = field(default_factory=dict)
    derived: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"flash-linear-attention's {self.defaults['model_type']}"

    def detect(self, raw: Mapping[str, Any]) -> bool:
        """Whether a file has this ``model_type`` and a field that the other package's files do not have."""
        own = {*self.alone, *self.earlier.values()}
        return raw.get("model_type") == self.defaults["model_type"] and not own.isdisjoint(raw)

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `StateDictFormat.expand`, with present field names, and None for "auto" in a derived field."""
        today = {name: new for name, new in self.earlier.items() if new not in raw}
        given, defaults = super().expand({today.get(name, name): value for name, value in raw.items()})
        return given | {name: None for name in self.derived if given[name] == "auto"}, defaults

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        """As `StateDictFormat.write_config`, with the derived fields."""
        written = super().write_config(config)
        return written | {theirs: getattr(config, attribute) for theirs, attribute in self.derived.items()}


@dataclass(frozen=True, kw_only=True)
class FormatBesideFla(TransformersFormat):
    """A format of transformers whose ``model_type`` flash-linear-attention uses too.

    Attributes:
        fla: the format of flash-linear-attention.
    """

    fla: FlaFormat

    def detect(self, raw: Mapping[str, Any]) -> bool:
        """As `NativeFormat.detect`, except for files of flash-linear-attention."""
        return super().detect(raw) and not self.fla.detect(raw)
