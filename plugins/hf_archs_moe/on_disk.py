"""How the experts of a layer stand in files."""

from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter, WeightRenaming


def expert_conversions() -> list[WeightConverter | WeightRenaming]:
    """How a mixture of experts stands in files: every expert under names of its own, as other tools want it.

    In memory all of a layer's are one tensor. Experts that are not gated have one projection in, under another name:
    a loader could not tell it from half of a gated one.
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
