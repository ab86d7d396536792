"""Conversion, in memory, between models of this library and foreign models of the same mathematics."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_archs import registry
from hf_archs.errors import reason
from hf_archs.native.formats import OURS, NativeCheckpoint, NativeFormat, StateDictFormat, TransformersFormat
from hf_archs.native.reading import translate
from hf_archs.registry import Architecture


def _formats() -> list[tuple[Architecture, TransformersFormat]]:
    return [
        (architecture, candidate)
        for architecture in map(registry.get_architecture, registry.architectures())
        for candidate in architecture.native_formats
        if isinstance(candidate, TransformersFormat)
    ]


def from_native(model: PreTrainedModel | NativeCheckpoint) -> PreTrainedModel:
    """Convert a model of transformers or another package to this library; the two models share no memory.

    All values are equal and tied embeddings stay tied. Parameters that this library keeps in float32 under lower
    precision are widened. Device, training mode and generation config are kept.

    Args:
        model: a base model or causal language model of a class that an architecture's native formats name; a
            `NativeCheckpoint` of any format; or a model of the package that writes such checkpoints.

    Raises:
        ValueError: for any other model, a config that this library cannot represent, or parameters that do not fit it.
    """
    if isinstance(model, NativeCheckpoint):
        return _from_checkpoint(model)
    pairs = [(form, *pair) for architecture, form in _formats() for pair in form.classes(architecture)]
    match = next((pair for pair in pairs if isinstance(model, pair[2])), None)
    if match is None and _detect(model.config.to_dict()) is not None:
        converted = _from_checkpoint(NativeCheckpoint(model.config.to_dict(), model.state_dict()))
        return converted.train(model.training)
    if match is None:
        names = ", ".join(theirs.__name__ for *_, theirs in pairs)
        raise ValueError(f"from_native: a {type(model).__name__} cannot be converted; allowed are {names}")
    form, ours, _ = match
    config_class: Any = ours.config_class
    config = config_class(**translate(form, model.config.to_dict(), config_class))
    state = {form.ours(name): tensor for name, tensor in model.state_dict().items()}
    return _take_over(_build(ours, config, _widened(ours, state), model.device, model.dtype), model)


def _widened(model_class: type[PreTrainedModel], state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of the tensors; those of ``_keep_in_fp32_modules_strict`` are widened to at least float32."""
    wide = set(model_class._keep_in_fp32_modules_strict or ())
    return {
        name: tensor.to(
            tensor.dtype if wide.isdisjoint(name.split(".")) else torch.promote_types(tensor.dtype, torch.float32),
            copy=True,
        )
        for name, tensor in state.items()
    }


def _detect(raw: Mapping[str, Any]) -> tuple[Architecture, NativeFormat] | None:
    for architecture in map(registry.get_architecture, registry.architectures()):
        for form in architecture.native_formats:
            if form.detect(raw):
                return architecture, form
    return None


def _from_checkpoint(checkpoint: NativeCheckpoint) -> PreTrainedModel:
    found = _detect(checkpoint.config)
    if found is None:
        known = [str(f) for name in registry.architectures() for f in registry.get_architecture(name).native_formats]
        raise ValueError(
            f"from_native: a checkpoint of {checkpoint.config.get('model_type', 'an unnamed type')!r} cannot be "
            f"converted; allowed are {', '.join(dict.fromkeys(known))}"
        )
    architecture, form = found
    config_class: Any = architecture.config_class
    config = config_class(**translate(form, checkpoint.config, config_class))
    state = {form.ours(name): tensor for name, tensor in checkpoint.state_dict.items() if not form.is_buffer(name)}
    state = form.convert(state, config)
    embedding = state.get(f"{OURS}.embed_tokens.weight")
    if config.tie_word_embeddings and embedding is not None:  # files hold tied tensors once
        state.setdefault("lm_head.weight", embedding)
    model_class = architecture.causal_lm_class
    if "lm_head.weight" not in state:
        model_class = architecture.model_class
        state = {name.removeprefix(f"{OURS}."): tensor for name, tensor in state.items()}
    first = next(iter(state.values()))
    try:
        return _build(model_class, config, _widened(model_class, state), first.device, first.dtype).eval()
    except RuntimeError as error:
        raise ValueError(f"from_native: the state dict does not fit its config: {reason(error)}") from error


def to_native(model: PreTrainedModel, format: str | None = None) -> PreTrainedModel | NativeCheckpoint:
    """Convert a model of this library to one of transformers or to another package's checkpoint.

    All values are equal, tied embeddings stay tied, and no memory is shared. Parameters that this library keeps in
    float32 under lower precision are cast to the model's dtype, unless that changes a value of any of them;
    transformers' models run with both dtypes.

    Args:
        model: a base model or causal language model of an architecture with native formats.
        format: name of the format (the ``model_type`` of transformers' models); None takes the first format that can
            represent the config.

    Raises:
        ValueError: if there is no such format, or no format can represent the config; the message names the field.
    """
    candidates: dict[str, tuple[TransformersFormat | StateDictFormat, Any]] = {}
    allowed: list[str] = []
    for architecture in map(registry.get_architecture, registry.architectures()):
        pairs: list[tuple[Any, TransformersFormat | StateDictFormat, Any]] = []
        for form in architecture.native_formats:
            if isinstance(form, TransformersFormat):
                pairs += [(ours, form, theirs) for ours, theirs in form.classes(architecture)]
            elif isinstance(form, StateDictFormat):
                pairs += [(ours, form, None) for ours in (architecture.model_class, architecture.causal_lm_class)]
        allowed += [ours.__name__ for ours, *_ in pairs]
        candidates.update({form.name: (form, theirs) for ours, form, theirs in pairs if isinstance(model, ours)})
    if not candidates:
        names = ", ".join(dict.fromkeys(allowed))
        raise ValueError(f"to_native: a {type(model).__name__} cannot be converted; allowed are {names}")
    if format is not None and format not in candidates:
        raise ValueError(
            f"to_native: format is {format!r}; allowed for a {type(model).__name__} are {', '.join(candidates)}"
        )
    refusals = []
    for form, theirs in [candidates[format]] if format else candidates.values():
        try:
            config: Any = form.write_config(model.config)
        except ValueError as refusal:
            refusals.append(str(refusal))
            continue
        state = _narrow(form, model)
        if isinstance(form, StateDictFormat):
            prefix = f"{form.prefix}." if model.base_model is model else ""
            state.update({name.removeprefix(prefix): t for name, t in form.buffers(model.config).items()})
            return NativeCheckpoint(config, state)
        return _take_over(_build(theirs, config, state, model.device, model.dtype), model)
    raise ValueError("; ".join(refusals))


def _narrow(form: NativeFormat, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters under the format's names, in the model's dtype unless that changes a value of any of them."""
    theirs = form.names_for(model.config)
    state = {theirs(name): tensor.clone() for name, tensor in model.state_dict().items()}
    wide = {name: tensor.to(model.dtype) for name, tensor in state.items() if tensor.dtype != model.dtype}
    if all(torch.equal(narrow.to(state[name].dtype), state[name]) for name, narrow in wide.items()):
        state.update(wide)
    return state


def _build(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    state: dict[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """A model of ``model_class`` with the tensors of ``state`` as they are, dtypes included."""
    with no_init_weights(), torch.device(device):
        model = model_class._from_config(config, dtype=dtype)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def _take_over(model: PreTrainedModel, source: PreTrainedModel) -> PreTrainedModel:
    """Give ``model`` the name, generation config and training mode of ``source``."""
    model.config.name_or_path = source.config.name_or_path
    if source.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)
    return model.train(source.training)
