"""TRL's trainers with what `ArchTrainer` adds, against losses and gradients worked out by hand; ``train --trainer``."""

import copy
import functools
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, TrainerCallback
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import hf_archs
from hf_archs.commands import trl
from hf_archs.data import text
from hf_archs.testing.contract.models import assert_all_close, assert_close, lively, tokens
from hf_archs.training import lora_config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL uses old names of transformers

ARCHITECTURES = ["hybrid", "hyena", "mamba", "mamba2", "moe", "retnet"]
PLAIN = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
STEP = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "logging_steps": 1, **PLAIN}


def model_of(name, seed=0, **fields):
    """In float64, in which a gradient shows each leak."""
    architecture = hf_archs.get_architecture(name)
    return lively(architecture.causal_lm_class, architecture.tiny_config(vocab_size=300, **fields), seed).double()


@functools.cache
def tokenizer():
    return text.train_tokenizer(["some words, and a few more of them"], 300)


class KeptGradients(TrainerCallback):
    """The gradients of the first step."""

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def step(kind, model, rows, folder, *, options, **more):
    """The loss and the gradients of a trainer's first step; the weights stay."""
    kept = KeptGradients()
    config = trl.config_and_parser(kind)[0](str(folder), **{**STEP, **options})
    trainer = trl.trainer_class(kind)(
        model, config, train_dataset=rows, processing_class=tokenizer(), callbacks=[kept], **more
    )
    return trainer, kept, trainer.train


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def log_probabilities(model, prompt, completion):
    """The log-probability of each token of a completion, by a plain forward of one row."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(1).gather(1, ids[0, len(prompt) :, None])[:, 0]


# -- SFT -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_documents_are_apart(name, tmp_path):
    """Six documents in three rows, with TRL's gradient checkpointing, against a forward for each document."""
    model = model_of(name)
    documents = [tokens(1, length, seed=length)[0] for length in (7, 2, 9, 12, 5, 3)]
    rows = Dataset.from_dict({"input_ids": [document.tolist() for document in documents]})
    options = {"packing": True, "max_length": 16, "per_device_train_batch_size": 3}
    ours = copy.deepcopy(model).train()
    trainer, kept, train = step("sft", ours, rows, tmp_path, options=options)
    assert len(trainer.train_dataset) == 3
    loss = train().training_loss

    model.train()
    losses = [F.cross_entropy(model(d[None]).logits[0, :-1], d[1:], reduction="sum") for d in documents]
    expected = torch.stack(losses).sum() / sum(len(d) - 1 for d in documents)
    if model.model.has_routers:  # they balance the whole batch
        ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([len(d) for d in documents])[:, None]).long()
        auxiliary = model(ids, attention_mask=mask).aux_loss
        assert auxiliary > 0.5
        expected = expected + model.config.router_aux_loss_coef * auxiliary
    assert abs(loss - expected.item()) < 1e-5 * expected.item()
    assert_all_close(kept.found, gradients_of(model, expected), "gradient")


@pytest.mark.parametrize(
    "fields",
    [{"router_z_loss_coef": 0.1}, {"router": "loss_free", "router_z_loss_coef": 0.1}]
    + [{"router": "expert_choice", "causal_predictor": True}, {"score_function": "sigmoid"}],
    ids=str,
)
@pytest.mark.parametrize("lora", [False, True])
def test_all_losses_of_the_routers_are_in_the_loss(fields, lora, tmp_path):
    """TRL itself adds Mixtral's load balancing, whatever the routers are."""
    model = model_of("moe", **fields)
    rows = Dataset.from_dict({"input_ids": tokens(2, 12).tolist()})
    more = {"peft_config": lora_config(model)} if lora else {}
    options = {"per_device_train_batch_size": 2, "packing": False}
    trainer, _, train = step("sft", copy.deepcopy(model), rows, tmp_path, options=options, **more)
    loss = train().training_loss
    ids = tokens(2, 12)
    expected = model.train()(ids, labels=ids, output_router_logits=True).loss.item()
    assert abs(loss - expected) < 1e-5 * expected
    model.config.router_aux_loss_coef = model.config.router_z_loss_coef = 0.0
    assert expected - F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item() > 1e-3


