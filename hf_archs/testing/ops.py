"""The tolerance of an op.

Outputs and every gradient may be at most twice as far from the float64 reference as the reference itself is when it
runs in the tested precision.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Tensors = Mapping[str, torch.Tensor | None]


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
    """Run ``op(**tensors, **options)`` and differentiate it by every floating-point tensor; both by name.

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
        # a plain run can be nearly exact by luck: sums of a few hundred float32 terms in another order
        allowed = max(allowed, 8 * torch.finfo(torch.promote_types(tested[name].dtype, torch.float32)).eps)
        if not got <= allowed:
            misses.append(f"{name}: {got:.2e} from the float64 reference, allowed {allowed:.2e}")
    assert not misses, "; ".join(misses)
