"""RetNet against a second implementation of three packages' mathematics, and their checkpoints."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from typer.testing import CliRunner

import hf_archs
from hf_archs.commands.cli import app
from hf_archs.errors import CheckpointMismatch
from hf_archs.native.formats import NativeCheckpoint
from hf_archs.testing.ops import relative_distance
from hf_archs_retnet import ArchRetNetConfig, ArchRetNetForCausalLM, ArchRetNetModel
from hf_archs_retnet.conversion import FLA, SYNCDOTH, TORCHSCALE, TORCHSCALE_2023
from hf_archs_retnet.mixer import decay_norm

WIDTH, LAYERS, VOCAB = 24, 2, 40
CONFIGS = Path(__file__).parents[2] / "data/configs"

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


def torchscale_scores(q, k, mask, form):
    """The scores (b, h, i, j) of its forms of retention, each as its commit 4d1e0e8 has them, and of the plain one."""
    if form == "plain":
        return q @ k.transpose(2, 3) * mask
    if form == "parallel":  # RetNetRelPos.forward and parallel_forward
        scores = q @ k.transpose(2, 3) * (mask / mask.sum(-1, keepdim=True).sqrt())
        return scores / scores.detach().abs().sum(-1, keepdim=True).clamp(min=1, max=5e4)
    rows, weights, scale = [], q.new_zeros(q.shape[1], 0), 0  # recurrent_forward: factors of each k v
    for t in range(q.shape[2]):
        decay = mask[:, 1, 0] if q.shape[2] > 1 else mask[:, 0, 0]
        before, scale = scale, scale * decay + 1
        if t:
            weights = weights * (before.sqrt() * decay / scale.sqrt())[:, None]
        weights = torch.cat([weights, scale.rsqrt()[:, None]], 1)
        scores = q[:, :, t : t + 1] @ k[:, :, : t + 1].transpose(2, 3) * weights[:, None]
        rows.append(F.pad(scores, (0, q.shape[2] - t - 1)))
    return torch.cat(rows, 2)


def torchscale_logits(config, state, ids, form):
    """torchscale: neighbours are pairs, 10000^-linspace(0, 1), scores over row sums, no weight in each head's norm.

    Until September 2023 (commits bf65397 to d1fefe9) linear layers had biases, every norm was a LayerNorm, and the
    feed-forward had no gate and one norm more.
    """
    eps, count, act = config["layernorm_eps"], config["decoder_retention_heads"], config["activation_fn"]
    act = {"swish": F.silu, "gelu": F.gelu, "relu": F.relu}[act]
    # syncdoth's package has the same under names of its own
    state = {n.removeprefix("model."): t for n, t in state.items()}
    head = state["lm_head.weight" if "lm_head.weight" in state else "output_projection.weight"]

    def norm(x, name, at):
        if f"{name}.bias" in at:
            return F.layer_norm(x, x.shape[-1:], at[f"{name}.weight"], at[f"{name}.bias"], eps)
        return rms_norm(x, eps, at[f"{name}.weight"])

    def linear(x, name, at):
        return F.linear(x, at[f"{name}.weight"], at.get(f"{name}.bias"))

    x = state["embed_tokens.weight"][ids]
    if not config["no_scale_embedding"]:
        x = x * math.sqrt(config["decoder_embed_dim"])
    if config["layernorm_embedding"]:
        x = norm(x, "layernorm_embedding", state)
    for i in range(config["decoder_layers"]):
        at = {n.removeprefix(f"layers.{i}."): t for n, t in state.items() if n.startswith(f"layers.{i}.")}
        y = norm(x, "retention_layer_norm", at)
        q, k, v = (heads(linear(y, f"retention.{name}_proj", at), count) for name in "qkv")
        n, length = q.shape[-1], ids.shape[1]
        exponents = torch.linspace(0, 1, n // 2, dtype=torch.float64)
        angle = (torch.arange(length)[:, None] * 10000**-exponents).to(x.dtype)
        q, k = (torch.stack(turned(t, angle, lambda t: (t[..., ::2], t[..., 1::2])), -1).flatten(-2) for t in (q, k))
        out = torchscale_scores(q, k * n**-0.5, decays(count, length).to(x.dtype), form) @ v
        if "retention.q_proj.bias" in at:
            out = F.layer_norm(out, out.shape[-1:], eps=config.get("head_norm_eps", eps))
        else:
            out = rms_norm(out, eps)
        gate = F.silu(linear(y, "retention.g_proj", at))
        x = x + linear(gate * out.transpose(1, 2).flatten(2), "retention.out_proj", at)
        y = norm(x, "final_layer_norm", at)
        inner = act(linear(y, "ffn.fc1", at))
        if "ffn.gate.weight" in at:
            inner = inner * linear(y, "ffn.gate", at)
        if "ffn.ffn_layernorm.weight" in at:
            inner = norm(inner, "ffn.ffn_layernorm", at)
        x = x + linear(inner, "ffn.fc2", at)
    return F.linear(norm(x, "layer_norm", state), head)


# -- their checkpoints, with random weights that all matter ------------------------------------------------------------


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
    width = config["hidden_size"]
    keys, values = round(width * config["expand_k"]), round(width * config["expand_v"])
    inner = config["intermediate_size"] or 256
    shapes = {
        "model.embeddings.weight": (VOCAB, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (VOCAB, width),
    }
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        shapes |= {at + "attn_norm.weight": (width,), at + "mlp_norm.weight": (width,)}
        shapes |= {at + f"attn.{name}_proj.weight": (keys, width) for name in "qk"}
        shapes |= {at + f"attn.{name}_proj.weight": (values, width) for name in "vg"}
        shapes[at + "attn.o_proj.weight"] = (width, values)
        if config["elementwise_affine"]:
            shapes[at + f"attn.{'g_norm_swish_gate' if fuse_norm else 'g_norm'}.weight"] = (
                values // config["num_heads"],
            )
        shapes |= {at + f"mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[at + "mlp.down_proj.weight"] = (width, inner)
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
    width, count = config["decoder_embed_dim"], config["decoder_retention_heads"]
    values, inner = config["decoder_value_embed_dim"], config["decoder_ffn_embed_dim"]
    shapes = {"embed_tokens.weight": (VOCAB, width), "output_projection.weight": (VOCAB, width)}
    shapes["layer_norm.weight"] = (width,)
    if config["layernorm_embedding"]:
        shapes["layernorm_embedding.weight"] = (width,)
    for i in range(LAYERS):
        at = f"layers.{i}."
        shapes |= {at + f"retention.{name}_proj.weight": (width, width) for name in "qk"}
        shapes |= {at + f"retention.{name}_proj.weight": (values, width) for name in "vg"}
        shapes[at + "retention.out_proj.weight"] = (width, values)
        shapes |= {at + f"{name}_layer_norm.weight": (width,) for name in ("retention", "final")}
        shapes |= {at + f"ffn.{name}.weight": (inner, width) for name in ("fc1", "gate")}
        shapes[at + "ffn.fc2.weight"] = (width, inner)
    state = filled(shapes, dtype)
    if config["share_decoder_input_output_embed"]:
        state["output_projection.weight"] = state["embed_tokens.weight"]
    pairs = width // count // 2
    angle = 1.0 / (10000 ** torch.linspace(0, 1, pairs))
    state["retnet_rel_pos.angle"] = angle.unsqueeze(-1).repeat(1, 2).flatten()
    state["retnet_rel_pos.decay"] = torch.log(1 - 2 ** (-5 - torch.arange(count, dtype=torch.float)))
    return NativeCheckpoint(config, state)


# syncdoth's RetNetConfig (commit 2634bbf) as its configs/retnet-base has it, but for the widths
SYNCDOTH_CONFIG = {
    "activation_dropout": 0.0,
    "activation_fn": "swish",
    "decoder_embed_dim": WIDTH,
    "decoder_ffn_embed_dim": 20,
    "decoder_layers": LAYERS,
    "decoder_normalize_before": True,
    "decoder_retention_heads": 3,
    "decoder_value_embed_dim": 48,
    "deepnorm": False,
    "drop_path_rate": 0.0,
    "dropout": 0.0,
    "eos_token_id": 0,
    "forward_impl": "parallel",
    "initializer_range": 0.02,
    "is_decoder": True,
    "layernorm_embedding": True,
    "layernorm_eps": 1e-06,
    "model_type": "retnet",
    "no_scale_embedding": False,
    "output_retentions": False,
    "pad_token_id": 0,
    "recurrent_chunk_size": 512,
    "subln": True,
    "tie_word_embeddings": False,
    "transformers_version": "4.29.1",
    "use_cache": True,
    "use_ffn_rms_norm": False,
    "use_glu": True,
    "use_lm_decay": False,
    "vocab_size": VOCAB,
    "z_loss_coeff": 0.0,
}


def syncdoth_checkpoint(dtype=torch.float32, **changes):
    config = {**SYNCDOTH_CONFIG, **changes}
    shared = {name: value for name, value in config.items() if name.startswith(("decoder_", "layernorm_embedding"))}
    state = torchscale_checkpoint(dtype, **shared).state_dict
    state["lm_head.weight"] = state.pop("output_projection.weight")
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    return NativeCheckpoint(config, {n if n == "lm_head.weight" else f"model.{n}": t for n, t in state.items()})


def torchscale_2023_checkpoint(dtype=torch.float32, **changes):
    """torchscale until September 2023, with the head norm's eps of August."""
    checkpoint = torchscale_checkpoint(dtype, **{"layernorm_eps": 1e-5, "head_norm_eps": 1e-6, **changes})
    config, state = checkpoint.config, checkpoint.state_dict
    del config["decoder_value_embed_dim"]
    shapes = {"layer_norm.bias": (WIDTH,)}
    if config["layernorm_embedding"]:
        shapes["layernorm_embedding.bias"] = (WIDTH,)
    for name, tensor in list(state.items()):
        if ".ffn.gate." in name:
            del state[name]
        elif name.startswith("layers."):
            shapes[name.replace("weight", "bias")] = tensor.shape[:1]
        if ".fc1." in name and config["subln"]:
            norm = name.replace("fc1", "ffn_layernorm")
            shapes |= {norm: tensor.shape[:1], norm.replace("weight", "bias"): tensor.shape[:1]}
    found = filled(shapes, dtype)
    state.update({name: tensor - 1 if "bias" in name else tensor for name, tensor in found.items()})
    return NativeCheckpoint(config, state)


