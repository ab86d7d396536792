"""`add_adapter`: PEFT's function, with errors for mistakes that PEFT ignores."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

import hf_archs
from hf_archs import training
from hf_archs.testing.contract.models import assert_close, lively, logits, tokens


def tiny(kind="causal_lm_class", **fields):
    architecture = hf_archs.get_architecture("mamba")
    return lively(getattr(architecture, kind), architecture.tiny_config(**fields))


def lora(**fields):
    return LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **fields)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            lora(target_modules=["in_proj", "q_proj"]),
            "target_modules of this LoraConfig has 'q_proj', which stands for",
        ),
        (lora(target_modules=["in_prj"]), "did you mean in_proj"),
        (lora(target_modules=r".*\.q_proj"), r"target_modules of this LoraConfig has '.*\\.q_proj'"),
        (lora(modules_to_save=["ssm", "gate"]), "modules_to_save of this LoraConfig has 'gate'"),
        (
            lora(modules_to_save=["A_log"]),
            "modules_to_save .* has 'A_log', which stands for nothing .* did you mean ssm",
        ),
        (lora(exclude_modules=["q_proj"]), "exclude_modules .* has 'q_proj'"),
        (lora(target_parameters=["experts.weight"]), "target_parameters .* has 'experts.weight'"),
        (lora(target_modules=["in_proj", "lm_head"]), "has lm_head, and the embedding and the head .* are one weight"),
        (lora(target_modules=["embed_tokens"]), "has model.embed_tokens, and the embedding and the head"),
        (lora(target_modules=".*(in_proj|head)"), "has lm_head, and the embedding and the head"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_mistakes_are_refused_in_a_sentence(config, sentence):
    model = tiny()
    names = [*model.state_dict()]
    with pytest.raises(ValueError, match=sentence) as refusal:
        hf_archs.add_adapter(model, config)
    assert "allowed are" in str(refusal.value) or "did you mean" in str(refusal.value)
    assert [*model.state_dict()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:Model .*`tie_word_embeddings=True`", "ignore:Input and output embeddings are no")
@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(target_modules="all-linear", exclude_modules=["out_proj"]),
        lora(target_modules=".*(_proj|head)", exclude_modules=["lm_head"]),
        lora(target_modules=["layers.0.mixer.in_proj"], modules_to_save=["ssm", "norm"]),
        lora(modules_to_save=["lm_head"]),
        IA3Config(task_type="CAUSAL_LM"),
    ],
    ids=["defaults", "linear", "excluded", "saved", "head", "ia3"],
)
def test_everything_else_is_pefts(config):
    ids = tokens(2, 9)
    model, bare = tiny(), tiny()
    torch.manual_seed(1)
    wrapped = hf_archs.add_adapter(model, config).eval()
    torch.manual_seed(1)
    expected = logits(get_peft_model(bare, config).eval(), ids)
    assert isinstance(wrapped, PeftModel)
    assert torch.equal(logits(wrapped, ids), expected)
    assert_close(logits(wrapped.merge_and_unload(), ids), expected, "merged", 1e-4)


def test_a_head_of_its_own_weight_is_a_target():
    ids = tokens(2, 9)
    wrapped = hf_archs.add_adapter(tiny(tie_word_embeddings=False), lora(target_modules=["in_proj", "lm_head"])).eval()
    expected = logits(wrapped, ids)
    assert_close(logits(wrapped.merge_and_unload(), ids), expected, "merged", 1e-4)


def test_under_bare_peft_a_tied_head_merges_wrongly():
    """The reason for the refusal: bare PEFT merges it wrongly, for Llama too."""
    ids = tokens(2, 9)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        wrapped = get_peft_model(tiny(), lora(target_modules=["in_proj", "lm_head"])).eval()
    expected = logits(wrapped, ids)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        merged = wrapped.merge_and_unload()
    assert (logits(merged, ids) - expected).abs().max() > 0.1 * expected.abs().max()


def test_names_that_peft_adds_by_itself():
    """PEFT adds all its names of classifiers to a config, one of which is the model's; the config can be reused."""
    config = LoraConfig(task_type="SEQ_CLS")
    for _ in range(2):
        wrapped = hf_archs.add_adapter(tiny("sequence_classification_class"), config)
        assert wrapped.base_model.model.score.modules_to_save["default"].weight.requires_grad


def test_an_adapter_without_targets():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert hf_archs.add_adapter(tiny(), config, "mine").active_adapter == "mine"


def test_the_command_line_takes_it():
    with pytest.raises(ValueError, match="has lm_head, and the embedding and the head"):
        training.add_lora(tiny(), ["in_proj", "lm_head"])
