"""A damaged weights file is named in one sentence, and the good checkpoint beside it still loads."""

import pytest
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

import hf_archs


@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_from_pretrained_names_the_checkpoint(tmp_path, kept):
    config = hf_archs.get_architecture("mamba").tiny_config()
    model = AutoModelForCausalLM.from_config(config)
    for name in ("good", "bad"):
        model.save_pretrained(tmp_path / name)
    file = tmp_path / "bad" / "model.safetensors"
    whole = file.read_bytes()
    file.chmod(0o600)
    file.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(SafetensorError, match=r"bad are corrupt or truncated .*restore them"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "bad")
    AutoModelForCausalLM.from_pretrained(tmp_path / "good")
