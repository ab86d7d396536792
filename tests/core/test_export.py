"""Exported graphs are made from one example and correct at every length.

`scripts/test -m exports` exports every architecture and preset in every way, and prints the distances by length.
"""

import itertools

import numpy
import onnxruntime
import pytest
import torch

import hf_archs
from hf_archs.export import Logits, Step
from hf_archs.testing.contract.models import distance, lively, tokens
from hf_archs.testing.contract.padding import padded
from hf_archs_hybrid.configuration import ArchHybridConfig
from hf_archs_hybrid.presets import PRESETS, preset_fields

# the exporters' warnings about themselves
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-4
LENGTHS = (1, 7, 19, 33, 65, 200, 512)
SIX = ("mamba", "mamba2", "retnet", "hyena", "moe", "hybrid")
# layers of each preset, up to every type of layer, and every shared layer twice
DEPTHS = {"mixture": 3, "jamba": 5, "samba": 2, "zamba2": 4, "nemotron-h": 11, "falcon-h1": 1, "griffin-like": 3}
DEPTHS |= {"qwen3-next-like": 4}
MIXERS = {
    "attention": {"type": "attention", "num_heads": 4, "num_key_value_heads": 2},
    "local": {"type": "sliding_attention", "num_heads": 4, "window": 7, "global_tokens": 2},
    "compressive": {"type": "memory", "num_heads": 4, "window": 5, "memory_slots": 4, "compression_rate": 3},
    "retrieval": {"type": "memory", "num_heads": 4, "window": 5, "memory_type": "retrieval", "retrieved_keys": 2},
    "learned": {"type": "hyena", "filter_frequency": 1.0, "max_positions": 48, "learned_positions": True},
    "modal": {"type": "hyena", "filter_type": "modal"},
    "medium": {"type": "hyena", "filter_type": "medium", "medium_taps": 20},
}
EXPERTS = {
    "switch": {"router": "switch", "capacity_factor": 1.25},
    "gshard": {"router": "gshard", "capacity_factor": 2.0},
    "expert_choice": {"router": "expert_choice"},
    "loss_free": {"router": "loss_free", "score_function": "sigmoid", "gated": False, "hidden_act": "relu2"},
}


def tiny_preset(name):
    fields = preset_fields(name, 64, DEPTHS[name])
    for mixer in fields["mixers"].values():
        if "window" in mixer:
            mixer["window"] = 7
        if mixer["type"].endswith("attention"):
            mixer.update(num_heads=4, num_key_value_heads=2)
        elif mixer["type"] == "mamba2":
            mixer.update(head_dim=16, state_size=16)
    if name == "zamba2":
        fields["layer_pattern"], fields["feed_forward_pattern"] = "mamba2; attention every 2", "none; mlp every 2"
    return ArchHybridConfig(vocab_size=128, **fields)


def make(name, kind="causal_lm_class"):
    """A lively model of an architecture, a preset, one mixer or one router."""
    if name in SIX or name in EXPERTS:
        architecture = hf_archs.get_architecture("moe" if name in EXPERTS else name)
        config = architecture.tiny_config(**EXPERTS.get(name, {}))
    else:
        architecture = hf_archs.get_architecture("hybrid")
        config = tiny_preset(name) if name in PRESETS else None
        if config is None:
            one = {"mixers": {name: MIXERS[name]}, "layer_pattern": name, "num_hidden_layers": 1}
            config = architecture.tiny_config(**one, feed_forward={}, feed_forward_pattern=None)
    return lively(getattr(architecture, kind), config)


