"""A cache as a safetensors file: its states, and the config and a fingerprint of the weights that computed them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from hf_archs.native.hub import check_downloads
from hf_archs.parts import VERSION

if TYPE_CHECKING:
    from hf_archs.cache.recurrent import RecurrentCache

FORMAT, FORMAT_VERSION = "hf_archs.cache", "1"
FILE = "state.safetensors"  # in a repository on the Hub
# fields of this library's configs that change no state
_IDLE = {"use_cache", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"}


def backbone_of(model: nn.Module) -> Any:
    """The backbone in a model with a head, and in an adapter's wrapper: the part that computes states.

    Raises:
        ValueError: if there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.base_model is module:
            return module
    raise ValueError(f"model is a {type(model).__name__}; allowed is a model of transformers, adapted or not")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of names and values, rounded to bf16, of all parameters that compute states, including adapters.

    A float32 and a bf16 copy of one model have the same fingerprint. States do not depend on the head, which is left
    out.
    """
    digest = hashlib.sha256()
    backbone = backbone_of(model)
    tensors = backbone.state_dict() | {n: t for n, t in model.state_dict().items() if "prompt_encoder." in n}
    adapted = [module for module in backbone.modules() if isinstance(module, BaseTunerLayer)]
    digest.update(repr([(module.active_adapters, module.disable_adapters) for module in adapted]).encode())
    for name, tensor in sorted(tensors.items()):
        rounded = tensor.detach().to(torch.bfloat16) if tensor.is_floating_point() else tensor.detach()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(rounded.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _fields(config: Any) -> dict[str, Any]:
    """The config fields that states depend on, as they are in JSON."""
    host = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    ours = {field.name for field in dataclasses.fields(config)} - host - _IDLE
    return json.loads(json.dumps({name: value for name, value in config.to_dict().items() if name in ours}))


def save(
    cache: RecurrentCache, path: str | os.PathLike, model: nn.Module, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the states of ``cache``, which ``model`` computed, to a file; see `RecurrentCache.save`.

    Args:
        metadata: further texts by name, which `load` returns.
    """
    if cache.is_empty:
        raise ValueError("the cache is empty; allowed is one that has read a token")
    path = Path(path).expanduser()
    about = {**(metadata or {}), "format": FORMAT, "version": FORMAT_VERSION, "library": VERSION}
    about["weights"] = fingerprint(model)
    about["config"] = json.dumps(_fields(backbone_of(model).config), sort_keys=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as folder:
        save_file(cache.state_dict(), Path(folder) / path.name, metadata=about)
        (Path(folder) / path.name).replace(path)


def load(cache: RecurrentCache, path: str | os.PathLike, model: nn.Module) -> dict[str, str]:
    """Read a file of `save` into ``cache``, in the dtypes and on the devices of ``model``.

    Returns:
        the metadata of the file.

    Raises:
        ValueError: for a damaged file, another format or version, or another model; it names the config field that
            differs, or the weights.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            states = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); allowed is a saved cache") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} holds no cache; allowed is a file that `cache.save` wrote")
    if about["version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has version {about['version']} of the file format, of hf-archs {about['library']}; allowed is "
            f"version {FORMAT_VERSION}"
        )
    backbone = backbone_of(model)
    there, here = json.loads(about["config"]), _fields(backbone.config)
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            raise ValueError(
                f"{path} is of another model: {name} is {there.get(name)!r} there and {here.get(name)!r} in this one"
            )
    if about["weights"] != (ours := fingerprint(model)):
        raise ValueError(
            f"{path} is of a model with other weights (fingerprint {about['weights'][:12]} there, {ours[:12]} here); "
            "allowed are the weights, and the adapter, that computed the states"
        )
    devices = [next(layer.parameters()).device for layer in backbone.layers]
    specs, dtype = cache.specs(), backbone.dtype
    for name in states.keys() & specs.keys():  # `load_state_dict` refuses other names
        state, kept_in = states[name], specs[name].dtype
        wanted = dtype if kept_in is None else torch.promote_types(kept_in, dtype)
        states[name] = state.to(devices[int(name.split(".")[1])], wanted if state.is_floating_point() else state.dtype)
    cache.load_state_dict(states)
    return about


def find(path: str | os.PathLike, filename: str = FILE, **options: Any) -> str:
    """The local path of a saved cache: ``path`` itself if it is a file, else ``filename`` of that repository.

    Raises:
        OSError: if there is none, or the download is not the file on the Hub.
    """
    if Path(path).expanduser().is_file():
        return str(Path(path).expanduser())
    found = cached_file(str(path), filename, **options)
    assert found is not None  # `cached_file` raises for a missing file
    check_downloads([found])
    return found


def push(cache: RecurrentCache, repo_id: str, model: nn.Module, filename: str = FILE, **options: Any) -> Any:
    """Upload the cache as ``filename`` of a repository, created if missing; returns the commit."""
    api = HfApi(token=options.pop("token", None))
    api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(cache, Path(folder) / FILE, model)
        return api.upload_file(path_or_fileobj=Path(folder) / FILE, path_in_repo=filename, repo_id=repo_id, **options)
