"""Placement: device maps, CPU and disk offload."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM

from hf_archs.testing.contract.generation import generate
from hf_archs.testing.contract.models import Contract, forward, logits, tokens


class PlacementContract(Contract):
    """Promises about the placement of a model."""

    def test_device_map_auto(self, model: Any, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path)
        found = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
        ids = tokens(1, 9)
        assert torch.equal(logits(found, ids), logits(model, ids))

    @pytest.mark.parametrize("everything", [False, True], ids=["one layer", "all layers"])
    def test_disk_offload(self, model: Any, tmp_path: Path, everything: bool) -> None:
        """Layers on the disk are loaded when they run, and give the same logits and tokens."""
        model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
        names = [name for name, _ in model.named_children() if name != "model"]
        names += [f"model.{name}" for name, _ in model.model.named_children() if name != "layers"]
        layers = [f"model.layers.{i}" for i in range(model.config.num_hidden_layers)]
        places = dict.fromkeys(names, "cpu") | dict.fromkeys(layers, "disk" if everything else "cpu")
        places[layers[-1]] = "disk"
        found = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload")
        )
        away = {name for name, parameter in found.named_parameters() if parameter.is_meta}
        assert {".".join(name.split(".")[:3]) for name in away} == set(layers if everything else layers[-1:])
        ids = tokens(2, 9)
        assert torch.equal(logits(found, ids), logits(model, ids))
        assert torch.equal(generate(found, ids, max_new_tokens=3), generate(model, ids, max_new_tokens=3))

    def test_cpu_offload(self, model: Any) -> None:
        """CPU offload works: a module's weights exist only during its call, so no weight may be read outside it."""
        ids = tokens(2, 9)
        expected, sequence = logits(model, ids), generate(model, ids, max_new_tokens=3)
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(logits(model, ids), expected)
        assert torch.equal(generate(model, ids, max_new_tokens=3), sequence)

    def test_hidden_states_follow_the_layers(self, model: Any) -> None:
        """Recorded hidden states are the embeddings, then one for each layer."""
        out = forward(model, tokens(1, 9), output_hidden_states=True)
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
        assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(tokens(1, 9)))
