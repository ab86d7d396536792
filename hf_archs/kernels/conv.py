"""The short causal depthwise convolution before a recurrence (Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling
with Selective State Spaces", https://arxiv.org/abs/2312.00752, figure 3).

Letters: b batch, l length, c channels. ``size`` is width - 1: the inputs before a position that its filter sees.
``reach``, (b, l), is how many of these belong to the position's document; None means all of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_archs.kernels.arguments import check_shapes, last_inputs, number_documents, some_boundaries
from hf_archs.kernels.backend import backend_for, is_transformed
from hf_archs.kernels.library import Op
from hf_archs.kernels.numerics import cast, wide

MAX_WIDTH = 8


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Filter each channel with its own ``width`` taps, and return the last inputs, from which the next call continues.

    ``y_t = activation(bias + sum_i weight[:, i] x_{t - (width - 1) + i})``, computed in float32, or in float64 if ``x``
    is float64. Each tensor may have its own dtype, which its gradient has too.

    Args:
        x: input, (batch, length, channels); a slice of a wider tensor is read in place.
        weight: the filters, oldest tap first, (channels, width) with a width of 2 to 8.
        bias: (channels,), or None.
        activation: ``"silu"``, or None.
        initial_state: the inputs before the first, oldest first, (batch, channels, width - 1), or None for zeros.
        seq_idx: integer, (batch, length). A document begins where the value differs from that of the position before,
            and does not see earlier inputs; position 0 always continues ``initial_state``.
        lengths: integer, (batch,), 0 to length: the tokens of each row. Later positions are pads, which the final state
            leaves out.

    Returns:
        ``y``, (batch, length, channels), and the final state, (batch, channels, width - 1): the last inputs of the
        row's last document. If that has fewer, zeros precede them, or the end of ``initial_state`` if it continues
        this. Both are in the dtype of ``x`` and can be differentiated once.

    Raises:
        ValueError: for a wrong shape or an unknown activation; the message names the argument.
    """
    _check(x, weight, bias, activation, initial_state, seq_idx, lengths)
    silu, size = activation == "silu", weight.shape[1] - 1
    backend = backend_for(x)
    if backend == "reference" and not is_transformed():
        return causal_conv1d_reference(
            x,
            weight,
            bias,
            activation=activation,
            initial_state=initial_state,
            seq_idx=seq_idx,
            lengths=lengths,
        )
    if backend == "portable" and x.shape[1] == 1:
        return _step(x, weight, bias, silu, initial_state, lengths)
    reach = None if seq_idx is None else _reach(seq_idx, size)
    y = _causal_conv1d(x, weight, bias, initial_state, reach, silu)
    return y, last_inputs(x, size, initial_state, number_documents(seq_idx), lengths)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
) -> None:
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"causal_conv1d: x must be (batch, length, channels), length at least 1, not {tuple(x.shape)}")
    if weight.dim() != 2 or not 2 <= weight.shape[1] <= MAX_WIDTH:
        raise ValueError(
            f"causal_conv1d: weight must be (channels, width) with a width of 2 to {MAX_WIDTH}, "
            f"not {tuple(weight.shape)}"
        )
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation must be None or 'silu', not {activation!r}")
    (b, l, c), width = x.shape, weight.shape[1]
    check_shapes(
        "causal_conv1d",
        weight=(weight, (c, width)),
        bias=(bias, (c,)),
        initial_state=(initial_state, (b, c, width - 1)),
        seq_idx=(seq_idx, (b, l)),
        lengths=(lengths, (b,)),
    )


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d` token by token: the oracle for the tests of the fast forms."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    b, l, c = x.shape
    window = x.new_zeros(b, c, weight.shape[1] - 1) if initial_state is None else initial_state.to(x.dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    final_state = window
    outputs = []
    for t in range(l):
        if seq_idx is not None and t > 0:
            window = torch.where((seq_idx[:, t] != seq_idx[:, t - 1])[:, None, None], 0, window)
        seen = torch.cat([window, x[:, t, :, None]], dim=2)
        y = (seen.to(dtype) * weight).sum(2)
        if bias is not None:
            y = y + bias
        outputs.append(F.silu(y) if activation == "silu" else y)
        window = seen[:, :, 1:]
        final_state = window if lengths is None else torch.where((t < lengths)[:, None, None], window, final_state)
    return torch.stack(outputs, dim=1).to(x.dtype), final_state


def _step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token, in a few PyTorch calls. The window has its channels innermost in memory."""
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], x.shape[2], weight.shape[1] - 1)
    seen = torch.cat([cast(initial_state, x.dtype).transpose(1, 2), x], dim=1)
    y = (wide(seen) * weight.t()).sum(1, keepdim=True)  # PyTorch's type promotion widens weight and bias
    if bias is not None:
        y = y + bias
    if silu:
        y = F.silu(y)
    final_state = seen[:, 1:]
    if lengths is not None:
        final_state = torch.where((lengths > 0)[:, None, None], final_state, seen[:, :-1])
    # a copy: a cached view of ``seen`` would keep one more input alive
    return cast(y, x.dtype), final_state.clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _reach(seq_idx: Tensor, size: int) -> Tensor:
    """The number of inputs before each position that belong to its document, at most ``size``: int32, (batch, length).

    The initial state belongs to the document of position 0.
    """
    length = seq_idx.shape[1]
    begins = (seq_idx != seq_idx.roll(1, 1)) & (torch.arange(length, device=seq_idx.device) > 0)
    continues = F.pad((~begins).to(torch.int32), (size - 1, 0), value=1)
    unbroken = continues[:, size - 1 :]
    reach = unbroken
    for back in range(1, size):
        unbroken = unbroken * continues[:, size - 1 - back : size - 1 - back + length]
        reach = reach + unbroken
    return reach


def _shifted_sum(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, reach: Tensor | None, silu: bool
) -> Tensor:
    """The convolution in ordinary operators, for exporters and `torch.func`, which support only these."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    (b, l, c), size = x.shape, weight.shape[1] - 1
    before = x.new_zeros(b, size, c, dtype=dtype) if initial_state is None else initial_state.transpose(1, 2).to(dtype)
    padded, weight = torch.cat([before, x.to(dtype)], dim=1), weight.to(dtype)
    y = padded[:, size:] * weight[:, size]
    for back in range(1, size + 1):
        term = padded[:, size - back : size - back + l] * weight[:, size - back]
        y = y + (term if reach is None else torch.where((reach >= back).unsqueeze(2), term, 0))
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if silu else y).to(x.dtype)


_causal_conv1d = Op(
    __name__,
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? reach, bool silu) -> Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
    learnt=("x", "weight", "bias", "initial_state"),
    plain=_shifted_sum,
)


def cases(device, dtype, batch=2, length=40, channels=12):
    """Arguments of `causal_conv1d` for tests and benchmarks: first the required ones, then all."""
    x, weight, bias, state = (
        torch.randn(shape, device=device, dtype=dtype)
        for shape in ((batch, length, channels), (channels, 4), (channels,), (batch, channels, 3))
    )
    yield {"x": x, "weight": weight}
    boundaries = some_boundaries(batch, length, device)
    yield {"x": x, "weight": weight, "bias": bias, "activation": "silu", "initial_state": state, **boundaries}


MODEL_SIZES = {"channels": 200}
