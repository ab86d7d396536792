"""``hf-archs list``: the architectures, and the parts of hybrids, as tables."""

from rich.table import Table

from hf_archs import registry


def architectures() -> Table:
    """A row for each architecture."""
    table = Table("architecture", "model type", "sizes", "native checkpoints", "LoRA on")
    for name in registry.architectures():
        a = registry.get_architecture(name)
        formats = ", ".join(map(str, a.native_formats))
        table.add_row(name, a.model_type, ", ".join(("tiny", *a.sizes)), formats, ", ".join(a.lora_targets))
    return table


def parts() -> Table:
    """A row for each token mixer and feed-forward of which hybrids are made."""
    table = Table("part of a model", "kind", "LoRA on")
    for mixer in map(registry.get_mixer, registry.mixers()):
        if mixer.parts is None:  # parallel mixers are made by a layer pattern, not by this name
            table.add_row(mixer.name, "token mixer", ", ".join(mixer.lora_targets))
    for feed_forward in map(registry.get_feed_forward, registry.feed_forwards()):
        table.add_row(feed_forward.name, "feed-forward", ", ".join(feed_forward.lora_targets))
    return table
