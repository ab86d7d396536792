"""Distil a trained model with a growing state into one with a state of constant size.

Massaroli et al. 2023, "Laughing Hyena Distillery: Extracting Compact Recurrences From Convolutions",
https://arxiv.org/abs/2310.18780, section 3.
"""

import copy
from typing import Any

import torch
from transformers.initialization import no_init_weights

from hf_archs.model.pretrained import ArchPreTrainedModel
from hf_archs_hyena.configuration import ArchHyenaConfig
from hf_archs_hyena.filters import ImplicitFilter
from hf_archs_hyena.modal_fitting import fit_modal_filters


def distill_filters(
    model: ArchPreTrainedModel, modes: int = 32, length: int | None = None
) -> tuple[ArchPreTrainedModel, dict[str, torch.Tensor]]:
    """Copy a model, with its implicit filters replaced by fitted sums of modes.

    The copy decodes with a state of constant size and shares no memory with the model.

    Args:
        model: a Hyena model with implicit filters and any head.
        modes: modes per filter; more modes fit more closely.
        length: taps to fit, None for all ``max_positions``.

    Returns:
        The copy, and by name of each fitted filter module the relative error of every channel, ``|fit - taps| /
        |taps|`` over the fitted taps: (channels,), float64.

    Raises:
        ValueError: for a model without implicit filters or with modal filters of another number of modes, or for a
            length out of range.
    """
    config: Any = model.config
    filters = {name: module for name, module in model.named_modules() if isinstance(module, ImplicitFilter)}
    if not isinstance(config, ArchHyenaConfig) or not filters:
        raise ValueError(
            f"distill_filters: a {type(model).__name__} without implicit filters; allowed are Hyena models"
        )
    if "modal" in config.filter_types and config.modes != modes:
        raise ValueError(
            f"distill_filters: modes is {modes}; this model has modal filters, so allowed is {config.modes}"
        )
    length = config.max_positions if length is None else length
    if not 2 <= length <= config.max_positions:
        raise ValueError(
            f"distill_filters: length is {length}; allowed are 2 to max_positions = {config.max_positions}"
        )
    state = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{module}.") for module in filters)
    }
    errors = {}
    for name, module in filters.items():
        with torch.no_grad():
            log_decay, phase, residues, errors[name] = fit_modal_filters(module.taps(length), modes)
        fitted = {"log_decay": log_decay, "phase": phase, "residues": residues, "bias": module.bias.detach().clone()}
        state.update({f"{name}.{key}": tensor for key, tensor in fitted.items()})
    config = copy.deepcopy(config)
    config.filter_types = ["modal" if kind == "implicit" else kind for kind in config.filter_types]
    config.modes = modes
    with no_init_weights(), torch.device(model.device):
        distilled = type(model)._from_config(config, dtype=model.dtype)
    distilled.load_state_dict(state, assign=True)
    distilled.tie_weights()
    if model.can_generate():
        distilled.generation_config = copy.deepcopy(model.generation_config)
    return distilled.train(model.training), errors
