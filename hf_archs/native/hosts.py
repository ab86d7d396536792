"""Registration of an architecture in the tables of transformers and PEFT."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

if TYPE_CHECKING:
    from hf_archs.registry import Architecture


# attribute of an architecture -> the Auto class, and the base class by which a plugin's class is recognised
ROLES: dict[str, tuple[Any, str]] = {
    "model_class": (AutoModel, "ArchModel"),
    "causal_lm_class": (AutoModelForCausalLM, "ArchForCausalLM"),
    "masked_lm_class": (AutoModelForMaskedLM, "ArchForMaskedLM"),
    "sequence_classification_class": (AutoModelForSequenceClassification, "GenericForSequenceClassification"),
    "token_classification_class": (AutoModelForTokenClassification, "GenericForTokenClassification"),
    "question_answering_class": (AutoModelForQuestionAnswering, "GenericForQuestionAnswering"),
}


def enter_names(architecture: Architecture) -> None:
    """Enter the classes in the tables that transformers looks up by name.

    The Trainer finds the causal models, whose labels it shifts, in such a table, and `transformers serve` takes classes
    from the module ``transformers``.
    """
    # transformers replaces its module while its processors are imported; earlier importers hold the first module
    held = (vars(module).get("transformers") for module in [*sys.modules.values()] if hasattr(module, "__dict__"))
    hosts = {id(host): host for host in (sys.modules["transformers"], *held) if isinstance(host, ModuleType)}
    for host in hosts.values():
        for named in (architecture.config_class, *(cls for _, cls in architecture.auto_classes().values())):
            setattr(host, named.__name__, named)
    for auto_class, model_class in architecture.auto_classes().values():
        if auto_class is not AutoModel:
            auto_class._model_mapping._model_mapping[architecture.model_type] = model_class.__name__  # type: ignore[attr-defined]


# adapters that divide a matrix into blocks of a fixed size
_EVEN = ("C3A", "MISS", "ROAD", "VBLORA")
# IA3 (Liu et al. 2022, section 3.3) scales states, keys, values and a feed-forward's inside, at these projections
_SCALED = ("in_proj", "x_proj", "k_proj", "v_proj", "down_proj")


def enter_adapter_targets(architecture: Architecture) -> None:
    """Enter the default target modules of every kind of adapter in PEFT."""
    from peft.utils import constants

    targets = architecture.lora_targets
    scaled = [name for name in targets if name in _SCALED]
    own = {
        "IA3_TARGET": scaled or targets,
        "IA3_FEEDFORWARD": [name for name in scaled if name == "down_proj"],
        "LNTUNING_TARGET": ["norm", "feed_forward_norm"],
        **{f"{tuner}_TARGET": architecture.even_targets or targets for tuner in _EVEN},
    }
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING"):
            kind = name.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix("_MODULES_MAPPING")
            table[architecture.model_type] = [*own.get(kind, targets)]
