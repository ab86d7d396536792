"""The Mamba architecture against transformers' Mamba and FalconMamba, and checkpoints of the package mamba_ssm."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    MambaConfig,
    MambaForCausalLM,
)

import hf_archs
from hf_archs.cache.call import NAME
from hf_archs.testing.ops import relative_distance
from hf_archs.testing.parity import check_parity, enliven
from hf_archs_mamba import ArchMambaConfig, ArchMambaForCausalLM
from hf_archs_mamba.conversion import FALCON_MAMBA, MAMBA

SIZES = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 6}
CASES = {
    "mamba": (MambaForCausalLM, MambaConfig, MAMBA, {}),
    "mamba biases": (MambaForCausalLM, MambaConfig, MAMBA, {"use_bias": True, "use_conv_bias": False}),
    "mamba untied": (
        MambaForCausalLM,
        MambaConfig,
        MAMBA,
        {"tie_word_embeddings": False, "residual_in_fp32": False, "layer_norm_epsilon": 1e-2},
    ),
    "mamba sizes": (
        MambaForCausalLM,
        MambaConfig,
        MAMBA,
        {"time_step_rank": 5, "expand": 3, "conv_kernel": 3, "hidden_act": "swish"},
    ),
    "mamba inner": (MambaForCausalLM, MambaConfig, MAMBA, {"intermediate_size": 40}),
    "falcon": (FalconMambaForCausalLM, FalconMambaConfig, FALCON_MAMBA, {}),
    "falcon untied": (
        FalconMambaForCausalLM,
        FalconMambaConfig,
        FALCON_MAMBA,
        {"tie_word_embeddings": False, "use_bias": True, "mixer_rms_eps": 1e-2, "residual_in_fp32": False},
    ),
    "falcon sizes": (
        FalconMambaForCausalLM,
        FalconMambaConfig,
        FALCON_MAMBA,
        {"time_step_rank": 5, "use_conv_bias": False, "conv_kernel": 3},
    ),
    # as in FalconMamba 7B, whose expand has no effect
    "falcon inner": (FalconMambaForCausalLM, FalconMambaConfig, FALCON_MAMBA, {"expand": 16, "intermediate_size": 40}),
}


def make(case):
    model_class, config_class, form, fields = CASES[case]
    model = model_class(config_class(**SIZES, **fields)).eval()
    enliven(model)
    return model, form


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_gradient_equal_transformers(case, dtype, tolerance):
    native, form = make(case)
    native = native.to(dtype)
    ours = hf_archs.from_native(native)
    assert type(ours) is ArchMambaForCausalLM
    check_parity(ours, native, form.ours, torch.randint(0, 40, (2, 19)), tolerance)
    back = hf_archs.to_native(ours, form.name)
    assert back.config.intermediate_size == native.config.intermediate_size
    assert all(torch.equal(tensor, native.state_dict()[name]) for name, tensor in back.state_dict().items())


@pytest.mark.parametrize("case", ["mamba", "falcon"])
def test_the_weights_of_these_tests_make_the_state_matter(case):
    """The first token changes the last logits; otherwise parity would not test the recurrence."""
    native, _ = make(case)
    ids = torch.randint(1, 40, (1, 19))
    other = ids.clone()
    other[:, 0] = 0  # beyond the reach of two layers' convolutions
    with torch.no_grad():
        assert relative_distance(native(ids).logits[:, -1], native(other).logits[:, -1]) > 1e-3


@pytest.mark.parametrize("case", ["mamba", "mamba biases", "falcon untied", "falcon inner"])
def test_cached_steps_equal_transformers(case):
    native, _ = make(case)
    ours = hf_archs.from_native(native)
    ids = torch.randint(1, 40, (2, 12))  # generate would take 0 for a pad
    name = "cache" if NAME == "cache" else "cache_params"
    with torch.no_grad():
        theirs, mine = native(ids[:, :6], use_cache=True), ours(ids[:, :6], use_cache=True)
        for t in range(6, 12):
            theirs = native(ids[:, t : t + 1], use_cache=True, **{name: theirs[name]})
            mine = ours(ids[:, t : t + 1], cache=mine.cache)
            assert relative_distance(mine.logits, theirs.logits) < 1e-5
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **options), native.generate(ids, **options))


def test_config_of_every_field():
    native = MambaConfig(
        **SIZES,
        layer_norm_epsilon=1e-3,
        expand=3,
        intermediate_size=40,
        conv_kernel=5,
        use_bias=True,
        use_conv_bias=False,
        initializer_range=0.3,
        residual_in_fp32=False,
        time_step_rank=7,
        time_step_scale=0.5,
        time_step_min=0.01,
        time_step_max=0.2,
        time_step_init_scheme="constant",
        time_step_floor=1e-3,
        rescale_prenorm_residual=True,
        use_cache=False,
        tie_word_embeddings=False,
        pad_token_id=3,
        bos_token_id=4,
        eos_token_id=[5, 6],
        id2label={0: "a", 1: "b", 2: "c"},
    )
    ours = ArchMambaConfig(**MAMBA.read_config(native.to_dict(), ArchMambaConfig))
    assert (ours.norm_eps, ours.dt_rank, ours.conv_kernel, ours.pad_token_id) == (1e-3, 7, 5, 3)
    assert (ours.expand, ours.inner_size, ours.channels) == (3, 40, 40)
    assert ours.num_labels == 3
    assert MAMBA.write_config(ours).to_dict() == native.to_dict()


@pytest.mark.parametrize(("config", "form"), [(MambaConfig, MAMBA), (FalconMambaConfig, FALCON_MAMBA)])
def test_an_activation_that_ours_lacks_is_refused(config, form):
    with pytest.raises(ValueError, match=r"hidden_act is 'gelu'.*allowed: 'silu', 'swish'"):
        form.read_config(config(hidden_act="gelu").to_dict(), ArchMambaConfig)


def test_the_format_follows_the_norm():
    tiny = hf_archs.get_architecture("mamba").tiny_config
    assert type(hf_archs.to_native(ArchMambaForCausalLM(tiny()))) is MambaForCausalLM
    falcon = ArchMambaForCausalLM(tiny(bcdt_norm="plain"))
    assert type(hf_archs.to_native(falcon)) is FalconMambaForCausalLM
    with pytest.raises(ValueError, match=r"bcdt_norm is 'plain'.*mamba model.*allowed: 'none'"):
        hf_archs.to_native(falcon, format="mamba")


def test_the_inner_size_of_configs_saved_before_it_was_a_field(tmp_path):
    config = ArchMambaConfig(hidden_size=24, expand=3)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.pop("inner_size") is None
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert ArchMambaConfig.from_pretrained(tmp_path).channels == config.channels == 72
    ArchMambaConfig(hidden_size=24, inner_size=40).save_pretrained(tmp_path)
    assert ArchMambaConfig.from_pretrained(tmp_path).channels == 40
    with pytest.raises(StrictDataclassError, match=r"inner_size is 0; allowed are 1 to 1048576"):
        ArchMambaConfig(hidden_size=24, inner_size=0)


# -- the layout of the package mamba_ssm -------------------------------------------------------------------------------

STATE_SPACES_CONFIG = {
    "d_model": 24,
    "n_layer": 2,
    "vocab_size": 37,  # padded to 40
    "ssm_cfg": {"d_state": 6},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}


def write_state_spaces(folder, weights="pytorch_model.bin", **changes):
    """A checkpoint as under state-spaces/: transformers' names except for the embedding, with the head's weight."""
    native, _ = make("mamba")
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
    ours, info = ArchMambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.config.norm_eps == 1e-5
    ids = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        assert relative_distance(ours(ids).logits, native(ids).logits) < 1e-5
    ours.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again) is ArchMambaForCausalLM
    assert all(torch.equal(again.state_dict()[name], value) for name, value in ours.state_dict().items())


def test_state_spaces_options(tmp_path):
    options = {
        "d_state": 7,
        "d_conv": 3,
        "expand": 3,
        "dt_rank": 5,
        "dt_min": 0.01,
        "dt_max": 0.2,
        "dt_init": "constant",
        "dt_scale": 0.5,
        "dt_init_floor": 1e-3,
        "conv_bias": False,
        "bias": True,
        "use_fast_path": False,
    }
    config = {**STATE_SPACES_CONFIG, "ssm_cfg": options, "tie_embeddings": False, "residual_in_fp32": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = ArchMambaConfig.from_pretrained(tmp_path)
    got = [ours.state_size, ours.conv_kernel, ours.expand, ours.dt_rank, ours.time_step_min, ours.time_step_max]
    got += [ours.time_step_init_scheme, ours.time_step_scale, ours.time_step_floor, ours.use_conv_bias, ours.use_bias]
    assert got == [7, 3, 3, 5, 0.01, 0.2, "constant", 0.5, 1e-3, False, True]
    assert (ours.hidden_size, ours.num_hidden_layers, ours.vocab_size) == (24, 2, 40)
    assert (ours.tie_word_embeddings, ours.residual_in_fp32) == (False, False)
    (tmp_path / "config.json").write_text(json.dumps({**STATE_SPACES_CONFIG, "ssm_cfg": {"dt_rank": "auto"}}))
    ours = ArchMambaConfig.from_pretrained(tmp_path)
    assert (ours.dt_rank, ours.state_size, ours.use_bias, ours.use_conv_bias) == (2, 16, False, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm": False}, "rms_norm is False"),
        ({"d_intermediate": 96}, "d_intermediate is 96"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\]"),
        ({"ssm_cfg": {"d_state": 6, "norm_before_gate": True}}, "ssm_cfg.norm_before_gate is True"),
        ({"ssm_cfg": [6]}, r"ssm_cfg is \[6\] in this state-spaces checkpoint"),
        ({"ssm_cfg": {"layer": None}}, r"ssm_cfg is \{'layer': None\} in this state-spaces checkpoint"),
        ({"d_inner": 48}, "d_inner is 48 in this state-spaces checkpoint"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0 in this state-spaces checkpoint"),
        ({"vocab_size": "40"}, "vocab_size is '40' in this state-spaces checkpoint"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "is a 'state-spaces Mamba3' checkpoint; ArchMambaForCausalLM reads"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "is a 'state-spaces Mamba2' checkpoint; ArchMambaForCausalLM reads"),
    ],
)
def test_state_spaces_options_that_ours_lacks_are_refused(tmp_path, changes, message):
    write_state_spaces(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        ArchMambaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("changes", [{"ssm_cfg": None}, {"ssm_cfg": ...}, {"attn_layer_idx": None, "attn_cfg": None}])
def test_state_spaces_defaults(tmp_path, changes):
    """mamba_ssm has a default for all but the two sizes; the default layer is Mamba."""
    config = {**STATE_SPACES_CONFIG, "ssm_cfg": {}, **changes}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    ours = ArchMambaConfig.from_pretrained(tmp_path)
    assert (ours.hidden_size, ours.num_hidden_layers, ours.state_size, ours.vocab_size) == (24, 2, 16, 40)
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 24, "n_layer": 2}))
    assert ArchMambaConfig.from_pretrained(tmp_path).vocab_size == 50280


def test_a_layer_beside_the_sizes_is_not_of_mamba_ssm():
    """HyenaDNA's first layout has ``d_model`` and ``n_layer`` too."""
    raw = {"d_model": 128, "n_layer": 2, "vocab_size": 12, "layer": {"_name_": "hyena", "l_max": 1026}}
    assert not any(form.detect(raw) for form in hf_archs.get_architecture("mamba").native_formats)


def test_another_architecture_is_refused(tmp_path):
    Mamba2Config().save_pretrained(tmp_path)
    message = (
        r"is a 'mamba2' checkpoint; ArchMambaForCausalLM reads hf_archs_mamba, mamba, falcon_mamba, "
        r"flash-linear-attention's mamba and the state-spaces layout$"
    )
    with pytest.raises(ValueError, match=message):
        ArchMambaForCausalLM.from_pretrained(tmp_path)