def initial(checkpoint):
    """A checkpoint of torchscale with the weights that its modules begin with, in float64."""
    torch.manual_seed(5)
    for name, tensor in checkpoint.state_dict.items():
        if "rel_pos" in name:
            continue
        if tensor.dim() == 1:
            tensor = torch.ones_like(tensor)
        elif "embed_tokens" in name or "output_projection" in name:
            tensor = torch.randn_like(tensor) * WIDTH**-0.5
        elif "retention" in name:
            torch.nn.init.xavier_uniform_(tensor, gain=2**-1 if "out_proj" in name else 2**-2.5)
        else:
            torch.nn.init.kaiming_uniform_(tensor, a=5**0.5)
        checkpoint.state_dict[name] = tensor.double()
    return checkpoint


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
    "tied": {"share_decoder_input_output_embed": True, "activation_fn": "swish"},
    "a norm of the embeddings": {"layernorm_embedding": True, "no_scale_embedding": False},
    "a large eps": {"layernorm_eps": 3e-2},
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
def test_the_mathematics_of_torchscale(case, dtype, tolerance):
    checkpoint = torchscale_checkpoint(dtype, **TORCHSCALE_CASES[case])
    logits_of = functools.partial(torchscale_logits, form="recurrent")
    compare(hf_archs.from_native(checkpoint), logits_of, checkpoint, TORCHSCALE, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(
    "changes", [{}, {"layernorm_embedding": False, "activation_fn": "gelu", "layernorm_eps": 3e-2}]
)
def test_the_mathematics_of_syncdoths_package(changes, dtype, tolerance):
    checkpoint = syncdoth_checkpoint(dtype, **changes)
    logits_of = functools.partial(torchscale_logits, form="recurrent")
    compare(hf_archs.from_native(checkpoint), logits_of, checkpoint, SYNCDOTH, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"subln": False, "no_scale_embedding": False, "layernorm_embedding": True, "activation_fn": "relu"},
        {"layernorm_eps": 1e-2, "head_norm_eps": 3e-2, "share_decoder_input_output_embed": True},
    ],
)
def test_the_mathematics_of_torchscale_before_september_2023(changes, dtype, tolerance):
    checkpoint = torchscale_2023_checkpoint(dtype, **changes)
    logits_of = functools.partial(torchscale_logits, form="recurrent")
    compare(hf_archs.from_native(checkpoint), logits_of, checkpoint, TORCHSCALE_2023, tolerance)


