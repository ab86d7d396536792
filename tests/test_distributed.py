"""Tensor parallelism and FSDP2 on two real processes equal one process, for every architecture."""

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


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in hf_archs.architectures():
        torch.manual_seed(0)
        config = hf_archs.get_architecture(name).tiny_config(initializer_range=0.2)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
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


@pytest.mark.parametrize("name", hf_archs.architectures())
def test_two_processes_equal_one(measured, name):
    assert measured["world_size"] == 2  # some launchers silently start one
    found = measured["found"][name]
    assert found["tensor_parallel"]["spread"] > 1  # more than the head
    assert found["tensor_parallel"]["logits"] < 1e-5
    assert found["tensor_parallel"]["gradients"] < 1e-5
    assert found["fsdp_float32"]["gradients"] < 1e-5
    assert found["fsdp_bfloat16"]["gradients"] < 4 * torch.finfo(torch.bfloat16).eps
    if name in ("moe", "hybrid"):
        assert found["expert_parallel"]["experts"] > 0
        assert found["expert_parallel"]["logits"] < 1e-5
        assert found["expert_parallel"]["gradients"] < 1e-5
    assert found["fsdp_float32"]["spread"] == found["fsdp_bfloat16"]["spread"] > found["tensor_parallel"]["spread"]
