"""The registry of architectures, mixers and feed-forwards, and the loading of plugins.

A plugin is any distribution with an entry point in the group ``hf_archs.plugins`` that names a module. The module
registers its parts and architectures when it is imported. Built-in plugins work the same way.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hf_archs.errors import did_you_mean, similar
from hf_archs.native.hosts import ROLES, enter_adapter_targets, enter_names
from hf_archs.parts import PartConfig, RoutedFeedForward, StateSpec, TokenMixer

if TYPE_CHECKING:
    from hf_archs.native.formats import NativeFormat

ENTRY_POINT_GROUP = "hf_archs.plugins"


@dataclass(frozen=True)
class Mixer:
    """A registered token mixer; see `register_mixer` for its fields."""

    name: str
    module_class: type[nn.Module]
    config_class: type[PartConfig]
    state: Callable[[Any], dict[str, StateSpec]]
    layer_type: Callable[[Any], str]
    parts: Callable[[Any], Iterable[tuple[str, PartConfig]]] | None
    window: Callable[[Any], int] | None
    follows_pairs: Callable[[Any], bool]
    shows_weights: bool
    lora_targets: tuple[str, ...]
    even_targets: tuple[str, ...]
    tiny: Mapping[str, Any]


@dataclass(frozen=True)
class FeedForward:
    """A registered feed-forward; see `register_feed_forward` for its fields."""

    name: str
    module_class: type[nn.Module]
    config_class: type[PartConfig]
    tp_plan: Callable[[Any], dict[str, str]] | None
    ep_plan: Callable[[Any], dict[str, str]] | None
    lora_targets: tuple[str, ...]
    even_targets: tuple[str, ...]
    tiny: Mapping[str, Any]
    conversions: tuple[WeightConverter | WeightRenaming, ...]

    @property
    def routes(self) -> bool:
        """Whether it has a router."""
        return issubclass(self.module_class, RoutedFeedForward)


@dataclass(frozen=True, init=False)
class Architecture:
    """A registered architecture.

    Attributes:
        name: name in the registry, on the command line and in the documents.
        config_class, model_class, ...: the classes, found in ``modeling`` by their bases.
        tiny: config fields of the tiny model in tests, besides the ``tiny`` of its mixer.
        sizes: config fields of each named size of ``hf-archs init``.
        native_formats: checkpoint formats of other libraries that can be read and written.
    """

    name: str
    modeling: ModuleType | None
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    causal_lm_class: type[PreTrainedModel]
    masked_lm_class: type[PreTrainedModel]
    sequence_classification_class: type[PreTrainedModel]
    token_classification_class: type[PreTrainedModel]
    question_answering_class: type[PreTrainedModel]
    tiny: Mapping[str, Any]
    sizes: Mapping[str, Mapping[str, Any]]
    native_formats: tuple[NativeFormat, ...]

    def __init__(
        self,
        name: str,
        modeling: ModuleType | None = None,
        *,
        tiny: Mapping[str, Any] | None = None,
        sizes: Mapping[str, Mapping[str, Any]] | None = None,
        native_formats: Sequence[NativeFormat] = (),
        lora_targets: Sequence[str] = (),
        even_targets: Sequence[str] = (),
        **classes: type,
    ):
        """
        Args:
            name, tiny, sizes, native_formats: see above.
            modeling: the module with the model classes, one for each Auto class.
            lora_targets, even_targets: replace the targets of its mixers and feed-forwards.
            classes: the classes one by one, as up to 0.1; this warns.

        Raises:
            TypeError: for a class that is missing in ``modeling``, or an unknown argument.
        """
        if unknown := sorted(set(classes) - {"config_class", "mixer_class", *ROLES}):
            raise TypeError(f"architecture {name!r}: there is no argument {unknown[0]!r}")
        if modeling is None:
            warnings.warn(
                f"hf_archs.Architecture({name!r}): pass modeling=, the module that its classes stand in, in place of "
                f"{', '.join(classes)}, which the next release does not take",
                FutureWarning,
                stacklevel=2,
            )
        classes.pop("mixer_class", None)  # no longer used
        own = {"_lora_targets": tuple(lora_targets), "_even_targets": tuple(even_targets)}
        vars(self).update(name=name, modeling=modeling, **{**_find_classes(name, modeling), **classes}, **own)
        vars(self).update(tiny=tiny or {}, sizes=sizes or {}, native_formats=tuple(native_formats))

    @property
    def model_type(self) -> str:
        """The ``model_type`` of the config, as in ``config.json``."""
        return self.config_class.model_type

    def parts(self) -> list[Mixer | FeedForward]:
        """The mixers and feed-forwards of a pure stack; all registered parts for other architectures."""
        return self._stacked or [*_mixers.values(), *_feed_forwards.values()]

    @cached_property
    def _stacked(self) -> list[Mixer | FeedForward]:
        """The parts of a pure stack; an empty list for other architectures."""
        if self._mixer is None:
            return []
        plans = self.tiny_config().layer_plans()
        feed_forwards = {plan.feed_forward: None for plan in plans if plan.feed_forward is not None}
        return [self._mixer, *map(get_feed_forward, feed_forwards)]

    @property
    def _mixer(self) -> Mixer | None:
        """The mixer of a pure stack; None for other architectures."""
        name = getattr(self.config_class, "mixer_type", None)
        return None if name is None else get_mixer(name)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Names of the linear layers that LoRA adapts by default; a model has a part of them."""
        gathered = dict.fromkeys(target for part in self.parts() for target in part.lora_targets)
        return self._lora_targets or tuple(gathered)  # type: ignore[attr-defined]

    @property
    def even_targets(self) -> tuple[str, ...]:
        """The ``lora_targets`` whose widths are multiples of ``hidden_size`` or a head's size in every part.

        They are the targets of adapters that cut a matrix into blocks.
        """
        uneven = {name for part in self.parts() for name in {*part.lora_targets} - {*part.even_targets}}
        even = tuple(name for name in self.lora_targets if name not in uneven)
        return self._even_targets or even  # type: ignore[attr-defined]

    def tiny_config(self, **overrides: Any) -> Any:
        """A config with vocabulary 128, hidden size 64 and two layers, or up to four if the architecture needs them."""
        own = {} if self._mixer is None else self._mixer.tiny
        fields = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, **own, **self.tiny, **overrides}
        return self.config_class(**fields)

    def auto_classes(self) -> dict[str, tuple[type, type]]:
        """Each Auto class and the class it resolves to, by the Auto class's name."""
        return {auto.__name__: (auto, getattr(self, role)) for role, (auto, _) in ROLES.items()}


