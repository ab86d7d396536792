"""The models that the contract tests, and the tolerance between two results.

With its initial weights, the logits of a model of width 64 depend on little but the last token: a lost state, a leaking
pad or an ignored boundary changes them by less than any tolerance. `enliven` gives every parameter large random values,
and `assert_remembers` checks that the first token still changes the logits thirty tokens later.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from hf_archs.registry import Architecture

# largest |difference| over largest |value|, for float32 results that differ in the order of additions only
TOLERANCE = 1e-5

# the submodule of a mixer with the parameters of its states: they are float32, and PEFT's `modules_to_save` names it
STATE_MODULE = "ssm"


def state_parameters(model: nn.Module) -> set[str]:
    """The full names of the states' parameters; empty if the architecture's decays are fixed."""
    return {name for name, _ in model.named_parameters() if STATE_MODULE in name.split(".")}


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids ``(batch, length)``, without the special tokens 0, 1 and 2."""
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give all saved tensors large random values, in place, so that the states change the logits."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) in seen:  # tied
                    continue
                seen.add(id(parameter))
                noise = torch.randn(parameter.shape, generator=generator)
                if isinstance(module, nn.Linear) and parameter.ndim == 2:
                    parameter.copy_(1.5 / math.sqrt(parameter.shape[1]) * noise)
                elif isinstance(module, nn.Embedding):
                    # smaller than the layers' outputs, since a tied head would only repeat its input otherwise
                    parameter.copy_(0.3 * noise)
                else:  # norms, biases, convolutions, decays: around their initial values
                    parameter.add_(0.3 * noise)
        stored = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point():
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


def lively(model_class: type[Any], config: Any, seed: int = 0) -> Any:
    """A model of this class with large random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return enliven(model_class(config), seed).eval()


@torch.no_grad()
def forward(model: Any, *arguments: Any, **options: Any) -> Any:
    """The outputs of one forward, without gradients."""
    return model(*arguments, **options)


def logits(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """The logits of one `forward`."""
    return forward(model, input_ids, **arguments).logits


def assert_remembers(model: Any) -> None:
    """Check that the model is fit for tests: the first token still changes the logits thirty tokens later."""
    ids = tokens(1, 32)
    other = ids.clone()
    other[0, 0] = ids[0, 0] - 1 if ids[0, 0] > 3 else 4
    change = (logits(model, ids) - logits(model, other))[0, 30:].abs().max().item()
    assert change > 1e-2, f"the first token changes the logits thirty tokens later by {change:.1e} only"


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """``max |found - expected| / max |expected|``; infinite for a value that is not finite."""
    assert found.shape == expected.shape, f"shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    if not torch.isfinite(found).all():
        return math.inf
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Check that two results are equal within the tolerance."""
    far = distance(found, expected)
    assert far < tolerance, f"{what}: {far:.1e} apart, allowed {tolerance:.0e}"


def assert_all_close(
    found: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    what: str,
    tolerance: float = TOLERANCE,
) -> None:
    """Check that both have the same names, and `assert_close` for each name."""
    assert found.keys() == expected.keys(), f"{what}: {sorted(found.keys() ^ expected.keys())}"
    for name, tensor in expected.items():
        assert_close(found[name], tensor, f"{what}, {name}", tolerance)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Copies of the gradient of every trainable parameter, by name; the model's gradients are cleared.

    Raises:
        AssertionError: for a parameter without a gradient.
    """
    model.zero_grad()
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            found[name] = parameter.grad.detach().clone()
    model.zero_grad()
    return found


def weighed(logits: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A loss that depends on every logit: the mean product with fixed random weights."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (logits * weights.to(logits.dtype)).mean()


def total(losses: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of the losses."""
    return torch.stack(list(losses)).sum()


class Contract:
    """The models that all parts of the contract share. A subclass overrides the fixture ``architecture``."""

    @pytest.fixture(scope="class")
    @classmethod
    def architecture(cls) -> Architecture:
        """The architecture under test; to be overridden."""
        raise NotImplementedError("override the fixture `architecture` with your own")

    @pytest.fixture(scope="class")
    @classmethod
    def shared_model(cls, architecture: Architecture) -> Any:
        """A causal model that tests must not change."""
        model = lively(architecture.causal_lm_class, architecture.tiny_config())
        assert_remembers(model)
        return model

    @pytest.fixture
    def model(self, shared_model: Any) -> Any:
        """A causal model that the test may change."""
        return copy.deepcopy(shared_model)
