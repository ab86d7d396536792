"""Saving and loading: bit for bit, in every form of checkpoint, for every head."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_archs.errors import CheckpointMismatch
from hf_archs.registry import Architecture
from hf_archs.testing.contract.models import Contract, forward, gradients, lively, logits, state_parameters, tokens

HEADS = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)


def assert_same_bits(found: Any, expected: Any) -> None:
    """Check that two models have the same tensors and the same outputs."""
    ours, theirs = expected.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype, name
        assert torch.equal(theirs[name], tensor), name
    buffers = dict(expected.named_buffers())
    for name, buffer in found.named_buffers():  # including buffers that no file holds
        assert torch.equal(buffer, buffers[name]), name
    ids = tokens(2, 9)
    for a, b in zip(forward(found, ids).to_tuple(), forward(expected, ids).to_tuple()):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)


def stored_names(folder: Path) -> set[str]:
    """The names of all tensors in the safetensors files of a folder."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return names


class SavingContract(Contract):
    """Promises about checkpoints."""

    @pytest.mark.parametrize("auto_class", HEADS)
    def test_every_head_comes_back_bit_for_bit(
        self, architecture: Architecture, auto_class: str, tmp_path: Path
    ) -> None:
        loader: Any
        found: Any
        loader, model_class = architecture.auto_classes()[auto_class]
        model = lively(model_class, architecture.tiny_config(num_labels=2))
        model.save_pretrained(tmp_path)
        found, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(found) is model_class
        assert not found.training  # type: ignore[attr-defined]
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert_same_bits(found, model)

    @pytest.mark.parametrize("auto_class", HEADS[1:])
    def test_every_head_has_a_loss(self, architecture: Architecture, auto_class: str) -> None:
        """The loss of each head is finite and depends on every parameter."""
        _, model_class = architecture.auto_classes()[auto_class]
        model = lively(model_class, architecture.tiny_config(num_labels=2)).train()
        ids = tokens(2, 9)
        labels: dict[str, Any] = {
            "AutoModelForSequenceClassification": {"labels": torch.tensor([0, 1])},
            "AutoModelForTokenClassification": {"labels": ids % 2},
            "AutoModelForQuestionAnswering": {
                "start_positions": torch.tensor([1, 2]),
                "end_positions": torch.tensor([3, 8]),
            },
        }
        loss = model(ids, **labels.get(auto_class, {"labels": ids})).loss
        assert loss.isfinite()
        for name, gradient in gradients(model, loss).items():
            assert gradient.isfinite().all(), name
            # a softmax over positions does not depend on a constant added to all of them
            assert name == "qa_outputs.bias" or gradient.abs().max() > 0, name

    @pytest.mark.parametrize("tied", [True, False])
    def test_tied_and_untied_heads(self, architecture: Architecture, tied: bool, tmp_path: Path) -> None:
        model = lively(architecture.causal_lm_class, architecture.tiny_config(tie_word_embeddings=tied))
        model.save_pretrained(tmp_path)
        assert ("lm_head.weight" in stored_names(tmp_path)) is not tied
        found = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert (found.lm_head.weight is found.model.embed_tokens.weight) is tied
        assert_same_bits(found, model)

    def test_sharded(self, model: Any, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path, max_shard_size="40KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        assert_same_bits(AutoModelForCausalLM.from_pretrained(tmp_path), model)

    @pytest.mark.parametrize("options", [{"low_cpu_mem_usage": True}, {"device_map": "cpu"}], ids=str)
    def test_built_on_the_meta_device(self, model: Any, options: dict[str, Any], tmp_path: Path) -> None:
        model.save_pretrained(tmp_path)
        assert_same_bits(AutoModelForCausalLM.from_pretrained(tmp_path, **options), model)

    def test_bf16(self, model: Any, tmp_path: Path) -> None:
        """Loaded in bf16, a model keeps its states' parameters in float32, and is saved and loaded bit for bit."""
        model.save_pretrained(tmp_path / "float32")
        half = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
        exact = dict(model.named_parameters())
        wide = state_parameters(model)
        for name, parameter in half.named_parameters():
            assert parameter.dtype == (torch.float32 if name in wide else torch.bfloat16), name
            assert torch.equal(parameter, exact[name].to(parameter.dtype)), name
        half.save_pretrained(tmp_path / "bf16")
        assert AutoConfig.from_pretrained(tmp_path / "bf16").dtype == torch.bfloat16
        assert_same_bits(AutoModelForCausalLM.from_pretrained(tmp_path / "bf16"), half)

    def test_only_what_is_missing_is_initialised(self, model: Any, tmp_path: Path) -> None:
        """A file that lacks one tensor is refused, and the error names the tensor. If a caller passes the other tensors
        instead, only the missing one is initialised.
        """
        exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        stored = load_file(file)
        for missing in sorted({re.sub(r"\.experts\..*", ".experts.", name) for name in stored}):
            # a layer's experts are one tensor in memory and one per expert in a file
            left = {k: v for k, v in stored.items() if k != missing and not k.startswith(missing)}
            if missing != "lm_head.weight":  # a head may be new
                save_file(left, file, metadata={"format": "pt"})
                with pytest.raises(
                    CheckpointMismatch, match=rf"{re.escape(missing)}.* is missing|the parts of .*experts"
                ):
                    type(model).from_pretrained(tmp_path)
                if not missing.endswith(".experts."):  # a caller who asks for the list is not refused
                    _, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
                    assert missing in info["missing_keys"]
            with torch.random.fork_rng():
                found = type(model).from_pretrained(None, config=model.config, state_dict=left).state_dict()
            tied = "lm_head.weight" if model.config.tie_word_embeddings else missing
            for name, tensor in found.items():
                gone = name == missing or name.startswith(missing)
                if gone or (name == tied and missing == "model.embed_tokens.weight"):
                    assert tensor.isfinite().all(), missing
                    assert not torch.equal(tensor, exact[name]), missing
                else:
                    assert torch.equal(tensor, exact[name]), f"{name} was made anew when {missing} was missing"

    def test_a_head_takes_the_backbone_over(self, model: Any, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path)
        found = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
        ours = model.model.state_dict()
        assert all(torch.equal(tensor, ours[name]) for name, tensor in found.model.state_dict().items())

    def test_every_parameter_is_initialised(self, architecture: Architecture) -> None:
        """No tensor of a new model has a NaN, with which uninitialised memory is filled here."""
        deterministic: Any = torch.utils.deterministic
        before = deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        try:
            model = architecture.causal_lm_class(architecture.tiny_config())
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                assert tensor.isfinite().all(), f"{name} is not initialised"
        finally:
            deterministic.fill_uninitialized_memory = before
            torch.use_deterministic_algorithms(False)

    def test_saved_again_and_again(self, model: Any, tmp_path: Path) -> None:
        """Loading and saving again changes no file: config, stub or weights."""
        model.save_pretrained(tmp_path / "0")
        for i in range(2):
            AutoModelForCausalLM.from_pretrained(tmp_path / str(i)).save_pretrained(tmp_path / str(i + 1))
        for file in (tmp_path / "0").iterdir():
            assert (tmp_path / "2" / file.name).read_bytes() == file.read_bytes(), file.name
        config = json.loads((tmp_path / "2" / "config.json").read_text())
        assert config["model_type"] == model.config.model_type
        stub = {value.partition(".")[0] for value in config["auto_map"].values()}
        assert all((tmp_path / "2" / f"{module}.py").is_file() for module in stub)

    def test_moved_to_float64_and_back(self, model: Any) -> None:
        """Casting to float64 and back changes nothing."""
        ids = tokens(1, 20)
        single = logits(model, ids)
        double = logits(model.double(), ids)
        assert double.dtype == torch.float64
        assert torch.equal(logits(model.float(), ids), single)
