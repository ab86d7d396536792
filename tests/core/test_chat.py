"""A conversation reads each token once, and its answers are those of the model without a cache."""

import copy
import io
import json
import os
import pty
import signal
import subprocess
import sys

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.generation.streamers import BaseStreamer

import hf_archs
from hf_archs.cache import ArchDynamicCache
from hf_archs.commands import chat
from hf_archs.commands.conversation import Conversation
from hf_archs.data import text
from hf_archs.testing.contract.generation import greedy
from hf_archs.testing.contract.models import assert_remembers, forward, lively, tokens

NEW = 8
GO_ON = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
import hf_archs
from hf_archs.commands.conversation import Conversation
for folder in sys.argv[1:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    conversation = Conversation(model, tokenizer, max_new_tokens=8, do_sample=False)
    read = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: read.append(args[0].shape[1]))
    conversation.load(f"{folder}/conversation")
    before = len(conversation.ids)
    conversation.say("and now?")
    print([sum(read) - (len(conversation.ids) - before), conversation.ids])
"""


@pytest.fixture(scope="module")
def tokenizer():
    return text.train_tokenizer(["the question and the answer, and now the next one"], 300)


def made(name, tokenizer):
    architecture = hf_archs.get_architecture(name)
    model = lively(architecture.causal_lm_class, architecture.tiny_config(vocab_size=len(tokenizer)))
    assert_remembers(model)
    return model


@pytest.fixture(scope="module")
def mamba(tokenizer):
    """A model that never writes the end token."""
    model = made("mamba", tokenizer)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    return model


def reads(model):
    """A list that receives the number of tokens of every forward."""
    found = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: found.append(args[0].shape[1]))
    return found


def uncached(model, conversation, prompt):
    """All tokens of the conversation after a turn whose prompt has that many, by whole forwards."""
    expected = greedy(model, torch.tensor([conversation.ids[:prompt]]), NEW)[0].tolist()
    ends = [i for i in range(prompt, len(expected)) if expected[i] == conversation.tokenizer.eos_token_id]
    return expected[: ends[0] + 1] if ends else expected


@pytest.mark.parametrize("name", hf_archs.architectures())
def test_ten_turns_read_each_token_once(name, tokenizer):
    model = made(name, tokenizer)
    conversation = Conversation(model, tokenizer, system="Be kind.", max_new_tokens=NEW, do_sample=False)
    read, written = reads(model), 0
    for number in range(11):
        read.clear()
        seen = max(len(conversation.ids) - 1, 0)
        conversation.say(f"question {number}, and the next")
        assert sum(read) == len(conversation.ids) - 1 - seen
        prompt = len(conversation.ids) - conversation.counts.written + written
        written = conversation.counts.written
        assert conversation.ids == uncached(model, conversation, prompt)
        if number == 4:
            before = conversation.ids[: conversation.turns[-1].common]
            assert conversation.undo().message == "question 4, and the next"
            assert conversation.ids == before
    assert len(conversation.turns) == 10
    assert conversation.counts.again == 0
    assert [m["content"] for m in conversation.messages if m["role"] == "user"][3:5] == [
        "question 3, and the next",
        "question 5, and the next",
    ]


def test_an_answer_ends_with_the_end_token(mamba, tokenizer):
    """Which the template puts there too: it is read once, and is not part of the text."""
    first = Conversation(mamba, tokenizer, max_new_tokens=NEW, do_sample=False).say("question")
    model = copy.deepcopy(mamba)
    with torch.no_grad():
        written = first.ids[4 - NEW]
        model.lm_head.weight[tokenizer.eos_token_id] = 2 * model.lm_head.weight[written]
    conversation = Conversation(model, tokenizer, max_new_tokens=NEW, do_sample=False)
    answer = conversation.say("question")
    end = answer.ids.index(tokenizer.eos_token_id, 1)
    assert answer.ids == [*first.ids[:end], tokenizer.eos_token_id]
    assert len(answer.ids) < len(first.ids)
    assert answer.answer == tokenizer.decode(first.ids[len(first.ids) - NEW : end])
    prompt = answer.ids + text.encode(tokenizer, "<|user|>next<|assistant|>")
    conversation.say("next")
    assert conversation.ids == uncached(model, conversation, len(prompt))
    assert conversation.ids[: len(prompt)] == prompt
    assert conversation.counts.again == 0


def test_a_pad_token_in_a_message_is_read(tokenizer):
    model = made("moe", tokenizer)
    conversation = Conversation(model, tokenizer, max_new_tokens=NEW, do_sample=False)
    conversation.say(f"question{tokenizer.pad_token}" * 3)
    assert conversation.ids.count(tokenizer.pad_token_id) >= 3
    assert conversation.ids == uncached(model, conversation, len(conversation.ids) - NEW)


def test_saved_and_loaded_in_another_process(tokenizer, tmp_path):
    """For all architectures: the rest of the conversation is the same, and no token is read again."""
    expected = []
    for name in hf_archs.architectures():
        model, folder = made(name, tokenizer), tmp_path / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        conversation = Conversation(model, tokenizer, max_new_tokens=NEW, do_sample=False)
        for number in range(3):
            conversation.say(f"question {number}")
        conversation.undo()
        conversation.save(folder / "conversation")
        assert ArchDynamicCache.load(folder / "conversation", model).get_seq_length() == len(conversation.ids) - 1
        conversation.say("and now?")
        expected.append([0, conversation.ids])
    folders = [str(tmp_path / name) for name in hf_archs.architectures()]
    done = subprocess.run([sys.executable, "-c", GO_ON, *folders], capture_output=True, text=True)
    assert [*map(json.loads, done.stdout.splitlines())] == expected, done.stderr


def test_sampling_goes_on_after_load_and_differs_after_undo(mamba, tokenizer, tmp_path):
    def conversation():
        return Conversation(mamba, tokenizer, max_new_tokens=NEW, do_sample=True, temperature=1.0, seed=3)

    first, second = conversation(), conversation()
    answer = first.say("question").answer
    first.save(tmp_path / "file")
    second.load(tmp_path / "file")
    assert second.say("next") == first.say("next")
    assert conversation().say("question").answer == answer
    first.undo()
    first.undo()
    assert first.say("question").answer != answer


def test_a_template_that_renders_earlier_turns_differently(mamba, tokenizer):
    """As one that drops thinking does: the tokens are those of the template, and the equal prefix is not read again."""
    changing = text.train_tokenizer(["the question and the answer, and now the next one"], 300)
    changing.chat_template = text.CHAT_TEMPLATE.replace(
        "message.content ~ eos_token", "(message.content if loop.last else 'cut') ~ eos_token"
    )
    conversation = Conversation(mamba, changing, max_new_tokens=NEW, do_sample=False)
    conversation.say("question")
    first = conversation.ids
    conversation.say("next")
    rendered = "<|endoftext|><|user|>question<|assistant|>cut<|endoftext|><|user|>next<|assistant|>"
    prompt = text.encode(changing, rendered)
    assert conversation.ids == uncached(mamba, conversation, len(prompt))
    assert conversation.ids[: len(prompt)] == prompt
    kept = len(text.encode(changing, "<|endoftext|><|user|>question"))  # a prompt's last token is left to `generate`
    assert conversation.counts.read == kept + 1 + len(prompt) - kept
    assert conversation.counts.again == len(first) - 1 - kept
    assert "of them again" in chat.counts(conversation)


def test_a_template_that_cuts_the_second_answer_later(mamba):
    """The third turn begins where the second answer began."""
    changing = text.train_tokenizer(["the question and the answer, and now the next one"], 300)
    changing.chat_template = text.CHAT_TEMPLATE.replace(
        "message.content ~ eos_token", "(message.content if loop.index0 != 3 else 'cut') ~ eos_token"
    )
    others = [i for i in range(len(changing)) if changing.decode([i]) not in list("0123456789")]  # no merges of digits
    conversation = Conversation(mamba, changing, max_new_tokens=NEW, do_sample=False, suppress_tokens=others)
    for message in ("question", "next", "and now?"):
        before = conversation.ids
        conversation.say(message)
    common = len(text.encode(changing, f"<|endoftext|><|user|>question<|assistant|>{conversation.turns[0].answer}"))
    common += len(text.encode(changing, "<|endoftext|><|user|>next"))
    assert before[:common] == conversation.ids[:common]
    assert conversation.counts.again == len(before) - 1 - common


def test_a_template_that_begins_the_last_answer_alone(mamba):
    """As those of reasoning models do: of each turn, only its own tokens are read."""
    thinking = text.train_tokenizer(["the question and the answer, and now the next one"], 300)
    thinking.chat_template = text.CHAT_TEMPLATE.replace(
        '{{- "<|assistant|>" -}}{%- endif', '{{- "<|assistant|>hm" -}}{%- endif'
    )
    conversation = Conversation(mamba, thinking, max_new_tokens=NEW, do_sample=False)
    read, rendered = [], "<|endoftext|>"
    for number in range(4):
        conversation.say(f"question {number}")
        read.append(conversation.counts.read)
        rendered += f"<|user|>question {number}"
        prompt = text.encode(thinking, f"{rendered}<|assistant|>hm")
        assert conversation.ids[: len(prompt)] == prompt
        assert conversation.ids == uncached(mamba, conversation, len(prompt))
        turn = text.encode(thinking, f"{conversation.turns[-1].answer}<|endoftext|><|user|>question<|assistant|>hm")
        assert read[-1] - sum(read[-2:-1]) <= len(turn) + NEW
        rendered += f"<|assistant|>{conversation.turns[-1].answer}<|endoftext|>"


def test_without_room_for_states_the_answers_are_the_same(mamba, tokenizer):
    small, large = (
        Conversation(mamba, tokenizer, max_new_tokens=NEW, do_sample=False, max_bytes=size) for size in (0, 2**30)
    )
    for conversation in (small, large):
        for message in ("question", "next"):
            conversation.say(message)
    assert small.counts.again == 0  # the present state is there
    for conversation in (small, large):
        conversation.undo()
        conversation.say("and now?")
    assert small.ids == large.ids
    assert (small.counts.again > 0, large.counts.again) == (True, 0)


class Interrupting(BaseStreamer):
    """Presses Ctrl-C at the third token of an answer, as often as it is told."""

    def __init__(self, act):
        self.calls, self.act = 0, act

    def put(self, value):
        self.calls += 1
        if self.calls == 4:  # the first call brings the prompt
            self.act()

    def end(self):
        pass


def test_ctrl_c_ends_an_answer_and_a_second_one_drops_the_turn(mamba, tokenizer):
    conversation = Conversation(mamba, tokenizer, max_new_tokens=NEW, do_sample=False)
    conversation.say("question")
    before = conversation.ids
    with chat._interruptible(conversation), pytest.raises(KeyboardInterrupt):
        conversation.say("next", Interrupting(lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)]))
    assert conversation.ids == before
    with chat._interruptible(conversation):
        conversation.say("next", Interrupting(lambda: signal.raise_signal(signal.SIGINT)))
    stopped = conversation.ids
    whole = Conversation(mamba, tokenizer, max_new_tokens=NEW, do_sample=False)
    for message in ("question", "next"):
        whole.say(message)
    assert stopped == whole.ids[: len(stopped)]
    assert len(whole.ids) - len(stopped) == NEW - 4  # the token in computation is the last
    read = reads(mamba)
    conversation.say("and now?")
    assert sum(read) == len(conversation.ids) - len(stopped)
    prompt = stopped + text.encode(tokenizer, "<|endoftext|><|user|>and now?<|assistant|>")
    assert conversation.ids[: len(prompt)] == prompt
    assert conversation.ids == uncached(mamba, conversation, len(prompt))


def test_a_file_that_does_not_belong(mamba, tokenizer, tmp_path):
    conversation = Conversation(mamba, tokenizer, max_new_tokens=NEW, do_sample=False)
    path = tmp_path / "file"
    with pytest.raises(ValueError, match="the conversation has no turn; /save needs one"):
        conversation.save(path)
    with pytest.raises(ValueError, match="the conversation has no turn; /undo needs one"):
        conversation.undo()
    conversation.say("question")
    forward(mamba, tokens(1, 9), use_cache=True).past_key_values.save(path, mamba)
    with pytest.raises(ValueError, match=r"file holds a state without a conversation; allowed is a file that /save"):
        conversation.load(path)
    conversation.save(path)
    whole = path.read_bytes()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    told = json.loads(metadata["conversation"])
    for wrong, named in (
        ("{", r"file holds a damaged conversation \(Expecting"),
        (json.dumps({**told, "turns": [{"message": "question"}]}), r"file holds a damaged conversation \("),
        (
            json.dumps({**told, "turns": []}),
            r"holds a conversation of 0 tokens and a state of \d+; allowed is one token",
        ),
    ):
        save_file(load_file(path), path, metadata={**metadata, "conversation": wrong})
        with pytest.raises(ValueError, match=named):
            conversation.load(path)
    save_file(load_file(path), path, metadata={**metadata, "version": "7", "library": "9.0"})
    with pytest.raises(
        ValueError, match=r"file has version 7 of the file format, of hf-archs 9\.0; allowed is version 1"
    ):
        conversation.load(path)
    path.write_bytes(whole)
    stranger = Conversation(made("retnet", tokenizer), tokenizer)
    with pytest.raises(ValueError, match=r"file is of another model: "):
        stranger.load(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"file is damaged or no safetensors file"):
        conversation.load(path)
    assert len(conversation.turns) == 1
    assert stranger.turns == []


def test_models_and_templates_that_cannot_talk(mamba, tokenizer, word_tokenizer):
    with pytest.raises(ValueError, match="has no chat template; allowed is one with a template"):
        Conversation(mamba, word_tokenizer)
    strict = text.train_tokenizer(["words"], 300)
    strict.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(ValueError, match="the chat template refuses the conversation: no system here"):
        Conversation(mamba, strict, system="Be kind.").say("question")
    adapted = get_peft_model(made("mamba", tokenizer), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="the adapter is PROMPT_TUNING; allowed is one without virtual tokens"):
        Conversation(adapted, tokenizer)


@pytest.fixture(scope="module")
def folder(mamba, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    mamba.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def piped(monkeypatch, capsys, folder, *lines):
    """The output of `chat` for these lines of stdin."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    capsys.readouterr()
    chat.chat(folder, None, None, max_new_tokens=NEW, do_sample=False)
    return capsys.readouterr().out


