"""The config fields that all architectures share, and the plan of a layer."""

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict, validated_field
from packaging.version import InvalidVersion, Version
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from hf_archs import registry
from hf_archs.cache.call import NEW_NAME, OLD_NAME, call
from hf_archs.errors import did_you_mean, similar
from hf_archs.native import reading, stub
from hf_archs.native.formats import IDLE, MOST_LABELS, MOST_LAYERS
from hf_archs.parts import VERSION, PartConfig, StateSpec, check_range

logger = logging.get_logger(__name__)

FOLLOW = ("num_heads", "num_key_value_heads")  # PEFT's prompt and prefix tuning read these from a config's dict


def _is_newer(version: object) -> bool:
    """Whether ``version`` is later than the installed version of hf-archs."""
    try:
        return isinstance(version, str) and Version(version) > Version(VERSION)
    except InvalidVersion:
        return False


def _check_token_id(field: str, value: Any) -> None:
    """Refuse a negative id, for which transformers only warns: -1 would be the last row of the embedding.

    An ``eos_token_id`` of -1 is allowed: in transformers it means never.
    """
    if field == "eos_token_id" and value == -1:
        return
    if any(isinstance(token, int) and token < 0 for token in (value if isinstance(value, list) else [value])):
        never = "-1 for never, " if field == "eos_token_id" else ""
        raise ValueError(f"{field} is {value}; allowed are 0 to vocab_size - 1, {never}and None")


@dataclass(frozen=True)
class Shared:
    """The name of a part that layers share, and the rank of each layer's own additions; see `SiteLinear`."""

    name: str
    site_rank: int = 0


@dataclass(frozen=True)
class LayerPlan:
    """The mixer and the feed-forward of one layer, each a registered name and a config, or None.

    Layers with the same ``shared_mixer`` share one mixer module; likewise for ``shared_feed_forward``.
    """

    mixer: str | None
    mixer_config: PartConfig | None
    feed_forward: str | None = None
    feed_forward_config: PartConfig | None = None
    shared_mixer: Shared | None = None
    shared_feed_forward: Shared | None = None

    def states(self) -> dict[str, StateSpec]:
        """The states of the layer's mixer."""
        return {} if self.mixer is None else registry.get_mixer(self.mixer).state(self.mixer_config)

    def mixers(self) -> list[tuple[registry.Mixer, Any]]:
        """The mixers of the layer with their configs; mixers side by side are listed one by one."""
        if self.mixer is None:
            return []
        entry = registry.get_mixer(self.mixer)
        if entry.parts is None:
            return [(entry, self.mixer_config)]
        return [(registry.get_mixer(name), config) for name, config in entry.parts(self.mixer_config)]

    def linear_layers(self) -> list[str]:
        """Names of the mixer's linear layers in a block, except those of the recurrence, in ``ssm``."""
        if self.mixer is None:
            return []
        with torch.device("meta"):
            module = registry.get_mixer(self.mixer).module_class(self.mixer_config)
        linear = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
        return [f"mixer.{name}" for name in linear if "ssm" not in name.split(".")]

    def feed_forward_plan(self, kind: Literal["tp_plan", "ep_plan"]) -> dict[str, str]:
        """The feed-forward's tensor-parallel or expert-parallel styles, by names in a block."""
        if self.feed_forward is None:
            return {}
        plan = getattr(registry.get_feed_forward(self.feed_forward), kind)
        styles = {} if plan is None else plan(self.feed_forward_config)
        return {f"feed_forward.{name}": style for name, style in styles.items()}


