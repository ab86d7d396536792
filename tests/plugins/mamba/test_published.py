"""Published Mamba and FalconMamba at small widths, and every field of transformers' config classes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from hf_archs import registry
from hf_archs.testing.native import native
from hf_archs.testing.parity import check_parity
from hf_archs.testing.published import check_fields, check_published, reduced
from hf_archs_mamba import ArchMambaForCausalLM
from hf_archs_mamba.conversion import FALCON_MAMBA, MAMBA

CONFIGS = Path(__file__).parents[2] / "data/configs"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@DTYPES
@pytest.mark.parametrize(
    "name",
    [
        "state-spaces__mamba-130m-hf",
        "state-spaces__mamba-2.8b-hf",
        "tiiuae__falcon-mamba-7b",
        "tiiuae__falcon-mamba-7b-instruct",
    ],
)
def test_published(name, dtype, tmp_path):
    raw = json.loads((CONFIGS / f"{name}.json").read_text())
    check_published(reduced(raw), "mamba", dtype, tmp_path)


@DTYPES
@pytest.mark.parametrize("size", ["130m", "370m", "790m", "1.4b", "2.8b"])
def test_published_state_spaces(size, dtype, tmp_path):
    """Of the larger files only the sizes are known, and that they have no ``ssm_cfg``."""
    small = reduced(json.loads((CONFIGS / f"state-spaces__mamba-{size}.json").read_text()))
    sizes = {"hidden_size": small["d_model"], "num_hidden_layers": small["n_layer"], "vocab_size": 128}
    theirs = native(MambaForCausalLM, MambaConfig(**sizes), dtype)
    state = {key.replace("embeddings", "embedding"): tensor for key, tensor in theirs.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(small))
    ours, info = ArchMambaForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.randint(0, 128, (2, 23), generator=torch.Generator().manual_seed(0))
    check_parity(ours, theirs, MAMBA.ours, ids, 1e-5 if dtype == torch.float32 else 1e-10)


FIELDS = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 6}
OTHERS = {"time_step_min": [0.05], "time_step_init_scheme": ["constant"]}


@pytest.mark.parametrize("form", [MAMBA, FALCON_MAMBA], ids=str)
def test_every_field_of_their_config(form):
    found = check_fields(form, FIELDS, OTHERS)
    assert {name for name, what in found.items() if what == "refused"} == {"hidden_act"}


def test_fields_that_are_passed_over_are_found(monkeypatch):
    fields = {ours: theirs for ours, theirs in MAMBA.fields.items() if ours != "norm_eps"}
    careless = dataclasses.replace(
        MAMBA, fields=fields, allowed={}, ignored=(*MAMBA.ignored, "layer_norm_epsilon", "hidden_act")
    )
    architecture = dataclasses.replace(registry.get_architecture("mamba"), native_formats=(careless,))
    monkeypatch.setitem(registry._architectures, "mamba", architecture)
    with pytest.raises(AssertionError) as found:
        check_fields(careless, FIELDS, OTHERS)
    norm, activation = str(found.value).splitlines()[0].split("; ")
    assert norm.startswith("layer_norm_epsilon = ")
    assert activation.startswith("hidden_act = 'gelu': ")
    assert all(line.endswith(" from transformers' logits") for line in (norm, activation))
