"""The two gloo processes of tests/test_distributed.py, run by torchrun; writes its measurements as JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.distributed import DistributedConfig

import hf_archs
from hf_archs.model.layout import Layout

BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def _load(folder: str, **options: Any) -> Any:
    auto = AutoModelForMaskedLM if AutoConfig.from_pretrained(folder).bidirectional else AutoModelForCausalLM
    return auto.from_pretrained(folder, **options)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = _whole(found.detach()), expected.detach()
    distance = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return distance if math.isfinite(distance) else math.inf


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: _whole(p.grad).clone() for name, p in model.named_parameters()}


def _furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(_apart(found[name], expected[name]) for name in expected)


def _compare(model: Any, alone: Any) -> dict[str, float]:
    """The largest relative difference of the gradients, and how many parameters are spread over the processes."""
    worst = _furthest(_gradients(model), _gradients(alone))
    return {"gradients": worst, "spread": sum(isinstance(p, DTensor) for p in model.parameters())}


def _in_pieces(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """The gradients of the mean loss, a row at a time, as processes have them: kernels round by their shapes."""
    for i in range(len(ids)):
        (_loss(model, ids[i : i + 1], None if mask is None else mask[i : i + 1]) / len(ids)).backward()


def _loss(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    # the routers' loss balances the rows of one process and is not a mean over processes
    options: dict[str, Any] = {"output_router_logits": False} if model.model.has_routers else {}
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    return model(ids, attention_mask=mask, labels=labels, **options).loss


def tensor_parallel(folder: str, ids: torch.Tensor) -> dict[str, float]:
    model, alone = _load(folder, distributed_config=DistributedConfig(tp_size=2)), _load(folder)
    out, expected = model(ids, labels=ids), alone(ids, labels=ids)
    out.loss.backward()
    expected.loss.backward()
    experts = sum(isinstance(p, DTensor) for n, p in model.named_parameters() if ".experts." in n)
    return {**_compare(model, alone), "logits": _apart(out.logits, expected.logits), "experts": experts}


def expert_parallel(folder: str, ids: torch.Tensor) -> dict[str, float]:
    """Each process holds half of the experts of every layer."""
    model, alone = _load(folder, distributed_config=DistributedConfig(tp_size=2, ep_size=2)), _load(folder)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # pads go to no expert on any rank
    labels = ids.masked_fill(mask == 0, -100)
    out, expected = (m(ids, attention_mask=mask, labels=labels) for m in (model, alone))
    out.loss.backward()
    expected.loss.backward()
    experts = [p for n, p in model.named_parameters() if ".experts." in n and ".shared" not in n]
    assert all(isinstance(p, DTensor) and p.to_local().shape[0] == p.shape[0] // 2 for p in experts)
    difference = _apart(out.logits[mask.bool()], expected.logits[mask.bool()])
    return {**_compare(model, alone), "logits": difference, "experts": len(experts)}


def _ours(folder: str, dtype: torch.dtype, policy: MixedPrecisionPolicy) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return hf_archs.fully_shard(_load(folder, dtype=dtype), mesh=mesh, mp_policy=policy)


def _plain(folder: str, dtype: torch.dtype, policy: MixedPrecisionPolicy) -> Any:
    """The recipe of torch's tutorials."""
    model, mesh = _load(folder, dtype=dtype), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def _transformers(folder: str, dtype: torch.dtype, policy: MixedPrecisionPolicy) -> Any:
    config = DistributedConfig(fsdp_size=dist.get_world_size(), fsdp_mixed_precision=policy == BFLOAT16)
    return _load(folder, dtype=dtype, distributed_config=config)


def _accelerate(folder: str, dtype: torch.dtype, policy: MixedPrecisionPolicy) -> Any:
    """FSDP as a Trainer applies it with ``fsdp=True`` on GPUs. (On CPUs accelerate makes it plain DDP.)"""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["ArchBlock"]
    )
    if policy == BFLOAT16:
        plugin.set_mixed_precision("bf16")
    accelerator: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="bf16" if policy == BFLOAT16 else "no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
        torch_device_mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=("dp_shard",)),
    )
    return fsdp2_prepare_model(accelerator, _load(folder, dtype=dtype))


