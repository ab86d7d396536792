"""TRL's trainers with what `ArchTrainer` adds, against losses and gradients worked out by hand; ``train --trainer``."""

import copy
import functools
import json
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl import DistillationConfig, DistillationTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import hf_archs
from hf_archs.commands import sentences, train, trl
from hf_archs.data import text
from hf_archs.model.watching import PlainTrainerWarning
from hf_archs.testing.contract.models import assert_all_close, lively, tokens
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
    trainer, kept, run = step("sft", ours, rows, tmp_path, options=options)
    assert len(trainer.train_dataset) == 3
    loss = run().training_loss

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
    [
        {"router_z_loss_coef": 0.1},
        {"router": "loss_free", "router_z_loss_coef": 0.1},
        {"router": "expert_choice", "causal_predictor": True},
        {"score_function": "sigmoid", "router_aux_loss_coef": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("lora", [False, True])
def test_all_losses_of_the_routers_are_in_the_loss(fields, lora, tmp_path):
    """TRL itself adds Mixtral's load balancing, whatever the routers are."""
    model = model_of("moe", **fields)
    rows = Dataset.from_dict({"input_ids": tokens(2, 12).tolist()})
    more = {"peft_config": lora_config(model)} if lora else {}
    options = {"per_device_train_batch_size": 2, "packing": False}
    _, _, run = step("sft", copy.deepcopy(model), rows, tmp_path, options=options, **more)
    loss = run().training_loss
    ids = tokens(2, 12)
    expected = model.train()(ids, labels=ids, output_router_logits=True).loss.item()
    assert abs(loss - expected) < 1e-5 * expected
    with pytest.warns(PlainTrainerWarning, match="SFTTrainer adds the load balancing of Mixtral"):
        plain = SFTTrainer(model, SFTConfig(str(tmp_path), **STEP), train_dataset=rows, processing_class=tokenizer())
    assert abs(plain.train().training_loss - expected) > 1e-3
    model.config.router_aux_loss_coef = model.config.router_z_loss_coef = 0.0
    assert expected - F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item() > 1e-3


@pytest.mark.parametrize("fields", [{}, {"router": "loss_free"}], ids=str)
def test_nothing_is_said_of_routers_that_trl_knows(fields, tmp_path, recwarn):
    rows = Dataset.from_dict({"input_ids": tokens(2, 12).tolist()})
    for model in (model_of("moe", **fields), model_of("mamba")):
        SFTTrainer(model, SFTConfig(str(tmp_path), **STEP), train_dataset=rows, processing_class=tokenizer())
    assert not [warning for warning in recwarn if warning.category is PlainTrainerWarning]


def test_states_do_not_decay_and_routers_are_corrected(tmp_path):
    rows = Dataset.from_dict({"input_ids": tokens(2, 12).tolist()})
    options = {"per_device_train_batch_size": 2, "packing": False, "weight_decay": 0.1}
    trainer, *_ = step("sft", model_of("mamba"), rows, tmp_path, options=options)
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert decayed
    assert not any(".ssm." in name for name in decayed)
    trainer, _, run = step("sft", model_of("moe", router="loss_free"), rows, tmp_path, options=options)
    before = [router.gate.e_score_correction_bias.clone() for router in trainer.model.model.routers().values()]
    run()
    for router, bias in zip(trainer.model.model.routers().values(), before):
        assert not torch.equal(router.gate.e_score_correction_bias, bias)
    assert any("max_load" in name for name in trainer.state.log_history[0])


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 64}], ids=["padded", "packed"])
def test_plain_trl_learns_from_answers_alone(options, tmp_path):
    """As a stranger calls it: a folder, messages, and no class of this library."""
    model_of("mamba").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    answers = ["four of them", "a few words"]
    rows = [[{"role": "user", "content": "how many?"}, {"role": "assistant", "content": answer}] for answer in answers]
    trainer = SFTTrainer(
        str(tmp_path / "model"),
        SFTConfig(str(tmp_path), assistant_only_loss=True, per_device_train_batch_size=2, **STEP, **options),
        train_dataset=Dataset.from_dict({"messages": rows}),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    learnt = tokenizer().decode(batch["labels"][batch["labels"] != -100])
    assert sorted(learnt.split(tokenizer().eos_token)) == ["", *sorted(answers)]
    assert trainer.train().training_loss > 0


def test_a_backbone_takes_the_logits_to_keep_of_the_head(tmp_path):
    """TRL's `DistillationTrainer` passes them to the backbones of teacher and student."""
    model = model_of("mamba").float().train()
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "some words"}]] * 2})
    trainer = DistillationTrainer(
        model,
        model_of("mamba", seed=1).float(),
        DistillationConfig(str(tmp_path), max_completion_length=4, per_device_train_batch_size=2, **STEP),
        train_dataset=rows,
        processing_class=tokenizer(),
    )
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
    _, kept, run = step("dpo", ours, rows, tmp_path, options=options, ref_model=copy.deepcopy(reference))
    loss = run().training_loss

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
    trainer, kept, run = step(
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
    loss = run().training_loss

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


@pytest.mark.parametrize("margins", [[0.0, 0.0], [0.5, 2.0]])
def test_a_reward_model_from_a_folder(margins, tmp_path):
    """TRL hides the missing head from reports; its weights are drawn all the same. The loss is worked out by hand."""
    model_of("mamba").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    trainer = RewardTrainer(
        str(tmp_path / "model"),
        RewardConfig(str(tmp_path), per_device_train_batch_size=2, **STEP),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED, "margin": margins}),
    )
    loss = trainer.train().training_loss
    scores = [
        [trainer.model(torch.tensor([[*p, *c]])).logits[0, 0] for p, c in spelt(PROMPTS, completions)]
        for completions in (CHOSEN, REJECTED)
    ]
    expected = torch.stack([-F.logsigmoid(c - r - margin) for c, r, margin in zip(*scores, margins)]).mean()
    assert abs(loss - expected.item()) < 1e-5


