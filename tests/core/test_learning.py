"""``hf-archs train`` on conversations: a tiny model answers questions that it has not seen, and ends after each."""

import json
import random
from string import ascii_lowercase as LETTERS

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import hf_archs
from hf_archs.commands import loading, train

pytestmark = pytest.mark.learns
HELD_OUT = 100


def shifted(word, by):
    """The right answer: each letter, ``by`` further in the alphabet."""
    return "".join(LETTERS[(LETTERS.index(letter) + by) % 26] for letter in word)


def questions():
    """1,100 different words of three letters; the first ones are held out."""
    generator = random.Random(0)
    words = sorted({"".join(generator.choices(LETTERS, k=3)) for _ in range(1200)})
    generator.shuffle(words)
    assert len(words) >= 1100
    return words[:1100]


def write(path, by):
    rows = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": shifted(word, by)}]}
        for word in questions()[HELD_OUT:]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learn(model, data, output, steps, *arguments):
    options = (
        f"--block_size 64 --per_device_train_batch_size 16 --max_steps {steps} --warmup_steps 20 --save_strategy no"
    )
    options += " --lr_scheduler_type cosine --disable_tqdm true"
    train.train(
        *train.parse([str(model), "--data", str(data), "--output_dir", str(output), *options.split(), *arguments])
    )


def answers(model, tokenizer):
    """The tokens that follow each held-out question, greedily, up to eight."""
    found = []
    for word in questions()[:HELD_OUT]:
        asked = [{"role": "user", "content": word}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        found.append(model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist())
    return found


def check(model, tokenizer, by):
    """At least 80 answers are right and end there, and 95 end; ``pipeline`` gives the same."""
    found = answers(model, tokenizer)
    expected = [
        [*tokenizer.encode(shifted(word, by), add_special_tokens=False), tokenizer.eos_token_id]
        for word in questions()[:HELD_OUT]
    ]
    right = sum(a == b for a, b in zip(found, expected))
    ended = sum(tokenizer.eos_token_id in answer for answer in found)
    print(f"{type(model).__name__}: {right} right, {ended} ended")
    assert right >= 80
    assert ended >= 95
    generate = pipeline("text-generation", model, tokenizer=tokenizer)
    for word, answer in zip(questions()[:HELD_OUT], found):
        [said] = generate([{"role": "user", "content": word}], max_new_tokens=8, do_sample=False)
        written = {"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)}
        assert said["generated_text"][-1] == written
    return found


# without a short convolution a letter takes longer to find the one that it answers
STEPS = {"mamba": 300, "mamba2": 300, "hybrid": 300, "hyena": 300, "retnet": 600, "moe": 1500}


@pytest.mark.parametrize("name", STEPS)
def test_a_model_and_an_adapter_learn_to_answer(tmp_path, name):
    """All weights first, on the letters that follow; then an adapter, on those that follow these."""
    assert {*STEPS} == {*hf_archs.architectures()}
    steps, rate = STEPS[name], 5e-3 if STEPS[name] == 300 else 2e-3
    torch.manual_seed(0)
    architecture = hf_archs.get_architecture(name)
    config = architecture.tiny_config(vocab_size=261, hidden_size=64)  # a token for each byte
    architecture.causal_lm_class(config).save_pretrained(tmp_path / "start")
    learn(
        tmp_path / "start", write(tmp_path / "next.jsonl", 1), tmp_path / "model", steps, "--learning_rate", f"{rate}"
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tokenizer, 1)
    second = write(tmp_path / "second.jsonl", 2)
    learn(tmp_path / "model", second, tmp_path / "adapter", steps, "--lora", "--learning_rate", f"{2 * rate}")
    model = loading.load_adapter(loading.load_model(str(tmp_path / "model")), str(tmp_path / "adapter"))
    found = check(model, tokenizer, 2)
    assert answers(model.merge_and_unload(), tokenizer) == found