ROUTES: dict[str, Callable[..., Any]] = {
    "hf_archs": _ours,
    "plain": _plain,
    "transformers": _transformers,
    "accelerate": _accelerate,
}


def _states(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(".ssm")]


class Step:
    """A clipped step of gradient descent: the gradients and their norm before, the parameters after."""

    def __init__(self, model: Any):
        self.gradients = _gradients(model)
        self.norm = float(_whole(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        self.parameters = {name: _whole(p.detach()) for name, p in model.named_parameters()}


def one_process(folder: str, ids: torch.Tensor, dtype: torch.dtype) -> Step:
    model = _load(folder, dtype=dtype)
    _in_pieces(model, ids)
    return Step(model)


def fully_sharded(folder: str, ids: torch.Tensor, dtype: torch.dtype, route: str, expected: Step) -> Any:
    """The same step of two processes."""
    try:
        model = ROUTES[route](folder, dtype, MixedPrecisionPolicy())
    except ValueError as error:
        return {"error": str(error)}
    states = [p for module in _states(model) for p in module.parameters()]
    assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in states)
    assert {p.dtype for p in model.parameters()} == ({dtype, torch.float32} if states else {dtype})
    _loss(model, ids[dist.get_rank() :: dist.get_world_size()]).backward()
    found = Step(model)
    return {
        "gradients": _furthest(found.gradients, expected.gradients),
        "norm": abs(found.norm / expected.norm - 1),
        "step": _furthest(found.parameters, expected.parameters),
        "spread": sum(isinstance(p, DTensor) for p in model.parameters()),
        "model": model,
    }


def uncast(folder: str, ids: torch.Tensor, route: str) -> list[str]:
    """The dtypes of what states and projections hold in a forward, where a policy asks for bfloat16."""
    model = ROUTES[route](folder, torch.float32, BFLOAT16)
    seen: set[str] = set()

    def look(module: nn.Module, *call: Any) -> None:
        kind = "projection" if isinstance(module, nn.Linear) else "states"
        seen.update(f"{kind} {p.dtype}" for p in module.parameters())

    layer = model.model.layers[0]
    for module in [*_states(layer), layer.mixer.in_proj]:
        module.register_forward_hook(look)
    _loss(model, ids).backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    return sorted(seen)


def checkpoints(folder: str, place: Path, model: Any, route: str) -> dict[str, bool]:
    """Whether a sharded model comes back: from a distributed checkpoint, and as an ordinary folder."""
    shards, whole = str(place / "shards"), str(place / "whole")
    dcp.save(get_model_state_dict(model), checkpoint_id=shards)
    again = ROUTES[route](folder, torch.bfloat16, MixedPrecisionPolicy())
    state = get_model_state_dict(again)
    dcp.load(state, checkpoint_id=shards)
    set_model_state_dict(again, state)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if route == "transformers":
        model.save_pretrained(whole)  # on every process
    elif dist.get_rank() == 0:
        model.save_pretrained(whole, state_dict=full)
    dist.barrier()
    loaded = _load(whole, dtype=torch.bfloat16)
    expected = {name: _whole(p.detach()) for name, p in model.named_parameters()}
    return {
        "shards": all(torch.equal(_whole(p.detach()), expected[n]) for n, p in again.named_parameters()),
        "whole": all(torch.equal(p, expected[n]) for n, p in loaded.named_parameters()),
    }


class Stage(nn.Module):
    """One of two stages of a pipeline: modules of the plan, each given what the plan names."""

    def __init__(self, model: Any, first: bool):
        super().__init__()
        self.steps: list[tuple[nn.Module, list[str]]] = []
        for name, module in model.named_modules():  # in running order
            if name not in model.pp_plan:
                continue
            inputs = model.pp_plan[name][0][1:]
            if isinstance(module, nn.ModuleList):
                half = len(module) // 2
                self.steps += [(layer, inputs) for layer in (module[:half] if first else module[half:])]
            elif first == (name == "model.embed_tokens"):
                self.steps.append((module, inputs))
        self.parts = nn.ModuleList(module for module, _ in self.steps)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        values = {"layout": Layout.build(mask.bool(), None)}
        for module, names in self.steps:
            hidden_states = module(hidden_states, **{name: values[name] for name in names})
        return hidden_states


def pipeline(folder: str, ids: torch.Tensor) -> dict[str, float]:
    """Logits and gradients of two stages under torch's GPipe schedule, a row at a time."""
    model, alone, rank = _load(folder), _load(folder), dist.get_rank()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    targets = ids.masked_fill(mask == 0, -100)
    _in_pieces(alone, ids, mask)
    stage = PipelineStage(Stage(model, first=rank == 0), rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(
        stage, len(ids), lambda logits, labels: alone.loss_function(logits, labels, vocab_size=alone.vocab_size)
    )
    if rank == 0:
        schedule.step(ids, mask=mask)
        logits = None
    else:
        logits = schedule.step(target=targets, mask=mask)
    # a tied weight has a part of its gradient in each stage
    gradients = {n: p.grad for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    found: list[Any] = [None, None]
    dist.all_gather_object(found, (gradients, logits))
    names: dict[int, set[str]] = {}
    for name, p in alone.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), set()).add(name)
    worst = 0.0
    for p in alone.parameters():
        # all names of a parameter in a stage have the same gradient
        of_stages = [next((g[n] for n in sorted(names[id(p)]) if n in g), None) for g, _ in found]
        worst = max(worst, _apart(sum(g for g in of_stages if g is not None), p.grad))
    with torch.no_grad():
        expected = alone(ids, attention_mask=mask).logits
    return {"gradients": worst, "logits": _apart(found[1][1][mask.bool()], expected[mask.bool()])}


def pipeline_of_transformers(folder: str, ids: torch.Tensor) -> dict[str, Any]:
    try:
        model = _load(folder, distributed_config=DistributedConfig(pp_size=2))
    except ValueError as error:
        return {"error": str(error)}
    alone, mask = _load(folder), torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        found, expected = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (model, alone))
    options: Any = {"attention_mask": mask, "max_new_tokens": 5, "eos_token_id": None, "do_sample": False}
    same = torch.equal(model.generate(ids, **options), alone.generate(ids, **options))
    return {"logits": _apart(found, expected), "generated": same}


