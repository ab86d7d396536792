"""Architectures, mixers and feed-forwards by name, and the plugins that bring them.

A plugin is any distribution with an entry point in the group ``hf_archs.plugins`` that names a module; the module
registers what it brings when it is imported. The built-in plugins use the same door.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hf_archs.errors import did_you_mean, similar

if TYPE_CHECKING:
    from hf_archs.formats import NativeFormat

ENTRY_POINT_GROUP = "hf_archs.plugins"


@dataclass(frozen=True)
class StateSpec:
    """One tensor of a mixer's state.

    Attributes:
        kind: ``"conv"`` (a window of past inputs) or ``"recurrent"``: where transformers' cache keeps it.
        shape: without the batch dimension. The last dimension may be None: time, for a mixer that needs all it has
            read. Such a state grows with every token; its last column is the row's latest token, and zeros in the
            first columns are tokens that never were (a static cache begins with nothing else).
        dtype: None for the dtype of the activations.
        together: whether the values of a column of a growing state lie together in a static cache, for mixers that read
            column by column, and not those of a row.
    """

    kind: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype | None = None
    together: bool = False

    @property
    def grows(self) -> bool:
        """Whether the state holds something of every token."""
        return self.shape[-1:] == (None,)


@dataclass(frozen=True)
class Mixer:
    """A registered token mixer: its module class, its config class, and a function from config to its states.

    ``layer_type`` says in transformers' words what a layer of it is, from its config.
    """

    name: str
    module_class: type[nn.Module]
    config_class: type
    state: Callable[[Any], dict[str, StateSpec]]
    layer_type: Callable[[Any], str]


@dataclass(frozen=True)
class FeedForward:
    """A registered feed-forward: its module class and its config class."""

    name: str
    module_class: type[nn.Module]
    config_class: type


@dataclass(frozen=True)
class Architecture:
    """A registered architecture: the classes, and what the library and its users need to know of it.

    Attributes:
        name: what the registry, the command line and the documents call it.
        lora_targets: names of the linear layers that LoRA adapts by default.
        even_targets: those of them whose widths are multiples of ``hidden_size`` or of a head's size, for adapters
            that cut a matrix into blocks; empty: all.
        tiny: config fields of the tiny model that tests use.
        sizes: config fields of each named size that ``hf-archs init`` offers.
        native_formats: the foreign checkpoint formats that can be read and written.
    """

    name: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    causal_lm_class: type[PreTrainedModel]
    masked_lm_class: type[PreTrainedModel]
    sequence_classification_class: type[PreTrainedModel]
    token_classification_class: type[PreTrainedModel]
    question_answering_class: type[PreTrainedModel]
    mixer_class: type[nn.Module]
    lora_targets: tuple[str, ...]
    even_targets: tuple[str, ...] = ()
    tiny: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    native_formats: tuple[NativeFormat, ...] = ()

    @property
    def model_type(self) -> str:
        """The ``model_type`` of the config, as it stands in ``config.json``."""
        return self.config_class.model_type

    def tiny_config(self, **overrides: Any) -> Any:
        """A config of vocabulary 128, width 64 and two layers (unless the architecture needs up to four)."""
        fields = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, **self.tiny, **overrides}
        return self.config_class(**fields)

    def auto_classes(self) -> dict[str, tuple[type, type]]:
        """The Auto class and the class it resolves to, by the name that stands in ``auto_map``."""
        return {
            "AutoModel": (AutoModel, self.model_class),
            "AutoModelForCausalLM": (AutoModelForCausalLM, self.causal_lm_class),
            "AutoModelForMaskedLM": (AutoModelForMaskedLM, self.masked_lm_class),
            "AutoModelForSequenceClassification": (
                AutoModelForSequenceClassification,
                self.sequence_classification_class,
            ),
            "AutoModelForTokenClassification": (AutoModelForTokenClassification, self.token_classification_class),
            "AutoModelForQuestionAnswering": (AutoModelForQuestionAnswering, self.question_answering_class),
        }


_architectures: dict[str, Architecture] = {}
_mixers: dict[str, Mixer] = {}
_feed_forwards: dict[str, FeedForward] = {}
_failed: dict[str, str] = {}
_loaded: set[str] = set()


def _add(kind: str, table: dict[str, Any], name: str, entry: Any) -> None:
    if name in table:
        raise ValueError(f"{kind} {name!r} is registered already, by {_owner(table[name])}")
    table[name] = entry


def _owner(entry: Any) -> str:
    return getattr(entry, "config_class", type(entry)).__module__


def _get(kind: str, table: Mapping[str, Any], name: str) -> Any:
    if name in table:
        return table[name]
    near = did_you_mean(similar(name, table))
    failed = "".join(f"; plugin {plugin} failed: {why}" for plugin, why in _failed.items())
    registered = f"{near} registered are {', '.join(sorted(table)) or 'none'}".lstrip()
    raise ValueError(f"no {kind} {name!r}; {registered}{failed}")


def register_mixer(
    name: str,
    module_class: type[nn.Module],
    config_class: type,
    *,
    state: Callable[[Any], dict[str, StateSpec]],
    layer_type: Callable[[Any], str] = lambda config: "linear_attention",
) -> Mixer:
    """Make a token mixer available to every architecture under ``name``.

    Args:
        module_class: built as ``module_class(config)`` and called as
            ``module(hidden_states, state=slot, lengths=..., seq_idx=...)``; see `hf_archs.backbone.ArchBlock`.
        config_class: a subclass of `hf_archs.configuration.MixerConfig`.
        state: the mixer's states, from its config.
        layer_type: what a layer of it is, in transformers' words, from its config.

    Raises:
        ValueError: where the name is taken.
        TypeError: where ``config_class`` is no mixer config.
    """
    from hf_archs.configuration import MixerConfig  # configuration imports this module

    if not (isinstance(config_class, type) and issubclass(config_class, MixerConfig)):
        raise TypeError(f"mixer {name!r}: config_class is {config_class!r}, which is no subclass of MixerConfig")
    entry = Mixer(name, module_class, config_class, state, layer_type)
    _add("mixer", _mixers, name, entry)
    return entry


def get_mixer(name: str) -> Mixer:
    """The registered mixer of that name; a `ValueError` lists the near names."""
    return _get("mixer", _mixers, name)


def register_feed_forward(name: str, module_class: type[nn.Module], config_class: type) -> FeedForward:
    """Make a feed-forward available under ``name``: ``module_class(config)``, called with the hidden states.

    Raises:
        ValueError: where the name is taken.
    """
    entry = FeedForward(name, module_class, config_class)
    _add("feed-forward", _feed_forwards, name, entry)
    return entry


def get_feed_forward(name: str) -> FeedForward:
    """The registered feed-forward of that name; a `ValueError` lists the near names."""
    return _get("feed-forward", _feed_forwards, name)


def register(architecture: Architecture) -> Architecture:
    """Register an architecture here and with every Auto class of transformers.

    Raises:
        TypeError: where its config class is no config, or has no ``model_type``.
        ValueError: where its name, its model type or the name of its config class is taken; nothing is registered
            then.
    """
    from hf_archs import formats  # which imports this module

    config_class = architecture.config_class
    if not (isinstance(config_class, type) and issubclass(config_class, PreTrainedConfig)):
        raise TypeError(
            f"architecture {architecture.name!r}: config_class is {config_class!r}, which is no config class"
        )
    if not config_class.model_type:
        raise TypeError(f"architecture {architecture.name!r}: {config_class.__name__} has no model_type")
    for other in _architectures.values():  # transformers refuses its own types only
        if other.name != architecture.name and other.model_type == config_class.model_type:
            raise ValueError(
                f"architecture {architecture.name!r}: model type {config_class.model_type!r} is registered already, "
                f"by {_owner(other)}"
            )
    if config_class.__name__ in CONFIG_MAPPING_NAMES.values():  # Auto classes tell configs apart by this name
        raise ValueError(
            f"architecture {architecture.name!r}: transformers has a {config_class.__name__} of its own; "
            f"allowed is another class name, such as Arch{config_class.__name__}"
        )
    _add("architecture", _architectures, architecture.name, architecture)
    try:
        AutoConfig.register(config_class.model_type, config_class)
    except ValueError as error:
        del _architectures[architecture.name]
        raise ValueError(f"architecture {architecture.name!r}: {error}") from error
    for auto_class, model_class in architecture.auto_classes().values():
        auto_class.register(config_class, model_class)  # type: ignore[attr-defined]
    _register_names(architecture)
    _register_adapter_targets(architecture)
    conversions = formats.expert_conversions()
    for form in architecture.native_formats:
        conversions += form.conversions
    register_checkpoint_conversion_mapping(config_class.model_type, conversions)
    return architecture


def _register_names(architecture: Architecture) -> None:
    """Enter the classes where hosts look names up: the Trainer shifts the labels of causal models by such a table, and
    `transformers serve` takes classes from transformers itself.
    """
    # it makes itself anew while its processors are imported, and who imported it before holds the first one
    held = (vars(module).get("transformers") for module in [*sys.modules.values()] if hasattr(module, "__dict__"))
    hosts = {id(host): host for host in (sys.modules["transformers"], *held) if isinstance(host, ModuleType)}
    for host in hosts.values():
        for named in (architecture.config_class, *(cls for _, cls in architecture.auto_classes().values())):
            setattr(host, named.__name__, named)
    for auto_class, model_class in architecture.auto_classes().values():
        if auto_class is not AutoModel:
            auto_class._model_mapping._model_mapping[architecture.model_type] = model_class.__name__  # type: ignore[attr-defined]


# adapters that cut a matrix into blocks of a fixed size
_EVEN = ("C3A", "MISS", "ROAD", "VBLORA")
# of IA3 (Liu et al. 2022, section 3.3): what states, keys and values are made of, and the inside of a feed-forward
_SCALED = ("in_proj", "x_proj", "k_proj", "v_proj", "down_proj")


def _register_adapter_targets(architecture: Architecture) -> None:
    """Enter the default targets of every kind of adapter."""
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


def architectures() -> list[str]:
    """The names of all registered architectures, sorted."""
    return sorted(_architectures)


def get_architecture(name: str) -> Architecture:
    """The registered architecture of that name; a `ValueError` lists the near names."""
    return _get("architecture", _architectures, name)


def find_architecture(config_class: type) -> Architecture | None:
    """The architecture that a config class belongs to, or None."""
    return next((a for a in _architectures.values() if issubclass(config_class, a.config_class)), None)


def distribution_of(architecture: Architecture) -> str:
    """The name of the installed distribution that brings an architecture: what a user would pip install."""
    module = architecture.config_class.__module__.partition(".")[0]
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry_point.module.partition(".")[0] == module and entry_point.dist:
            return entry_point.dist.name
    return module


def failed_plugins() -> dict[str, str]:
    """The plugins that could not be imported, with the cause."""
    return dict(_failed)


def load_plugins(entry_points: Iterable[importlib.metadata.EntryPoint] | None = None) -> None:
    """Import every installed plugin once. One that fails is named in a warning and leaves the others alone."""
    if entry_points is None:
        entry_points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    for entry_point in entry_points:
        if entry_point.value in _loaded:
            continue
        _loaded.add(entry_point.value)
        try:
            importlib.import_module(entry_point.module)
        except Exception as error:
            distribution = entry_point.dist.name if entry_point.dist else "an unknown distribution"
            _failed[entry_point.name] = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"hf-archs: plugin {entry_point.name!r} of {distribution} could not be loaded "
                f"({_failed[entry_point.name]}); everything else works",
                stacklevel=2,
            )