def _find_classes(name: str, modeling: ModuleType | None) -> dict[str, type]:
    if modeling is None:
        return {}
    own = [c for c in vars(modeling).values() if isinstance(c, type) and c.__module__ == modeling.__name__]
    found: dict[str, type] = {}
    for role, (_, base) in ROLES.items():
        there = [c for c in own if any(parent.__name__ == base for parent in c.__mro__[1:])]
        if len(there) != 1:
            names = ", ".join(c.__name__ for c in there) or "none"
            raise TypeError(f"architecture {name!r}: {modeling.__name__} has {names} on {base}; allowed is one class")
        found[role] = there[0]
    return {**found, "config_class": found["model_class"].config_class}  # type: ignore[attr-defined]


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
    module_class: type[TokenMixer],
    config_class: type[PartConfig],
    *,
    state: Callable[[Any], dict[str, StateSpec]],
    layer_type: Callable[[Any], str] = lambda config: "linear_attention",
    parts: Callable[[Any], Iterable[tuple[str, PartConfig]]] | None = None,
    window: Callable[[Any], int] | None = None,
    follows_pairs: Callable[[Any], bool] = lambda config: False,
    shows_weights: bool = False,
    lora_targets: Sequence[str] = (),
    even_targets: Sequence[str] = (),
    tiny: Mapping[str, Any] | None = None,
) -> Mixer:
    """Make a token mixer available to every architecture under ``name``.

    Args:
        module_class, config_class: a `hf_archs.parts.TokenMixer`, constructed as ``module_class(config)``.
        state: function from a config to the states of the mixer.
        layer_type: function from a config to the layer type in transformers' terms.
        parts: for several mixers side by side, function from a config to the registered name and config of each.
        window: for a mixer with a window, function from a config to its number of tokens.
        follows_pairs: function from a config to whether the mixer follows masks of four dimensions
            (`hf_archs.cache.call.call.pairs`).
        shows_weights: whether it passes attention weights to `hf_archs.cache.call.call.show`.
        lora_targets: names of its linear layers that LoRA adapts by default.
        even_targets: the ``lora_targets`` whose widths are multiples of ``hidden_size`` or of a head's size.
        tiny: config fields of the tiny mixer in tests.

    Raises:
        ValueError: for a name that is taken.
        TypeError: for a ``config_class`` that does not inherit from `hf_archs.parts.PartConfig`.
    """
    if not (isinstance(config_class, type) and issubclass(config_class, PartConfig)):
        raise TypeError(f"mixer {name!r}: config_class is {config_class!r}, which is no subclass of PartConfig")
    module: Any = module_class  # a Protocol is no nn.Module for mypy
    targets, even = tuple(lora_targets), tuple(even_targets)
    entry = Mixer(
        name,
        module,
        config_class,
        state,
        layer_type,
        parts,
        window,
        follows_pairs,
        shows_weights,
        targets,
        even,
        tiny or {},
    )
    _add("mixer", _mixers, name, entry)
    _enter_parts()
    return entry


def get_mixer(name: str) -> Mixer:
    """The registered mixer ``name``; raises a `ValueError` that lists similar names."""
    return _get("mixer", _mixers, name)


def mixers() -> list[str]:
    """The names of all registered mixers, sorted."""
    return sorted(_mixers)