def data_parallel(folder: str, ids: torch.Tensor) -> dict[str, float]:
    """Each process has its own row, twice, with a loss of the logits alone: a parameter without a gradient stops the
    second time.
    """
    alone, model = _load(folder).train(), DistributedDataParallel(_load(folder).train())
    mine = ids[dist.get_rank() :: dist.get_world_size()]
    for _ in range(2):
        model.zero_grad()
        model(mine).logits.square().mean().backward()
    alone(ids).logits.square().mean().backward()
    return _compare(model.module, alone)


def main(folders: Path, output: Path) -> None:
    dist.init_process_group("gloo")
    ids = torch.randint(3, 128, (2, 33), generator=torch.Generator().manual_seed(0))
    measured: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in folders.iterdir() if path.is_dir()):
        folder, found = str(path), measured.setdefault(path.name, {})
        found["tensor_parallel"] = tensor_parallel(folder, ids)
        found["data_parallel"] = data_parallel(folder, ids)
        if AutoConfig.from_pretrained(folder).base_model_ep_plan:
            found["expert_parallel"] = expert_parallel(folder, ids)
        found["pipeline"] = pipeline(folder, ids)
        if path.name != "masked":
            found["pipeline_of_transformers"] = pipeline_of_transformers(folder, ids)
        step = one_process(folder, ids, torch.float32)
        found["float32"] = fully_sharded(folder, ids, torch.float32, "hf_archs", step)
        found["float32"].pop("model")
        step = one_process(folder, ids, torch.bfloat16)
        for route in ROUTES:
            found[route] = fully_sharded(folder, ids, torch.bfloat16, route, step)
            model = found[route].pop("model", None)
            if route == "hf_archs" or (route == "transformers" and path.name in ("mamba", "hybrid")):
                place = output.parent / "checkpoints" / path.name / route
                found[route] |= checkpoints(folder, place, model, route)
        if path.name in ("mamba", "hyena"):
            found["uncast"] = {route: uncast(folder, ids, route) for route in ROUTES}
    if dist.get_rank() == 0:
        output.write_text(json.dumps({"world_size": dist.get_world_size(), "found": measured}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
