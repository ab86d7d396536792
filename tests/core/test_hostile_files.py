"""Wrong files: a config or weights with any content are refused in one sentence, or read correctly."""

import json
import random
import struct

import hypothesis
import pytest
import torch
import transformers
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import hf_archs
from hf_archs.commands import sentences
from hf_archs.native import conversion
from hf_archs.registry import get_architecture

MISSING = object()
WRONG = ["nonsense", -1, 0, 2**62, float("nan"), float("inf"), None, [], {}, 1.5, True, [-1], ["x"], MISSING]
# fields that transformers reads in any file, and writes in none of these
HOST = ("num_labels", "per_layer_config")
# transformers' own sentence about several fields, and a name that says nothing of a value
UNNAMED = ("dimensions for the Mamba head state", "which follows from the other fields", "layer_pattern has")


def native_config(architecture, form):
    if form.tiny:
        return getattr(transformers, form.config_name)(**form.tiny)
    return form.write_config(architecture.tiny_config(**form.constants))


def kinds():
    """Every kind of checkpoint: ours, and every native one that transformers has."""
    yield from ((name, None) for name in hf_archs.architectures())
    yield from ((architecture.name, form.name) for architecture, form in conversion._formats())


def small(name, form_name):
    """A small model of this kind."""
    architecture = get_architecture(name)
    torch.manual_seed(0)
    if form_name is None:
        return architecture.causal_lm_class(architecture.tiny_config())
    form = next(form for form in architecture.native_formats if form.name == form_name)
    return getattr(transformers, form.causal_lm_name)(native_config(architecture, form))


def content(config):
    return json.loads(config.to_json_string(use_diff=False))


def with_value(raw, field, value):
    return {k: v for k, v in raw.items() if k != field} | ({} if value is MISSING else {field: value})


def one_sentence(read):
    """The one line of an expected error of ``read``, or None if it succeeds. Any other error is a failure."""
    try:
        read()
    except sentences.EXPECTED as error:
        said = sentences.sentence(error)
        assert said
        assert "\n" not in said
        return said
    return None


def write(folder, raw):
    (folder / "config.json").write_text(json.dumps(raw))


def check_config(name, raw, field, value, folder):
    write(folder, with_value(raw, field, value))
    said = one_sentence(lambda: get_architecture(name).config_class.from_pretrained(folder))
    if said is not None and value is not MISSING and field != "model_type":
        assert field in said or any(words in said for words in UNNAMED), f"{field} = {value!r}: {said}"


@pytest.mark.parametrize("name", hf_archs.architectures())
def test_a_config_of_ours(name, tmp_path):
    raw = content(get_architecture(name).tiny_config())
    for field in {**raw, **dict.fromkeys(HOST)}:
        for value in WRONG:
            check_config(name, raw, field, value, tmp_path)


@pytest.mark.parametrize(("name", "form"), [kind for kind in kinds() if kind[1]])
def test_a_config_of_others(name, form, tmp_path):
    """One random wrong value for every field; `test_any_config` tries all."""
    raw, pick = content(small(name, form).config), random.Random(0)
    for field in {**raw, **dict.fromkeys(HOST)}:
        check_config(name, raw, field, pick.choice(WRONG), tmp_path)


@pytest.mark.parametrize(("name", "form"), list(kinds()))
def test_fields_of_the_host(name, form, tmp_path):
    """Values that transformers accepts, makes lists of or fails at are refused by field in any file."""
    raw, config_class = content(small(name, form).config), get_architecture(name).config_class
    for field, value, allowed in (
        ("num_hidden_layers", 2**62, "allowed are 1 to 4096"),  # a list of them would fill the memory
        ("num_labels", 2**62, "allowed are 0 to 1048576"),
        ("num_labels", None, "allowed are 0 to 1048576"),
        ("id2label", {"a": "b"}, "dict of numbers and labels"),
        ("id2label", {"²": "b"}, "dict of numbers and labels"),
        ("output_hidden_states", "nonsense", "a bool, the index of a layer, a list of indices, and None"),
        ("output_hidden_states", ["x"], "a bool, the index of a layer, a list of indices, and None"),
        ("per_layer_config", {"0": {"use_cache": False}}, "per_layer_config"),
        ("per_layer_config", 0, "per_layer_config"),
    ):
        if field in (*raw, *HOST):
            write(tmp_path, {**raw, field: value})
            said = one_sentence(lambda: config_class.from_pretrained(tmp_path))
            assert said is not None, f"{field} = {value!r} is taken"
            assert field in said, said
            if form is None or isinstance(value, int):
                assert allowed in said, said
    taken = [("output_hidden_states", [0, 1]), ("num_labels", 3)]
    for field, value in [*taken, ("per_layer_config", {})] if form is None else taken:
        write(tmp_path, {**raw, field: value})
        assert one_sentence(lambda: config_class.from_pretrained(tmp_path)) is None, field


