"""Rotary positions (Su et al. 2021), counted from the start of each token's document.

Letters and coordinates are those of `hf_archs.layers.attention`.
"""

import math

import torch

from hf_archs.kernels.numerics import cast, made_once


def document_starts(
    length: int, before: torch.Tensor | None, seq_idx: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """The coordinate at which the document of each token starts: (b or 1, length or 1), integer.

    Args:
        before: number of earlier tokens of the first document, (b, 1); None for 0.
        seq_idx: the document number of each token, (b, length); None for a single document.
    """
    if seq_idx is None:
        return torch.zeros(1, 1, dtype=torch.int64, device=device) if before is None else -before
    steps = torch.arange(length, device=device).unsqueeze(0)
    begins = (seq_idx != seq_idx.roll(1, 1)) & (steps > 0)
    return torch.where(begins, steps, 0 if before is None else -before).cummax(1).values


def rotary(position: torch.Tensor, size: int, theta: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the angle of each pair of channels (Su et al. 2021, section 3.2).

    They are computed at each call: a buffer would be cast to bfloat16 with the model, and be empty on the meta device.

    Args:
        position: integer, (b or 1, l).
        size: number of rotated channels of a head, a multiple of 2.
        theta: base of the frequencies.
        dtype: of the result.

    Returns:
        Two of (b or 1, 1, l, size): the factor of each channel (cosine) and that of its partner (signed sine).
    """
    # modulo 2 pi in float64: in float32 an angle at position 10,000 has lost four digits
    exact = dtype if position.device.type == "mps" else torch.float64
    pairs = size // 2
    frequencies = made_once(
        ("rotary", pairs, theta, exact),
        position,
        lambda: torch.logspace(0, -(pairs - 1) / pairs, pairs, theta, dtype=exact, device=position.device),
    )
    angle = (position[:, None, :, None] * frequencies).remainder(2 * math.pi).to(dtype)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first channels of x, (..., l, n), by the angles of `rotary`, in the dtype of the angles."""
    x, size = cast(x, cos.dtype), cos.shape[-1]
    rotated = x if size == x.shape[-1] else x[..., :size]
    turned = torch.addcmul(rotated * cos, rotated.roll(size // 2, -1), sin)
    return turned if size == x.shape[-1] else torch.cat([turned, x[..., size:]], dim=-1)
