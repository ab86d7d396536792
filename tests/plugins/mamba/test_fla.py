"""flash-linear-attention's Mamba: its fields in three versions, against a second implementation in this file."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import MambaConfig

import hf_archs
from hf_archs.native.formats import NativeCheckpoint
from hf_archs.testing.ops import relative_distance
from hf_archs_mamba import ArchMambaConfig, ArchMambaForCausalLM
from hf_archs_mamba.conversion import FLA, MAMBA

# as `fla.models.MambaConfig` writes it from April 2026 on
CONFIG = {
    "architectures": ["MambaForCausalLM"],
    "bos_token_id": 1,
    "conv_kernel": 3,
    "dt_init_floor": 1e-4,
    "dt_init_scheme": "random",
    "dt_max": 0.1,
    "dt_min": 0.001,
    "dt_rank": 3,
    "dt_scale": 1.0,
    "eos_token_id": 2,
    "expand": 2,
    "fuse_cross_entropy": True,
    "fuse_linear_cross_entropy": False,
    "fuse_norm": True,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "model_type": "mamba",
    "norm_eps": 0.1,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": False,
    "state_size": 5,
    "tie_word_embeddings": False,
    "use_bias": True,
    "use_cache": True,
    "use_conv_bias": True,
    "use_l2warp": False,
    "vocab_size": 40,
}
EARLIER = {
    "dt_rank": "time_step_rank",
    "dt_scale": "time_step_scale",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_scheme": "time_step_init_scheme",
    "dt_init_floor": "time_step_floor",
}


def dialect(config, when):
    """The config with the earlier names of its fields."""
    names = EARLIER if when in ("2025", "2024") else {}
    if when == "2024":
        names = {**names, "norm_eps": "layer_norm_epsilon"}
    return {names.get(name, name): value for name, value in config.items()}


def filled(config, dtype):
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    d, n, r = config["hidden_size"], config["state_size"], config["dt_rank"]
    c, vocabulary = config["intermediate_size"], config["vocab_size"]
    state = {"backbone.embeddings.weight": random(vocabulary, d), "backbone.norm_f.weight": 1 + random(d, scale=0.3)}
    for i in range(config["num_hidden_layers"]):
        at = f"backbone.layers.{i}."
        state |= {
            at + "norm.weight": 1 + random(d, scale=0.3),
            at + "mixer.A_log": random(c, n, scale=0.5) - 1,
            at + "mixer.D": random(c),
            at + "mixer.in_proj.weight": random(2 * c, d, scale=d**-0.5),
            at + "mixer.conv1d.weight": random(c, 1, config["conv_kernel"], scale=0.6),
            at + "mixer.x_proj.weight": random(r + 2 * n, c, scale=c**-0.5),
            at + "mixer.dt_proj.weight": random(c, r),
            at + "mixer.dt_proj.bias": random(c) - 1,
            at + "mixer.out_proj.weight": random(d, c, scale=c**-0.5),
        }
        if config["use_conv_bias"]:
            state[at + "mixer.conv1d.bias"] = random(c)
        if config["use_bias"]:
            state |= {at + "mixer.in_proj.bias": random(2 * c), at + "mixer.out_proj.bias": random(d)}
    tied = state["backbone.embeddings.weight"]
    state["lm_head.weight"] = tied if config["tie_word_embeddings"] else random(vocabulary, d, scale=d**-0.5)
    return state


def rms_norm(x, weight, eps):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def logits(config, state, ids):
    """`fla.layers.Mamba` in blocks of norm, mixer and sum, token by token."""
    n, r, taps = config["state_size"], config["dt_rank"], config["conv_kernel"]
    x = state["backbone.embeddings.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        at = {k.removeprefix(f"backbone.layers.{i}."): v for k, v in state.items() if f"layers.{i}." in k}
        y = rms_norm(x, at["norm.weight"], config["norm_eps"])
        u, z = F.linear(y, at["mixer.in_proj.weight"], at.get("mixer.in_proj.bias")).chunk(2, -1)
        padded = F.pad(u, (0, 0, taps - 1, 0))
        u = sum(padded[:, k : k + u.shape[1]] * at["mixer.conv1d.weight"][:, 0, k] for k in range(taps))
        u = F.silu(u + at.get("mixer.conv1d.bias", 0.0))
        dt, B, C = F.linear(u, at["mixer.x_proj.weight"]).split([r, n, n], -1)
        dt = F.softplus(F.linear(dt, at["mixer.dt_proj.weight"], at["mixer.dt_proj.bias"]))
        A, h, out = -at["mixer.A_log"].exp(), torch.zeros(()).to(x.dtype), []
        for t in range(ids.shape[1]):
            h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
            out.append((h * C[:, t, None]).sum(-1))
        y = (torch.stack(out, 1) + u * at["mixer.D"]) * F.silu(z)
        x = x + F.linear(y, at["mixer.out_proj.weight"], at.get("mixer.out_proj.bias"))
    return F.linear(rms_norm(x, state["backbone.norm_f.weight"], config["norm_eps"]), state["lm_head.weight"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True, "use_bias": False, "use_conv_bias": False}, {"intermediate_size": 40}],
    ids=str,
)
def test_logits_and_the_way_back(changes, dtype, tolerance):
    config = {**CONFIG, **changes}
    state = filled(config, dtype)
    ours = hf_archs.from_native(NativeCheckpoint(config, state))
    assert type(ours) is ArchMambaForCausalLM
    ids = torch.randint(0, 40, (2, 19))
    with torch.no_grad():
        assert relative_distance(ours(ids).logits, logits(config, state, ids)) < tolerance
    back = hf_archs.to_native(ours, "fla_mamba")
    assert back.state_dict.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.state_dict.items())
    kernels = ("fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp")
    assert back.config == {name: value for name, value in config.items() if name not in kernels}


@pytest.mark.parametrize("when", ["2026", "2025", "2024"])
def test_files(when, tmp_path):
    state = filled(CONFIG, torch.float32)
    NativeCheckpoint(dialect(CONFIG, when), state).save_pretrained(tmp_path)
    ours, info = ArchMambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.randint(0, 40, (2, 19))
    with torch.no_grad():
        assert relative_distance(ours(ids).logits, logits(CONFIG, state, ids)) < 1e-5


def test_every_name_of_a_field():
    changes = {"dt_scale": 0.5, "dt_min": 0.01, "dt_max": 0.2, "dt_init_scheme": "constant", "dt_init_floor": 1e-3}
    expected = None
    for when in ("2026", "2025", "2024"):
        config = ArchMambaConfig(**FLA.read_config(dialect({**CONFIG, **changes}, when), ArchMambaConfig))
        expected = expected or config
        assert config.to_dict() == expected.to_dict()
    got = [expected.norm_eps, expected.dt_rank, expected.time_step_scale, expected.time_step_min]
    got += [expected.time_step_max, expected.time_step_init_scheme, expected.time_step_floor]
    assert got == [0.1, 3, 0.5, 0.01, 0.2, "constant", 1e-3]
    automatic = ArchMambaConfig(
        **FLA.read_config({**CONFIG, "dt_rank": "auto", "intermediate_size": "auto"}, ArchMambaConfig)
    )
    assert (automatic.dt_rank, automatic.channels) == (2, automatic.expand * automatic.hidden_size)


def test_which_package_a_file_is_of(tmp_path):
    """Both have ``model_type`` ``mamba``."""
    assert all(FLA.detect(dialect(CONFIG, when)) for when in ("2026", "2025", "2024"))
    assert not any(MAMBA.detect(dialect(CONFIG, when)) for when in ("2026", "2025", "2024"))
    MambaConfig().save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "config.json").read_text())
    assert MAMBA.detect(theirs)
    assert not FLA.detect(theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu' in this fla_mamba checkpoint.*allowed: 'silu', 'swish'"),
        ({"attn": {"layers": [1]}}, r"attn is \{'layers': \[1\]\} in this fla_mamba checkpoint"),
        ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon is 0.001 in this fla_mamba checkpoint"),  # beside norm_eps
    ],
)
def test_options_that_ours_lacks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FLA.read_config({**CONFIG, **changes}, ArchMambaConfig)
