"""The experts of a mixture (Shazeer et al. 2017, "Outrageously Large Neural Networks: The Sparsely-Gated
Mixture-of-Experts Layer", https://arxiv.org/abs/1701.06538, section 2), gated as in Mixtral (Jiang et al. 2024,
https://arxiv.org/abs/2401.04088, section 2.1). No expert has a capacity: it computes all tokens routed to it.

Letters: t tokens, k choices of a token, p pairs of a token and one of its choices (t times k), e experts, h hidden,
i inner.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_archs.kernels.arguments import check_shapes
from hf_archs.kernels.backend import backend_for, is_transformed
from hf_archs.kernels.exporting import any_length
from hf_archs.kernels.library import Op
from hf_archs.kernels.numerics import cast, wide

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def expert_mlp(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
) -> Tensor:
    """The weighted sum of the outputs of each token's chosen experts.

    ``y_t = sum_k w_tk down_e activation(up_e x_t)`` with ``e = expert_index[t, k]``. If the experts are gated, the
    first half of ``up_e`` is the gate: ``activation(gate_e x_t) * (up_e x_t)``.

    Products and the sum over k accumulate in float32, or in float64 if ``x`` is float64; the inner layer has the dtype
    of ``x``. Under autocast, x, up and down are cast to autocast's dtype, as by `F.linear`. Only chosen experts are
    read, and results repeat exactly.

    Args:
        x: input, (tokens, hidden).
        expert_index: integer, (tokens, k), 0 to ``experts - 1``. ``experts`` means no expert, and adds nothing: a
            dropped choice, or an expert of another rank.
        expert_weight: (tokens, k), of any floating dtype.
        up: (experts, 2 * inner, hidden), the gate first, or (experts, inner, hidden) if experts are not gated. Up and
            down are cast to the dtype of x.
        down: (experts, hidden, inner).
        activation: ``"silu"``, ``"gelu"``, ``"gelu_pytorch_tanh"``, ``"relu"`` or ``"relu2"``, the names of
            transformers.
        gated: whether experts have a gate.

    Returns:
        (tokens, hidden) in the dtype of ``x``, or of autocast if it is on. It can be differentiated once; experts that
        computed nothing have gradients of zero.

    Raises:
        ValueError: for a wrong shape, an index that is no integer, or an unknown activation; the message names the
            argument.
    """
    _check(x, expert_index, expert_weight, up, down, activation, gated)
    dtype, device = x.dtype, x.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    x, up, down = (cast(t, dtype) for t in (x, up, down))
    inputs = (x, expert_index, expert_weight, up, down, activation, gated)
    if is_transformed():
        return _dense(*inputs)
    if backend_for(x) == "reference":
        return expert_mlp_reference(x, expert_index, expert_weight, up, down, activation=activation, gated=gated)
    if any_length():
        return _dense(*inputs)
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, expert_weight, up, down))
    if x.is_cpu and not learns and not torch.compiler.is_compiling():
        # on a CPU, a call through PyTorch's op library costs as much as a small expert
        return _expert_mlp.run(*inputs, False, _expert_mlp.backend(*inputs[:5]))[0]
    return _expert_mlp(*inputs)


def _check(
    x: Tensor, expert_index: Tensor, expert_weight: Tensor, up: Tensor, down: Tensor, activation: str, gated: bool
) -> None:
    if x.dim() != 2 or expert_index.dim() != 2 or down.dim() != 3:
        raise ValueError(
            f"expert_mlp: x must be (tokens, hidden), expert_index (tokens, k) and down (experts, hidden, inner), "
            f"not {tuple(x.shape)}, {tuple(expert_index.shape)} and {tuple(down.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"expert_mlp: activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if expert_index.is_floating_point() or expert_index.dtype == torch.bool:
        raise ValueError(f"expert_mlp: expert_index must be an integer tensor, not {expert_index.dtype}")
    (t, h), k, (e, _, i) = x.shape, expert_index.shape[1], down.shape
    check_shapes(
        "expert_mlp",
        expert_index=(expert_index, (t, k)),
        expert_weight=(expert_weight, (t, k)),
        up=(up, (e, 2 * i if gated else i, h)),
        down=(down, (e, h, i)),
    )


def _activate(pre: Tensor, activation: str, gated: bool) -> Tensor:
    """The inner layer, given ``pre``, the product with ``up``; in the dtype of ``pre``."""
    act = ACTIVATIONS[activation]
    if not gated:
        return cast(act(wide(pre)), pre.dtype)
    gate, up = wide(pre).chunk(2, -1)
    return cast(act(gate) * up, pre.dtype)


def expert_mlp_reference(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
) -> Tensor:
    """`expert_mlp` by its formula, choice by choice: the oracle for the tests of the fast forms."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    # an empty sum of each input, so that all have gradients even if no expert computes
    nothing = torch.stack([t[:0].sum().to(dtype) for t in (x, expert_weight, up, down)]).sum()
    outputs = [nothing.expand(0, x.shape[1])]
    for token, experts, weights in zip(x, expert_index.tolist(), expert_weight):
        y = nothing.expand(1, x.shape[1])
        for expert, weight in zip(experts, weights):
            if expert < up.shape[0]:
                inner = _activate(F.linear(token, up[expert]), activation, gated)
                y = y + weight.to(dtype) * F.linear(inner, down[expert]).to(dtype)
        outputs.append(y)
    return torch.cat(outputs).to(x.dtype)


