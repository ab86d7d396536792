"""flash-linear-attention's Mamba-2: its fields in four versions, against a second implementation in this file."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import Mamba2Config

import hf_archs
from hf_archs.native.formats import NativeCheckpoint
from hf_archs.testing.ops import relative_distance
from hf_archs_mamba2 import ArchMamba2Config, ArchMamba2ForCausalLM
from hf_archs_mamba2.conversion import FLA, MAMBA2

# as `fla.models.Mamba2Config` writes it from April 2026 on
CONFIG = {
    "A_init_range": [1, 16],
    "D_has_hdim": False,
    "architectures": ["Mamba2ForCausalLM"],
    "bos_token_id": 1,
    "chunk_size": 256,
    "conv_init": None,
    "conv_kernel": 3,
    "dt_init_floor": 1e-4,
    "dt_limit": [0.2, 0.9],
    "dt_max": 0.1,
    "dt_min": 0.001,
    "eos_token_id": 2,
    "expand": 2,
    "fuse_cross_entropy": True,
    "fuse_linear_cross_entropy": False,
    "fuse_norm": True,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "model_type": "mamba2",
    "n_groups": 3,
    "norm_before_gate": False,
    "norm_eps": 0.1,
    "num_heads": 6,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": True,
    "rmsnorm": True,
    "state_size": 5,
    "tie_word_embeddings": False,
    "use_bias": True,
    "use_cache": True,
    "use_conv_bias": True,
    "use_l2warp": False,
    "vocab_size": 40,
}
EARLIER = {
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
    "dt_limit": "time_step_limit",
    "rmsnorm": "rms_norm",
}
TODAY_ALONE = ("A_init_range", "D_has_hdim", "conv_init", "norm_before_gate")


def dialect(config, when):
    """The config with the fields of an earlier version."""
    if when == "2026":
        return config
    names = EARLIER if when == "2025" else {**EARLIER, "norm_eps": "layer_norm_epsilon"}
    found = {names.get(name, name): value for name, value in config.items() if name not in TODAY_ALONE}
    return {**found, "time_step_rank": 2}


def filled(config, dtype):
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    d, h, vocabulary = config["hidden_size"], config["num_heads"], config["vocab_size"]
    c = config["expand"] * d
    convolved = c + 2 * config["n_groups"] * config["state_size"]
    state = {"backbone.embeddings.weight": random(vocabulary, d), "backbone.norm_f.weight": 1 + random(d, scale=0.3)}
    for i in range(config["num_hidden_layers"]):
        at = f"backbone.layers.{i}."
        state |= {
            at + "norm.weight": 1 + random(d, scale=0.3),
            at + "mixer.A_log": random(h, scale=0.5) - 1,
            at + "mixer.D": random(h),
            at + "mixer.dt_bias": random(h) - 1,
            at + "mixer.in_proj.weight": random(c + convolved + h, d, scale=d**-0.5),
            at + "mixer.conv1d.weight": random(convolved, 1, config["conv_kernel"], scale=0.6),
            at + "mixer.norm.weight": 1 + random(c, scale=0.3),
            at + "mixer.out_proj.weight": random(d, c, scale=c**-0.5),
        }
        if config["use_conv_bias"]:
            state[at + "mixer.conv1d.bias"] = random(convolved)
        if config["use_bias"]:
            state |= {at + "mixer.in_proj.bias": random(c + convolved + h), at + "mixer.out_proj.bias": random(d)}
    tied = state["backbone.embeddings.weight"]
    state["lm_head.weight"] = tied if config["tie_word_embeddings"] else random(vocabulary, d, scale=d**-0.5)
    return state


def rms_norm(x, weight, eps):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def logits(config, state, ids):
    """`fla.layers.Mamba2` in blocks of norm, mixer and sum, token by token."""
    n, g, taps, eps = config["state_size"], config["n_groups"], config["conv_kernel"], config["norm_eps"]
    h, p = config["num_heads"], config["head_dim"]
    x = state["backbone.embeddings.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        at = {k.removeprefix(f"backbone.layers.{i}."): v for k, v in state.items() if f"layers.{i}." in k}
        y = F.linear(rms_norm(x, at["norm.weight"], eps), at["mixer.in_proj.weight"], at.get("mixer.in_proj.bias"))
        z, u, dt = y.split([h * p, h * p + 2 * g * n, h], -1)
        padded = F.pad(u, (0, 0, taps - 1, 0))
        u = sum(padded[:, k : k + u.shape[1]] * at["mixer.conv1d.weight"][:, 0, k] for k in range(taps))
        v, B, C = F.silu(u + at.get("mixer.conv1d.bias", 0.0)).split([h * p, g * n, g * n], -1)
        v = v.unflatten(-1, (h, p))
        B, C = (t.unflatten(-1, (g, n)).repeat_interleave(h // g, 2) for t in (B, C))
        dt = F.softplus(dt + at["mixer.dt_bias"]).clamp(*config["dt_limit"])
        decay, s, out = (-dt * at["mixer.A_log"].exp()).exp(), torch.zeros(()).to(x.dtype), []
        for t in range(ids.shape[1]):
            s = decay[:, t, :, None, None] * s + (dt[:, t, :, None] * v[:, t])[..., None] * B[:, t, :, None]
            out.append((s * C[:, t, :, None]).sum(-1))
        y = (torch.stack(out, 1) + v * at["mixer.D"][:, None]).flatten(2) * F.silu(z)
        weight = at["mixer.norm.weight"].unflatten(-1, (g, -1))
        y = rms_norm(y.unflatten(-1, (g, -1)), weight, eps).flatten(2)
        x = x + F.linear(y, at["mixer.out_proj.weight"], at.get("mixer.out_proj.bias"))
    return F.linear(rms_norm(x, state["backbone.norm_f.weight"], eps), state["lm_head.weight"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True, "use_bias": False, "use_conv_bias": False, "n_groups": 1}], ids=str
)
def test_logits_and_the_way_back(changes, dtype, tolerance):
    config = {**CONFIG, **changes}
    state = filled(config, dtype)
    ours = hf_archs.from_native(NativeCheckpoint(config, state))
    assert type(ours) is ArchMamba2ForCausalLM
    ids = torch.randint(0, 40, (2, 19))
    with torch.no_grad():
        expected = logits(config, state, ids)
        assert relative_distance(ours(ids).logits, expected) < tolerance
        assert relative_distance(logits({**config, "dt_limit": [0.0, 9.0]}, state, ids), expected) > 1e-3
    back = hf_archs.to_native(ours, "fla_mamba2")
    assert back.state_dict.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.state_dict.items())
    left_out = (
        "fuse_cross_entropy",
        "fuse_linear_cross_entropy",
        "use_l2warp",
        "chunk_size",
        "A_init_range",
        "conv_init",
    )
    assert back.config == {name: value for name, value in config.items() if name not in left_out}


@pytest.mark.parametrize("when", ["2026", "2025", "2024"])
def test_files(when, tmp_path):
    state = filled(CONFIG, torch.float32)
    NativeCheckpoint(dialect(CONFIG, when), state).save_pretrained(tmp_path)
    ours, info = ArchMamba2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.randint(0, 40, (2, 19))
    with torch.no_grad():
        assert relative_distance(ours(ids).logits, logits(CONFIG, state, ids)) < 1e-5


def test_every_name_of_a_field():
    changes = {"dt_min": 0.01, "dt_max": 0.2, "dt_init_floor": 1e-3}
    expected = None
    for when in ("2026", "2025", "2024"):
        config = ArchMamba2Config(**FLA.read_config(dialect({**CONFIG, **changes}, when), ArchMamba2Config))
        expected = expected or config
        assert config.to_dict() == expected.to_dict()
    got = [expected.norm_eps, expected.time_step_min, expected.time_step_max, expected.time_step_floor]
    assert [*got, *expected.time_step_limit] == [0.1, 0.01, 0.2, 1e-3, 0.2, 0.9]


def test_which_package_a_file_is_of(tmp_path):
    """Both have ``model_type`` ``mamba2``; Mamba-Codestral, a file of transformers, has a ``norm_before_gate`` without
    effect.
    """
    assert all(FLA.detect(dialect(CONFIG, when)) for when in ("2026", "2025", "2024"))
    assert not any(MAMBA2.detect(dialect(CONFIG, when)) for when in ("2026", "2025", "2024"))
    Mamba2Config(norm_before_gate=True, rms_norm=True).save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "config.json").read_text())
    assert MAMBA2.detect(theirs)
    assert not FLA.detect(theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_before_gate": True}, "norm_before_gate is True in this fla_mamba2 checkpoint"),
        ({"rmsnorm": False}, "rmsnorm is False in this fla_mamba2 checkpoint"),
        ({"D_has_hdim": True}, "D_has_hdim is True in this fla_mamba2 checkpoint"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu' in this fla_mamba2 checkpoint"),
        ({"attn": {"layers": [1]}}, r"attn is \{'layers': \[1\]\} in this fla_mamba2 checkpoint"),
        ({"num_heads": 5}, "num_heads is 5 in this fla_mamba2 checkpoint; allowed is .* = 48 / 8"),
    ],
)
def test_options_that_ours_lacks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FLA.read_config({**CONFIG, **changes}, ArchMamba2Config)


def test_the_first_files_put_the_norm_before_the_gate():
    """A file of August 2024 is refused: today's class would ignore its field."""
    first = {**dialect(CONFIG, "2024"), "norm_before_gate": True}
    del first["fuse_norm"]
    assert FLA.detect(first)
    with pytest.raises(ValueError, match="norm_before_gate is True in this fla_mamba2 checkpoint"):
        FLA.read_config(first, ArchMamba2Config)
