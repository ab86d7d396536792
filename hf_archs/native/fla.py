"""Checkpoints of flash-linear-attention (github.com/fla-org/flash-linear-attention): its configs and state dicts."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from hf_archs.native.formats import StateDictFormat, TransformersFormat

# which kernels run, and what their training loss is computed with
KERNELS = ("fuse_norm", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp")


@dataclass(frozen=True, kw_only=True)
class FlaFormat(StateDictFormat):
    """One of its models. Its ``model_type``, among the ``defaults``, may be that of another package too.

    Attributes:
        alone: fields by one of which a file of it is told from the other package's.
        earlier: names of fields before April 2025 or 2026, and today's.
        derived: their config fields and the attribute of our config that gives the value when writing; when reading,
            "auto" is what ours calls None.
    """

    alone: Collection[str] = ()
    earlier: Mapping[str, str] = field(default_factory=dict)
    derived: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"flash-linear-attention's {self.defaults['model_type']}"

    def detect(self, raw: Mapping[str, Any]) -> bool:
        """Whether it has this ``model_type`` and a field that the other package's files do not have."""
        own = {*self.alone, *self.earlier.values()}
        return raw.get("model_type") == self.defaults["model_type"] and not own.isdisjoint(raw)

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `StateDictFormat.expand`, with earlier names of fields as today's and a derived "auto" as None."""
        today = {name: new for name, new in self.earlier.items() if new not in raw}
        given, defaults = super().expand({today.get(name, name): value for name, value in raw.items()})
        return given | {name: None for name in self.derived if given[name] == "auto"}, defaults

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        """As `StateDictFormat.write_config`, with the derived fields' values."""
        written = super().write_config(config)
        return written | {theirs: getattr(config, attribute) for theirs, attribute in self.derived.items()}


@dataclass(frozen=True, kw_only=True)
class FormatBesideFla(TransformersFormat):
    """A format of transformers whose ``model_type`` flash-linear-attention has too.

    Attributes:
        fla: the other one.
    """

    fla: FlaFormat

    def detect(self, raw: Mapping[str, Any]) -> bool:
        """As `NativeFormat.detect`, unless the file is flash-linear-attention's."""
        return super().detect(raw) and not self.fla.detect(raw)
