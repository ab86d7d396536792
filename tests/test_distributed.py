"""Tensor parallelism, data parallelism and FSDP2 on two real processes equal one process, for every architecture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_archs

CONFIGS = {
    name: hf_archs.get_architecture(name).tiny_config(initializer_range=0.2) for name in hf_archs.architectures()
}
# as in Zamba2: the layers that are shared are whole on both processes, since their low-rank parts would not fit
CONFIGS["shared"] = hf_archs.get_architecture("hybrid").tiny_config(
    num_hidden_layers=4,
    mixers={
        "mamba2": {"type": "mamba2", "state_size": 16, "head_dim": 16},
        "attention": {"type": "attention", "num_heads": 4, "shared": True, "site_rank": 4},
    },
    layer_pattern="mamba2 attention",
    feed_forward={
        "mlp": {"type": "mlp", "intermediate_size": 96, "shared": True, "site_rank": 4},
        "moe": {"type": "moe", "num_experts": 4, "moe_intermediate_size": 48},
    },
    feed_forward_pattern="moe mlp",
    initializer_range=0.2,
)
CONFIGS["expert_choice"] = hf_archs.get_architecture("moe").tiny_config(
    router="expert_choice", causal_predictor=True, initializer_range=0.2
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter, tensor in model.named_parameters():
            if parameter.endswith("site_up"):  # zeros at first, through which nothing learns
                torch.nn.init.normal_(tensor, std=0.2)
        model.save_pretrained(folder / name)
    worker = Path(__file__).with_name("distributed_worker.py")
    output = folder / "measured.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*command, str(worker), str(folder), str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert output.exists(), run.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_equal_one(measured, name):
    assert measured["world_size"] == 2  # some launchers silently start one
    found = measured["found"][name]
    assert found["tensor_parallel"]["spread"] > 1  # more than the head
    assert found["tensor_parallel"]["logits"] < 1e-5
    assert found["tensor_parallel"]["gradients"] < 1e-5
    assert found["data_parallel"]["gradients"] < 1e-5
    assert found["fsdp_float32"]["gradients"] < 1e-5
    assert found["fsdp_bfloat16"]["gradients"] < 4 * torch.finfo(torch.bfloat16).eps
    if name in ("moe", "hybrid", "shared", "expert_choice"):
        assert found["tensor_parallel"]["experts"] > 0  # each of them sharded in its inner layer
        assert found["expert_parallel"]["experts"] > 0
        assert found["expert_parallel"]["logits"] < 1e-5
        assert found["expert_parallel"]["gradients"] < 1e-5
    assert found["fsdp_float32"]["spread"] == found["fsdp_bfloat16"]["spread"] > found["tensor_parallel"]["spread"]