def test_over_a_pipe(monkeypatch, capsys, mamba, tokenizer, folder, tmp_path):
    monkeypatch.chdir(tmp_path)
    expected = Conversation(mamba, tokenizer, max_new_tokens=NEW, do_sample=False)
    for message in ("question", "/next"):
        expected.say(message)

    def shown(turn):
        answer = tokenizer.decode(tokenizer.encode(turn.answer, add_special_tokens=False), skip_special_tokens=True)
        return f"{answer}\n"

    first, second = map(shown, expected.turns)
    out = piped(monkeypatch, capsys, folder, "question", "", "/save file", " /next", "/undo", "/tokens", "/quit", "no")
    saved = f"1 turns, {expected.turns[1].common} tokens\n"
    assert out.startswith(f"{first}{saved}{second}taken back: /next\nread ")
    assert out.count("\n") == f"{first}{saved}{second}".count("\n") + 2
    assert piped(monkeypatch, capsys, folder, "/load file", " /next").endswith(f" tokens\n{second}")
    assert piped(monkeypatch, capsys, folder, "/help").startswith("/save FILE  write")
    for line, said in {"/what": "'/what' is no command; /help lists them", "/save": "allowed is /save FILE"}.items():
        with pytest.raises(ValueError, match=said):
            piped(monkeypatch, capsys, folder, line)


