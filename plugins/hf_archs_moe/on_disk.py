"""Conversion of a layer's experts between memory and files."""

from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter, WeightRenaming


def expert_conversions() -> list[WeightConverter | WeightRenaming]:
    """The conversions of a layer's experts: one tensor in memory, one per expert in files, as other tools expect.

    The input projection of ungated experts is ``in_proj`` in files: a loader could not tell ``up_proj`` from half of a
    gated projection.
    """

    def merge(sources: list[str], target: str, *operations: ConversionOps) -> WeightConverter:
        prefix = "feed_forward.experts"
        patterns = [f"{prefix}.*.{source}.weight" for source in sources]
        return WeightConverter(patterns, f"{prefix}.{target}", operations=[MergeModulelist(dim=0), *operations])

    return [
        merge(["gate_proj", "up_proj"], "gate_up_proj", Concatenate(dim=1)),
        merge(["in_proj"], "up_proj"),
        merge(["down_proj"], "down_proj"),
    ]
