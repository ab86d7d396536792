"""Rename tables for transformers' Jamba, Bamba and Nemotron-H checkpoints."""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_archs.native.formats import TransformersFormat


@dataclass(frozen=True, kw_only=True)
class HybridFormat(TransformersFormat):
    """A format whose parameter names depend on the layer. Each instance is named after its type.

    Attributes:
        kinds: for each mixer and feed-forward, our parameter names in a layer and theirs.
        read_pattern: computes our fields that combine several of theirs: patterns, and by path fields of an instance.
        write_pattern: computes their pattern fields from our config.
    """

    kinds: Mapping[str, Mapping[str, str]]
    read_pattern: Callable[[Mapping[str, Any]], dict[str, Any]]
    write_pattern: Callable[[Any], dict[str, Any]]

    def __post_init__(self) -> None:
        aliases = {theirs: ours for table in self.kinds.values() for ours, theirs in table.items()}
        object.__setattr__(self, "layer_aliases", aliases)
        types = {f"{path.rpartition('.')[0]}.type": path.split(".")[1] for path in self.fields if "." in path}
        object.__setattr__(self, "constants", {**self.constants, **types})

    def names_for(self, config: Any) -> Callable[[str], str]:
        """As `NativeFormat.names_for`; a parameter's name depends on its layer's mixer and feed-forward."""

        def theirs(name: str) -> str:
            match = re.fullmatch(r"(.*?layers\.)(\d+)\.(.*)", name)
            if match is None:
                return self.theirs(name)
            start, layer, rest = match.groups()
            table = {k: v for kind in config.placed(int(layer)) for k, v in self.kinds[kind].items()}
            return self.theirs(f"{start}{layer}.{table.get(rest, rest)}")

        return theirs

    def read_config(self, raw: Mapping[str, Any], config_class: type[PreTrainedConfig]) -> dict[str, Any]:
        """As `NativeFormat.read_config`, with the fields from ``read_pattern``."""
        found = super().read_config(raw, config_class)
        for path, value in self.read_pattern(self.expand(raw)[0]).items():
            *parents, name = path.split(".")
            reduce(dict.__getitem__, parents, found)[name] = value
        return found

    def write_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        """As `NativeFormat.write_fields`, with the fields from ``write_pattern``."""
        return {**super().write_fields(config), **self.write_pattern(config)}


_SAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range", "use_cache", "tie_word_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
# sizes for tests
_TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {"num_heads": "num_attention_heads", "num_key_value_heads": "num_key_value_heads"}
_MAMBA = {
    "state_size": "mamba_d_state",
    "conv_kernel": "mamba_d_conv",
    "expand": "mamba_expand",
    "use_conv_bias": "mamba_conv_bias",
    "use_bias": "mamba_proj_bias",
}
_PATTERNS = ("layer_pattern", "feed_forward_pattern")
_TWO_NORMS: dict[str, Any] = {
    "prefix": "model",
    "renames": {"norm.weight": "final_layernorm.weight"},
    "layer_renames": {
        "norm.weight": "input_layernorm.weight",
        "feed_forward_norm.weight": "pre_ff_layernorm.weight",
        "feed_forward.gate.weight": "feed_forward.router.weight",
    },
}


def _of(instance: str, *names: str, **fields: str) -> dict[str, str]:
    """Paths of an instance's fields, mapped to their names: ``names`` are equal in both, ``fields`` are not."""
    return {f"{instance}.{ours}": theirs for ours, theirs in ({name: name for name in names} | fields).items()}


def _inside(ours: str, theirs: str, *names: str, **renamed: str) -> dict[str, str]:
    """Weights and biases in our module, mapped to theirs: ``names`` are equal in both, ``renamed`` are not."""
    both = {**{name: name for name in names}, **renamed}
    return {f"{ours}.{a}.{kind}": f"{theirs}.{b}.{kind}" for a, b in both.items() for kind in ("weight", "bias")}


def _attention(module: str) -> dict[str, str]:
    return _inside("mixer", module, "q_proj", "k_proj", "v_proj", out_proj="o_proj")


def _mamba2(module: str) -> dict[str, str]:
    return {
        **_inside("mixer", module, "in_proj", "conv1d", "norm", "out_proj"),
        **{f"mixer.ssm.{name}": f"{module}.{name}" for name in ("A_log", "D", "dt_bias")},
    }