def test_states_do_not_decay_and_routers_are_corrected(tmp_path):
    rows = Dataset.from_dict({"input_ids": tokens(2, 12).tolist()})
    options = {"per_device_train_batch_size": 2, "packing": False, "weight_decay": 0.1}
    trainer, *_ = step("sft", model_of("mamba"), rows, tmp_path, options=options)
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert decayed
    assert not any(".ssm." in name for name in decayed)
    trainer, _, train = step("sft", model_of("moe", router="loss_free"), rows, tmp_path, options=options)
    before = [router.gate.e_score_correction_bias.clone() for router in trainer.model.model.routers().values()]
    train()
    for router, bias in zip(trainer.model.model.routers().values(), before):
        assert not torch.equal(router.gate.e_score_correction_bias, bias)
    assert any("max_load" in name for name in trainer.state.log_history[0])


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 64}], ids=["padded", "packed"])
def test_plain_trl_learns_from_answers_alone(options, tmp_path):
    """As a stranger calls it: a folder, messages, and no class of this library."""
    model_of("mamba").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    answers = ["four of them", "a few words"]
    rows = [
        [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": answer}] for answer in answers
    ]
    trainer = SFTTrainer(
        str(tmp_path / "model"),
        SFTConfig(str(tmp_path), assistant_only_loss=True, per_device_train_batch_size=2, **STEP, **options),
        train_dataset=Dataset.from_dict({"messages": rows}),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    learnt = tokenizer().decode(batch["labels"][batch["labels"] != -100])
    assert sorted(learnt.split(tokenizer().eos_token)) == ["", *sorted(answers)]
    assert trainer.train().training_loss > 0


# -- preferences and rewards -----------------------------------------------------------------------------------

PROMPTS = ["some words", "and a few more of them"]
CHOSEN, REJECTED = [" of them", " and words"], [" more words of them", " a few"]


def spelt(prompts, completions):
    """The tokens of prompts and of completions, which TRL ends with the end token."""
    encode, end = tokenizer(), tokenizer().eos_token
    whole = [encode(p + c + end)["input_ids"] for p, c in zip(prompts, completions)]
    begun = [encode(p)["input_ids"] for p in prompts]
    for row, beginning in zip(whole, begun):
        assert row[: len(beginning)] == beginning
    return [(row[: len(b)], row[len(b) :]) for row, b in zip(whole, begun)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dpo_of_two_rows(name, tmp_path):
    """``-log sigmoid(beta * ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected))))``, averaged."""
    policy, reference = model_of(name), model_of(name, seed=1)
    rows = Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED})
    options = {"beta": 0.01, "per_device_train_batch_size": 2, "router_aux_loss_coef": 0.0}
    ours = copy.deepcopy(policy).train()
    _, kept, train = step("dpo", ours, rows, tmp_path, options=options, ref_model=copy.deepcopy(reference))
    loss = train().training_loss

    losses = []
    for chosen, rejected in zip(spelt(PROMPTS, CHOSEN), spelt(PROMPTS, REJECTED)):
        with torch.no_grad():
            before = [log_probabilities(reference, *pair).sum() for pair in (chosen, rejected)]
        ratios = [log_probabilities(policy, *pair).sum() - q for pair, q in zip((chosen, rejected), before)]
        losses.append(-F.logsigmoid(0.01 * (ratios[0] - ratios[1])))
    expected = torch.stack(losses).mean()
    assert abs(expected.item() - torch.tensor(2.0).log().item()) > 1e-3
    assert abs(loss - expected.item()) < 1e-5
    assert_all_close(kept.found, gradients_of(policy, expected), "gradient")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_grpo_of_two_rows(name, tmp_path, monkeypatch):
    """Two prompts with two fixed completions each: advantages from rewards, the policy gradient, and the divergence."""
    policy, reference = model_of(name), model_of(name, seed=1)
    policy.save_pretrained(tmp_path / "model")
    ours = type(policy).from_pretrained(tmp_path / "model").train()
    end = tokenizer().eos_token_id
    completions = [[40, 41, end], [42, 43, 44, 45], [46, end], [47, 48, 49, end]]
    rewards, beta = [1.0, 3.0, 2.0, 0.5], 0.05
    options = {"num_generations": 2, "max_completion_length": 4, "per_device_train_batch_size": 4, "beta": beta}
    options |= {"router_aux_loss_coef": 0.0, "shuffle_dataset": False}
    reward = {tuple(row): value for row, value in zip(completions, rewards)}
    trainer, kept, train = step(
        "grpo",
        ours,
        Dataset.from_dict({"prompt": PROMPTS}),
        tmp_path,
        options=options,
        reward_funcs=lambda completion_ids, **_: [reward[tuple(row)] for row in completion_ids],
    )
    trainer.ref_model.load_state_dict(reference.state_dict())
    padded = torch.tensor([[*row, *[end] * (4 - len(row))] for row in completions])
    monkeypatch.setattr(ours, "generate", lambda input_ids, **_: torch.cat([input_ids, padded], 1))
    loss = train().training_loss

    prompts = [tokenizer()(prompt)["input_ids"] for prompt in PROMPTS for _ in range(2)]
    terms = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        group = torch.tensor(rewards[i // 2 * 2 :][:2])
        advantage = (rewards[i] - group.mean()) / (group.std() + 1e-4)
        p = log_probabilities(policy, prompt, completion)
        with torch.no_grad():
            q = log_probabilities(reference, prompt, completion)
        ratio, divergence = (p - p.detach()).exp(), (q - p).exp() - (q - p) - 1
        terms.append(ratio * (beta * divergence - advantage))  # with TRL's `use_bias_correction_kl`
    expected = torch.cat(terms).mean()  # of all tokens, as `loss_type` dapo says
    assert abs(expected.item()) > 1e-3
    assert abs(loss - expected.item()) < 1e-5 * abs(expected.item())
    assert_all_close(kept.found, gradients_of(policy, expected), "gradient")


def test_a_reward_model_from_a_folder(tmp_path):
    """TRL hides the missing head from reports; its weights are drawn all the same. The loss is worked out by hand."""
    model_of("mamba").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    trainer = RewardTrainer(
        str(tmp_path / "model"),
        RewardConfig(str(tmp_path), per_device_train_batch_size=2, **STEP),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}),
    )
    loss = trainer.train().training_loss
    scores = [
        [trainer.model(torch.tensor([[*p, *c]])).logits[0, 0] for p, c in spelt(PROMPTS, completions)]
        for completions in (CHOSEN, REJECTED)
    ]
    expected = torch.stack([-F.logsigmoid(chosen - rejected) for chosen, rejected in zip(*scores)]).mean()
    assert abs(loss - expected.item()) < 1e-5
