"""Checks of published ``config.json`` files at small widths, and of each field of a native config class."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

import hf_archs
from hf_archs.errors import reason
from hf_archs.native.formats import TransformersFormat
from hf_archs.testing.native import check_back, native
from hf_archs.testing.ops import relative_distance
from hf_archs.testing.parity import check_parity

VOCABULARY = 123

# matched with the end of a field's name, since some names begin with that of a layer
_WIDTHS = ("hidden_size", "d_model", "d_inner", "intermediate_size", "time_step_rank", "dt_rank")
_HEADS = {"num_heads": "head_dim", "n_heads": "d_head"}  # heads of a recurrence, and their channels
_PATTERNS = ("override_pattern", "layers_block_type", "layer_types")
_PERIODS = "layer_period"

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_DEPTHS = ("num_hidden_layers", "n_layer")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def reduced(raw: Mapping[str, Any], width: int = 32, **exactly: Any) -> dict[str, Any]:
    """A published ``config.json`` at a small width: sizes are reduced in proportion, other fields are unchanged.

    The relations of the sizes are kept (a size that is not a multiple of another stays so), and the ratio of heads to
    key groups too. The first layers are kept, as many as include every type. Token ids are taken modulo the small
    vocabulary.

    Args:
        raw: the content of the file.
        width: the new ``hidden_size`` or ``d_model``.
        exactly: fields that replace those of the result.

    Raises:
        ValueError: if the heads of a recurrence do not have a whole number of channels at that width.
    """
    small = dict(raw)
    factor = Fraction(raw["hidden_size" if "hidden_size" in raw else "d_model"], width)
    for name, value in raw.items():
        if name.endswith(_WIDTHS) and isinstance(value, int):
            small[name] = max(1, round(value / factor))
        for end, dim in _HEADS.items():
            layer = name.removesuffix(end)
            if name.endswith(end) and layer + dim in raw:
                small[name] = 2 * raw.get(f"{layer}n_groups", raw.get("n_groups", 1))
                size = value * raw[layer + dim] / factor / small[name]
                if size.denominator != 1:
                    raise ValueError(f"width is {width}; allowed are widths that leave {layer}{dim} = {size} whole")
                small[layer + dim] = int(size)
    if "num_attention_heads" in raw:
        heads, groups = raw["num_attention_heads"], raw.get("num_key_value_heads") or raw["num_attention_heads"]
        small["num_attention_heads"] = heads // groups * min(groups, 2)
        if raw.get("num_key_value_heads"):
            small["num_key_value_heads"] = min(groups, 2)
        small.update({name: 8 for name in ("head_dim", "attention_head_dim") if name in raw})
    for name in _EXPERTS:
        if name in raw:
            small[name] = min(raw[name], 2 * raw["num_experts_per_tok"])
    small["vocab_size"] = min(raw["vocab_size"], VOCABULARY)
    for name in _TOKENS:
        if isinstance(raw.get(name), int):
            small[name] = raw[name] % VOCABULARY
        elif isinstance(raw.get(name), list):
            small[name] = [token % VOCABULARY for token in raw[name]]
    depth = next((raw[name] for name in _DEPTHS if name in raw), None)
    patterns = {n: v for n, v in raw.items() if n.endswith(_PATTERNS) and depth in (None, len(v))}
    layers = max([2, *(value for name, value in raw.items() if name.endswith(_PERIODS))])
    for pattern in patterns.values():
        layers = max(layers, *(pattern.index(kind) + 1 for kind in set(pattern)))
    small.update({name: pattern[:layers] for name, pattern in patterns.items()})
    small.update({name: layers for name in _DEPTHS if name in raw})
    return {**small, **exactly}


def _tokens(vocabulary: int, pad: int | None = None) -> torch.Tensor:
    ids = torch.randint(0, vocabulary, (2, 23), generator=torch.Generator().manual_seed(0))
    return ids if pad is None else ids.where(ids != pad, (pad + 1) % vocabulary)  # no gradient reaches pads


def check_published(raw: Mapping[str, Any], architecture: str, dtype: torch.dtype, folder: Path, **told: Any) -> None:
    """Read a ``config.json`` with weights of transformers' class, and compare logits and the config written back.

    Args:
        raw: content of the file, at a small width.
        architecture: our architecture that reads it.
        dtype: float32, to 1e-5; or float64, to 1e-10 with transformers' casts lifted, and every gradient too.
        folder: an empty folder.
        told: fields for transformers' class only, for a file that it would misread without them.
    """
    ours_entry = hf_archs.get_architecture(architecture)
    form: Any = next(form for form in ours_entry.native_formats if form.detect(raw))
    config_class, model_class = getattr(transformers, form.config_name), getattr(transformers, form.causal_lm_name)
    theirs = native(model_class, config_class.from_dict({**raw, **told}), dtype)
    theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    ours_class: Any = ours_entry.causal_lm_class
    ours, info = ours_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    ids = _tokens(raw["vocab_size"], raw.get("pad_token_id"))
    if dtype == torch.float64:
        check_parity(ours, theirs, form.ours, ids, 1e-10)
    else:  # in float32, gradients through many layers differ by more
        with torch.no_grad():
            assert relative_distance(ours(ids).logits, theirs(ids, use_cache=False).logits) <= 1e-5
    back = check_back(ours, theirs, form.name)
    for name in _own_fields(config_class):
        kept, given = _value(back, name), _value(theirs.config, name)
        assert kept == given or name in form.ignored, f"{name} was {given!r} and is {kept!r}"


def _own_fields(config_class: Any) -> list[str]:
    """The fields that a config class declares itself, without inherited ones."""
    return [f.name for f in dataclasses.fields(config_class) if f.name in config_class.__annotations__]


def _value(config: Any, name: str) -> Any:
    value = getattr(config, name)
    return list(value) if isinstance(value, tuple) else value


def _others(value: Any) -> Iterator[Any]:
    """Other values of the type of ``value``."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (2 * value, value + 1, value // 2, value + 8)
    elif isinstance(value, float):
        yield from (3 * value + 0.2, value / 2)
    elif isinstance(value, str):
        yield from (other for other in ("gelu", "constant", "bfloat16") if other != value)
    elif value is None:
        yield from (3, 0.5, True)