def test_the_parallel_form_of_torchscale():
    """torchscale's second factor, of the rows' absolute sums, is 1 at initial weights; at others the norm cancels it,
    except for its eps.
    """
    ids = torch.randint(0, VOCAB, (2, 60))
    begun, trained = initial(torchscale_checkpoint()), torchscale_checkpoint(torch.float64)
    for checkpoint, tolerance in ((begun, 1e-10), (trained, 3e-5)):
        weights = checkpoint.config, checkpoint.state_dict, ids
        expected, plain = (torchscale_logits(*weights, form) for form in ("parallel", "plain"))
        with torch.no_grad():
            assert relative_distance(hf_archs.from_native(checkpoint)(ids).logits, expected) < tolerance
        assert checkpoint is trained or relative_distance(plain, expected) > 0.05  # without the first factor


def test_the_factor_of_far_heads():
    """A late head's decay rounds to 1 in float32, so that t decays sum to t."""
    found = decay_norm(torch.tensor([[0, 2, 999_999]]), 300, torch.float32).double()
    far = torch.tensor([1.0, 3.0, 1e6], dtype=torch.float64).rsqrt()
    torch.testing.assert_close(found[0, :, 200:], far[:, None].expand(-1, 100), rtol=1e-6, atol=0)
    for head in (0, 9, 20):
        gone = 2.0 ** (-5 - head)
        sums = torch.tensor([-math.expm1(t * math.log1p(-gone)) / gone for t in (1, 3, 1e6)], dtype=torch.float64)
        torch.testing.assert_close(found[0, :, head], sums.rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 30), (7, 20, 7), (33, 1)])