def _dense(
    x: Tensor, expert_index: Tensor, expert_weight: Tensor, up: Tensor, down: Tensor, activation: str, gated: bool
) -> Tensor:
    """Every token through every expert: for exporters, which support neither our op nor shapes that depend on values,
    and for `torch.jit.trace`, which would always use the experts that the example chose."""
    chosen = expert_index.unsqueeze(2) == torch.arange(up.shape[0], device=x.device)  # (t, k, e)
    weight = torch.where(chosen, wide(expert_weight).unsqueeze(2), 0).sum(1)  # (t, e)
    inner = _activate(x @ up.transpose(1, 2), activation, gated)
    outputs = weight.t().unsqueeze(2) * wide(inner @ down.transpose(1, 2))  # (e, t, h)
    return cast(torch.where(chosen.any(1).t().unsqueeze(2), outputs, 0).sum(0), x.dtype)


# kept for the backward: the products with ``up`` of all pairs, sorted by expert
_expert_mlp = Op(
    __name__,
    "expert_mlp(Tensor x, Tensor expert_index, Tensor expert_weight, Tensor up, Tensor down, str activation, "
    "bool gated, bool keep) -> (Tensor, Tensor)",
    fake=lambda x, expert_index, expert_weight, up, down, activation, gated, keep, _: (
        x.new_empty(x.shape),
        x.new_empty((expert_index.numel(), up.shape[1]) if keep else (0,)),
    ),
    learnt=("x", "expert_weight", "up", "down"),
    float64=False,
)


def cases(device, dtype, batch=2, length=9, experts=4, hidden=16, inner=12, k=2):
    """Arguments of `expert_mlp` for tests and benchmarks: gated; and not gated, with some pairs of no expert."""
    tokens = batch * length
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    weight = torch.rand(tokens, k, device=device, dtype=dtype)
    index = torch.randint(experts, (tokens, k), device=device)
    up = torch.randn(experts, 2 * inner, hidden, device=device, dtype=dtype) * hidden**-0.5
    down = torch.randn(experts, hidden, inner, device=device, dtype=dtype) * inner**-0.5
    yield {"x": x, "expert_index": index, "expert_weight": weight, "up": up, "down": down}
    index = torch.where(torch.rand(tokens, k, device=device) < 0.2, experts, index)
    plain = {"up": up[:, :inner].contiguous(), "down": down, "activation": "gelu", "gated": False}
    yield {"x": x, "expert_index": index, "expert_weight": weight, **plain}


MODEL_SIZES = {"batch": 16, "experts": 8, "hidden": 256, "inner": 192}
