"""Weights in pickles: reading and refusals; no code in a file is run."""

import os
import re
from collections import OrderedDict, defaultdict

import pytest
import torch

from hf_archs.native.pickles import read_state_dict


class Settings:
    """An object of a class other than tensors."""

    def __init__(self, **fields):
        self.__dict__.update(fields)


class Call:
    """An object that is unpickled by calling a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


WEIGHTS = OrderedDict(a=torch.arange(3.0), b=torch.ones(2, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "content", [WEIGHTS, dict(WEIGHTS), {"state_dict": WEIGHTS, "epoch": 3}], ids=["ordered", "plain", "among"]
)
def test_tensors(content, zipped, tmp_path):
    torch.save(content, tmp_path / "w.ckpt", _use_new_zipfile_serialization=zipped)
    found = read_state_dict(tmp_path / "w.ckpt")
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


def test_other_objects_are_passed_over_and_never_made(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Settings, "__setstate__", made.append, raising=False)
    counts = defaultdict(dict, {"x": {"y": Settings}})
    others = {"hyper_parameters": Settings(node=Settings(type=int), counts=counts), "args": Call(Settings)}
    torch.save({"state_dict": WEIGHTS, **others}, tmp_path / "w.ckpt")
    found = read_state_dict(tmp_path / "w.ckpt")
    assert torch.equal(found["a"], WEIGHTS["a"])
    assert not made
    # what stood for them stands for nothing later
    with pytest.raises(Exception, match="Settings was not an allowed global"):
        torch.load(tmp_path / "w.ckpt", weights_only=True)


@pytest.mark.parametrize("function", [exec, eval])
def test_nothing_in_a_file_is_run(function, tmp_path):
    call = Call(function, f"open({str(tmp_path / 'written')!r}, 'w')")
    torch.save({"state_dict": WEIGHTS, "more": call}, tmp_path / "w.ckpt")
    assert torch.equal(read_state_dict(tmp_path / "w.ckpt")["a"], WEIGHTS["a"])
    assert not (tmp_path / "written").exists()


def test_a_call_of_the_operating_system_is_refused(tmp_path):
    torch.save({"state_dict": WEIGHTS, "more": Call(os.mkdir, str(tmp_path / "made"))}, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match="mkdir"):
        read_state_dict(tmp_path / "w.ckpt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"state_dict": {"a": WEIGHTS["a"], "b": Settings()}}, "holds 'b', which is no tensor"),
        ({"a": WEIGHTS["a"], "b": 3}, "holds 'b', which is no tensor"),
        ({"state_dict": {}}, "holds no weights"),
        ([WEIGHTS["a"]], "holds no weights"),
        (Settings(), "holds no weights"),
    ],
    ids=["object", "number", "empty", "list", "instance"],
)
def test_anything_else_is_refused(content, why, tmp_path):
    torch.save(content, tmp_path / "w.ckpt")
    with pytest.raises(
        ValueError, match=f"{re.escape(str(tmp_path / 'w.ckpt'))} {why}; allowed is a pickle of tensors"
    ):
        read_state_dict(tmp_path / "w.ckpt")


@pytest.mark.parametrize("keep", [0, 3, 200, -50])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_was_cut_off_is_refused_in_one_sentence(keep, zipped, tmp_path):
    torch.save(WEIGHTS, tmp_path / "w.ckpt", _use_new_zipfile_serialization=zipped)
    (tmp_path / "w.ckpt").write_bytes((tmp_path / "w.ckpt").read_bytes()[:keep])
    with pytest.raises(ValueError, match="cannot be read as weights alone") as refusal:
        read_state_dict(tmp_path / "w.ckpt")
    assert "weights_only" not in str(refusal.value)  # torch advises to turn it off


def test_no_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_state_dict(tmp_path / "w.ckpt")