def test_the_tokens_before_are_counted_in_a_cache(sizes):
    """The weight of eps depends on a token's position in its document, in chunks as in one pass."""
    checkpoint = torchscale_checkpoint(torch.float64, layernorm_eps=3e-2)
    ours, ids = hf_archs.from_native(checkpoint), torch.randint(0, VOCAB, (2, sum(sizes)))
    expected = torchscale_logits(checkpoint.config, checkpoint.state_dict, ids, "recurrent")
    cache, parts = None, []
    with torch.no_grad():
        for part in ids.split(sizes, 1):
            output = ours(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert relative_distance(torch.cat(parts, 1), expected) < 1e-10


def test_documents_and_pads_are_not_counted():
    checkpoint = torchscale_checkpoint(torch.float64, layernorm_eps=3e-2)
    ours, ids = hf_archs.from_native(checkpoint), torch.randint(0, VOCAB, (1, 25))
    alone = torchscale_logits(checkpoint.config, checkpoint.state_dict, ids, "recurrent")
    packed = torch.cat([torch.randint(0, VOCAB, (1, 9)), ids, torch.randint(0, VOCAB, (1, 4))], 1)
    seq_idx = torch.tensor([[0] * 9 + [1] * 25 + [2] * 4])
    mask = (seq_idx == 1).long()
    mask[:, 12:15] = 0  # some in the middle too
    with torch.no_grad():
        assert relative_distance(ours(packed, seq_idx=seq_idx).logits[:, 9:34], alone) < 1e-10
        for row in (mask, mask.flip(1)):
            padded = torch.zeros_like(packed).masked_scatter(row.bool(), ids[:, :22])
            output = ours(padded, attention_mask=row, use_cache=True)
            assert relative_distance(output.logits[row.bool()], alone[0, :22]) < 1e-10
            rest = ours(ids[:, 22:], past_key_values=output.past_key_values).logits
            assert relative_distance(rest, alone[:, 22:]) < 1e-10


def test_the_dialects_are_not_the_same():
    """The rotation changes the logits, so that the tests above test it."""
    ids = torch.randint(0, VOCAB, (1, 30))
    ours = hf_archs.from_native(fla_checkpoint())
    with torch.no_grad():
        plain = ours(ids).logits[:, -1]
        for layer in ours.model.layers:
            layer.mixer.config.rotary = "interleaved"
        assert relative_distance(ours(ids).logits[:, -1], plain) > 1e-2


def test_cached_steps_at_a_distant_position():
    """A cache continues the rotation at its position, also a far one in float32, step by step as in one pass."""
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
        (torchscale_checkpoint, {"layernorm_embedding": True}, "torchscale"),
        (torchscale_2023_checkpoint, {}, "torchscale-2023"),
        (torchscale_2023_checkpoint, {"subln": False, "layernorm_embedding": True}, "torchscale-2023"),
        (syncdoth_checkpoint, {}, "syncdoth"),
        (syncdoth_checkpoint, {"tie_word_embeddings": True}, "syncdoth"),
    ],
)
def test_there_and_back(make, changes, form, dtype):
    checkpoint = make(dtype, **changes)
    ours = hf_archs.from_native(checkpoint)
    assert type(ours) is ArchRetNetForCausalLM
    assert ours.dtype == dtype
    pointers = {t.data_ptr() for t in checkpoint.state_dict.values()}
    assert not any(p.data_ptr() in pointers for p in ours.parameters())
    back = hf_archs.to_native(ours, form)
    assert_same(back.state_dict, checkpoint.state_dict)
    for name, value in back.config.items():
        if name in checkpoint.config:
            assert checkpoint.config[name] == value, name
    with pytest.raises(ValueError, match=r"which a .* model cannot represent"):
        hf_archs.to_native(ours, "torchscale" if form == "retnet" else "retnet")
    if form != "syncdoth":  # its options are torchscale's
        assert_same(hf_archs.to_native(ours).state_dict, checkpoint.state_dict)


