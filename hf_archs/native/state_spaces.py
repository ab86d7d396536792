"""Checkpoints of the package mamba_ssm, as published by state-spaces."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_archs.native.formats import NativeFormat


@dataclass(frozen=True, kw_only=True)
class StateSpacesFormat(NativeFormat):
    """The checkpoint format of mamba_ssm (github.com/state-spaces/mamba), as published under ``state-spaces/``.

    Attributes:
        layer: the kind of layer, the value of ``ssm_cfg["layer"]``.
        layer_defaults: every option of such a layer, with its default in mamba_ssm. The tables name an option
            ``ssm_cfg.<option>``.
    """

    name: str = "state-spaces"
    layer: str
    layer_defaults: Mapping[str, Any]

    def __str__(self) -> str:
        return "the state-spaces layout"

    def detect(self, raw: Mapping[str, Any]) -> bool:
        """Whether the file's kind of layer is this format's. Raises as `state_spaces_layer` does."""
        return state_spaces_layer(raw) == self.layer

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `NativeFormat.expand`, with mamba_ssm's defaults. Raises a `ValueError` for an impossible size."""
        # fields of mamba_ssm.models.config_mamba.MambaConfig apart from the sizes; ``defaults`` are the values that a
        # stack of this layer alone has
        defaults = {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True}
        options = {"vocab_size": 50277, "residual_in_fp32": True, "pad_vocab_size_multiple": 8, "tie_embeddings": True}
        empty = ("attn_layer_idx", "attn_cfg")  # null means empty
        given = {
            **defaults,
            **options,
            **{k: v for k, v in raw.items() if k != "ssm_cfg" and not (k in empty and v is None)},
        }
        for name in ("d_model", "vocab_size", "pad_vocab_size_multiple"):
            if type(given[name]) is not int or given[name] < 1:
                raise ValueError(
                    f"{name} is {given[name]!r} in this {self.name} checkpoint; allowed are whole numbers above 0"
                )
        multiple = given.pop("pad_vocab_size_multiple")
        given["vocab_size"] = -(-given["vocab_size"] // multiple) * multiple
        given.pop("fused_add_norm", None)  # it selects a kernel and changes no result
        layer = {**self.layer_defaults, **{k: v for k, v in (raw.get("ssm_cfg") or {}).items() if k != "layer"}}
        if type(layer["expand"]) is int and layer.get("d_ssm") == layer["expand"] * given["d_model"]:
            layer["d_ssm"] = None  # None: all inner channels
        # "auto", a value that follows from the hidden size, is None in this library
        given.update({f"ssm_cfg.{name}": None if value == "auto" else value for name, value in layer.items()})
        return given, {**defaults, **{f"ssm_cfg.{name}": value for name, value in self.layer_defaults.items()}}


def state_spaces_layer(raw: Mapping[str, Any]) -> str | None:
    """The kind of layer in a ``config.json`` of mamba_ssm; None for any other file.

    mamba_ssm has a default for every field but the two sizes. HyenaDNA has sizes of the same names, and a ``layer``
    beside them.

    Raises:
        ValueError: if ``ssm_cfg`` is not a dict, or its ``layer`` not a string.
    """
    if "model_type" in raw or "layer" in raw or not {"d_model", "n_layer"} <= set(raw):
        return None
    options = {} if raw.get("ssm_cfg") is None else raw["ssm_cfg"]
    layer = options.get("layer", "Mamba1") if isinstance(options, Mapping) else None
    if not isinstance(layer, str):
        raise ValueError(f"ssm_cfg is {options!r} in this state-spaces checkpoint; allowed is a dict with a 'layer'")
    return layer
