"""The Mamba-2 architecture against transformers' Mamba2, and checkpoints of the package mamba_ssm."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM, MambaConfig

import hf_archs
from hf_archs.cache.call import NAME
from hf_archs.testing.ops import relative_distance
from hf_archs.testing.parity import check_parity, enliven
from hf_archs_mamba2 import ArchMamba2Config, ArchMamba2ForCausalLM
from hf_archs_mamba2.conversion import MAMBA2

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "state_size": 6,
    "head_dim": 8,
    "num_heads": 6,
    "chunk_size": 8,
}
CASES = {
    "one group": {"n_groups": 1},
    "groups, tied": {"n_groups": 3, "tie_word_embeddings": True},
    "biases": {"n_groups": 2, "use_bias": True, "use_conv_bias": False},
    "limited steps": {"n_groups": 2, "time_step_limit": (0.15, 0.6)},
    "no float32 residual": {"n_groups": 6, "residual_in_fp32": False, "layer_norm_epsilon": 1e-2},
    "sizes": {"n_groups": 1, "head_dim": 4, "num_heads": 18, "expand": 3, "conv_kernel": 3, "hidden_act": "swish"},
}


def make(case):
    model = Mamba2ForCausalLM(Mamba2Config(**{**SIZES, **CASES[case]})).eval()
    enliven(model)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_gradient_equal_transformers(case, dtype, tolerance):
    native = make(case).to(dtype)
    ours = hf_archs.from_native(native)
    assert type(ours) is ArchMamba2ForCausalLM
    check_parity(ours, native, MAMBA2.ours, torch.randint(0, 40, (2, 19)), tolerance)


def test_the_weights_of_these_tests_make_the_state_and_the_limits_matter():
    """The first token and the limits change the logits; otherwise parity would not test them."""
    native = make("groups, tied")
    ids = torch.randint(1, 40, (1, 19))
    other = ids.clone()
    other[:, 0] = 0  # beyond the reach of two layers' convolutions
    limited = make("limited steps")
    limitless = hf_archs.from_native(limited)
    for layer in limitless.model.layers:
        layer.mixer.ssm.dt_limit = (0.0, float("inf"))
    with torch.no_grad():
        assert relative_distance(native(ids).logits[:, -1], native(other).logits[:, -1]) > 1e-3
        assert relative_distance(limitless(ids).logits, limited(ids).logits) > 1e-3


# without time_step_limit, which transformers' one-token step ignores
@pytest.mark.parametrize("case", ["one group", "groups, tied", "biases"])
def test_cached_steps_equal_transformers(case):
    native = make(case)
    ours = hf_archs.from_native(native)
    ids = torch.randint(2, 40, (2, 12))  # generate would take 1 for a pad
    name = "cache" if NAME == "cache" else "cache_params"
    with torch.no_grad():
        theirs, mine = native(ids[:, :6], use_cache=True), ours(ids[:, :6], use_cache=True)
        for t in range(6, 12):
            theirs = native(ids[:, t : t + 1], use_cache=True, **{name: theirs[name]})
            mine = ours(ids[:, t : t + 1], cache=mine.cache)
            assert relative_distance(mine.logits, theirs.logits) < 1e-5
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    assert torch.equal(ours.generate(ids, **options), native.generate(ids, **options))


def test_config_of_every_field():
    native = Mamba2Config(
        **{**SIZES, "chunk_size": 256},
        n_groups=3,
        layer_norm_epsilon=1e-3,
        conv_kernel=5,
        use_bias=True,
        use_conv_bias=False,
        initializer_range=0.3,
        residual_in_fp32=False,
        time_step_min=0.01,
        time_step_max=0.2,
        time_step_floor=1e-3,
        time_step_limit=(0.1, 0.7),
        rescale_prenorm_residual=True,
        use_cache=False,
        tie_word_embeddings=True,
        pad_token_id=3,
        bos_token_id=4,
        eos_token_id=[5, 6],
    )
    ours = ArchMamba2Config(**MAMBA2.read_config(native.to_dict(), ArchMamba2Config))
    assert (ours.norm_eps, ours.num_heads, ours.n_groups, ours.pad_token_id) == (1e-3, 6, 3, 3)
    assert MAMBA2.write_config(ours).to_dict() == native.to_dict()


def test_the_inner_size(tmp_path):
    """``inner_size``, a width of the recurrence that transformers' Mamba2 does not have."""
    fields = {"hidden_size": 24, "inner_size": 40, "head_dim": 8, "num_hidden_layers": 2, "vocab_size": 40}
    model = ArchMamba2ForCausalLM(ArchMamba2Config(**fields, state_size=6)).eval()
    assert (model.config.channels, model.config.num_heads, model.config.conv_size) == (40, 5, 40 + 2 * 6)
    assert model.model.layers[0].mixer.out_proj.weight.shape == (24, 40)
    ids = torch.randint(2, 40, (2, 12))
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :7], use_cache=True)
        assert relative_distance(model(ids[:, 7:], cache=first.cache).logits, whole[:, 7:]) < 1e-5
    model.save_pretrained(tmp_path)
    again = ArchMamba2ForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, whole)
    with pytest.raises(ValueError, match=r"inner_size is 40, which a mamba2 model cannot represent; allowed: None"):
        hf_archs.to_native(model, "mamba2")
    saved = json.loads((tmp_path / "config.json").read_text())
    for name in ("inner_size", "num_heads"):  # files from before it was a field
        del saved[name]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert ArchMamba2Config.from_pretrained(tmp_path).channels == 48
    for wrong, message in [(0, "inner_size is 0; allowed are 1 to"), (41, "divisors of inner_size = 41")]:
        with pytest.raises(StrictDataclassError, match=message):
            ArchMamba2Config(**{**fields, "inner_size": wrong})


