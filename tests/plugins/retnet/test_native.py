"""RetNet against the published mathematics of its two dialects, written here once more, and their checkpoints."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from typer.testing import CliRunner

import hf_archs
from hf_archs.cli import app
from hf_archs.formats import NativeCheckpoint
from hf_archs.testing.ops import relative_distance
from hf_archs_retnet import ArchRetNetConfig, ArchRetNetForCausalLM, ArchRetNetModel
from hf_archs_retnet.conversion import FLA, TORCHSCALE

WIDTH, LAYERS, VOCAB = 24, 2, 40

# -- both packages' models in the parallel form: nothing of this library is in them -----------------------------------


def rms_norm(x, eps, weight=None):
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed if weight is None else normed * weight


def turned(x, angle, pairs):
    """Rotate x, (b, h, l, n), by angle, (l, n / 2): each pair of channels as a complex number."""
    first, second = pairs(x)
    cos, sin = angle.cos(), angle.sin()
    return first * cos - second * sin, first * sin + second * cos


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def decays(count, length):
    """D of equation 5, (h, i, j), in float64."""
    gamma = 1 - 2.0 ** (-5 - torch.arange(count, dtype=torch.float64))
    steps = (torch.arange(length)[:, None] - torch.arange(length)).double()
    return torch.where(steps >= 0, gamma[:, None, None] ** steps.clamp(min=0), 0)


def fla_logits(config, state, ids):
    """flash-linear-attention: halves of a head are pairs, 10000^(-2c/n), weights in the norm of each head, SwiGLU."""
    eps, count = config["norm_eps"], config["num_heads"]
    x = state["model.embeddings.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        at = {n.removeprefix(f"model.layers.{i}."): t for n, t in state.items() if n.startswith(f"model.layers.{i}.")}
        y = rms_norm(x, eps, at["attn_norm.weight"])
        q, k, v = (heads(F.linear(y, at[f"attn.{name}_proj.weight"]), count) for name in "qkv")
        n, length = q.shape[-1], ids.shape[1]
        exponents = torch.arange(0, n, 2, dtype=torch.float64) / n
        angle = (torch.arange(length)[:, None] * 10000**-exponents).to(x.dtype)
        q, k = (torch.cat(turned(t, angle, lambda t: t.chunk(2, -1)), -1) for t in (q, k))
        scores = q @ k.transpose(2, 3) * n**-0.5 * decays(count, length).to(x.dtype)
        norm = next((at[name] for name in ("attn.g_norm_swish_gate.weight", "attn.g_norm.weight") if name in at), None)
        out = rms_norm(scores @ v, eps, norm).transpose(1, 2).flatten(2)
        x = x + F.linear(out * F.silu(F.linear(y, at["attn.g_proj.weight"])), at["attn.o_proj.weight"])
        y = rms_norm(x, eps, at["mlp_norm.weight"])
        inner = F.silu(F.linear(y, at["mlp.gate_proj.weight"])) * F.linear(y, at["mlp.up_proj.weight"])
        x = x + F.linear(inner, at["mlp.down_proj.weight"])
    return F.linear(rms_norm(x, eps, state["model.norm.weight"]), state["lm_head.weight"])


def torchscale_logits(config, state, ids, normalised):
    """torchscale: neighbours are pairs, 10000^-linspace(0, 1), scores over row sums, no weight in each head's norm."""
    eps, count, act = config["layernorm_eps"], config["decoder_retention_heads"], getattr(F, config["activation_fn"])
    x = state["embed_tokens.weight"][ids]
    if not config["no_scale_embedding"]:
        x = x * math.sqrt(config["decoder_embed_dim"])
    for i in range(config["decoder_layers"]):
        at = {n.removeprefix(f"layers.{i}."): t for n, t in state.items() if n.startswith(f"layers.{i}.")}
        y = rms_norm(x, eps, at["retention_layer_norm.weight"])
        q, k, v = (heads(F.linear(y, at[f"retention.{name}_proj.weight"]), count) for name in "qkv")
        n, length = q.shape[-1], ids.shape[1]
        exponents = torch.linspace(0, 1, n // 2, dtype=torch.float64)
        angle = (torch.arange(length)[:, None] * 10000**-exponents).to(x.dtype)
        q, k = (torch.stack(turned(t, angle, lambda t: (t[..., ::2], t[..., 1::2])), -1).flatten(-2) for t in (q, k))
        mask = decays(count, length).to(x.dtype)
        if normalised:
            mask = mask / mask.sum(-1, keepdim=True).sqrt()
        scores = q @ (k * n**-0.5).transpose(2, 3) * mask
        if normalised:
            scores = scores / scores.detach().sum(-1, keepdim=True).abs().clamp(min=1)
        out = rms_norm(scores @ v, eps).transpose(1, 2).flatten(2)
        gate = F.silu(F.linear(y, at["retention.g_proj.weight"]))
        x = x + F.linear(gate * out, at["retention.out_proj.weight"])
        y = rms_norm(x, eps, at["final_layer_norm.weight"])
        inner = act(F.linear(y, at["ffn.fc1.weight"])) * F.linear(y, at["ffn.gate.weight"])
        x = x + F.linear(inner, at["ffn.fc2.weight"])
    return F.linear(rms_norm(x, eps, state["layer_norm.weight"]), state["output_projection.weight"])


# -- their checkpoints, with random weights under which everything matters ---------------------------------------------


def filled(shapes, dtype):
    torch.manual_seed(3)
    state = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            state[name] = 0.5 + torch.rand(shape)
        else:
            state[name] = torch.randn(shape) * (1.0 if "embed" in name else shape[1] ** -0.5)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def fla_checkpoint(dtype=torch.float32, fuse_norm=True, **changes):
    config = {
        "model_type": "retnet",
        "architectures": ["RetNetForCausalLM"],
        "attn_mode": "chunk",
        "hidden_size": WIDTH,
        "expand_k": 1,
        "expand_v": 2,
        "hidden_ratio": 2,
        "intermediate_size": 20,
        "num_hidden_layers": LAYERS,
        "num_heads": 3,
        "num_kv_heads": None,
        "feature_map": None,
        "hidden_act": "swish",
        "use_short_conv": False,
        "conv_size": 4,
        "use_output_gate": True,
        "max_position_embeddings": 2048,
        "elementwise_affine": True,
        "norm_eps": 1e-6,
        "attn": None,
        "use_cache": True,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "fuse_norm": fuse_norm,
        "fuse_swiglu": True,
        "fuse_cross_entropy": True,
        "use_l2warp": False,
        "vocab_size": VOCAB,
        **changes,
    }
    keys, values = round(WIDTH * config["expand_k"]), round(WIDTH * config["expand_v"])
    inner = config["intermediate_size"] or 256
    shapes = {
        "model.embeddings.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCAB, WIDTH),
    }
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        shapes |= {at + "attn_norm.weight": (WIDTH,), at + "mlp_norm.weight": (WIDTH,)}
        shapes |= {at + f"attn.{name}_proj.weight": (keys, WIDTH) for name in "qk"}
        shapes |= {at + f"attn.{name}_proj.weight": (values, WIDTH) for name in "vg"}
        shapes[at + "attn.o_proj.weight"] = (WIDTH, values)
        if config["elementwise_affine"]:
            shapes[at + f"attn.{'g_norm_swish_gate' if fuse_norm else 'g_norm'}.weight"] = (values // 3,)
        shapes |= {at + f"mlp.{name}_proj.weight": (inner, WIDTH) for name in ("gate", "up")}
        shapes[at + "mlp.down_proj.weight"] = (WIDTH, inner)
    state = filled(shapes, dtype)
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embeddings.weight"]
    return NativeCheckpoint(config, state)


def torchscale_checkpoint(dtype=torch.float32, **changes):
    config = {
        "decoder_embed_dim": WIDTH,
        "decoder_value_embed_dim": 48,
        "decoder_retention_heads": 3,
        "decoder_ffn_embed_dim": 20,
        "decoder_layers": LAYERS,
        "decoder_normalize_before": True,
        "activation_fn": "gelu",
        "dropout": 0.1,
        "no_scale_embedding": True,
        "layernorm_embedding": False,
        "moe_freq": 0,
        "deepnorm": False,
        "subln": True,
        "multiway": False,
        "share_decoder_input_output_embed": False,
        "no_output_layer": False,
        "layernorm_eps": 1e-6,
        "chunkwise_recurrent": True,
        "recurrent_chunk_size": 512,
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        **changes,
    }
    values, inner = config["decoder_value_embed_dim"], config["decoder_ffn_embed_dim"]
    shapes = {"embed_tokens.weight": (VOCAB, WIDTH), "output_projection.weight": (VOCAB, WIDTH)}
    shapes["layer_norm.weight"] = (WIDTH,)
    for i in range(LAYERS):
        at = f"layers.{i}."
        shapes |= {at + f"retention.{name}_proj.weight": (WIDTH, WIDTH) for name in "qk"}
        shapes |= {at + f"retention.{name}_proj.weight": (values, WIDTH) for name in "vg"}
        shapes[at + "retention.out_proj.weight"] = (WIDTH, values)
        shapes |= {at + f"{name}_layer_norm.weight": (WIDTH,) for name in ("retention", "final")}
        shapes |= {at + f"ffn.{name}.weight": (inner, WIDTH) for name in ("fc1", "gate")}
        shapes[at + "ffn.fc2.weight"] = (WIDTH, inner)
    state = filled(shapes, dtype)
    if config["share_decoder_input_output_embed"]:
        state["output_projection.weight"] = state["embed_tokens.weight"]
    pairs = WIDTH // 3 // 2
    angle = 1.0 / (10000 ** torch.linspace(0, 1, pairs))
    state["retnet_rel_pos.angle"] = angle.unsqueeze(-1).repeat(1, 2).flatten()
    state["retnet_rel_pos.decay"] = torch.log(1 - 2 ** (-5 - torch.arange(3, dtype=torch.float)))
    return NativeCheckpoint(config, state)


FLA_CASES = {
    "plain": {},
    "other sizes": {"expand_k": 0.5, "expand_v": 1.5, "intermediate_size": None},
    "no weight in the norm": {"elementwise_affine": False, "norm_eps": 1e-3},
    "not fused": {"fuse_norm": False},
    "tied": {"tie_word_embeddings": True},
}
TORCHSCALE_CASES = {
    "plain": {},
    "scaled": {"no_scale_embedding": False, "activation_fn": "relu", "decoder_value_embed_dim": 36},
    "tied": {"share_decoder_input_output_embed": True, "activation_fn": "silu"},
}


def compare(ours, logits_of, checkpoint, form, tolerance):
    """Logits, and every parameter's gradient by name, of a fixed random functional of the logits."""
    ids = torch.randint(0, VOCAB, (2, 19))
    leaves = {n: t.clone().requires_grad_() for n, t in checkpoint.state_dict.items() if "rel_pos" not in n}
    tied = leaves.keys() & {"lm_head.weight", "output_projection.weight"} if ours.config.tie_word_embeddings else set()
    for name in tied:
        leaves[name] = leaves[next(n for n in leaves if "embed" in n)]
    expected, found = logits_of(checkpoint.config, leaves, ids), ours(ids).logits
    assert relative_distance(found, expected) <= tolerance
    weight = torch.randn(expected.shape).to(expected)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert {form.ours(name) for name in leaves.keys() - tied} == gradients.keys()
    for name in leaves.keys() - tied:
        assert relative_distance(gradients[form.ours(name)], leaves[name].grad) <= 3 * tolerance, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("case", FLA_CASES)
def test_the_mathematics_of_flash_linear_attention(case, dtype, tolerance):
    checkpoint = fla_checkpoint(dtype, **FLA_CASES[case])
    compare(hf_archs.from_native(checkpoint), fla_logits, checkpoint, FLA, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("case", TORCHSCALE_CASES)
@pytest.mark.parametrize("normalised", [False, True])
def test_the_mathematics_of_torchscale(case, normalised, dtype, tolerance):
    """Its factors of the rows are taken out again by the norm, but for the norm's eps."""
    changes = dict(TORCHSCALE_CASES[case])
    activation = changes.get("activation_fn", "gelu")
    changes["activation_fn"] = {"silu": "swish"}.get(activation, activation)
    checkpoint = torchscale_checkpoint(dtype, **changes, **({"layernorm_eps": 1e-14} if normalised else {}))
    ours = hf_archs.from_native(checkpoint)
    checkpoint.config["activation_fn"] = activation

    def logits_of(*arguments):
        return torchscale_logits(*arguments, normalised)

    compare(ours, logits_of, checkpoint, TORCHSCALE, tolerance)


def test_the_dialects_are_not_the_same():
    """A rotation that does not matter would make the tests above say nothing about it; the same for documents' age."""
    ids = torch.randint(0, VOCAB, (1, 30))
    ours = hf_archs.from_native(fla_checkpoint())
    with torch.no_grad():
        plain = ours(ids).logits[:, -1]
        for layer in ours.model.layers:
            layer.mixer.config.rotary = "interleaved"
        assert relative_distance(ours(ids).logits[:, -1], plain) > 1e-2


def test_cached_steps_at_a_distant_position():
    """A cache continues the rotation where it stands: far away too, in float32, step by step as in the whole."""
    ours = hf_archs.from_native(fla_checkpoint())
    ids = torch.randint(0, VOCAB, (1, 3012))
    with torch.no_grad():
        whole = ours(ids).logits[:, 3000:]
        cache = ours(ids[:, :3000], use_cache=True).past_key_values
        steps = [ours(ids[:, t : t + 1], past_key_values=cache).logits for t in range(3000, 3012)]
    assert relative_distance(torch.cat(steps, 1), whole) < 1e-5


# -- conversion --------------------------------------------------------------------------------------------------------


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    different = [n for n in found if found[n].dtype != expected[n].dtype or not torch.equal(found[n], expected[n])]
    assert not different


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "changes", "form"),
    [
        (fla_checkpoint, {}, "retnet"),
        (fla_checkpoint, {"tie_word_embeddings": True, "elementwise_affine": False}, "retnet"),
        (torchscale_checkpoint, {}, "torchscale"),
        (torchscale_checkpoint, {"share_decoder_input_output_embed": True, "no_scale_embedding": False}, "torchscale"),
    ],
)
def test_there_and_back(make, changes, form, dtype):
    checkpoint = make(dtype, **changes)
    ours = hf_archs.from_native(checkpoint)
    assert type(ours) is ArchRetNetForCausalLM
    assert ours.dtype == dtype
    pointers = {t.data_ptr() for t in checkpoint.state_dict.values()}
    assert not any(p.data_ptr() in pointers for p in ours.parameters())
    back = hf_archs.to_native(ours)
    assert_same(back.state_dict, checkpoint.state_dict)
    for name, value in back.config.items():
        if name in checkpoint.config:
            assert checkpoint.config[name] == value, name
    with pytest.raises(ValueError, match=r"which a .* model cannot represent"):
        hf_archs.to_native(ours, "torchscale" if form == "retnet" else "retnet")


@pytest.mark.parametrize("make", [fla_checkpoint, torchscale_checkpoint])
@pytest.mark.parametrize("tied", [False, True])
def test_from_a_folder(make, tied, tmp_path):
    name = "tie_word_embeddings" if make is fla_checkpoint else "share_decoder_input_output_embed"
    checkpoint = make(**{name: tied})
    checkpoint.save_pretrained(tmp_path)
    expected = hf_archs.from_native(checkpoint)
    found, info = ArchRetNetForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(found.state_dict(), expected.state_dict())
    assert_same(ArchRetNetModel.from_pretrained(tmp_path).state_dict(), expected.model.state_dict())
    found.save_pretrained(tmp_path / "ours")
    assert_same(ArchRetNetForCausalLM.from_pretrained(tmp_path / "ours").state_dict(), expected.state_dict())


def test_a_fairseq_checkpoint_and_an_unfused_norm(tmp_path):
    """Other names of the same parameters, from memory and from a folder."""
    plain = torchscale_checkpoint()
    whole = NativeCheckpoint(plain.config, {f"decoder.{n}": t for n, t in plain.state_dict.items()})
    expected = hf_archs.from_native(plain).state_dict()
    assert_same(hf_archs.from_native(whole).state_dict(), expected)
    whole.save_pretrained(tmp_path / "whole")
    assert_same(ArchRetNetForCausalLM.from_pretrained(tmp_path / "whole").state_dict(), expected)
    unfused = fla_checkpoint(fuse_norm=False)
    unfused.save_pretrained(tmp_path / "unfused")
    expected = hf_archs.from_native(unfused).state_dict()
    assert_same(ArchRetNetForCausalLM.from_pretrained(tmp_path / "unfused").state_dict(), expected)


def test_a_model_of_the_package_itself():
    """Any model with such a config will do: the package need not be there."""

    class Config(dict):
        def to_dict(self):
            return dict(self)

    class Theirs(torch.nn.Module):
        def __init__(self, checkpoint):
            super().__init__()
            self.config, self.found = Config(checkpoint.config), checkpoint.state_dict

        def state_dict(self):
            return self.found

    checkpoint = fla_checkpoint()
    ours = hf_archs.from_native(Theirs(checkpoint).train())
    assert ours.training
    assert_same(ours.state_dict(), hf_archs.from_native(checkpoint).state_dict())


def test_the_command_line_converts_both_ways(tmp_path):
    checkpoint = fla_checkpoint()
    checkpoint.save_pretrained(tmp_path / "fla")
    run = CliRunner().invoke(app, ["convert", str(tmp_path / "fla"), "-o", str(tmp_path / "ours")])
    assert run.exit_code == 0, run.output
    back = ["convert", str(tmp_path / "ours"), "-o", str(tmp_path / "back"), "--to", "retnet"]
    run = CliRunner().invoke(app, back)
    assert run.exit_code == 0, run.output
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), checkpoint.state_dict)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {n: v for n, v in written.items() if n in checkpoint.config} == {
        n: v for n, v in checkpoint.config.items() if n in written
    }


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (fla_checkpoint, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (fla_checkpoint, {"num_kv_heads": 1}, "num_kv_heads is 1"),
        (fla_checkpoint, {"feature_map": "relu"}, "feature_map is 'relu'"),
        (fla_checkpoint, {"use_output_gate": False}, "use_output_gate is False"),
        (fla_checkpoint, {"use_short_conv": True}, "use_short_conv is True"),
        (fla_checkpoint, {"attn": {"layers": [1], "num_heads": 4}}, "attn is {'layers'"),
        (torchscale_checkpoint, {"moe_freq": 2}, "moe_freq is 2"),
        (torchscale_checkpoint, {"deepnorm": True}, "deepnorm is True"),
        (torchscale_checkpoint, {"decoder_normalize_before": False}, "decoder_normalize_before is False"),
        (torchscale_checkpoint, {"layernorm_embedding": True}, "layernorm_embedding is True"),
        (torchscale_checkpoint, {"multiway": True}, "multiway is True"),
    ],
)
def test_what_ours_lacks_is_refused(make, changes, message, tmp_path):
    checkpoint = make()
    checkpoint.config.update(changes)
    message += r".*ArchRetNetConfig cannot represent; allowed: "
    with pytest.raises(ValueError, match=message):
        hf_archs.from_native(checkpoint)
    checkpoint.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        ArchRetNetForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate_fn": "gelu"}, "gate_fn is 'gelu', which a retnet model cannot represent; allowed: 'swish'"),
        ({"norm_type": "layer_norm"}, "norm_type is 'layer_norm'"),
        ({"gated": False}, "gated is False"),
        ({"rotary": "interleaved"}, "rotary is 'interleaved'.*elementwise_affine is True, which a torchscale"),
        ({"rotary": "interleaved", "elementwise_affine": False, "expand_k": 2.0}, "expand_k is 2.0.*torchscale"),
        (
            {"rotary": "interleaved", "elementwise_affine": False, "embedding_multiplier": 3.0},
            "embedding_multiplier is 3.0.*torchscale",
        ),
    ],
)
def test_what_theirs_lack_is_refused(fields, message):
    config = ArchRetNetConfig(hidden_size=24, num_hidden_layers=1, num_heads=3, vocab_size=40, **fields)
    with pytest.raises(ValueError, match=message):
        hf_archs.to_native(ArchRetNetForCausalLM(config))


