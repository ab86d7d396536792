"""The checkpoints of the package mamba_ssm, as state-spaces publishes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_archs.native.formats import NativeFormat


@dataclass(frozen=True, kw_only=True)
class StateSpacesFormat(NativeFormat):
    """The checkpoints of the package mamba_ssm (github.com/state-spaces/mamba), as published under ``state-spaces/``.

    Attributes:
        layer: the kind of layer, as ``ssm_cfg["layer"]`` has it.
        layer_defaults: every option of such a layer, with the default it has where ``ssm_cfg`` leaves it out. In the
            tables its name is ``ssm_cfg.<option>``.
    """

    name: str = "state-spaces"
    layer: str
    layer_defaults: Mapping[str, Any]

    def __str__(self) -> str:
        return "the state-spaces layout"

    def detect(self, raw: Mapping[str, Any]) -> bool:
        """Whether all is made of this format's layer. Raises as `state_spaces_layer`."""
        return state_spaces_layer(raw) == self.layer

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `NativeFormat.expand`, by mamba_ssm's defaults. Raises a `ValueError` for an impossible size."""
        # options of mamba_ssm.models.config_mamba.MambaConfig beside the sizes, and the value that a stack of
        # nothing but such layers has
        defaults = {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True}
        options = {"vocab_size": 50277, "residual_in_fp32": True, "pad_vocab_size_multiple": 8, "tie_embeddings": True}
        empty = ("attn_layer_idx", "attn_cfg")  # null is none of them
        given = {k: v for k, v in raw.items() if k != "ssm_cfg" and not (k in empty and v is None)}
        given = {**defaults, **options, **given}
        for name in ("d_model", "vocab_size", "pad_vocab_size_multiple"):
            if type(given[name]) is not int or given[name] < 1:
                raise ValueError(
                    f"{name} is {given[name]!r} in this {self.name} checkpoint; allowed are whole numbers above 0"
                )
        multiple = given.pop("pad_vocab_size_multiple")
        given["vocab_size"] = -(-given["vocab_size"] // multiple) * multiple
        given.pop("fused_add_norm", None)  # the same result in another kernel
        layer = {**self.layer_defaults, **{k: v for k, v in (raw.get("ssm_cfg") or {}).items() if k != "layer"}}
        if type(layer["expand"]) is int and layer.get("d_ssm") == layer["expand"] * given["d_model"]:
            layer["d_ssm"] = None  # all of them
        # "auto" is what ours calls None: it follows from the width
        given.update({f"ssm_cfg.{name}": None if value == "auto" else value for name, value in layer.items()})
        return given, {**defaults, **{f"ssm_cfg.{name}": value for name, value in self.layer_defaults.items()}}


def state_spaces_layer(raw: Mapping[str, Any]) -> str | None:
    """The kind of layer in a ``config.json`` of the package mamba_ssm; None where it is of anything else.

    mamba_ssm has a default for all but the two sizes. A ``layer`` beside them is HyenaDNA's, whose sizes have the same
    names.

    Raises:
        ValueError: where ``ssm_cfg`` is no dict with a name in ``layer``.
    """
    if "model_type" in raw or "layer" in raw or not {"d_model", "n_layer"} <= set(raw):
        return None
    options = {} if raw.get("ssm_cfg") is None else raw["ssm_cfg"]
    layer = options.get("layer", "Mamba1") if isinstance(options, Mapping) else None
    if not isinstance(layer, str):
        raise ValueError(f"ssm_cfg is {options!r} in this state-spaces checkpoint; allowed is a dict with a 'layer'")
    return layer