def _period_and_offset(config: Any, kind: str, layers: Sequence[list[str]], name: str, other: str) -> dict[str, int]:
    """Jamba's period and offset of the layers that hold ``name``; all others must hold ``other``."""
    found = [i for i, entry in enumerate(layers) if entry == [name]]
    if not found:
        return {f"{kind}_layer_period": len(layers) + 1, f"{kind}_layer_offset": len(layers)}
    period = found[1] - found[0] if len(found) > 1 else max(found[0] + 1, len(layers))
    expected = [[name] if i % period == found[0] % period else [other] for i in range(len(layers))]
    if [*layers] != expected or found[0] >= period:
        raise ValueError(
            f"{type(config).__name__}: {name!r} stands in the layers {found}, which a jamba model cannot represent; "
            f"allowed is {name!r} at a regular distance and {other!r} everywhere else"
        )
    return {f"{kind}_layer_period": period, f"{kind}_layer_offset": found[0]}


def _router_logits(given: Mapping[str, Any], has_experts: bool) -> dict[str, Any]:
    """The field ``output_router_logits``, which only a config with routers has."""
    return {"output_router_logits": given["output_router_logits"]} if has_experts else {}


def _read_jamba(given: Mapping[str, Any]) -> dict[str, Any]:
    experts = "; moe every {expert_layer_period} from {expert_layer_offset}" if given["num_experts"] > 1 else ""
    return {
        "layer_pattern": "mamba; attention every {attn_layer_period} from {attn_layer_offset}".format(**given),
        "feed_forward_pattern": f"mlp{experts}".format(**given),
        **_router_logits(given, bool(experts)),
    }


def _write_jamba(config: Any) -> dict[str, Any]:
    mixers, feed_forwards = zip(*(config.placed_by_kind(i) for i in range(config.num_hidden_layers)))
    written = _period_and_offset(config, "attn", mixers, "attention", "mamba")
    written["mamba_dt_rank"] = config.instances()["mixers.mamba"][1].dt_rank
    experts = _period_and_offset(config, "expert", feed_forwards, "moe", "mlp")
    if ["moe"] not in feed_forwards:
        return {**written, "num_experts": 1}
    return {**written, **experts, "output_router_logits": config.output_router_logits}


