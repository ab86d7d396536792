"""Rename table for flash-linear-attention's RetNet checkpoints; `hf_archs_retnet.torchscale` has the other packages'.

None of the packages is imported. Their models differ in the rotation, the norms and the feed-forward, see
`hf_archs_retnet.configuration.RetNetMixerConfig`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform

from hf_archs.native.fla import KERNELS, FlaFormat
from hf_archs_retnet.torchscale import ASSUMED, RMS_NORMS, SYNCDOTH, TORCHSCALE, TORCHSCALE_2023, is_decoder

__all__ = ["FLA", "SYNCDOTH", "TORCHSCALE", "TORCHSCALE_2023"]


def _gate_and_up(gate: Any, up: Any, rows: int) -> tuple[Any, Any]:
    """The gate and up projection of a file; a ``gate`` of twice the ``rows`` holds both, the gate first."""
    if gate is not None and up is None and gate.shape[0] == 2 * rows:
        return tuple(half.contiguous() for half in gate.chunk(2))  # type: ignore[return-value]
    return gate, up


class GateAndUp(ConversionOps):
    """Splits the feed-forward's gate and up projection, which may be one tensor in a file."""

    supports_many_to_many = True

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        config: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        found = (input_dict.get(source) for source in source_patterns)
        gate, up = (tensor[0] if isinstance(tensor, list) else tensor for tensor in found)
        names = (full_layer_name.replace(target_patterns[0], target) for target in target_patterns)
        both = zip(names, _gate_and_up(gate, up, config.intermediate_size))
        return {name: tensor for name, tensor in both if tensor is not None}


class ReadingConverter(WeightConverter):
    """A conversion for reading only: files are written with the model's own parameters."""

    __slots__ = ()

    def reverse_transform(self) -> WeightTransform:
        return WeightTransform([], [])  # neither a renaming nor a conversion, so never applied


@dataclass(frozen=True, kw_only=True)
class RetNetFlaFormat(FlaFormat):
    """``model_type`` ``retnet``, which transformers itself does not have.

    Until 2025-02-08 (commit c23f304) its feed-forward had gate and up in one ``gate_proj`` of twice the rows. Both
    layouts are read; the later one is written.
    """

    def detect(self, raw: Mapping[str, Any]) -> bool:
        return raw.get("model_type") == self.name and not is_decoder(raw)

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        given, defaults = super().expand(raw)
        if given["num_kv_heads"] == given["num_heads"]:
            given["num_kv_heads"] = None
        given["hidden_ratio"] = 4 if given["hidden_ratio"] is None else given["hidden_ratio"]
        for name in ("expand_k", "expand_v", "hidden_ratio"):  # integers in many files
            given[name] = float(given[name])
        given["elementwise_affine"] = bool(given["elementwise_affine"])  # None means False
        older = given.pop("rms_norm_eps", None)  # the name of norm_eps until 2024-04-28 (commit 6d0aa56)
        if older is not None and raw.get("norm_eps", older) != older:
            raise ValueError(
                f"rms_norm_eps is {older!r} in this {self.name} checkpoint, and norm_eps, which names the same, is "
                f"{raw['norm_eps']!r}; allowed is one of them"
            )
        given["norm_eps"] = given["norm_eps"] if older is None else older
        return given, defaults

    def key_mapping(self) -> dict[str, str]:
        # temporary names, unique to these files, which `conversions` replaces by ours
        mapping = super().key_mapping()
        return {theirs: re.sub(r"(?=(gate|up)_proj)", "fla_", ours) for theirs, ours in mapping.items()}

    def convert(self, state: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        converted = dict(state)
        for name in state:
            if name.endswith("feed_forward.gate_proj.weight"):
                other = name.replace("gate_proj", "up_proj")
                both = _gate_and_up(state[name], state.get(other), config.intermediate_size)
                converted |= {n: tensor for n, tensor in zip((name, other), both) if tensor is not None}
        return converted


FLA = RetNetFlaFormat(
    name="retnet",
    prefix="model",
    renames={"embed_tokens.weight": "embeddings.weight"},
    layer_renames={
        "norm.weight": "attn_norm.weight",
        **{f"mixer.{x}_proj.weight": f"attn.{x}_proj.weight" for x in ("q", "k", "v", "g")},
        "mixer.out_proj.weight": "attn.o_proj.weight",
        "mixer.norm.weight": "attn.g_norm_swish_gate.weight",
        "feed_forward_norm.weight": "mlp_norm.weight",
        **{f"feed_forward.{x}_proj.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    },
    layer_aliases={"attn.g_norm.weight": "mixer.norm.weight"},  # if norm and gate are not fused
    defaults={
        "model_type": "retnet",
        "architectures": ["RetNetForCausalLM"],
        "attn_mode": "chunk",
        "hidden_size": 2048,
        "expand_k": 1.0,
        "expand_v": 2.0,
        "hidden_ratio": 2,
        "intermediate_size": None,
        "num_hidden_layers": 24,
        "num_heads": 8,
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
        "fuse_norm": True,
        "vocab_size": 32000,
        "attnres_block_size": None,
    },
    fields={
        name: name
        for name in (
            "hidden_size",
            "expand_k",
            "expand_v",
            "hidden_ratio",
            "intermediate_size",
            "num_hidden_layers",
            "num_heads",
            "elementwise_affine",
            "norm_eps",
            "use_cache",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
            "tie_word_embeddings",
            "initializer_range",
            "vocab_size",
        )
    },
    # their hidden_act serves gate and feed-forward
    constants={
        "rotary": "half",
        **RMS_NORMS,
        "gate_fn": "swish",
        "hidden_act": "swish",
        "gated": True,
        "bias": False,
        "norm_type": "rms_norm",
        "normalize_decay": False,
        "embedding_multiplier": 1.0,
        "embedding_norm": False,
        "bidirectional": False,
    },
    ignored=(
        *KERNELS,
        *("attn_mode", "fuse_swiglu"),
        # read by attention layers only
        "max_position_embeddings",
        # never passed to a layer
        "use_short_conv",
        "conv_size",
        "share_conv_kernel",
    ),
    conversions=(
        ReadingConverter(
            [f"feed_forward.fla_{x}_proj.weight" for x in ("gate", "up")],
            [f"feed_forward.{x}_proj.weight" for x in ("gate", "up")],
            operations=[GateAndUp()],
        ),
    ),
    assumed=ASSUMED,
)
