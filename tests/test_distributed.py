"""Tensor, expert and data parallelism, pipelines and FSDP2 on two processes equal one, for every architecture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_archs
from hf_archs.testing.contract.models import lively

CONFIGS = {name: hf_archs.get_architecture(name).tiny_config() for name in hf_archs.architectures()}
CONFIGS["retnet"] = hf_archs.get_architecture("retnet").tiny_config(embedding_multiplier=3.0)
# every module of a layer runs twice in a forward
CONFIGS["masked"] = hf_archs.get_architecture("mamba2").tiny_config(bidirectional=True, tie_word_embeddings=False)
# as in Zamba2: shared layers are whole on both processes, since their low-rank parts could not be sharded
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
)
CONFIGS["expert_choice"] = hf_archs.get_architecture("moe").tiny_config(
    router="expert_choice", causal_predictor=True, initializer_range=0.2
)


OF = {
    "masked": "mamba2",
    "shared": "hybrid",
    "expert_choice": "moe",
}  # architectures of cases with another name
BFLOAT16 = torch.finfo(torch.bfloat16).eps


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder, output = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("output") / "measured.json"
    for name, config in CONFIGS.items():
        architecture = hf_archs.get_architecture(OF.get(name, name))
        model_class = architecture.masked_lm_class if config.bidirectional else architecture.causal_lm_class
        lively(model_class, config).save_pretrained(folder / name)
    worker = Path(__file__).with_name("distributed_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*command, str(worker), str(folder), str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert output.exists(), run.stderr[-3000:]
    measured = json.loads(output.read_text())
    assert measured["world_size"] == 2  # some launchers silently start one
    return measured["found"]


@pytest.mark.parametrize("name", CONFIGS)
def test_tensor_parallel(measured, name):
    found = measured[name]
    assert found["tensor_parallel"]["spread"] > 1  # not only the head
    assert found["tensor_parallel"]["logits"] < 1e-5
    assert found["tensor_parallel"]["gradients"] < 3e-5
    assert found["data_parallel"]["gradients"] < 3e-5
    if name in ("moe", "hybrid", "shared", "expert_choice"):
        assert found["tensor_parallel"]["experts"] > 0  # each is sharded in its hidden width
        assert found["expert_parallel"]["experts"] > 0
        assert found["expert_parallel"]["logits"] < 1e-5
        assert found["expert_parallel"]["gradients"] < 3e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_fsdp(measured, name):
    """A training step, by each way to make units."""
    found = measured[name]
    assert found["float32"]["gradients"] < 1e-6
    assert found["float32"]["step"] < 1e-6
    assert found["float32"]["norm"] < 1e-6
    assert found["float32"]["spread"] > found["tensor_parallel"]["spread"]
    for route in ("hf_archs", "plain", "transformers", "accelerate"):
        if name == "shared" and route in ("plain", "accelerate"):
            # shared weights would belong to the first of their layers only
            assert "shares its mixer with others" in found[route]["error"]
            assert "hf_archs.fully_shard(model)" in found[route]["error"]
            continue
        # transformers' units add a tied head's part in another order
        assert found[route]["gradients"] <= (BFLOAT16 if route == "transformers" else 0)
        assert found[route]["step"] < BFLOAT16
        assert found[route]["norm"] < BFLOAT16
        assert found[route]["spread"] == found["float32"]["spread"]


@pytest.mark.parametrize("name", CONFIGS)
def test_fsdp_checkpoints(measured, name):
    found = measured[name]
    for route in ("hf_archs", "transformers") if name in ("mamba", "hybrid") else ("hf_archs",):
        assert found[route]["shards"]
        assert found[route]["whole"]


@pytest.mark.parametrize("name", ["mamba", "hyena"])
@pytest.mark.parametrize("route", ["hf_archs", "plain", "transformers", "accelerate"])
def test_mixed_precision_casts_no_states(measured, name, route):
    assert measured[name]["uncast"][route] == ["projection torch.bfloat16", "states torch.float32"]


@pytest.mark.parametrize("name", CONFIGS)
def test_pipeline(measured, name):
    """Two stages: of what the plan says, under torch's schedule, and of transformers' own."""
    assert measured[name]["pipeline"]["logits"] < 1e-6
    assert measured[name]["pipeline"]["gradients"] < 1e-6
    if name == "shared":
        assert (
            "pp_size is 2, and layers of this ArchHybridForCausalLM share"
            in (measured[name]["pipeline_of_transformers"]["error"])
        )
    elif name != "masked":  # an encoder's stages give no causal logits
        assert measured[name]["pipeline_of_transformers"]["logits"] < 1e-6
        assert measured[name]["pipeline_of_transformers"]["generated"]