@strict
class ArchConfig(PreTrainedConfig, PartConfig):
    """Base of every architecture's config.

    Args:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of blocks.
        norm_eps: added to the mean square, or the variance, in every norm.
        norm_type: the norm before every mixer and feed-forward and at the end, ``rms_norm`` or ``layer_norm``.
        embedding_multiplier: factor of the embeddings; the square root of hidden_size in some models.
        embedding_norm: whether a norm of ``norm_type`` follows the embedding (torchscale's ``layernorm_embedding``).
        residual_in_fp32: whether the residual stream is at least float32, whatever the dtype of the weights.
        initializer_range: standard deviation of embeddings and linear layers at initialisation.
        rescale_prenorm_residual: whether the initial output projections are divided by the square root of the number
            of residual additions (GPT-2, section 2.3).
        bidirectional: whether every mixer reads a row in both directions, with the same weights; for encoders.
        tie_word_embeddings: whether the language-model head has the weight of the embedding.
    """

    # the registered mixer of a pure stack; None if layers differ
    mixer_type: ClassVar[str | None] = None
    keys_to_ignore_at_inference: ClassVar[list[str]] = [OLD_NAME, NEW_NAME, "aux_loss", "router_logits"]
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads"}  # prompt tuning asks for it
    # input and output names of each module that a pipeline stage may hold
    base_model_pp_plan: ClassVar[dict[str, Any]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "layout"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    num_hidden_layers: int = 24
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    embedding_multiplier: float = 1.0
    embedding_norm: bool = False
    residual_in_fp32: bool = True
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    bidirectional: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = validated_field(partial(_check_token_id, "pad_token_id"), default=0)
    bos_token_id: int | None = validated_field(partial(_check_token_id, "bos_token_id"), default=0)
    eos_token_id: int | list[int] | None = validated_field(partial(_check_token_id, "eos_token_id"), default=0)

    def _check_host_fields(self, given: dict[str, Any]) -> None:
        """Check the fields that transformers uses before it checks their types.

        Args:
            given: the values that are not fields of the class.
        """
        dtype: Any = self.dtype
        known = dtype is None or isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype)
        self._allow(known, "dtype", "are torch's, such as 'bfloat16', and None")
        labels: Any = self.id2label
        numbered = isinstance(labels, dict) and all(str(key).removeprefix("-").isdecimal() for key in labels)
        self._allow(labels is None or numbered, "id2label", "is a dict of numbers and labels, and None")
        wanted: Any = self.output_hidden_states
        selected = isinstance(wanted, list) and all(isinstance(index, int) for index in wanted)
        self._allow(
            wanted is None or isinstance(wanted, int) or selected,
            "output_hidden_states",
            "are a bool, the index of a layer, a list of indices, and None",
        )
        count = given.get("num_labels", 2)
        if not (isinstance(count, int) and 0 <= count <= MOST_LABELS):
            raise ValueError(f"{type(self).__name__}: num_labels is {count!r}; allowed are 0 to {MOST_LABELS}")
        if given.get("per_layer_config") not in (None, {}):
            raise ValueError(
                f"{type(self).__name__} takes no per_layer_config; layers that differ are those of a layer_pattern"
            )

    def validate_sizes(self) -> None:
        """Raise a `ValueError` for sizes that are out of range."""
        check_range(self, "vocab_size", 1, 2**24)
        check_range(self, "num_hidden_layers", 1, MOST_LAYERS)
        check_range(self, "initializer_range", 0.0, 10.0)
        check_range(self, "embedding_multiplier", 1e-6, 1e6)

    def validate_token_ids(self) -> None:
        """Raise a `ValueError` for ids of special tokens outside the vocabulary."""
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, field)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and token >= self.vocab_size:
                    raise ValueError(
                        f"{type(self).__name__}: {field} is {value}; allowed are 0 to vocab_size - 1 = "
                        f"{self.vocab_size - 1}, and None"
                    )

    def layer_plan(self, layer_idx: int) -> LayerPlan:
        """The plan of layer ``layer_idx``; all layers of a pure stack have the same."""
        return LayerPlan(self.mixer_type, self)

    def instances(self) -> dict[str, tuple[str, PartConfig]]:
        """Every named mixer and feed-forward by its path in this config; a pure stack has none."""
        return {}

    def layer_plans(self) -> list[LayerPlan]:
        """The plan of every layer."""
        return [self.layer_plan(i) for i in range(self.num_hidden_layers)]

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # type: ignore[override]  # which depends on the fields
        """Tensor-parallel styles of the layers, by name.

        All linear layers of a mixer are sharded. The recurrence has few parameters, and runs on every rank.
        """
        plan: dict[str, str] = {}
        whole: set[str] = set()
        for layer in {(id(p.mixer_config), id(p.feed_forward_config)): p for p in self.layer_plans()}.values():
            own = dict.fromkeys(layer.linear_layers(), "colwise_gather_output")
            feed_forward = layer.feed_forward_plan("tp_plan")
            plan |= feed_forward | own
            # a style would also shard the low-rank additions of a shared layer, in the wrong dimensions
            if layer.shared_mixer is not None and layer.shared_mixer.site_rank:
                whole |= own.keys()
            if layer.shared_feed_forward is not None and layer.shared_feed_forward.site_rank:
                whole |= feed_forward.keys()
        return {f"layers.*.{name}": style for name, style in plan.items() if name not in whole}

    @property
    def layer_types(self) -> list[str]:
        """The layer types in transformers' terms; ``moe`` for a layer without a mixer, with experts or not."""
        return [
            "moe" if plan.mixer is None else registry.get_mixer(plan.mixer).layer_type(plan.mixer_config)
            for plan in self.layer_plans()
        ]

    @layer_types.setter
    def layer_types(self, value: list[str]) -> None:  # PEFT's shadow networks set the same value
        if list(value) != self.layer_types:
            raise ValueError(
                f"{type(self).__name__}: layer_types is {list(value)}; allowed is {self.layer_types}, which follows "
                "from the other fields"
            )

    def __getattr__(self, name: str) -> Any:
        if name == "num_key_value_heads":
            raise AttributeError(
                f"{type(self).__name__} has no num_key_value_heads: its layers are {', '.join(set(self.layer_types))}, "
                "and prefix tuning, quantised and paged caches need keys and values of all tokens in every layer"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __post_init__(self, **kwargs: Any) -> None:
        # first, since transformers and other checks compute with these sizes and iterate over the layers
        self.validate_mixer_sizes()
        self.validate_sizes()
        self._check_host_fields(kwargs)
        # values that follow from other fields, written to the file for tools that read only the file
        follow = {name: kwargs.pop(name, None) for name in FOLLOW if name not in self.__dataclass_fields__}
        self._check_names(kwargs, kwargs.pop("hf_archs_version", None))
        super().__post_init__(**kwargs)
        for name, given in follow.items():
            if given is None:
                continue
            self.validate()  # type: ignore[attr-defined]
            if given != getattr(self, name, None):
                raise ValueError(
                    f"{type(self).__name__}: {name} is {given}; allowed is {getattr(self, name, None)}, "
                    "which follows from the other fields"
                )

    def _check_names(self, given: Collection[str], written_by: object) -> None:
        """Refuse misspelt fields, which would have no effect; other unknown names are allowed, since tools add some.

        Args:
            given: names that are not fields.
            written_by: the version of hf-archs that wrote the file with these names, if any.

        Raises:
            ValueError: for a name that is similar to that of a field.
        """
        unknown = [name for name in given if not self._is_known(name)]
        if unknown and _is_newer(written_by):
            logger.warning(
                f"hf-archs {written_by} wrote this config, and the installed one, {VERSION}, does not know "
                f"{', '.join(unknown)}: the model may be another one; pip install -U hf-archs"
            )
            return
        for name, near in self._misspelt(unknown).items():
            raise ValueError(f"{type(self).__name__} has no field {name!r}; {did_you_mean(near)}")

    def _is_known(self, name: str) -> bool:
        return name in self.__dataclass_fields__ or hasattr(type(self), name) or name in IDLE or name[0] == "_"

    def _misspelt(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The names that are not fields but similar to some, with the similar fields."""
        own = [name for name in self.__dataclass_fields__ if name not in PreTrainedConfig.__dataclass_fields__]
        found = {}
        for name in names:
            if self._is_known(name):
                continue
            words = set(name.split("_"))
            inside = [field for field in own if len(words) > 1 and words < set(field.split("_"))]
            near = similar(name, own, most=1, cutoff=0.8) or inside
            if near:
                found[name] = near
        return found

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with this library's version and the ``auto_map``, and without misspelt fields."""
        output = super().to_dict()
        for name in self._misspelt(output):  # set on this object; a file with them would be refused
            del output[name]
        output["hf_archs_version"] = VERSION
        output.update({name: getattr(self, name) for name in FOLLOW if getattr(self, name, None) is not None})
        auto_map = stub.auto_map(type(self))
        if auto_map:
            output["auto_map"] = auto_map
        return output

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers; also writes the stub by which Auto classes find this library."""
        self.validate()  # type: ignore[attr-defined]  # before anything is written
        for name, near in self._misspelt(vars(self)).items():
            logger.warning(f"{type(self).__name__} has no field {name!r}, and it is not saved; {did_you_mean(near)}")
        if not os.path.isfile(save_directory):  # transformers raises its own error for a file
            stub.write_stub(type(self), save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; the config of a native checkpoint is converted to the fields of this class.

        Inside ``from_pretrained`` of a model no file is read, since it has inspected the checkpoint.

        Raises:
            ValueError: for a checkpoint of another architecture, or with an option that this library lacks.
        """
        checkpoint = None if call.reading is None else call.reading.checkpoint
        if checkpoint is not None and checkpoint.source == str(pretrained_model_name_or_path):
            others = {name: value for name, value in kwargs.items() if name not in reading.WHERE}
            return checkpoint.fields(cls), others
        raw, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return reading.read_config(raw, cls, pretrained_model_name_or_path), kwargs

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: the stub that is always saved serves every Auto class. (Copies of our files would not work.)"""
