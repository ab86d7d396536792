"""FSDP2 (`torch.distributed.fsdp.fully_shard`) for models with float32 states.

FSDP casts, gathers and reduces all parameters of a group in one dtype. The parameters of a recurrence, in ``ssm``, stay
in float32 beside half-precision weights, so they get a group of their own in every FSDP unit, whether the unit is made
by `fully_shard` below, by torch's, by transformers' plan or by accelerate.
"""

from collections import Counter
from typing import Any

from torch import nn


class Shardable:
    """Base of modules that become FSDP2 units; their states get a separate parameter group."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "__class__":  # the last step of torch's `fully_shard` on a module
            _set_states_apart(self)  # type: ignore[arg-type]


def fully_shard(model: nn.Module, *, reshard_after_forward: bool | int | None = None, **options: Any) -> nn.Module:
    """Shard a model by FSDP2, with a unit for each layer, shared part and ``ssm`` module, and for the embeddings.

    Call it on every process before the optimizer is made. Untied embeddings are a unit, and final norm and head are
    another, which stays gathered until the backward. Tied embeddings are in the root unit, with the final norm.

    Args:
        model: a model of this library, with or without an adapter.
        reshard_after_forward, options: as in `torch.distributed.fsdp.fully_shard`. An ``mp_policy`` casts no states.

    Returns:
        ``model``.

    Raises:
        ValueError: if there is no model of this library in it.
    """
    from torch.distributed import fsdp

    ours = (module for module in model.modules() if isinstance(module, Shardable))
    backbone: Any = next((module for module in ours if hasattr(module, "layers")), None)
    if backbone is None:
        raise ValueError(f"model is a {type(model).__name__}; allowed is a model of hf_archs")
    own = {**options, "reshard_after_forward": reshard_after_forward}
    parts = Counter(part for layer in backbone.layers for part in (layer.mixer, layer.feed_forward) if part is not None)
    for states in _state_modules(backbone):
        fsdp.fully_shard(states, **{**own, "mp_policy": _uncast()})
    for part in (part for part, layers in parts.items() if layers > 1):
        fsdp.fully_shard(part, **own)
    for layer in backbone.layers:
        fsdp.fully_shard(layer, **own)
    embedding, head = backbone.embed_tokens, getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and head.weight is not embedding.weight:
        fsdp.fully_shard(embedding, **own)
        fsdp.fully_shard([backbone.norm, head], **options, reshard_after_forward=False)
    fsdp.fully_shard(model, **own)
    return model


def _state_modules(module: nn.Module) -> list[nn.Module]:
    """The ``ssm`` modules, which hold the parameters of recurrences."""
    return [child for name, child in module.named_modules() if name.rpartition(".")[2] == "ssm"]


def _uncast() -> Any:
    """The policy of states: they are gathered, used and reduced in their own dtype."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(cast_forward_inputs=False)


def _set_states_apart(module: nn.Module) -> None:
    """Give the states of every FSDP2 unit in ``module`` a group whose policy casts nothing.

    Raises:
        ValueError: if a layer becomes a unit before a part that it shares with other layers; or, in a release of torch
            with one group per unit, if the unit's states and other weights have different dtypes.
    """
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(module, FSDPModule):
        return
    for part in getattr(module, "sites", ()):
        if not isinstance(getattr(module, part), FSDPModule):
            raise ValueError(
                f"a layer that shares its {part} with others cannot be a unit of FSDP before that; "
                "hf_archs.fully_shard(model) makes all units"
            )
    holders = {child for states in _state_modules(module) for child in states.modules()}
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            _part(unit._get_fsdp_state(), holders)  # type: ignore[operator]


def _part(state: Any, holders: set[nn.Module]) -> None:
    """Split each group of the unit with this ``state`` into the parameters of modules in ``holders`` and the rest."""
    single = not hasattr(state, "_fsdp_param_groups")
    for group in [state._fsdp_param_group] if single else list(state._fsdp_param_groups):
        states = [parameter for parameter in group.fsdp_params if parameter._module_info.module in holders]
        others = [parameter for parameter in group.fsdp_params if parameter._module_info.module not in holders]
        mixed = len({parameter.sharded_param.dtype for parameter in group.fsdp_params}) > 1
        if states and not others:
            group.mp_policy = state._mp_policy = _uncast()
        elif states and (mixed or group.mp_policy.param_dtype is not None):
            if single:
                raise ValueError(
                    "the states of this model stay in float32, and in this release of torch a unit of FSDP has one "
                    "dtype; hf_archs.fully_shard(model) makes units of them"
                )
            mesh = group.mesh_info, group.post_forward_mesh_info, group.device
            own = type(group)([], group.modules, *mesh, None, _uncast(), group.offload_policy)
            group.fsdp_params, own.fsdp_params = others, states
            state._fsdp_param_groups.append(own)
