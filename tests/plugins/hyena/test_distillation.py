"""`distill_filters`: a model with a state of constant size and nearly the trained model's outputs."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_archs
from hf_archs.testing.contract.generation import generate
from hf_archs.testing.contract.models import distance, lively, logits, tokens
from hf_archs_hyena import distill_filters


def implicit(**fields):
    architecture = hf_archs.get_architecture("hyena")
    fields = {"hidden_size": 8, "max_positions": 200, "filter_size": 8, **fields}
    return lively(architecture.causal_lm_class, architecture.tiny_config(**fields))


def test_the_more_modes_the_closer():
    """The reported errors are those of the taps, and the model's outputs are as close."""
    model, ids = implicit(num_hidden_layers=1), tokens(2, 150)
    expected = logits(model, ids)
    far = []
    for modes in (2, 20):
        distilled, errors = distill_filters(model, modes)
        assert set(errors) == {"model.layers.0.mixer.ssm"}
        for name, error in errors.items():
            truth, fit = (m.get_submodule(name).taps(200).double() for m in (model, distilled))
            assert torch.allclose(error, (fit - truth).norm(dim=1) / truth.norm(dim=1), rtol=1e-2, atol=1e-6)
        far.append((max(e.max().item() for e in errors.values()), distance(logits(distilled, ids), expected)))
    assert far[1][0] < min(far[0][0], 3e-2), far
    assert far[1][1] < min(far[0][1], 3e-2), far


def test_it_is_another_model_with_a_constant_state(tmp_path):
    model = implicit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    distilled, _ = distill_filters(model, 8)
    assert distilled.config.filter_types == ["modal"]
    assert model.config.filter_types == ["implicit"]
    sizes = []
    for length in (5, 50):
        with torch.no_grad():
            sizes.append(distilled(tokens(1, length), use_cache=True).past_key_values.num_bytes())
    assert sizes[0] == sizes[1]
    with torch.no_grad():
        for parameter in distilled.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    distilled, _ = distill_filters(model, 8)
    distilled.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(generate(found, tokens(1, 9)), generate(distilled, tokens(1, 9)))


def test_other_filters_stay():
    model = implicit(filter_types=["implicit", "short"])
    distilled, errors = distill_filters(model, 4)
    assert list(errors) == ["model.layers.0.mixer.ssm"]
    short = "model.layers.1.mixer.ssm.coefficients"
    assert torch.equal(distilled.state_dict()[short], model.state_dict()[short])


def test_precision_is_kept():
    model = implicit(num_hidden_layers=1).to(torch.bfloat16)
    distilled, _ = distill_filters(model, 4)
    assert distilled.dtype == torch.bfloat16
    assert distilled.model.layers[0].mixer.ssm.log_decay.dtype == torch.float32


def test_what_cannot_be_distilled():
    with pytest.raises(ValueError, match="without implicit filters"):
        distill_filters(implicit(filter_types=["modal"]))
    with pytest.raises(ValueError, match=r"modes is 4; .* allowed is 16"):
        distill_filters(implicit(filter_types=["implicit", "modal"]), 4)
    with pytest.raises(ValueError, match="length is 201; allowed are 2 to"):
        distill_filters(implicit(), 4, length=201)
