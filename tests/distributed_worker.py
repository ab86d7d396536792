"""Runs under torchrun with two gloo processes for tests/test_distributed.py; writes what it measured as JSON."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_archs  # noqa: F401  # registers the architectures


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _compare(model: Any, alone: Any) -> dict[str, float]:
    """The largest relative difference of the gradients, and how many parameters are spread over the processes."""
    worst = 0.0
    for (name, p), (other, q) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        assert name == other
        difference = float((_whole(p.grad) - q.grad).abs().max() / q.grad.abs().max().clamp(min=1e-30))
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return {"gradients": worst, "spread": sum(isinstance(p, DTensor) for p in model.parameters())}


def tensor_parallel(folder: str, ids: torch.Tensor) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    alone = AutoModelForCausalLM.from_pretrained(folder)
    out, expected = model(ids, labels=ids), alone(ids, labels=ids)
    out.loss.backward()
    expected.loss.backward()
    experts = sum(isinstance(p, DTensor) for n, p in model.named_parameters() if ".experts." in n)
    difference = (out.logits - expected.logits).abs().max()
    return {**_compare(model, alone), "logits": float(difference), "experts": experts}


def expert_parallel(folder: str, ids: torch.Tensor) -> dict[str, float]:
    """Each process holds half of the experts of every layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2, ep_size=2))
    alone = AutoModelForCausalLM.from_pretrained(folder)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # pads go to no expert, wherever it is
    labels = ids.masked_fill(mask == 0, -100)
    out, expected = (m(ids, attention_mask=mask, labels=labels) for m in (model, alone))
    out.loss.backward()
    expected.loss.backward()
    experts = [p for n, p in model.named_parameters() if ".experts." in n and ".shared" not in n]
    assert all(isinstance(p, DTensor) and p.to_local().shape[0] == p.shape[0] // 2 for p in experts)
    difference = (out.logits - expected.logits)[mask.bool()].abs().max()
    return {**_compare(model, alone), "logits": float(difference), "experts": len(experts)}


def fully_sharded(folder: str, ids: torch.Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Every layer is a unit, and so are float32 states, since FSDP wants one dtype in a unit, and what is shared."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parts = Counter(part for layer in model.model.layers for part in (layer.mixer, layer.feed_forward))
    for module in (part for part, layers in parts.items() if part is not None and layers > 1):
        fully_shard(module, mesh=mesh)
    for layer in model.model.layers:
        for module in layer.modules():
            if module is not layer and getattr(module, "weight", None) is None and list(module.parameters(False)):
                fully_shard(module, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    mine = ids[dist.get_rank() :: dist.get_world_size()]
    # routers balance the rows of a process, and their loss is no mean over processes
    options = {"output_router_logits": False} if alone.model.has_routers else {}
    model(mine, labels=mine, **options).loss.backward()
    alone(ids, labels=ids, **options).loss.backward()
    return _compare(model, alone)


def data_parallel(folder: str, ids: torch.Tensor) -> dict[str, float]:
    """Each process has its own row, twice, with a loss of the logits alone: a parameter without a gradient stops the
    second time.
    """
    alone = AutoModelForCausalLM.from_pretrained(folder).train()
    model = DistributedDataParallel(AutoModelForCausalLM.from_pretrained(folder).train())
    mine = ids[dist.get_rank() :: dist.get_world_size()]
    for _ in range(2):
        model.zero_grad()
        model(mine).logits.square().mean().backward()
    alone(ids).logits.square().mean().backward()
    return _compare(model.module, alone)


def main(folders: Path, output: Path) -> None:
    dist.init_process_group("gloo")
    ids = torch.randint(3, 128, (2, 33), generator=torch.Generator().manual_seed(0))
    found = {}
    for path in sorted(path for path in folders.iterdir() if path.is_dir()):
        folder = str(path)
        found[path.name] = {
            "tensor_parallel": tensor_parallel(folder, ids),
            "data_parallel": data_parallel(folder, ids),
            "fsdp_float32": fully_sharded(folder, ids, torch.float32),
            "fsdp_bfloat16": fully_sharded(folder, ids, torch.bfloat16),
        }
        if AutoConfig.from_pretrained(folder).base_model_ep_plan:
            found[path.name]["expert_parallel"] = expert_parallel(folder, ids)
    if dist.get_rank() == 0:
        output.write_text(json.dumps({"world_size": dist.get_world_size(), "found": found}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
