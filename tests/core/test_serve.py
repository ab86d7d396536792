"""transformers' server with a model of this library, asked by OpenAI's client: the tokens of `generate`."""

import asyncio
import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
import torch
import uvicorn

import hf_archs
from hf_archs.cache import StateCache
from hf_archs.commands import serve
from hf_archs.data import text
from hf_archs.testing.contract.generation import greedy
from hf_archs.testing.contract.models import assert_remembers, lively

NEW = 24
PROMPT = [{"role": "system", "content": "Be kind, " * 20}, {"role": "user", "content": "question"}]


@contextlib.contextmanager
def serving(model, tokenizer, max_bytes=2**24):
    """The address of a server in a thread."""

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            started.set()

    started = threading.Event()
    application = serve.application("toy", model, tokenizer, max_bytes)
    server = Server(uvicorn.Config(application, port=0, log_level="error"))
    thread = threading.Thread(target=asyncio.run, args=(server.serve(),))
    thread.start()
    started.wait()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def tokenizer():
    return text.train_tokenizer(["the question and the answer, and now the next one"], 300)


@pytest.fixture(scope="module", params=["mamba", "hybrid"])
def model(request, tokenizer):
    architecture = hf_archs.get_architecture(request.param)
    model = lively(architecture.causal_lm_class, architecture.tiny_config(vocab_size=len(tokenizer)))
    assert_remembers(model)
    return model


@pytest.fixture(scope="module")
def address(model, tokenizer):
    with serving(model, tokenizer) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        yield client


def rendered(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]


def expected(model, tokenizer, ids):
    """The text of the greedy tokens after a prompt, (1, l), up to the end token."""
    answer = greedy(model, ids, NEW)[0, ids.shape[1] :].tolist()
    end = answer.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in answer else NEW
    return tokenizer.decode(answer[:end], skip_special_tokens=True)


def said(client, messages, stream):
    answer = client.chat.completions.create(
        model="toy", messages=messages, temperature=0, max_tokens=NEW, stream=stream
    )
    if stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    return answer.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_chat_is_what_generate_says(model, tokenizer, client, stream):
    messages = [*PROMPT]
    for message in ("and now?", "next"):
        answer = said(client, messages, stream)
        whole = expected(model, tokenizer, rendered(tokenizer, messages))
        # the host's streamer drops the bytes of a last character that is not complete
        assert answer == whole or (stream and whole.startswith(answer) and set(whole[len(answer) :]) == {"\ufffd"})
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": message}]


def test_completions_are_what_generate_says(model, tokenizer, client):
    answer = client.completions.create(model="toy", prompt="the question", temperature=0, max_tokens=NEW)
    ids = tokenizer("the question", return_tensors="pt").input_ids
    assert answer.choices[0].text == expected(model, tokenizer, ids)
    assert answer.usage.prompt_tokens == ids.shape[1]


def test_two_clients_at_once(model, tokenizer, address):
    """Of which one streams: each gets the answers to its own questions, several times."""
    asked = [[PROMPT[0], {"role": "user", "content": f"question {number % 4}"}] for number in range(8)]
    right = [expected(model, tokenizer, rendered(tokenizer, messages)) for messages in asked]

    def ask(stream):
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
            return [said(client, messages, stream) for messages in asked]

    with ThreadPoolExecutor(2) as pool:
        whole, streamed = pool.map(ask, [False, True])
    assert whole == right
    assert all(r.startswith(s) and set(r[len(s) :]) <= {"\ufffd"} for r, s in zip(right, streamed))


def test_the_same_prefix_is_read_once(model, tokenizer):
    read = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, out: read.append(args[0].shape[1]))
    with serving(model, tokenizer) as address, openai.OpenAI(base_url=address, api_key="none") as client:
        found = []
        for question in ("question", "question and more", "question and more"):
            read.clear()
            messages = [PROMPT[0], {"role": "user", "content": question}]
            answer = client.chat.completions.create(model="toy", messages=messages, temperature=0, max_tokens=NEW)
            found.append(sum(read) - (answer.usage.completion_tokens - 1))
    hook.remove()
    first, second = (
        rendered(tokenizer, [PROMPT[0], {"role": "user", "content": q}])[0].tolist()
        for q in ("question", "question and more")
    )
    common = next(i for i, (a, b) in enumerate(zip(first, second)) if a != b)
    assert common == len(first) - 1
    assert found == [len(first), len(second) - common, 1]


def test_beams_and_static_caches_are_left_to_the_host(model, tokenizer, client):
    for options in ({"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}):
        options |= {"max_new_tokens": 6, "do_sample": False}
        answer = client.chat.completions.create(
            model="toy", messages=PROMPT, extra_body={"generation_config": json.dumps(options)}
        )
        ids = rendered(tokenizer, PROMPT)
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=1, **options)
        assert answer.choices[0].message.content == tokenizer.decode(
            generated[0, ids.shape[1] :], skip_special_tokens=True
        )


def test_one_model_alone(address, client):
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="other", messages=PROMPT)
    reply = httpx2.post(f"{address.removesuffix('/v1')}/load_model", json={"model": "other"})
    assert "the model is 'other@main'; allowed is 'toy'" in reply.text
    httpx2.post(f"{address.removesuffix('/v1')}/reset")
    assert said(client, PROMPT, False)


def test_an_interrupted_stream_leaves_no_state(model, tokenizer):
    """A client that goes away ends the answer, and the next one is right."""
    states = StateCache(model, 2**24)
    ids = rendered(tokenizer, PROMPT)
    run = serve._WithStates(model, states)

    class Gone:
        calls = 0

        def put(self, value):
            self.calls += 1
            if self.calls == 5:
                raise InterruptedError

        def end(self):
            pass

    config = model.generation_config
    with pytest.raises(InterruptedError):
        run.generate(input_ids=ids, generation_config=config, streamer=Gone(), max_new_tokens=NEW, pad_token_id=1)
    found = run.generate(input_ids=ids, generation_config=config, max_new_tokens=NEW, pad_token_id=1)
    assert tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True) == expected(model, tokenizer, ids)
    assert states.known(torch.cat([found, ids], 1)) == found.shape[1] - 1  # the next turn begins after the answer