def test_in_a_terminal(mamba, tokenizer, folder, tmp_path):
    """The program answers, is interrupted, refuses in a sentence and goes on, and saves the tokens that were shown."""
    ours, theirs = pty.openpty()
    program = [sys.executable, "-c", "import hf_archs_main; hf_archs_main.main()", "chat", folder]
    arguments = ["--temperature", "0", "--max-new-tokens", "1000000", "--system", "Be kind."]
    environment = {**os.environ, "PYTHONUTF8": "1", "TERM": "dumb"}
    process = subprocess.Popen([*program, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""

    def until(part):
        nonlocal seen
        while part not in seen:
            seen += os.read(ours, 65536)
        before, _, seen = seen.partition(part)
        return before.decode(errors="replace").replace("\r\n", "\n")

    until(b"> ")
    os.write(ours, b"question\n")
    until(b"question\r\n")
    seen = os.read(ours, 65536)  # the beginning of an answer without end
    process.send_signal(signal.SIGINT)
    answer = until(b"\r\n> ")
    os.write(ours, b"/load nowhere/at/all\n")
    assert "error: " in until(b"> ")
    os.write(ours, b"/save " + str(tmp_path / "file").encode() + b"\n")
    assert "1 turns, " in until(b" tokens\r\n> ")
    os.write(ours, b"/quit\n")
    assert process.wait() == 0
    os.close(ours)
    conversation = Conversation(mamba, tokenizer, max_new_tokens=NEW, do_sample=False)
    conversation.load(tmp_path / "file")
    assert conversation.messages[0] == {"role": "system", "content": "Be kind."}
    prompt = text.encode(tokenizer, "<|endoftext|><|system|>Be kind.<|user|>question<|assistant|>")
    written = conversation.ids[len(prompt) :]
    assert conversation.ids[: len(prompt)] == prompt
    assert answer.rstrip("\n") == tokenizer.decode(written, skip_special_tokens=True).rstrip("\n")
    expected = greedy(mamba, torch.tensor([prompt]), min(len(written), 24))[0].tolist()
    assert conversation.ids[: len(expected)] == expected