@pytest.mark.parametrize(
    "make", [fla_checkpoint, torchscale_checkpoint, torchscale_2023_checkpoint, syncdoth_checkpoint]
)
def test_a_base_model_has_no_prefix(make):
    """Buffers have no prefix either."""
    checkpoint = make()
    ours = hf_archs.from_native(checkpoint)
    form = next(form for form in hf_archs.get_architecture("retnet").native_formats if form.detect(checkpoint.config))
    state = {
        name.removeprefix("model."): tensor
        for name, tensor in checkpoint.state_dict.items()
        if name not in ("lm_head.weight", "output_projection.weight")
    }
    found = hf_archs.to_native(ours.model, form.name)
    assert_same(found.state_dict, state)
    assert_same(hf_archs.from_native(found).state_dict(), ours.model.state_dict())


FROM_FOLDERS = [
    fla_checkpoint,
    torchscale_checkpoint,
    functools.partial(torchscale_checkpoint, layernorm_embedding=True),
    syncdoth_checkpoint,
    torchscale_2023_checkpoint,
    functools.partial(torchscale_2023_checkpoint, layernorm_embedding=True),
]


@pytest.mark.parametrize("make", FROM_FOLDERS)
@pytest.mark.parametrize("tied", [False, True])
def test_from_a_folder(make, tied, tmp_path):
    name = (
        "tie_word_embeddings" if make in (fla_checkpoint, syncdoth_checkpoint) else "share_decoder_input_output_embed"
    )
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
    """Second names of the same parameters, from memory and from a folder."""
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