@pytest.mark.parametrize("form", [None, "mamba"])
def test_damaged_weights(form, tmp_path):
    model, architecture = small("mamba", form), get_architecture("mamba")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole, state = file.read_bytes(), load_file(file)
    header = struct.unpack("<Q", whole[:8])[0]
    names = sorted(state)

    def refused():
        return one_sentence(lambda: architecture.causal_lm_class.from_pretrained(tmp_path))

    for damaged in (
        whole[:-1],
        whole[: 8 + header // 2],
        b"",
        b"\xff" * 8 + whole[8:],
        struct.pack("<Q", 2**40) + whole[8:],
        whole.replace(b'"F32"', b'"F99"', 1),
        b"PK\x03\x04" + whole,  # a pickle of torch
        whole + b"0",
    ):
        file.write_bytes(damaged)
        assert "corrupt or truncated" in refused()
    a, b = next(n for n in names if n.endswith("x_proj.weight")), next(n for n in names if n.endswith("A_log"))
    for changed, said in (
        ({**state, a: state[b], b: state[a]}, "has shape"),
        ({**state, a: state[a].T.contiguous()}, "has shape"),
        ({**state, a: torch.zeros(0)}, "has shape"),
        ({**state, "more": state[a].clone()}, "no place" if form else None),
        ({k: v for k, v in state.items() if k != a}, "is missing"),
        ({}, "is missing"),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        found = refused()
        assert said is None if found is None else said in found


@pytest.mark.hostile
@hypothesis.settings(max_examples=4000, deadline=None, database=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_config(data, tmp_path_factory):
    """Any two fields of any kind of file, with the values above and others; a model that is read also runs."""
    name, form = data.draw(st.sampled_from(list(kinds())))
    folder = tmp_path_factory.mktemp("any")
    model = small(name, form)
    model.save_pretrained(folder)
    raw = content(model.config)
    anything = st.one_of(
        st.sampled_from(WRONG),
        st.integers(),
        st.integers(-4, 200),
        st.floats(),
        st.text(max_size=8),
        st.lists(st.integers(-2, 9), max_size=4),
        st.dictionaries(st.text(max_size=2), st.integers(-2, 9), max_size=2),
    )
    changed = raw
    for field in data.draw(st.lists(st.sampled_from(sorted({*raw, *HOST})), min_size=1, max_size=2, unique=True)):
        changed = with_value(changed, field, data.draw(anything))
    write(folder, changed)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}

    def read():
        loaded = get_architecture(name).causal_lm_class.from_pretrained(folder).eval()
        with torch.no_grad():
            loaded(torch.randint(3, 50, (2, 7)))

    one_sentence(read)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


@pytest.mark.hostile
@hypothesis.settings(max_examples=1500, deadline=None, database=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_weights(data, tmp_path_factory):
    """Bytes removed and changed anywhere; tensors of other shapes and types, swapped, missing and added."""
    name, form = data.draw(st.sampled_from(list(kinds())))
    folder = tmp_path_factory.mktemp("any")
    small(name, form).save_pretrained(folder)
    file = folder / "model.safetensors"
    if data.draw(st.booleans()):
        whole = bytearray(file.read_bytes())
        header = 8 + struct.unpack("<Q", whole[:8])[0]
        for _ in range(data.draw(st.integers(0, 3))):
            whole[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
        file.write_bytes(whole[: data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))])
    else:
        state = load_file(file)
        names = st.sampled_from(sorted(state))
        for _ in range(data.draw(st.integers(1, 3))):
            a, b = data.draw(names), data.draw(names)
            change = data.draw(st.sampled_from(["swap", "drop", "add", "shape", "type"]))
            if change == "swap" and a in state and b in state:
                state[a], state[b] = state[b], state[a]
            elif change == "drop":
                state.pop(a, None)
            elif change == "add":
                state[f"{a}.more"] = torch.zeros(data.draw(st.integers(0, 3)))
            elif change == "shape":
                state[a] = torch.zeros(data.draw(st.lists(st.integers(0, 5), max_size=4)))
            elif a in state:
                state[a] = state[a].to(data.draw(st.sampled_from([torch.int8, torch.bool, torch.float64, torch.half])))
        save_file({k: v.clone() for k, v in state.items()}, file, metadata={"format": "pt"})
    before = file.read_bytes()
    one_sentence(lambda: get_architecture(name).causal_lm_class.from_pretrained(folder))
    assert file.read_bytes() == before
