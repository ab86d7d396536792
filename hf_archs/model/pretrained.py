"""The base of every model class: initialising, loading and saving weights."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import REPOCARD_NAME
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_archs.cache.call import NEW_NAME, OLD_NAME, call, during
from hf_archs.config.model import ArchConfig
from hf_archs.model.block import ArchBlock, AttentionWeights
from hf_archs.model.sharding import Shardable
from hf_archs.model.watching import watch_trainers
from hf_archs.native import hub, model_card
from hf_archs.native.reading import WHERE, Checkpoint, Reading, prepare, unpickled
from hf_archs.parts import SelfInitialized
from hf_archs.registry import get_mixer


class ArchPreTrainedModel(Shardable, PreTrainedModel):
    """Base of every model class of this library."""

    config_class = ArchConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ArchBlock"]
    _skip_keys_device_placement = [OLD_NAME, NEW_NAME]
    _is_stateful = False  # the cache can roll back, so assisted decoding works
    _can_compile_fullgraph = True
    _supports_sdpa = True
    _supports_context_parallel = False  # the order of real tokens and the states need whole rows
    # the parameters of recurrences, in a submodule `ssm` of the mixer, and the load-balancing bias of routers
    _keep_in_fp32_modules_strict = ["ssm", "e_score_correction_bias"]

    @property
    def _can_record_outputs(self) -> dict[str, type[nn.Module]]:  # type: ignore[override]
        mixer = self.config.mixer_type
        shown = mixer is None or get_mixer(mixer).shows_weights
        return {"hidden_states": ArchBlock, **({"attentions": AttentionWeights} if shown else {})}

    def post_init(self) -> None:
        """As in transformers; the lists of modules to keep in float32 are reduced to modules of this model."""
        super().post_init()
        model_card.tag(self)
        # readers of the list expect every name to match something
        names = {part for name in self.state_dict() for part in name.split(".")}
        kept: Any = set(self._keep_in_fp32_modules_strict or ()) & names
        self._keep_in_fp32_modules_strict = kept
        # quantisers leave these modules alone, and match full names
        states = {name: module for name, module in self.named_modules() if name.rpartition(".")[2] == "ssm"}
        self._keep_in_fp32_modules = {*states, *(self._keep_in_fp32_modules or ())}
        for module in states.values():  # also in a model that is built in half precision
            if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in module.parameters()):
                module.float()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # for custom code transformers skips modules without direct parameters (mixers, blocks), lest they overwrite
        # loaded weights; ours use `transformers.initialization`, which does not
        super()._initialize_weights(module)

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """As in transformers, but without comparing the weights of layers that share a module.

        They are one tensor, and quantised weights cannot be compared.
        """
        if missing_keys is not None:
            weights = dict(self.named_parameters(remove_duplicate=False))
            pairs = self.all_tied_weights_keys.items()
            missing_keys |= {name for name, first in pairs if name in weights and weights[name] is weights.get(first)}
        super().tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """True: the loss takes ``num_items_in_batch``. Every new `Trainer` reads this, and is watched from then on."""
        watch_trainers()
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SelfInitialized) and not isinstance(module, PreTrainedModel):
            module.init_weights()
        if isinstance(module, ArchBlock) and self.config.rescale_prenorm_residual:
            # children are initialised before their parents, so the projections have their plain values here
            plans = self.config.layer_plans()
            additions = sum((plan.mixer is not None) + (plan.feed_forward is not None) for plan in plans)
            for name, parameter in module.named_parameters():
                if name.endswith(("out_proj.weight", "down_proj.weight", "experts.down_proj")):
                    init.normal_(parameter, std=self.config.initializer_range / math.sqrt(additions))

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers looks for the call in the module of the class, not in its mixers

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.config_class.base_model_ep_plan is not None  # a config class without it has no experts

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As in transformers, with ``hf_archs`` as the default."""
        if requested_experts is None and self._can_set_experts_implementation() and "hf_archs" in ALL_EXPERTS_FUNCTIONS:
            return "hf_archs"
        return super().get_correct_experts_implementation(requested_experts)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        checkpoint: Checkpoint | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, and for native checkpoints, see `hf_archs.native.reading`.

        Args:
            checkpoint: the checkpoint of the folder or repository, if the caller has inspected it already.

        Raises:
            ValueError: for a checkpoint of another architecture, or with an option that this library lacks; and for
                pickled weights, unless ``use_safetensors=False``.
            CheckpointMismatch: a RuntimeError, for a tensor of another shape than the config's; and for missing or
                unexpected tensors, unless ``output_loading_info=True`` lists them; see
                `hf_archs.native.reading.Reading.check`.
            SafetensorError: for a corrupt or truncated weights file.
            TransferError: an OSError, for a failed download, and for a downloaded weights file whose sha256 is not the
                Hub's; see `hf_archs.native.hub`.
        """
        checkpoint = prepare(cls, pretrained_model_name_or_path, kwargs, checkpoint)
        with unpickled(checkpoint, pretrained_model_name_or_path, kwargs) as moved:
            if moved is not None:
                loaded: Any = cls.from_pretrained(moved.source, *model_args, checkpoint=moved, **kwargs)
                model = loaded[0] if isinstance(loaded, tuple) else loaded
                model.config.name_or_path = str(pretrained_model_name_or_path)
                return loaded
        reading = None
        if kwargs.get("state_dict") is None:  # a state dict of the caller may hold some weights only
            reading = Reading(
                pretrained_model_name_or_path,
                checkpoint,
                any_shape=kwargs.get("ignore_mismatched_sizes", False),
                reported=kwargs.get("output_loading_info", False),
            )
        where = {name: kwargs[name] for name in WHERE & kwargs.keys()}
        try:
            with during(reading=reading), hub.one_sentence(pretrained_model_name_or_path, where):
                loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise SafetensorError(
                f"the weights of {pretrained_model_name_or_path} are corrupt or truncated ({error}); "
                "restore them from where they came"
            ) from error
        if checkpoint is not None and checkpoint.native is not None:
            # else transformers would save under the native names
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model._weight_conversions = get_model_conversion_mapping(model)
        return loaded

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: dict | None, checkpoint_files: list[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        # the weights of models and of adapters that transformers loads into them
        hub.check_downloads(checkpoint_files or ())
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As in transformers; also writes a model card, unless the folder has one that was written by hand."""
        path = Path(save_directory) / REPOCARD_NAME
        own = path.read_bytes() if path.is_file() else None
        if own is not None and model_card.is_automatic(own.decode(errors="replace")):
            own = None
        with during(card=own):
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, *args, **kwargs)
        if not is_main_process or os.path.isfile(save_directory):
            return
        if own is not None:
            path.write_bytes(own)  # transformers has overwritten it with the repository's card
        elif not push_to_hub and not getattr(self, "_hf_peft_config_loaded", False):
            model_card.save_card(self, save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # the folder has the repository's card, or an empty one from transformers
        path = Path(working_dir) / REPOCARD_NAME
        if call.card is not None and model_card.is_automatic(path.read_text(encoding="utf-8")):
            path.write_bytes(call.card)
        elif not getattr(self, "_hf_peft_config_loaded", False):
            model_card.save_card(self, working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """As in transformers; a checkpoint that does not fit raises `CheckpointMismatch`, before memory is taken."""
        super().mark_tied_weights_as_initialized(loading_info)
        if call.reading is not None:
            call.reading.pass_over_buffers(loading_info)
        if call.reading is not None and getattr(self, "hf_quantizer", None) is None:  # stores weights in parts
            missing = set(loading_info.missing_keys)
            self._adjust_missing_and_unexpected_keys(loading_info)
            call.reading.check(self, loading_info)
            loading_info.missing_keys = missing  # transformers initialises those that it does not report, too

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: for a pipeline, if layers share weights, which may be in different stages.
        """
        if mesh_manager is not None and distributed_config.pp_size > 1 and model.base_model._tied_weights_keys:
            raise ValueError(
                f"pp_size is {distributed_config.pp_size}, and layers of this {cls.__name__} share weights, which one "
                "stage of a pipeline would hold and another use; allowed is 1"
            )
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: the stub that is always saved serves every Auto class."""