def batch(length, mask, rows=3):
    """Token ids, and with ``mask`` padding on the left, on the right and inside."""
    if not mask:
        return (tokens(rows, length, seed=length),)
    sides = itertools.cycle(("left", "right", "interior"))
    documents = [tokens(1, length - (i + 1) * length // 6, seed=length + i)[0] for i in range(rows)]
    both = [padded([document], side, length) for document, side in zip(documents, sides)]
    return tuple(torch.cat(parts) for parts in zip(*both))


def shapes(arguments):
    return tuple({0: torch.export.Dim("rows", min=1), 1: torch.export.Dim("length", min=1)} for _ in arguments)


def session(program, path):
    program.save(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options)


def by_export(module, arguments, strict=False):
    return torch.export.export(module, arguments, dynamic_shapes=shapes(arguments), strict=strict).module()


def by_onnx(module, arguments, path):
    made = torch.onnx.export(module, arguments, dynamo=True, dynamic_shapes=shapes(arguments), verbose=False)
    run = session(made, path)
    names = [value.name for value in run.get_inputs()]
    return lambda *a: torch.from_numpy(run.run(None, {n: t.numpy() for n, t in zip(names, a, strict=True)})[0])


def far(program, module, mask, lengths):
    """The program's distance from the module at each length, at the real tokens."""
    found = {}
    for length in lengths:
        for rows in (3, 1) if length == lengths[1] else (3,):
            arguments = batch(length, mask, rows)
            real = arguments[1].bool() if mask else torch.ones_like(arguments[0], dtype=torch.bool)
            with torch.no_grad():
                apart = distance(program(*arguments)[real], module(*arguments)[real])
            found[length] = max(apart, found.get(length, 0.0))
    return found


def hold(found):
    assert max(found.values()) < TOLERANCE, ", ".join(f"{length}: {apart:.0e}" for length, apart in found.items())


QUICK = (1, 7, 33, 65, 200)


@pytest.mark.parametrize("name", [*SIX, "samba"])
def test_onnx(name, tmp_path):
    """Architectures without a mask, and a preset with one; -m exports runs all combinations."""
    module, mask = Logits(make(name)), name in PRESETS
    hold(far(by_onnx(module, batch(19, mask), tmp_path / "m.onnx"), module, mask, QUICK))


@pytest.mark.parametrize("name", [*SIX, *PRESETS, *MIXERS, *EXPERTS])
def test_torch_export(name):
    module, mask = Logits(make(name)), name not in PRESETS
    hold(far(by_export(module, batch(19, mask)), module, mask, QUICK))


@pytest.mark.parametrize("name", ["mamba", "moe", "local", "compressive"])
def test_strict_torch_export(name):
    """Dynamo traces the source first, and must take the same branches."""
    module = Logits(make(name))
    hold(far(by_export(module, batch(19, mask=True), strict=True), module, True, QUICK))


@pytest.mark.exports
def test_masked_language_model(tmp_path):
    module = Logits(make("mamba2", "masked_lm_class"))
    hold(far(by_onnx(module, batch(19, mask=True), tmp_path / "m.onnx"), module, True, QUICK))


@pytest.mark.parametrize("name", ["compressive"])
def test_onnx_of_parts(name, tmp_path):
    """Parts that no default architecture has and ONNX has no operator for."""
    module = Logits(make(name))
    hold(far(by_onnx(module, batch(19, mask=True), tmp_path / "m.onnx"), module, True, QUICK))


@pytest.mark.parametrize("name", ["mamba", "mamba2", "retnet", "hyena", *MIXERS])
def test_packed_documents(name):
    class Packed(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, seq_idx):
            return self.model(input_ids, seq_idx=seq_idx, use_cache=False).logits

    def packed(length):
        position = torch.arange(length).expand(2, -1)
        return tokens(2, length), position // torch.tensor([[9], [40]])

    module = Packed(make(name))
    program = by_export(module, packed(30))
    for length in (7, 33, 90, 200):
        apart = distance(program(*packed(length)), module(*packed(length)))
        assert apart < TOLERANCE, f"{length}: {apart:.0e}"


def onnx_step(step, path, tokens=1):
    made = torch.onnx.export(
        step,
        kwargs=step.example(tokens),
        dynamic_shapes=step.dynamic_shapes(tokens),
        input_names=step.input_names,
        output_names=step.output_names,
        dynamo=True,
        verbose=False,
    )
    run = session(made, path)
    assert [value.name for value in run.get_inputs()] == step.input_names
    assert [value.name for value in run.get_outputs()] == step.output_names

    def call(ids, states):
        logits, *after = run.run(None, {"input_ids": ids, **dict(zip(step.input_names[1:], states, strict=True))})
        return logits, after

    return call


def onnx_generate(call, step, prompt, new):
    """Greedy decoding by single tokens, the prompt's included."""
    ids, states = prompt.numpy(), [t.numpy() for t in step.empty(prompt.shape[0]).values()]
    for at in range(prompt.shape[1] + new - 1):
        logits, states = call(ids[:, at : at + 1], states)
        if at >= prompt.shape[1] - 1:
            ids = numpy.concatenate([ids, logits[:, -1].argmax(-1, keepdims=True)], 1)
    return ids


def check_step(name, path):
    model = make(name)
    model.generation_config.eos_token_id = None
    step, prompt = Step(model), tokens(2, 11)
    expected = model.generate(prompt, max_new_tokens=64, do_sample=False)
    assert (onnx_generate(onnx_step(step, path), step, prompt, 64) == expected.numpy()).all()


@pytest.mark.parametrize("name", ["mamba2", "retnet", "hyena", "moe", "samba"])
def test_decode_step(name, tmp_path):
    """64 tokens in onnxruntime equal those of `generate`."""
    check_step(name, tmp_path / "step.onnx")


@pytest.mark.parametrize("name", [*SIX, *MIXERS])
def test_step_of_any_number_of_tokens(name):
    """One graph reads a text in pieces of any size, from empty states."""
    model = make(name)
    step, ids = Step(model), tokens(2, 90)
    program = torch.export.export(step, (), step.example(None), dynamic_shapes=step.dynamic_shapes(None)).module()
    states, pieces = step.empty(2), []
    for piece in ids.split((1, 7, 40, 1, 33, 8), 1):
        logits, states = program(input_ids=piece, states=states)
        pieces.append(logits)
    apart = distance(torch.cat(pieces, 1), Logits(model)(ids))
    assert apart < TOLERANCE, f"{apart:.0e}"


@pytest.mark.parametrize("name", [*SIX, "samba", *MIXERS])
def test_jit_trace(name):
    """A trace of a few tokens is correct for other tokens and other lengths."""
    module = Logits(make(name))
    with torch.no_grad():
        program = torch.jit.trace(module, (tokens(2, 5),), check_trace=False)
    hold(far(program, module, False, QUICK))


def test_jit_trace_of_eager_experts():
    model = make("moe")
    model.set_experts_implementation("eager")
    module = Logits(model)
    with torch.no_grad():
        program = torch.jit.trace(module, (tokens(2, 5),), check_trace=False)
    hold(far(program, module, False, QUICK))


@pytest.mark.exports
@pytest.mark.parametrize("mask", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("way", ["onnx", "export", "strict"])
@pytest.mark.parametrize("name", [*SIX, *PRESETS, *MIXERS, *EXPERTS])
def test_every_way(name, way, mask, tmp_path):
    module, example = Logits(make(name)), batch(19, mask)
    if way == "onnx":
        program = by_onnx(module, example, tmp_path / "m.onnx")
    else:
        program = by_export(module, example, strict=way == "strict")
    found = far(program, module, mask, LENGTHS)
    print(f"{name} {way}: " + ", ".join(f"{length}: {apart:.0e}" for length, apart in found.items()))
    hold(found)


@pytest.mark.exports
@pytest.mark.parametrize("name", [*SIX, *PRESETS, *MIXERS])
def test_every_decode_step(name, tmp_path):
    check_step(name, tmp_path / "step.onnx")