def test_a_limit_of_steps_beyond_float32():
    """Files write infinity, which JSON lacks, as 1e308."""
    native = make("one group")
    ids = torch.randint(0, 40, (2, 19))
    config = {**native.config.to_dict(), "time_step_limit": [0.0, 1e308]}
    ours = ArchMamba2ForCausalLM(ArchMamba2Config(**MAMBA2.read_config(config, ArchMamba2Config)))
    ours.load_state_dict({MAMBA2.ours(name): tensor for name, tensor in native.state_dict().items()})
    with torch.no_grad():
        assert relative_distance(ours(ids).logits, native(ids).logits) < 1e-5


def test_an_activation_that_ours_lacks_is_refused():
    with pytest.raises(ValueError, match=r"hidden_act is 'gelu'.*allowed: 'silu', 'swish'"):
        MAMBA2.read_config(Mamba2Config(hidden_act="gelu").to_dict(), ArchMamba2Config)


# -- the layout of the package mamba_ssm -------------------------------------------------------------------------------

STATE_SPACES_CONFIG = {
    "d_model": 24,
    "d_intermediate": 0,
    "n_layer": 2,
    "vocab_size": 37,  # padded to 40
    "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 8, "ngroups": 3},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}


def write_state_spaces(folder, weights="pytorch_model.bin", **changes):
    """A checkpoint as under state-spaces/: transformers' names except for the embedding, with the head's weight."""
    native = make("groups, tied")
    state = {name.replace("embeddings", "embedding"): value.clone() for name, value in native.state_dict().items()}
    assert {"backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"} < state.keys()
    if weights.endswith(".bin"):
        torch.save(state, folder / weights)
    else:
        save_file(state, folder / weights)
    (folder / "config.json").write_text(json.dumps({**STATE_SPACES_CONFIG, **changes}))
    return native


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_state_spaces_checkpoint(tmp_path, weights):
    native = write_state_spaces(tmp_path, weights)
    ours, info = ArchMamba2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.config.norm_eps == 1e-5
    ids = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        assert relative_distance(ours(ids).logits, native(ids).logits) < 1e-5
    ours.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again) is ArchMamba2ForCausalLM
    assert all(torch.equal(again.state_dict()[name], value) for name, value in ours.state_dict().items())


def test_state_spaces_options(tmp_path):
    options = {
        "layer": "Mamba2",
        "d_state": 7,
        "d_conv": 3,
        "expand": 3,
        "headdim": 12,
        "ngroups": 2,
        "dt_min": 0.01,
        "dt_max": 0.2,
        "dt_init_floor": 1e-3,
        "dt_limit": [0.1, 0.7],
        "conv_bias": False,
        "bias": True,
        "chunk_size": 64,
        "d_ssm": 72,
    }
    config = {**STATE_SPACES_CONFIG, "ssm_cfg": options, "tie_embeddings": False, "residual_in_fp32": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = ArchMamba2Config.from_pretrained(tmp_path)
    got = [ours.state_size, ours.conv_kernel, ours.expand, ours.head_dim, ours.n_groups, ours.num_heads]
    got += [ours.time_step_min, ours.time_step_max, ours.time_step_floor, ours.use_conv_bias, ours.use_bias]
    assert got == [7, 3, 3, 12, 2, 6, 0.01, 0.2, 1e-3, False, True]
    assert tuple(ours.time_step_limit) == (0.1, 0.7)
    assert (ours.hidden_size, ours.num_hidden_layers, ours.vocab_size) == (24, 2, 40)
    assert (ours.tie_word_embeddings, ours.residual_in_fp32) == (False, False)
    published = {**STATE_SPACES_CONFIG, "d_model": 768, "ssm_cfg": {"layer": "Mamba2"}, "vocab_size": 50277}
    (tmp_path / "config.json").write_text(json.dumps({**published, "pad_vocab_size_multiple": 16}))
    ours = ArchMamba2Config.from_pretrained(tmp_path)
    assert (ours.state_size, ours.num_heads, ours.n_groups, ours.vocab_size) == (128, 24, 1, 50288)
    assert tuple(ours.time_step_limit) == (0.0, float("inf"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm": False}, "rms_norm is False"),
        ({"d_intermediate": 96}, "d_intermediate is 96"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\]"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "ssm_cfg.norm_before_gate is True"),
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "ssm_cfg.rmsnorm is False"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "ssm_cfg.D_has_hdim is True"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 8}}, "ssm_cfg.d_ssm is 8"),
        ({"ssm_cfg": {"layer": "Mamba2", "expand": None, "d_ssm": 8}}, "ssm_cfg.d_ssm is 8"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_rank": 3}}, "ssm_cfg.dt_rank is 3"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "is a 'state-spaces Mamba3' checkpoint; ArchMamba2ForCausalLM reads"),
        ({"ssm_cfg": {}}, "is a 'state-spaces Mamba1' checkpoint; ArchMamba2ForCausalLM reads"),
    ],
)
def test_state_spaces_options_that_ours_lacks_are_refused(tmp_path, changes, message):
    write_state_spaces(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        ArchMamba2ForCausalLM.from_pretrained(tmp_path)


def test_another_architecture_is_refused(tmp_path):
    MambaConfig().save_pretrained(tmp_path)
    message = (
        "is a 'mamba' checkpoint; ArchMamba2ForCausalLM reads hf_archs_mamba2, mamba2, "
        "flash-linear-attention's mamba2 and the state-spaces layout$"
    )
    with pytest.raises(ValueError, match=message):
        ArchMamba2ForCausalLM.from_pretrained(tmp_path)
