"""Compare a model with an independent implementation of its architecture: logits and every gradient, by name."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_archs.testing.ops import relative_distance


class Float32CastsAsFloat64(TorchFunctionMode):
    """Turns float32 into float64, in casts and in created tensors, so that another implementation runs in float64."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        lifted = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*(torch.float64 if a is torch.float32 else a for a in args), **lifted)


def enliven(model: nn.Module) -> None:
    """Draw weights, by torch's seed, such that every parameter matters and a state lasts for many tokens."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = name.rpartition(".")[2]
            if kind == "A_log" or ("dt" in name and parameter.ndim == 1):
                parameter.uniform_(-2.0, 0.5)  # decays from 0.1 to 0.99 a token
            elif kind == "D" or kind == "bias":
                parameter.normal_()
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)  # norms
            else:
                fan_in = parameter.numel() // parameter.shape[0]
                parameter.normal_(std=1.0 if "embed" in name else fan_in**-0.5)


def logits_and_gradients(model: nn.Module, input_ids: torch.Tensor, lift: bool = False) -> dict[str, torch.Tensor]:
    """The logits, and the gradients of their inner product with fixed random weights, by the parameters' names.

    Args:
        input_ids: (batch, length).
        lift: turn the model's casts to float32 into casts to float64.
    """
    model.zero_grad()
    with Float32CastsAsFloat64() if lift else contextlib.nullcontext():
        logits = model(input_ids, use_cache=False).logits
    generator = torch.Generator().manual_seed(1)
    logits.backward(torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits))
    gradients = {name: p.grad for name, p in model.named_parameters()}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, f"no gradient for {', '.join(missing)}"
    return {"logits": logits.detach(), **gradients}


def check_parity(
    ours: nn.Module, theirs: nn.Module, rename: Callable[[str], str], input_ids: torch.Tensor, tolerance: float
) -> None:
    """Compare logits and every parameter's gradient.

    In float64 the casts to float32 in ``theirs`` become casts to float64; ``ours`` must not have any.

    Args:
        rename: maps a parameter's name in ``theirs`` to its name in ``ours``.
        input_ids: (batch, length).
        tolerance: largest allowed difference, relative to the largest value of the same tensor.

    Raises:
        AssertionError: naming the tensors that differ and their distances, or the names that only one model has.
    """
    lift = next(theirs.parameters()).dtype == torch.float64
    expected = {rename(name): value for name, value in logits_and_gradients(theirs, input_ids, lift).items()}
    got = logits_and_gradients(ours, input_ids)
    assert got.keys() == expected.keys(), f"only one model has {sorted(got.keys() ^ expected.keys())}"
    distances = {name: relative_distance(got[name], value) for name, value in expected.items()}
    misses = [f"{name}: {distance:.1e}" for name, distance in distances.items() if not distance <= tolerance]
    assert not misses, f"farther than {tolerance:.0e} from the other implementation: {'; '.join(misses)}"