JAMBA = HybridFormat(
    name="jamba",
    config_name="JambaConfig",
    model_name="JambaModel",
    causal_lm_name="JambaForCausalLM",
    tiny={**_TINY, "num_hidden_layers": 2, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    **_TWO_NORMS,
    kinds={
        "mamba": {
            **_inside("mixer", "mamba", "in_proj", "conv1d", "x_proj", "out_proj"),
            "mixer.dt_proj.weight": "mamba.dt_proj.weight",
            "mixer.ssm.dt_bias": "mamba.dt_proj.bias",
            **{f"mixer.ssm.{name}": f"mamba.{name}" for name in ("A_log", "D")},
            **{f"mixer.norms.{x}.weight": f"mamba.{x.lower()}_layernorm.weight" for x in ("dt", "B", "C")},
        },
        "attention": _attention("self_attn"),
        "mlp": {},
        "moe": {},
    },
    fields={
        **{name: name for name in _SAME},
        "norm_eps": "rms_norm_eps",
        **_of("mixers.mamba", time_step_rank="mamba_dt_rank", bcdt_norm_eps="rms_norm_eps", **_MAMBA),
        **_of("mixers.attention", **_HEADS),
        **_of("feed_forward.mlp", "intermediate_size"),
        **_of("feed_forward.moe", "num_experts", "num_experts_per_tok", "router_aux_loss_coef"),
        **_of("feed_forward.moe", moe_intermediate_size="intermediate_size"),
    },
    constants={
        **dict.fromkeys(("residual_in_fp32", "rescale_prenorm_residual"), False),
        "mixers.mamba.bcdt_norm": "affine",
        "mixers.attention.rope_theta": None,
        "feed_forward.moe.norm_topk_prob": False,
    },
    unused=_PATTERNS,
    allowed={
        "hidden_act": ("silu", "swish"),
        "attention_dropout": (0.0,),
        "sliding_window": (None,),
        "mamba_inner_layernorms": (True,),
    },
    ignored=(
        # read by _read_jamba
        *("attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset"),
        "output_router_logits",
        "max_position_embeddings",  # Jamba has no positions
        # transformers' choice of scan, and its options of generation
        *("use_mamba_kernels", "use_mambapy", "use_associative_scan"),
        *("num_logits_to_keep", "calc_logits_for_entire_prompt"),
    ),
    read_pattern=_read_jamba,
    write_pattern=_write_jamba,
)


def _read_bamba(given: Mapping[str, Any]) -> dict[str, Any]:
    attention = set(given["attn_layer_indices"] or ())
    rotated = given.get("attn_rotary_emb")
    if rotated is not None and rotated * 2 * given["num_attention_heads"] != given["hidden_size"]:
        raise ValueError(
            f"attn_rotary_emb is {rotated!r} in this bamba checkpoint; allowed is half a head, since transformers "
            "rotates that"
        )
    return {
        "layer_pattern": ["attention" if i in attention else "mamba2" for i in range(given["num_hidden_layers"])],
        "feed_forward_pattern": "mlp",
    }


def _placed(config: Any, form: str, allowed: Collection[list[str]], words: str) -> list[list[str]]:
    """The instance names of every layer. Raises a `ValueError` for a layer that is not in ``allowed``."""
    placed = [config.placed(i) for i in range(config.num_hidden_layers)]
    for i, layer in enumerate(placed):
        if layer not in allowed:
            raise ValueError(
                f"{type(config).__name__}: layer {i} is {'+'.join(layer)!r}, which a {form} model cannot represent; "
                f"allowed {words}"
            )
    return placed


def _write_bamba(config: Any) -> dict[str, Any]:
    placed = _placed(config, "bamba", (["attention", "mlp"], ["mamba2", "mlp"]), "are attention or mamba2, and mlp")
    return {
        "attn_layer_indices": [i for i, layer in enumerate(placed) if layer[0] == "attention"],
        "mamba_n_heads": config.instances()["mixers.mamba2"][1].num_heads,
    }


BAMBA = HybridFormat(
    name="bamba",
    config_name="BambaConfig",
    model_name="BambaModel",
    causal_lm_name="BambaForCausalLM",
    tiny={**_TINY, "num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_state": 16},
    **_TWO_NORMS,
    nested=("rope_parameters",),
    kinds={"mamba2": _mamba2("mamba"), "attention": _attention("self_attn"), "mlp": {}},
    fields={
        **{name: name for name in _SAME},
        "norm_eps": "rms_norm_eps",
        **_of("mixers.mamba2", "time_step_limit", head_dim="mamba_d_head", n_groups="mamba_n_groups", **_MAMBA),
        **_of("mixers.attention", "attention_bias", output_bias="attention_bias", **_HEADS),
        **{f"mixers.attention.{name}": f"rope_parameters.{name}" for name in ("rope_theta", "partial_rotary_factor")},
        **_of("feed_forward.mlp", "intermediate_size", bias="mlp_bias"),
    },
    constants={
        **dict.fromkeys(("residual_in_fp32", "rescale_prenorm_residual"), False),
        "feed_forward.mlp.hidden_act": "silu",  # their hidden_act serves mixer and feed-forward
    },
    unused=(*_PATTERNS, *(f"mixers.mamba2.time_step_{x}" for x in ("min", "max", "floor"))),
    allowed={
        "hidden_act": ("silu", "swish"),
        "attention_dropout": (0.0,),
        "rope_parameters.rope_type": ("default",),
        "z_loss_coefficient": (0.0,),
    },
    ignored=(
        # read by _read_bamba, or implied by the widths, which BambaConfig checks
        *("attn_layer_indices", "attn_rotary_emb", "mamba_n_heads"),
        # length of its position table, chunk length of its scan, choice of kernels, option of generation
        *("max_position_embeddings", "mamba_chunk_size", "use_mamba_kernels", "num_logits_to_keep"),
    ),
    read_pattern=_read_bamba,
    write_pattern=_write_bamba,
)


@dataclass(frozen=True, kw_only=True)
class NemotronHFormat(HybridFormat):
    """Nemotron-H as transformers computes it; files of NVIDIA's own code are read too.

    transformers clamps steps from below at ``time_step_min`` and ignores ``time_step_limit``; NVIDIA's code does the
    opposite. A file with a ``time_step_limit`` other than (0, inf) is refused, since the two disagree on it.
    """

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `TransformersFormat.expand`. Raises a `ValueError` for contradicting fields or an unknown layer type."""
        raw = dict(raw)
        _check_same(raw, "layer_norm_epsilon", raw.get("layer_norm_epsilon", 1e-5), "norm_eps", "rms_norm_eps")
        if "attention_head_dim" in raw:  # the first files' name of head_dim
            raw.setdefault("head_dim", raw["attention_head_dim"])
            _check_same(raw, "head_dim", raw["head_dim"], "attention_head_dim")
        for kind in raw.get("hybrid_override_pattern") or "":
            if kind not in "ME*-":
                raise ValueError(
                    f"hybrid_override_pattern has {kind!r} in this nemotron_h checkpoint; allowed are M, E, * and -"
                )
        given, defaults = super().expand(raw)
        _check_same(raw, "the length of the pattern", len(given["layers_block_type"]), "num_hidden_layers")
        limit = given["time_step_limit"]
        if len(limit) == 2:  # files write 1e308 for infinity, which JSON lacks
            given["time_step_limit"] = (limit[0], limit[1] if limit[1] < torch.finfo(torch.float32).max else math.inf)
        return given, defaults


def _check_same(raw: Mapping[str, Any], field: str, value: Any, *others: str) -> None:
    """Raise a `ValueError` if the file holds another value under another name of a field."""
    for name in others:
        if raw.get(name, value) != value:
            raise ValueError(
                f"{name} is {raw[name]!r} in this nemotron_h checkpoint; allowed is {value!r}, as {field} is"
            )


# our instance for each layer type: a layer of Nemotron-H is one mixer or one feed-forward
_NEMOTRON = {"linear_attention": "mamba2", "full_attention": "attention", "mlp": "mlp", "moe": "moe"}


def _read_nemotron_h(given: Mapping[str, Any]) -> dict[str, Any]:
    placed = [_NEMOTRON[kind] for kind in given["layers_block_type"]]
    if given["mlp_bias"] and "moe" in placed:
        raise ValueError(
            "mlp_bias is True in this nemotron_h checkpoint; allowed beside experts is False, since the expert that "
            "all tokens share would have biases too"
        )
    return {
        "num_hidden_layers": len(placed),
        "layer_pattern": [name if name in ("mamba2", "attention") else "none" for name in placed],
        "feed_forward_pattern": [name if name in ("mlp", "moe") else "none" for name in placed],
        "mixers.mamba2.inner_size": given["mamba_num_heads"] * given["mamba_head_dim"],  # expand has no effect
        "mixers.mamba2.time_step_limit": (given["time_step_min"], math.inf),
        **_router_logits(given, "moe" in placed),
    }


def _write_nemotron_h(config: Any) -> dict[str, Any]:
    kinds = {name: kind for kind, name in _NEMOTRON.items()}
    placed = _placed(config, "nemotron_h", [[kind] for kind in kinds], f"is one of {', '.join(kinds)}")
    instances = config.instances()
    if instances["feed_forward.mlp"][1].bias and ["moe"] in placed:
        raise ValueError(
            f"{type(config).__name__}: feed_forward.mlp.bias is True, which a nemotron_h model cannot represent beside "
            "experts; allowed: False"
        )
    mamba2 = instances["mixers.mamba2"][1]
    if tuple(mamba2.time_step_limit) != (mamba2.time_step_min, math.inf):
        raise ValueError(
            f"{type(config).__name__}: mixers.mamba2.time_step_limit is {mamba2.time_step_limit}, which a nemotron_h "
            f"model cannot represent; allowed: {(mamba2.time_step_min, math.inf)}, since transformers clamps at "
            "time_step_min"
        )
    return {
        "layers_block_type": [kinds[layer[0]] for layer in placed],
        "mamba_num_heads": mamba2.num_heads,
        "output_router_logits": getattr(config, "output_router_logits", False),
    }


NEMOTRON_H = NemotronHFormat(
    name="nemotron_h",
    config_name="NemotronHConfig",
    model_name="NemotronHModel",
    causal_lm_name="NemotronHForCausalLM",
    tiny={
        **_TINY,
        "layers_block_type": ["linear_attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 40,
        "head_dim": 16,
    },
    prefix="model",
    file_prefixes=("backbone",),
    renames={"embed_tokens.weight": "embeddings.weight", "norm.weight": "norm_f.weight"},
    kinds={
        "mamba2": _mamba2("mixer"),
        "attention": _attention("mixer"),
        "mlp": _inside("feed_forward", "mixer", "up_proj", "down_proj"),
        "moe": {
            **{f"feed_forward.gate.{x}": f"mixer.gate.{x}" for x in ("weight", "e_score_correction_bias")},
            **{f"feed_forward.experts.{x}": f"mixer.experts.{x}" for x in ("up_proj", "down_proj")},
            **_inside("feed_forward.shared_experts", "mixer.shared_experts", "up_proj", "down_proj"),
        },
    },
    fields={
        **{name: name for name in _SAME if name != "tie_word_embeddings"},  # ignored by its class
        "norm_eps": "layer_norm_epsilon",
        **{name: name for name in ("residual_in_fp32", "rescale_prenorm_residual")},
        **_of("mixers.mamba2", "n_groups", "conv_kernel", "expand", "use_conv_bias", "use_bias"),
        **_of("mixers.mamba2", "time_step_min", "time_step_max", "time_step_floor"),
        **_of("mixers.mamba2", state_size="ssm_state_size", head_dim="mamba_head_dim"),
        **_of("mixers.attention", "head_dim", **_HEADS),
        **_of("feed_forward.mlp", "intermediate_size", hidden_act="mlp_hidden_act", bias="mlp_bias"),
        **_of("feed_forward.moe", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        **_of("feed_forward.moe", "routed_scaling_factor", num_experts="n_routed_experts", hidden_act="mlp_hidden_act"),
        **_of("feed_forward.moe", shared_expert_intermediate_size="moe_shared_expert_intermediate_size"),
    },
    constants={
        "tie_word_embeddings": False,
        "mixers.attention.rope_theta": None,
        "feed_forward.mlp.gated": False,
        "feed_forward.moe.router": "loss_free",
        "feed_forward.moe.score_function": "sigmoid",
        "feed_forward.moe.gated": False,
    },
    unused=(
        *_PATTERNS,
        *("mixers.mamba2.inner_size", "mixers.mamba2.time_step_limit", "feed_forward.moe.router_aux_loss_coef"),
    ),
    allowed={
        "time_step_limit": ((0.0, math.inf),),
        "mamba_hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "num_nextn_predict_layers": (0,),
        **dict.fromkeys(("attention_dropout", "hidden_dropout"), (0.0,)),
        **dict.fromkeys(("sliding_window", "moe_latent_size"), (None,)),
        **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), (1,)),
    },
    ignored=(
        # read by _read_nemotron_h
        *("mamba_num_heads", "layers_block_type", "output_router_logits"),
        # second names, compared by _check_same
        *("norm_eps", "rms_norm_eps", "attention_head_dim", "num_hidden_layers"),
        # ignored by its class: the head is never tied, use_bias sets the mixer's biases, steps have no rank, attention
        # has no positions
        *("tie_word_embeddings", "mamba_proj_bias", "time_step_rank"),
        *("max_position_embeddings", "rope_theta", "rope_scaling", "partial_rotary_factor"),
        # kernels, dtype of its cache, chunk length, scheduling, generation, layers that predict further tokens
        *("use_mamba_kernels", "mamba_ssm_cache_dtype", "chunk_size", "moe_shared_expert_overlap"),
        *("num_logits_to_keep", "mtp_layers_block_type"),
    ),
    layer_patterns={
        rf"mixer\.experts\.(\d+)\.{theirs}_proj\.weight": rf"feed_forward.experts.\2.{ours}_proj.weight"
        for theirs, ours in (("up", "in"), ("down", "down"))
    },
    read_pattern=_read_nemotron_h,
    write_pattern=_write_nemotron_h,
)