@torch.no_grad()
def check_fields(
    form: TransformersFormat, fields: Mapping[str, Any], others: Mapping[str, Sequence[Any]]
) -> dict[str, str]:
    """Change each field of transformers' config class alone, and convert the model.

    Our model must reproduce the logits and write the value back, or refuse it with a reason that names the field.

    Args:
        form: the format.
        fields: fields of a small config.
        others: values to try, for fields whose type suggests none. A dict that contains the field changes several
            fields, which transformers accepts only together.

    Returns:
        The outcome of each field: ``refused``; ``read``, if the logits changed; ``kept``, if they did not.

    Raises:
        AssertionError: naming every field that is read wrongly or of which transformers accepts no other value.
    """
    config_class, model_class = getattr(transformers, form.config_name), getattr(transformers, form.causal_lm_name)
    base = native(model_class, config_class(**fields))
    ids = _tokens(fields["vocab_size"] // 2)
    found: dict[str, str] = {}
    wrong: list[str] = []
    plain = base(ids, use_cache=False).logits
    for name in _own_fields(config_class):
        value = getattr(base.config, name)
        for other in others.get(name, _others(value)):
            if other == value:
                continue
            try:
                together = other if isinstance(other, dict) and name in other else {name: other}
                changed = config_class(**{**fields, **together})
                theirs = native(model_class, changed)
                shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
                if shapes == {key: tensor.shape for key, tensor in base.state_dict().items()}:
                    theirs.load_state_dict(base.state_dict())
                expected = theirs(ids, use_cache=False).logits
            except Exception:  # transformers itself refuses the value
                continue
            break
        else:
            wrong.append(f"{name}: transformers accepts none of the other values that were tried")
            continue
        same = expected.shape == plain.shape and torch.equal(expected, plain)
        found[name] = "kept" if same else "read"
        try:
            ours = hf_archs.from_native(theirs)
            distance = relative_distance(ours(ids).logits, expected)
            back: Any = hf_archs.to_native(ours, form.name)
        except (ValueError, StrictDataclassError) as error:
            found[name] = "refused"
            if name not in reason(error):
                wrong.append(f"{name} = {other!r} is refused by {reason(error)!r}")
            continue
        if not distance <= 1e-5:
            wrong.append(f"{name} = {other!r}: {distance:.1e} from transformers' logits")
        kept = _value(back.config, name)
        if kept != _value(changed, name) and name not in form.ignored:
            wrong.append(f"{name} = {other!r} is written back as {kept!r}")
    assert not wrong, "; ".join(wrong)
    return found
