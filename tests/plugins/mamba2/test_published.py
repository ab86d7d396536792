"""Published Mamba-2 at small widths, and every field of transformers' config class."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from hf_archs.testing.native import native
from hf_archs.testing.parity import check_parity
from hf_archs.testing.published import check_fields, check_published, reduced
from hf_archs_mamba2 import ArchMamba2ForCausalLM
from hf_archs_mamba2.conversion import MAMBA2

CONFIGS = Path(__file__).parents[2] / "data/configs"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@DTYPES
def test_published(dtype, tmp_path):
    raw = json.loads((CONFIGS / "mistralai__Mamba-Codestral-7B-v0.1.json").read_text())
    check_published(reduced(raw), "mamba2", dtype, tmp_path)


@DTYPES
@pytest.mark.parametrize("size", ["130m", "370m", "780m", "1.3b", "2.7b"])
def test_published_state_spaces(size, dtype, tmp_path):
    """Their heads have 64 channels and 128 states, mamba_ssm's defaults, which the files omit."""
    small = reduced(json.loads((CONFIGS / f"state-spaces__mamba2-{size}.json").read_text()))
    sizes = {"hidden_size": small["d_model"], "num_heads": 1, "n_groups": 1, "num_hidden_layers": 2}
    config = Mamba2Config(**sizes, vocab_size=128, tie_word_embeddings=True, chunk_size=8)
    theirs = native(Mamba2ForCausalLM, config, dtype)
    state = {key.replace("embeddings", "embedding"): tensor for key, tensor in theirs.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(small))
    ours, info = ArchMamba2ForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.randint(0, 128, (2, 23), generator=torch.Generator().manual_seed(0))
    check_parity(ours, theirs, MAMBA2.ours, ids, 1e-5 if dtype == torch.float32 else 1e-10)


def test_every_field_of_their_config():
    fields = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 6}
    fields |= {"head_dim": 8, "num_heads": 6, "n_groups": 2, "chunk_size": 8}
    others = {
        "num_heads": [{"num_heads": 12, "head_dim": 4}],
        "head_dim": [{"num_heads": 12, "head_dim": 4}],
        "hidden_size": [{"hidden_size": 48, "num_heads": 12}],
        "expand": [{"expand": 3, "num_heads": 9, "n_groups": 3}],
        "time_step_min": [0.05],
        "time_step_limit": [(0.15, 0.6)],
    }
    found = check_fields(MAMBA2, fields, others)
    assert {name for name, what in found.items() if what == "refused"} == {"hidden_act"}
