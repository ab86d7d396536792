"""The tolerance of an op.

An output or gradient may be at most twice as far from the float64 reference as the reference is when it runs in the
tested precision.
"""

import importlib.metadata
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Tensors = Mapping[str, torch.Tensor | None]


@dataclass(frozen=True)
class OpWithCases:
    """A public function ``<name>`` with its ``<name>_reference`` and ``cases`` in one module.

    ``cases(device, dtype, **sizes)`` yields arguments by keyword. All its sizes have defaults; some are ``batch`` and
    ``length``. ``MODEL_SIZES``, which a module may have, holds sizes as in a model.
    """

    name: str
    module: ModuleType

    @property
    def function(self) -> Callable[..., Any]:
        """The public function."""
        return getattr(self.module, self.name)

    @property
    def reference(self) -> Callable[..., Any]:
        """The op as the paper writes it."""
        return vars(self.module)[f"{self.name}_reference"]

    def cases(self, device: torch.device | str, dtype: torch.dtype, **sizes: int) -> list[dict[str, Any]]:
        """The arguments of every case, the same at every call."""
        torch.manual_seed(0)
        return list(self.module.cases(device, dtype, **sizes))

    @property
    def model_sizes(self) -> dict[str, int]:
        """``MODEL_SIZES`` of the module; empty if it has none."""
        return getattr(self.module, "MODEL_SIZES", {})


def ops_with_cases() -> list[OpWithCases]:
    """Every op of the library and the installed plugins whose module has ``cases``, sorted by name."""
    plugins = importlib.metadata.entry_points(group="hf_archs.plugins")
    packages = {"hf_archs", *(plugin.module.partition(".")[0] for plugin in plugins)}
    found = []
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] in packages]:
        own = {n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
        names = {n.removesuffix("_reference") for n in own if n.endswith("_reference")} & own
        found += [OpWithCases(name, module) for name in names if "cases" in own]
    return sorted(found, key=lambda op: op.name)


def operators(run: Callable[[], Any]) -> list[str]:
    """The names of the operators that ``run`` calls without gradients, except views."""
    found: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not func.is_view and func is not torch.ops.aten.promote_types.default:
                found.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Record():
        run()
    return found


def relative_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """``max |a - b| / max |b|`` in float64; infinite if ``a`` has a value that is not finite."""
    a, b = a.detach().double(), b.detach().double()
    if a.shape != b.shape:
        raise AssertionError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    if not torch.isfinite(a).all():
        return float("inf")
    if a.numel() == 0:
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def outputs_and_gradients(
    op: Callable[..., Any], tensors: Tensors, options: Mapping[str, Any], cotangent_seed: int = 0
) -> dict[str, torch.Tensor]:
    """The outputs of ``op(**tensors, **options)`` and its gradients for every floating-point tensor, by name.

    The loss is the inner product of all outputs with fixed random cotangents, the same for every precision.
    """
    leaves = {
        name: t.detach().clone().requires_grad_(t.is_floating_point()) if t is not None else None
        for name, t in tensors.items()
    }
    outputs = op(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(cotangent_seed)
    loss = sum(
        (out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)).sum()
        for out in outputs
    )
    wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=False)  # type: ignore[arg-type]
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    found.update({f"gradient of {name}": g for name, g in zip(wanted, gradients)})
    return found


def check_op(
    op: Callable[..., Any], reference: Callable[..., Any], tensors: Tensors, options: Mapping[str, Any] | None = None
) -> None:
    """Compare outputs and every gradient of ``op`` with the float64 ``reference``, by this module's tolerance.

    Args:
        op: the implementation under test, with the reference's signature.
        reference: the oracle; it must run in the precision of its inputs, float64 included.
        tensors: the tensor arguments by name, in the precision under test.
        options: all other arguments.

    Raises:
        AssertionError: naming the outputs and gradients that are too far off, and their distances.
    """
    options = options or {}
    wide = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in tensors.items()}
    exact = outputs_and_gradients(reference, wide, options)
    plain = outputs_and_gradients(reference, tensors, options)
    tested = outputs_and_gradients(op, tensors, options)
    misses = []
    for name, truth in exact.items():
        if tested[name].dtype != plain[name].dtype:
            misses.append(f"{name}: dtype {tested[name].dtype}, expected {plain[name].dtype}")
        got, allowed = relative_distance(tested[name], truth), 2 * relative_distance(plain[name], truth)
        # the reference can be nearly exact by luck, so sums of a few hundred float32 terms may always differ in order
        allowed = max(allowed, 8 * torch.finfo(torch.promote_types(tested[name].dtype, torch.float32)).eps)
        if not got <= allowed:
            misses.append(f"{name}: {got:.2e} from the float64 reference, allowed {allowed:.2e}")
    assert not misses, "; ".join(misses)
