"""Checks of native checkpoints for the tests of plugins: they compare a model of transformers with ours."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import hf_archs
from hf_archs.testing.parity import Float32CastsAsFloat64, check_parity, enliven

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def native(model_class: Any, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model of transformers with ``eager`` experts and lively weights, which are the same in float32 and float64.

    In float64, the constants that a model computes at construction (rotary frequencies) are computed in float64.
    """
    torch.manual_seed(0)
    with Float32CastsAsFloat64() if dtype == torch.float64 else contextlib.nullcontext():
        model = model_class(config)
    torch.manual_seed(0)
    enliven(model.float())
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.1)
    if dtype == torch.float64:  # the first model's buffers are rounded to float32
        with Float32CastsAsFloat64():
            exact = model_class(config).double()
        exact.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
        model = exact
    model.set_experts_implementation("eager")
    return model.eval()


def check_back(ours: Any, theirs: Any, name: str) -> Any:
    """Check that ``ours`` converts back to ``theirs`` in the format ``name``, bit for bit, and return its config."""
    back: Any = hf_archs.to_native(ours, name)
    expected = theirs.state_dict()
    assert type(back) is type(theirs)
    assert back.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())
    return back.config


def check_native(model_class: Any, config: Any, architecture: str, dtype: torch.dtype) -> None:
    """Check logits, every gradient by name, and that conversion to ours and back is exact."""
    theirs = native(model_class, config, dtype)
    ours = hf_archs.from_native(theirs)
    assert type(ours) is hf_archs.get_architecture(architecture).causal_lm_class
    forms: Any = hf_archs.get_architecture(architecture).native_formats
    form = next(form for form in forms if form.name == config.model_type)
    ids = torch.randint(3, 97, (2, 23), generator=torch.Generator().manual_seed(0))
    check_parity(ours, theirs, form.ours, ids, 1e-5 if dtype == torch.float32 else 1e-10)
    volatile = ("architectures", "_name_or_path", "dtype", "transformers_version")
    kept, given = check_back(ours, theirs, config.model_type).to_dict(), config.to_dict()
    assert {k: v for k, v in kept.items() if k not in volatile} == {k: v for k, v in given.items() if k not in volatile}


@torch.no_grad()
def check_files(model_class: Any, config: Any, architecture: str, folder: Path) -> None:
    """Check that our class reads the native model's files, and its own files again, with the same logits."""
    theirs = native(model_class, config)
    ours = hf_archs.from_native(theirs)
    ids = torch.randint(3, 97, (2, 23), generator=torch.Generator().manual_seed(0))
    expected = ours(ids).logits
    theirs.save_pretrained(folder / "native")
    ours_class: Any = hf_archs.get_architecture(architecture).causal_lm_class
    read, info = ours_class.from_pretrained(folder / "native", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert torch.equal(read(ids).logits, expected)
    read.save_pretrained(folder / "ours")
    again = AutoModelForCausalLM.from_pretrained(folder / "ours")
    assert type(again) is ours_class
    assert torch.equal(again(ids).logits, expected)
