"""Writes the files beside it, with the installed version of hf-archs; tests/core/test_written_before.py reads them.

Run by hand, with the version that is to be remembered: ``python tests/data/written_by_0_1/make.py``. For each
architecture ``NAME/`` is a checkpoint as `save_pretrained` writes it, with `NAME.cache.safetensors` (the states after
some tokens) and `NAME.answers.safetensors` (what the model said); ``NAME.lora/`` is an adapter, for two of them.
``written_with.json`` says by which versions, and on which kind of processor.

The module imports hf_archs inside its functions only: a process that has not imported the library uses `answers` too.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parent
ARCHITECTURES = ("hybrid", "hyena", "mamba", "mamba2", "moe", "retnet")
ADAPTED = ("hybrid", "mamba")
READ = 12  # tokens behind the saved cache


def machine() -> dict[str, str]:
    """Two machines for which this is the same add in the same order, so that results are equal to the bit."""
    found = {"torch": torch.__version__.partition("+")[0], "instructions": torch.backends.cpu.get_cpu_capability()}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    kind = [fields.get(field, "") for field in ("vendor_id", "cpu family", "model")]
    return {**found, "processor": " ".join([platform.machine(), *kind])}


def tokens() -> torch.Tensor:
    """Two rows of 24 token ids; the second row of a mask that goes with them begins with five pads."""
    return torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(13))


@torch.no_grad()
def answers(model: Any, name: str) -> dict[str, torch.Tensor]:
    """The answers of that architecture's model: padded, generating, and with the saved cache behind it.

    One thread computes: how many there are decides the order of additions.
    """
    from hf_archs.cache import ArchDynamicCache

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ids = tokens()
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
        cache = ArchDynamicCache(model.config)
        cache.load_state_dict(load_file(FOLDER / f"{name}.cache.safetensors"))
        return {
            "logits": model(ids, attention_mask=mask).logits,
            "continuation": model.generate(ids[:1, :READ], max_new_tokens=READ, min_new_tokens=READ),
            "after_the_cache": model(ids[:1, READ:], past_key_values=cache, use_cache=True).logits,
        }
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def adapted(model: Any, name: str) -> Any:
    """The model under its saved adapter."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, FOLDER / f"{name}.lora").eval()


def make(name: str) -> None:
    """Write the files of one architecture."""
    import peft

    import hf_archs
    from hf_archs.cache import ArchDynamicCache
    from hf_archs.testing.contract.models import assert_remembers, lively

    torch.set_num_threads(1)
    architecture = hf_archs.get_architecture(name)
    model = lively(
        architecture.causal_lm_class, architecture.tiny_config(hidden_size=32), seed=ARCHITECTURES.index(name)
    )
    assert_remembers(model)
    model.save_pretrained(FOLDER / name)
    cache = ArchDynamicCache(model.config)
    with torch.no_grad():
        model(tokens()[:1, :READ], past_key_values=cache, use_cache=True)
    save_file(cache.state_dict(), FOLDER / f"{name}.cache.safetensors")
    said = answers(model, name)
    if name in ADAPTED:
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["ssm"])
        model = hf_archs.add_adapter(model, config)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(FOLDER / f"{name}.lora")
        said |= {f"adapted.{key}": value for key, value in answers(model.eval(), name).items()}
    save_file(said, FOLDER / f"{name}.answers.safetensors")


if __name__ == "__main__":
    for architecture in ARCHITECTURES:
        make(architecture)
    versions = {package: importlib.metadata.version(package) for package in ("hf-archs", "transformers", "peft")}
    (FOLDER / "written_with.json").write_text(json.dumps({**versions, **machine()}, indent=2) + "\n")
    print(f"written with {versions} on {machine()}")