# -- the command -----------------------------------------------------------------------------------------------

FAST = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--disable_tqdm", "true", "--report_to", "none"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model, data and a reward function, from which commands are run."""
    monkeypatch.chdir(tmp_path)
    architecture = hf_archs.get_architecture("mamba")
    architecture.causal_lm_class(architecture.tiny_config(vocab_size=300)).save_pretrained("model")
    tokenizer().save_pretrained("model")
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(PROMPTS, CHOSEN, REJECTED)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "texts.csv").write_text("text\n" + "some words\n" * 38 + f"{'of them ' * 30}\n" * 2)
    (tmp_path / "texts.txt").write_text("some words\n" * 400)
    (tmp_path / "rewards_of_a_test.py").write_text(
        "def size(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n"
        "def needs_more(completions, solution, **kwargs): ...\n"
    )
    monkeypatch.setattr(sys, "path", sys.path[:])
    return tmp_path


def command(*arguments):
    """Run ``hf-archs train``, and return the results."""
    short = ["--num_generations", "2", "--max_completion_length", "4"] if "grpo" in arguments else []
    return train.train(*train.parse([*map(str, arguments), *FAST, *short]))


def test_a_reward_model_and_a_policy_that_it_rewards(place):
    data = ["model", "--data", "pairs.jsonl", "--output_dir"]
    assert command(*data, "judge", "--trainer", "reward")["train_loss"] > 0
    card = ModelCard.load(place / "judge" / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert 'AutoModelForSequenceClassification.from_pretrained("judge")' in card.text
    assert "by TRL's RewardTrainer. 1 steps" in card.text
    judge = AutoModelForSequenceClassification.from_pretrained("judge")
    assert judge.config.num_labels == 1
    rewards = ["judge", "rewards_of_a_test:size"]
    results = command(*data, "policy", "--trainer", "grpo", "--reward", *rewards, "--beta", "0.1")
    assert results.keys() == {"train_loss"}
    assert (place / "policy" / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_an_adapter_on_the_default_targets(kind, place):
    command("model", "--data", "pairs.jsonl", "--trainer", kind, "--lora", "--output_dir", "adapter")
    auto, labels = (
        (AutoModelForSequenceClassification, {"num_labels": 1}) if kind == "reward" else (AutoModelForCausalLM, {})
    )
    adapted = PeftModel.from_pretrained(auto.from_pretrained("model", **labels), "adapter")
    assert set(adapted.peft_config["default"].target_modules) == set(hf_archs.get_architecture("mamba").lora_targets)
    saved = load_file(place / "adapter" / "adapter_model.safetensors")
    assert any("score" in name for name in saved) == (kind == "reward")
    assert f"{auto.__name__}.from_pretrained(" in (place / "adapter" / "README.md").read_text()


def test_sft_packs_and_measures_held_out_rows(place, monkeypatch):
    seen = []
    monkeypatch.setattr(
        trl,
        "trainer_class",
        lambda kind, made=trl.trainer_class: lambda *a, **k: seen.append(made(kind)(*a, **k)) or seen[-1],
    )
    results = command(
        *["model", "--data", "texts.csv", "--trainer", "sft", "--output_dir", "out", "--max_length", "32"],
        *["--eval_strategy", "steps", "--eval_steps", "1", "--model_init_kwargs", '{"attn_implementation": "eager"}'],
    )
    assert results.keys() == {"train_loss", "eval_loss"}
    (trainer,) = seen
    assert trainer.args.packing
    texts = (place / "texts.csv").read_text().splitlines()[1:]
    rows = text.split({str(i): row for i, row in enumerate(texts)})[0].values()
    lengths = [len(tokenizer()(row + tokenizer().eos_token)["input_ids"]) for row in rows]
    assert max(lengths) > 32 == max(len(row["input_ids"]) for row in trainer.train_dataset)
    assert sum(len(row["input_ids"]) for row in trainer.train_dataset) == sum(lengths)  # nothing is cut off
    assert trainer.model.config._attn_implementation == "eager"
    assert f"| held-out rows | loss {results['eval_loss']:.4f} |" in (place / "out" / "README.md").read_text()
    assert train.described(results).startswith(f"training loss {results['train_loss']:.4f}, evaluation loss ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trainer", "sftt"], "argument --trainer: invalid choice: 'sftt' (choose from 'sft', 'dpo', 'grpo', 'rew"),
        (["--trainer", "dpo", "--block_size", "8"], "hf-archs train has no argument '--block_size'"),
        (["--trainer", "dpo", "--reward", "a:b"], "hf-archs train has no argument '--reward'"),
        (["--trainer", "dpo"], "'texts.csv' has the columns text; needed are 'chosen' and 'rejected'"),
        (
            ["--trainer", "sft", "--data", "pairs.jsonl"],
            "columns prompt, chosen, rejected; needed are 'text', or 'messages', or 'prompt' and 'completion', or",
        ),
        (["--trainer", "sft", "--data", "none.jsonl"], "data is 'none.jsonl', which does not exist"),
        (
            ["--trainer", "sft", "--data", "bad.json"],
            "line 1 of 'bad.json': it is no JSON: Expecting ',' delimiter at column 11",
        ),
        (["--trainer", "sft", "--data", "empty.json"], "data is 'empty.json', which holds no rows"),
        (["--trainer", "sft", "--data", "head.csv"], "data is 'head.csv', which holds no rows"),
        (["--trainer", "grpo"], "the following arguments are required: --reward"),
        (["--trainer", "grpo", "--reward", "sise"], "reward is 'sise'; allowed are accuracy_reward"),
        (["--trainer", "grpo", "--reward", "./judge"], "reward is './judge'; allowed are"),
        (["--trainer", "grpo", "--reward", "nowhere:size"], "cannot be imported: No module named 'nowhere'"),
        (["--trainer", "grpo", "--reward", "rewards_of_a_test:sise"], "has no attribute 'sise'"),
        (["--trainer", "grpo", "--reward", "rewards_of_a_test:needs_more"], "missing a required argument: 'solution'"),
        (["--trainer", "grpo", "--reward", "accuracy_reward"], "'accuracy_reward', which reads messages"),
        (["--trainer", "sft", "--model", "bare"], "'bare' has no tokenizer"),
        (["--trainer", "sft", "--data", "chat.jsonl", "--model", "untold"], "of 'untold' has no chat template"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input(arguments, said, place):
    (place / "bad.json").write_text('{"text": 1')
    (place / "empty.json").write_text("")
    (place / "head.csv").write_text("text\n")
    (place / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    model, data = "model", "pairs.jsonl" if "grpo" in arguments else "texts.csv"
    if "--model" in arguments:
        *arguments, _, model = arguments
        shutil.copytree("model", model)
        (place / model / "chat_template.jinja").unlink()
        if model == "bare":
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (place / model / file).unlink()
    with pytest.raises(sentences.EXPECTED) as caught:
        command(model, "--data", data, *arguments, "--output_dir", "out")
    assert said in sentences.sentence(caught.value)
    assert len(sentences.sentence(caught.value).splitlines()) == 1
    assert not (place / "out").exists()


def test_without_trl(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"--trainer sft needs the package trl: pip install 'hf-archs\[trl\]'"):
        command("model", "--data", "texts.csv", "--trainer", "sft", "--output_dir", "out")
    assert command("model", "--data", "texts.txt", "--output_dir", "out", "--block_size", "16")


def test_sft_reads_a_stream_a_named_column_and_data_to_measure_with(place, capsys):
    (place / "notes.jsonl").write_text("".join(f'{{"note": "note number {i}"}}\n' for i in range(30)) + "nothing\n")
    results = command(
        *["model", "--data", "notes.jsonl", "--trainer", "sft", "--column", "note", "--eval_data", "notes.jsonl"],
        *["--streaming", "--skip_bad", "--eval_strategy", "steps", "--eval_steps", "1", "--output_dir", "out"],
    )
    assert results.keys() == {"train_loss", "eval_loss"}
    said = "notes.jsonl: a stream of rows with note; 30 to measure with; 1 left out: line 31 of 'notes.jsonl'"
    assert said in capsys.readouterr().out


def test_a_reference_of_another_library_s_format(place):
    hf_archs.to_native(model_of("mamba")).save_pretrained("native")
    tokenizer().save_pretrained("native")
    data = ["native", "--data", "pairs.jsonl", "--output_dir", "out"]
    with pytest.raises(ValueError, match="'native' is in the format of another library, and beta is 0"):
        command(*data, "--trainer", "grpo", "--beta", "0.1", "--reward", "rewards_of_a_test:size")
    assert command(*data, "--trainer", "dpo")
