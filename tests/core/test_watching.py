"""A plain Trainer is watched; `ArchTrainer` handles what it does not."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

import hf_archs
from hf_archs.model.watching import PlainTrainerWarning
from hf_archs.testing.contract.models import lively, tokens
from hf_archs.training import ArchTrainer


def model_of(name, **fields):
    architecture = hf_archs.get_architecture(name)
    return lively(architecture.causal_lm_class, architecture.tiny_config(**fields))


def arguments(folder, **options):
    return TrainingArguments(str(folder), use_cpu=True, report_to=[], **options)


@pytest.mark.parametrize(
    ("name", "decayed"),
    [("mamba", "A_log, D"), ("mamba2", "A_log, D"), ("hybrid", "A_log, D"), ("hyena", "weight, deltas, freq")],
)
def test_decay_of_states_is_said_once(name, decayed, tmp_path):
    model = model_of(name)
    with pytest.warns(PlainTrainerWarning, match=rf"weight_decay 0.1 will be applied to {decayed} of") as heard:
        Trainer(model, arguments(tmp_path, weight_decay=0.1))
    assert len(heard) == 1


def test_nothing_is_said_where_nothing_is_wrong(tmp_path):
    model = model_of("mamba")
    optimizer = torch.optim.AdamW(hf_archs.parameter_groups(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(model, arguments(tmp_path))
        Trainer(model, arguments(tmp_path, weight_decay=0.1), optimizers=(optimizer, None))
        Trainer(model_of("retnet"), arguments(tmp_path, weight_decay=0.1, label_smoothing_factor=0.1))
        ArchTrainer(model, arguments(tmp_path, weight_decay=0.1))
        ArchTrainer(model_of("moe"), arguments(tmp_path, label_smoothing_factor=0.1))


@pytest.mark.parametrize("name", ["moe", "hybrid"])
def test_the_routers_loss_stands_beside_a_smoothed_one(name, tmp_path):
    """Also with the Trainer's count of predicted tokens: doubling the count halves the loss."""
    model, ids = model_of(name), tokens(4, 12)
    trainer = ArchTrainer(model, arguments(tmp_path, label_smoothing_factor=0.1))
    with torch.no_grad():
        out = model(ids)
        smoothed = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
        found = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
        half = trainer.compute_loss(model, {"input_ids": ids, "labels": ids}, num_items_in_batch=88)
    own = model.config.router_aux_loss_coef * out.aux_loss
    assert own > 0
    torch.testing.assert_close(found, smoothed + own)
    torch.testing.assert_close(half, found / 2)


@pytest.mark.parametrize("name", ["moe", "hybrid"])
def test_the_routers_loss_beside_a_smoothed_one_is_missed_in_words(name, tmp_path):
    with pytest.warns(PlainTrainerWarning, match="so the loss of the routers is no part of it"):
        Trainer(model_of(name), arguments(tmp_path, label_smoothing_factor=0.1))