def fused(checkpoint):
    """The checkpoint as flash-linear-attention wrote it until February 2025: gate and up in one matrix."""
    state = dict(checkpoint.state_dict)
    for i in range(LAYERS):
        gate, up = (f"model.layers.{i}.mlp.{name}_proj.weight" for name in ("gate", "up"))
        state[gate] = torch.cat([state[gate], state.pop(up)])
    return NativeCheckpoint(checkpoint.config, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_and_up_in_one_matrix(dtype, tmp_path):
    later = fla_checkpoint(dtype)
    earlier = fused(later)
    expected = hf_archs.from_native(later).state_dict()
    found = hf_archs.from_native(earlier)
    assert_same(found.state_dict(), expected)
    assert_same(hf_archs.to_native(found).state_dict, later.state_dict)
    assert earlier.state_dict.keys() == fused(later).state_dict.keys()
    earlier.save_pretrained(tmp_path)
    loaded, info = ArchRetNetForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(loaded.state_dict(), expected)
    base = hf_archs.from_native(later).model.state_dict()
    assert_same(ArchRetNetModel.from_pretrained(tmp_path, dtype=dtype).state_dict(), base)
    for model, name in ((loaded, "loaded"), (found, "made")):  # both are saved with their own parameters
        model.save_pretrained(tmp_path / name)
        assert_same(load_file(tmp_path / name / "model.safetensors"), expected)


@pytest.mark.parametrize("rows", [39, 20])
def test_one_matrix_of_other_rows(rows, tmp_path):
    """A shape that is neither the gate's nor that of gate and up is named, and nothing is split."""
    checkpoint = fused(fla_checkpoint())
    name = "model.layers.0.mlp.gate_proj.weight"
    checkpoint.state_dict[name] = checkpoint.state_dict[name][:rows]
    with pytest.raises(ValueError, match=r"does not fit its config.*feed_forward\.(gate|up)_proj"):
        hf_archs.from_native(checkpoint)
    both = fla_checkpoint()
    both.state_dict[name] = fused(both).state_dict[name]
    both.save_pretrained(tmp_path)
    with pytest.raises(CheckpointMismatch, match=r"gate_proj\.weight has shape \(40, 24\)"):
        ArchRetNetForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit its config.*gate_proj"):
        hf_archs.from_native(both)


def test_the_older_name_of_eps():
    """fla-hub/retnet-340M, as it was published: until April 2024 norm_eps was rms_norm_eps."""
    raw = json.loads((CONFIGS / "fla-hub__retnet-340M.json").read_text())
    config = ArchRetNetConfig(**FLA.read_config(raw, ArchRetNetConfig))
    assert (config.norm_eps, config.intermediate_size, config.tie_word_embeddings) == (1e-6, 1536, True)
    other = FLA.read_config({**raw, "rms_norm_eps": 1e-3}, ArchRetNetConfig)
    assert other["norm_eps"] == 1e-3
    with pytest.raises(
        ValueError, match=r"rms_norm_eps is 0\.001 in this retnet checkpoint, and norm_eps, .* is 1e-06"
    ):
        FLA.read_config({**raw, "rms_norm_eps": 1e-3, "norm_eps": 1e-6}, ArchRetNetConfig)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("size", ["base", "300m", "medium", "xl", "3b", "7b"])
def test_a_published_config_of_syncdoths_package(size, dtype, tolerance):
    """The published fields at width 128, with widths in proportion."""
    raw = json.loads((CONFIGS / f"syncdoth__retnet-{size}.json").read_text())
    small = {
        f"decoder_{x}_dim": raw[f"decoder_{x}_dim"] * 128 // raw["decoder_embed_dim"] for x in ("embed", "ffn_embed")
    }
    small["decoder_value_embed_dim"] = raw["decoder_value_embed_dim"] * 128 // raw["decoder_embed_dim"]
    small |= {"decoder_layers": LAYERS, "decoder_retention_heads": 2, "vocab_size": VOCAB}
    small |= {name: raw[name] % VOCAB for name in raw if name.endswith("_token_id")}
    checkpoint = syncdoth_checkpoint(dtype, **raw | small)
    checkpoint.config = raw | small
    logits_of = functools.partial(torchscale_logits, form="recurrent")
    compare(hf_archs.from_native(checkpoint), logits_of, checkpoint, SYNCDOTH, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_published_config_of_flash_linear_attention(dtype, tolerance, tmp_path):
    """The published fields at width 32, with its time's layout; they determine the feed-forward's width."""
    raw = json.loads((CONFIGS / "fla-hub__retnet-340M.json").read_text())
    small = raw | {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    checkpoint = fla_checkpoint(dtype, **small, intermediate_size=256)
    expected = hf_archs.from_native(checkpoint)
    compare(expected, fla_logits, checkpoint, FLA, tolerance)
    NativeCheckpoint(small, fused(checkpoint).state_dict).save_pretrained(tmp_path)
    assert_same(ArchRetNetForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict(), expected.state_dict())


@pytest.mark.parametrize(
    ("size", "width", "values", "layers", "heads"),
    [
        ("base", 512, 864, 6, 2),
        ("300m", 1280, 2560, 12, 8),
        ("medium", 1024, 1728, 16, 4),
        ("xl", 2048, 3456, 24, 8),
        ("3b", 2560, 4280, 32, 10),
        ("7b", 4096, 6912, 32, 16),
    ],
)
def test_the_sizes_of_syncdoths_package(size, width, values, layers, heads):
    """The published configs; the 300m omits use_glu."""
    raw = json.loads((CONFIGS / f"syncdoth__retnet-{size}.json").read_text())
    config = ArchRetNetConfig(**SYNCDOTH.read_config(raw, ArchRetNetConfig))
    assert (config.hidden_size, config.value_size, config.intermediate_size) == (width, values, values)
    assert (config.num_hidden_layers, config.num_heads) == (layers, heads)
    assert (config.embedding_norm, config.embedding_multiplier, config.hidden_act) == (True, width**0.5, "swish")
    assert (config.normalize_decay, config.gated, config.norm_eps) == (True, True, 1e-6)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (
        raw["pad_token_id"],
        None,
        raw["eos_token_id"],
    )
    written = SYNCDOTH.write_config(config)
    assert {name: value for name, value in written.items() if raw.get(name, value) != value} == {}


@pytest.mark.parametrize("make", [torchscale_checkpoint, syncdoth_checkpoint])
def test_weights_of_before_september_2023_with_a_config_of_later(make, tmp_path):
    checkpoint = make()
    name = next(name for name in checkpoint.state_dict if name.endswith("q_proj.weight"))
    checkpoint.state_dict[name.replace("weight", "bias")] = torch.zeros(WIDTH)
    with pytest.raises(ValueError, match=r"does not fit its config.*q_proj\.bias"):
        hf_archs.from_native(checkpoint)
    checkpoint.save_pretrained(tmp_path)
    with pytest.raises(CheckpointMismatch, match=r"q_proj\.bias stands in .*whose config has no place for it"):
        ArchRetNetForCausalLM.from_pretrained(tmp_path)


def test_what_files_of_before_september_2023_do_not_say():
    """The eps of each head's norm changed twice, and no field holds it."""
    checkpoint = torchscale_2023_checkpoint()
    del checkpoint.config["head_norm_eps"]
    message = "head_norm_eps is missing in this torchscale checkpoint.*allowed is .* 1e-6 .* 1e-05, for those before"
    with pytest.raises(ValueError, match=message):
        hf_archs.from_native(checkpoint)
    checkpoint.config["layernorm_eps"] = 1e-6  # equal to that of August
    assert hf_archs.from_native(checkpoint).model.layers[0].mixer.norm.eps == 1e-6
    checkpoint = syncdoth_checkpoint()
    del checkpoint.config["decoder_value_embed_dim"]
    with pytest.raises(ValueError, match="decoder_value_embed_dim is missing in this syncdoth checkpoint"):
        hf_archs.from_native(checkpoint)


def test_a_model_of_the_package_itself():
    """Any model with such a config works, without the package."""

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
        (fla_checkpoint, {"attnres_block_size": 1}, "attnres_block_size is 1"),
        (fla_checkpoint, {"attn": {"layers": [1], "num_heads": 4}}, "attn is {'layers'"),
        (torchscale_checkpoint, {"moe_freq": 2}, "moe_freq is 2"),
        (torchscale_checkpoint, {"deepnorm": True}, "deepnorm is True"),
        (torchscale_checkpoint, {"decoder_normalize_before": False}, "decoder_normalize_before is False"),
        (torchscale_checkpoint, {"multiway": True}, "multiway is True"),
        (torchscale_checkpoint, {"use_lm_decay": True}, "use_lm_decay is True"),
        (syncdoth_checkpoint, {"use_lm_decay": True}, "use_lm_decay is True in this syncdoth checkpoint"),
        (syncdoth_checkpoint, {"use_glu": False}, "use_glu is False in this syncdoth checkpoint"),
        (syncdoth_checkpoint, {"deepnorm": True}, "deepnorm is True in this syncdoth checkpoint"),
        (syncdoth_checkpoint, {"decoder_normalize_before": False}, "decoder_normalize_before is False"),
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


OLDER = {"projection_bias": True, "head_norm": "layer_norm", "gated": False, "bias": True, "norm_type": "layer_norm"}
TORCHSCALES = {"rotary": "interleaved", "elementwise_affine": False, "normalize_decay": True}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate_fn": "gelu"}, "gate_fn is 'gelu', which a retnet model cannot represent; allowed: 'swish'"),
        ({"norm_type": "layer_norm"}, "norm_type is 'layer_norm'"),
        ({"gated": False}, "gated is False"),
        ({"rotary": "interleaved"}, "rotary is 'interleaved'.*elementwise_affine is True, which a torchscale"),
        ({"normalize_decay": True}, "normalize_decay is True, which a retnet"),
        ({"embedding_norm": True}, "embedding_norm is True, which a retnet"),
        ({"projection_bias": True}, "projection_bias is True, which a retnet"),
        ({"head_norm": "layer_norm"}, "head_norm is 'layer_norm', which a retnet"),
        ({"head_norm_eps": 1e-3}, "head_norm_eps is 0.001, which a retnet"),
        ({**TORCHSCALES, "gated": False, "inner_norm": True}, "gated is False, which a torchscale"),
        ({**TORCHSCALES, **OLDER, "expand_v": 1.0}, "expand_v is 1.0, which a torchscale-2023 model"),
        ({**TORCHSCALES, **OLDER, "norm_type": "rms_norm"}, "norm_type is 'rms_norm', which a torchscale-2023 model"),
        ({**TORCHSCALES, "normalize_decay": False}, "normalize_decay is False, which a torchscale"),
        ({**TORCHSCALES, "expand_k": 2.0}, "expand_k is 2.0.*torchscale"),
        ({**TORCHSCALES, "embedding_multiplier": 3.0}, "embedding_multiplier is 3.0.*torchscale"),
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
        ({"inner_norm": True}, "inner_norm is True; allowed is False where gated is True"),
        ({"head_norm_eps": 2.0}, "head_norm_eps is 2.0; allowed are 0.0 to 1.0"),
        ({"head_norm": "batch_norm"}, "head_norm"),
    ],
)
def test_a_wrong_config(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        hf_archs.get_architecture("retnet").tiny_config(**fields)


def test_the_width_of_the_feed_forward():
    config = ArchRetNetConfig(hidden_size=2048)
    assert config.intermediate_size == 2816  # two thirds of 4096, up to a multiple of 256
    assert ArchRetNetConfig(hidden_size=2048, hidden_ratio=4.0).intermediate_size == 5632


def test_a_norm_inside_the_feed_forward():
    """The norm needs the whole hidden layer, so no process may have a part of it. In a hybrid: ``sub_ln_mlp``."""
    tiny = hf_archs.get_architecture("retnet").tiny_config
    for fields in ({}, {"gated": False}, {"gated": False, "inner_norm": True}):
        config = tiny(**fields)
        assert "base_model_tp_plan" not in config.to_dict()
        linear = {n for n, m in ArchRetNetModel(config).named_modules() if isinstance(m, torch.nn.Linear)}
        plan = config.base_model_tp_plan
        assert {f"layers.0.{name.removeprefix('layers.*.')}" for name in plan} == {n for n in linear if ".0." in n}
        inner = plan["layers.*.feed_forward.up_proj"], plan["layers.*.feed_forward.down_proj"]
        assert inner == (("colwise_gather_output",) * 2 if config.inner_norm else ("colwise", "rowwise"))
    hybrid = hf_archs.get_architecture("hybrid")
    pattern = {"mixers": {"a": {"type": "retnet", "num_heads": 2}}, "layer_pattern": "a", "num_hidden_layers": 1}
    pattern["feed_forward_pattern"] = None
    config = hybrid.tiny_config(**pattern, feed_forward={"f": {"type": "sub_ln_mlp"}})
    feed_forward = hybrid.model_class(config).layers[0].feed_forward
    x = torch.randn(2, 5, config.hidden_size)
    inner = F.silu(feed_forward.up_proj(x))
    expected = feed_forward.down_proj(F.layer_norm(inner, inner.shape[-1:], eps=config.norm_eps))
    torch.testing.assert_close(feed_forward(x), expected)
    with pytest.raises((ValueError, StrictDataclassError), match="gated is True; allowed is False"):
        hybrid.tiny_config(**pattern, feed_forward={"f": {"type": "sub_ln_mlp", "gated": True}})
