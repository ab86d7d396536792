"""Hyena's short explicit filters: causal depthwise convolutions of up to 128 taps.

Poli et al. 2023, "Hyena Hierarchy", https://arxiv.org/abs/2302.10866, section 3 (the convolution as a Toeplitz matrix);
Ku et al. 2025, "Systems and Algorithms for Convolutional Multi-Hybrid Language Models at Scale",
https://arxiv.org/abs/2503.01868, section 2 (StripedHyena 2's short and medium filters, one for a group of channels) and
section 3 (tiles of that matrix on tensor cores).

Letters: b batch, l length, c channels, g groups of channels that share a filter, k taps of a filter.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_archs.kernels.arguments import check_shapes, last_inputs, number_documents, some_boundaries
from hf_archs.kernels.backend import backend_for
from hf_archs.kernels.library import Op

MAX_TAPS = 128


def toeplitz_conv(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y_t = sum_m taps[:, m] x_{t - m} + bias x_t``, channel by channel, in float32 or wider.

    Each tensor may have its own dtype, which its gradient has too.

    Args:
        x: input, (batch, length, channels).
        taps: the filters, newest input first, (groups, taps) with 1 to 128 taps; channels is a multiple of groups, and
            channel ``c`` has the filter of group ``c // (channels // groups)``.
        bias: weight of an input in its own output, added to the first tap, (channels,), or None.
        initial_state: the inputs before the first, oldest first, (batch, channels, taps - 1), or None for zeros.
        seq_idx: integer, (batch, length). A document begins where the value differs from that of the position before,
            and does not see earlier inputs; position 0 always continues ``initial_state``.
        lengths: integer, (batch,), 0 to length: the tokens of each row. Later positions are pads, which the final state
            leaves out.

    Returns:
        ``y``, (batch, length, channels), and the final state, (batch, channels, taps - 1): the last inputs of the row's
        last document. If that has fewer, zeros precede them, or the end of ``initial_state`` if it continues this.
        Both are in the dtype of ``x`` and can be differentiated once.

    Raises:
        ValueError: for a wrong shape; the message names the argument.
    """
    _check(x, taps, bias, initial_state, seq_idx, lengths)
    if backend_for(x) == "reference":
        return toeplitz_conv_reference(x, taps, bias, initial_state=initial_state, seq_idx=seq_idx, lengths=lengths)
    if x.shape[1] == 1:
        return _step(x, taps, bias, initial_state, lengths)
    documents = number_documents(seq_idx)
    y = _toeplitz_conv(x, taps, bias, initial_state, documents)
    return y, last_inputs(x, taps.shape[1] - 1, initial_state, documents, lengths).contiguous()


def _check(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
) -> None:
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"toeplitz_conv: x must be (batch, length, channels), length at least 1, not {tuple(x.shape)}")
    if taps.dim() != 2 or not 1 <= taps.shape[1] <= MAX_TAPS:
        raise ValueError(
            f"toeplitz_conv: taps must be (groups, taps) with 1 to {MAX_TAPS} taps, not {tuple(taps.shape)}"
        )
    b, l, c = x.shape
    if taps.shape[0] == 0 or c % taps.shape[0]:
        raise ValueError(f"toeplitz_conv: channels must be a multiple of the groups of taps, not {c} of {len(taps)}")
    check_shapes(
        "toeplitz_conv",
        bias=(bias, (c,)),
        initial_state=(initial_state, (b, c, taps.shape[1] - 1)),
        seq_idx=(seq_idx, (b, l)),
        lengths=(lengths, (b,)),
    )