def register_feed_forward(
    name: str,
    module_class: type[nn.Module],
    config_class: type[PartConfig],
    *,
    tp_plan: Callable[[Any], dict[str, str]] | None = None,
    ep_plan: Callable[[Any], dict[str, str]] | None = None,
    lora_targets: Sequence[str] = (),
    even_targets: Sequence[str] = (),
    tiny: Mapping[str, Any] | None = None,
    conversions: Sequence[WeightConverter | WeightRenaming] = (),
) -> FeedForward:
    """Make a feed-forward available to every architecture under ``name``.

    Args:
        module_class: constructed as ``module_class(config)``, and called with hidden states (b, l, d), to the same; a
            `hf_archs.parts.RoutedFeedForward` if it has a router.
        config_class: a subclass of `hf_archs.parts.PartConfig`.
        tp_plan: function from a config to the tensor-parallel styles of its layers, in transformers' terms.
        ep_plan: function from a config to the expert-parallel styles of its experts.
        lora_targets, even_targets, tiny: as in `register_mixer`.
        conversions: between its parameters in memory and in files, with names from ``feed_forward.`` on.

    Raises:
        ValueError: for a name that is taken.
        TypeError: for a ``config_class`` that does not inherit from `hf_archs.parts.PartConfig`.
    """
    if not (isinstance(config_class, type) and issubclass(config_class, PartConfig)):
        raise TypeError(f"feed-forward {name!r}: config_class is {config_class!r}, which is no subclass of PartConfig")
    targets, even = tuple(lora_targets), tuple(even_targets)
    entry = FeedForward(
        name, module_class, config_class, tp_plan, ep_plan, targets, even, tiny or {}, tuple(conversions)
    )
    _add("feed-forward", _feed_forwards, name, entry)
    _enter_parts()
    return entry


def get_feed_forward(name: str) -> FeedForward:
    """The registered feed-forward ``name``; raises a `ValueError` that lists similar names."""
    return _get("feed-forward", _feed_forwards, name)


def feed_forwards() -> list[str]:
    """The names of all registered feed-forwards, sorted."""
    return sorted(_feed_forwards)


def register(architecture: Architecture) -> Architecture:
    """Register an architecture here and with every Auto class of transformers.

    Raises:
        TypeError: for a config class that is no `PreTrainedConfig`, or has no ``model_type``.
        ValueError: for a name, model type or config class name that is taken; nothing is registered then.
    """
    config_class = architecture.config_class
    if not (isinstance(config_class, type) and issubclass(config_class, PreTrainedConfig)):
        raise TypeError(
            f"architecture {architecture.name!r}: config_class is {config_class!r}, which is no config class"
        )
    if not config_class.model_type:
        raise TypeError(f"architecture {architecture.name!r}: {config_class.__name__} has no model_type")
    for other in _architectures.values():  # transformers refuses only its own model types
        if other.name != architecture.name and other.model_type == config_class.model_type:
            raise ValueError(
                f"architecture {architecture.name!r}: model type {config_class.model_type!r} is registered already, "
                f"by {_owner(other)}"
            )
    if config_class.__name__ in CONFIG_MAPPING_NAMES.values():  # Auto classes distinguish configs by class name
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
    enter_names(architecture)
    enter_adapter_targets(architecture)
    _register_conversions(architecture)
    return architecture


def _enter_parts() -> None:
    """Update the registered architectures for a new part."""
    for architecture in _architectures.values():
        if not architecture._stacked:
            enter_adapter_targets(architecture)
        _register_conversions(architecture)


def _register_conversions(architecture: Architecture) -> None:
    """Register the weight conversions of all feed-forwards, and of the architecture's native formats."""
    owners: list[Any] = [*_feed_forwards.values(), *architecture.native_formats]
    conversions = [conversion for owner in owners for conversion in owner.conversions]
    register_checkpoint_conversion_mapping(architecture.model_type, conversions, overwrite=True)


def architectures() -> list[str]:
    """The names of all registered architectures, sorted."""
    return sorted(_architectures)


def get_architecture(name: str) -> Architecture:
    """The registered architecture ``name``; raises a `ValueError` that lists similar names."""
    return _get("architecture", _architectures, name)


def find_architecture(config_class: type) -> Architecture | None:
    """The architecture of a config class or of its base, or None."""
    return next((a for a in _architectures.values() if issubclass(config_class, a.config_class)), None)


def distribution_of(architecture: Architecture) -> str:
    """The name of the installed distribution that provides an architecture, for ``pip install``."""
    module = architecture.config_class.__module__.partition(".")[0]
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry_point.module.partition(".")[0] == module and entry_point.dist:
            return entry_point.dist.name
    return module


def failed_plugins() -> dict[str, str]:
    """The plugins that could not be imported, each with its error."""
    return dict(_failed)


def load_plugins(entry_points: Iterable[importlib.metadata.EntryPoint] | None = None) -> None:
    """Import every installed plugin once. A plugin that fails causes a warning, and does not stop the others."""
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