def test_parameters_that_do_not_fit():
    checkpoint = fla_checkpoint()
    del checkpoint.state_dict["model.layers.1.attn.q_proj.weight"]
    with pytest.raises(ValueError, match=r"does not fit its config.*layers\.1\.mixer\.q_proj"):
        hf_archs.from_native(checkpoint)
    with pytest.raises(ValueError, match="a checkpoint of 'gpt2' cannot be converted"):
        hf_archs.from_native(NativeCheckpoint({"model_type": "gpt2"}, {}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 5}, r"expand_k is 1.0; allowed .* = 64 must be a multiple of 10 \(num_heads is 5\)"),
        ({"expand_v": 1.1}, "expand_v is 1.1; allowed"),
        ({"num_heads": 64}, "expand_k is 1.0; allowed"),  # one channel a head is no pair
        ({"hidden_act": "tanh"}, "hidden_act"),
    ],
)
def test_a_wrong_config(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        hf_archs.get_architecture("retnet").tiny_config(**fields)


def test_the_width_of_the_feed_forward():
    config = ArchRetNetConfig(hidden_size=2048)
    assert config.intermediate_size == 2816  # two thirds of 4096, up to a multiple of 256
    assert ArchRetNetConfig(hidden_size=2048, hidden_ratio=4.0).intermediate_size == 5632