def toeplitz_conv_reference(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`toeplitz_conv` token by token: the oracle for the tests of the fast forms."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    b, l, c = x.shape
    window = x.new_zeros(b, c, taps.shape[1] - 1) if initial_state is None else initial_state.to(x.dtype)
    oldest_first = taps.to(dtype).flip(1).repeat_interleave(c // taps.shape[0], 0)
    final_state = window
    outputs = []
    for t in range(l):
        if seq_idx is not None and t > 0:
            window = torch.where((seq_idx[:, t] != seq_idx[:, t - 1])[:, None, None], 0, window)
        seen = torch.cat([window, x[:, t, :, None]], dim=2)
        y = (seen.to(dtype) * oldest_first).sum(2)
        if bias is not None:
            y = y + bias.to(dtype) * x[:, t].to(dtype)
        outputs.append(y)
        window = seen[:, :, 1:]
        final_state = window if lengths is None else torch.where((t < lengths)[:, None, None], window, final_state)
    return torch.stack(outputs, dim=1).to(x.dtype), final_state


def _step(
    x: Tensor, taps: Tensor, bias: Tensor | None, initial_state: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token, in a few PyTorch calls, on every device."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    (b, _, c), (g, k) = x.shape, taps.shape
    if initial_state is None:
        initial_state = x.new_zeros(b, c, k - 1)
    seen = torch.cat([initial_state.to(x.dtype), x.transpose(1, 2)], dim=2)
    oldest_first = taps.flip(1).unsqueeze(1)
    y = (seen.view(b, g, c // g, k).to(dtype) * oldest_first).sum(3).view(b, 1, c)  # type promotion widens taps
    if bias is not None:
        y = torch.addcmul(y, x.to(dtype), bias.to(dtype))
    final_state = seen[:, :, 1:].contiguous()
    if lengths is not None:
        final_state = torch.where((lengths > 0)[:, None, None], final_state, seen[:, :, :-1])
    return y.to(x.dtype), final_state


def _plain(
    x: Tensor, taps: Tensor, bias: Tensor | None, initial_state: Tensor | None, documents: Tensor | None
) -> Tensor:
    """The convolution in ordinary operators, for exporters, which support no others."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    (b, l, c), (g, k) = x.shape, taps.shape
    before = x.new_zeros(b, k - 1, c) if initial_state is None else initial_state.transpose(1, 2)
    padded = torch.cat([before.to(dtype), x.to(dtype)], dim=1)
    taps = taps.to(dtype).repeat_interleave(c // g, 0)
    if documents is None:
        y = F.conv1d(padded.transpose(1, 2), taps.flip(1).unsqueeze(1), groups=c).transpose(1, 2)
    else:
        seen = F.pad(documents, (k - 1, 0))
        y = padded[:, k - 1 :] * taps[:, 0]
        for back in range(1, k):
            visible = documents == seen[:, k - 1 - back : k - 1 - back + l]
            y = y + torch.where(visible.unsqueeze(2), padded[:, k - 1 - back : k - 1 - back + l], 0) * taps[:, back]
    if bias is not None:
        y = y + x.to(dtype) * bias.to(dtype)
    return y.to(x.dtype)


_toeplitz_conv = Op(
    __name__,
    "toeplitz_conv(Tensor x, Tensor taps, Tensor? bias, Tensor? initial_state, Tensor? documents) -> Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
    learnt=("x", "taps", "bias", "initial_state"),
    float64=False,
    plain=_plain,
)


def cases(device, dtype, batch=2, length=40, groups=3, shared=4, taps=20):
    """Arguments of `toeplitz_conv` for tests and benchmarks: many taps; few taps, with all options; wide groups."""

    def arguments(groups, channels, taps):
        shapes = (batch, length, channels), (groups, taps), (channels,), (batch, channels, taps - 1)
        made = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
        return dict(zip(("x", "taps", "bias", "initial_state"), made))

    plain = arguments(groups, groups * shared, taps)
    yield {"x": plain["x"], "taps": plain["taps"]}
    yield arguments(groups, groups * shared, min(taps, 7)) | some_boundaries(batch, length, device)
    yield arguments(2, 32, taps) | some_boundaries(batch, length, device)


MODEL_SIZES = {"groups": 50, "taps": 128}
