"""Configs and states of full and sliding-window attention."""

from dataclasses import dataclass
from typing import Literal

import torch
from huggingface_hub.dataclasses import strict

from hf_archs.parts import PartConfig, StateSpec, check_range


@strict
@dataclass(kw_only=True)
class AttentionConfig(PartConfig):
    """Fields of attention (Vaswani et al. 2017, section 3.2).

    Args:
        num_heads: number of query heads.
        num_key_value_heads: number of key-value heads, each shared by equally many query heads (Ainslie et al. 2023);
            None for ``num_heads``.
        head_dim: channels of a head; None for ``hidden_size / num_heads``.
        rope_theta: base of the rotary positions (Su et al. 2021); None for no positions. Channels c and c + m/2 of m
            rotated channels are a pair, rotated by ``rope_theta ** (-2c / m)`` per token.
        partial_rotary_factor: share of a head's channels that are rotated, the first ones.
        qk_norm: RMSNorm of queries and keys: over each ``head`` (Qwen3), over the ``full`` projection (OLMoE), or
            ``none``.
        attention_bias: whether the projections to queries, keys and values have a bias.
        output_bias: whether the output projection has a bias.
        clip_qkv: largest absolute value of queries, keys and values (OLMoE); None for no limit.
        attention_scale: factor of the scores; None for ``head_dim ** -0.5``.
    """

    num_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = 10000.0
    partial_rotary_factor: float = 1.0
    qk_norm: Literal["none", "head", "full"] = "none"
    attention_bias: bool = False
    output_bias: bool = False
    clip_qkv: float | None = None
    attention_scale: float | None = None

    def validate_attention(self) -> None:
        """Raise a `ValueError` for fields that are out of range or do not fit together."""
        check_range(self, "num_heads", 1, 2**10)
        check_range(self, "partial_rotary_factor", 2.0**-10, 1.0)
        if self.num_key_value_heads is not None:
            check_range(self, "num_key_value_heads", 1, self.num_heads)
        self._allow(
            self.num_heads % self.key_value_heads == 0,
            "num_key_value_heads",
            f"are divisors of num_heads = {self.num_heads}, and None",
        )
        if self.head_dim is not None:
            check_range(self, "head_dim", 1, 2**12)
        self._allow(
            self.head_dim is not None or self.hidden_size % self.num_heads == 0,
            "num_heads",
            f"are divisors of hidden_size = {self.hidden_size} where head_dim is None",
        )
        if self.rope_theta is not None:
            check_range(self, "rope_theta", 1.0, 1e15)
        self._allow(
            self.rope_theta is None or (self.rotary_size >= 2 and self.rotary_size % 2 == 0),
            "partial_rotary_factor",
            f"is what gives an even number of the {self.head_size} channels of a head",
        )
        for field in ("clip_qkv", "attention_scale"):
            if getattr(self, field) is not None:
                check_range(self, field, 1e-6, 1e6)

    @property
    def _attn_implementation(self) -> str | None:
        """The attention implementation of the model; transformers' attention functions read it here."""
        owner = self.model_config
        return getattr(self, "_implementation", None) if owner is self else owner._attn_implementation

    @_attn_implementation.setter
    def _attn_implementation(self, implementation: str | None) -> None:
        self._implementation = implementation

    @property
    def key_value_heads(self) -> int:
        """Number of key-value heads."""
        return self.num_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """Channels per head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_size(self) -> int:
        """Rotated channels per head, if there are rotary positions."""
        return int(self.head_size * self.partial_rotary_factor)


@strict
@dataclass(kw_only=True)
class SlidingAttentionConfig(AttentionConfig):
    """Fields of attention over a window (Beltagy et al. 2020, section 3.1).

    Args:
        window: number of tokens that a token sees, itself included.
        global_tokens: number of first tokens of each document that all later tokens see (attention sinks, Xiao et al.
            2023).
    """

    window: int = 2048
    global_tokens: int = 0

    def validate_window(self) -> None:
        """Raise a `ValueError` for sizes that are out of range."""
        check_range(self, "window", 1, 2**24)
        check_range(self, "global_tokens", 0, 2**16)

    @property
    def reach(self) -> int:
        """The largest number of direct columns that a query sees, global tokens aside."""
        return self.window


def attention_state(config: AttentionConfig) -> dict[str, StateSpec]:
    """Rotated keys and values of all tokens, and ``position``, the number of tokens in the document so far.

    The last ``position`` columns belong to the current document. (``position`` has kind ``conv``, since transformers
    expects a state of each kind.)
    """
    shape = (config.key_value_heads, config.head_size)
    kept = {name: StateSpec("recurrent", (*shape, None), together=True) for name in ("key", "value")}
    return {**kept, "position": StateSpec("conv", (1,), torch.int64)}


def sliding_attention_state(config: SlidingAttentionConfig) -> dict[str, StateSpec]:
    """As `attention_state`, for the tokens of the window, and keys and values of the global tokens."""
    shape = (config.key_value_heads, config.head_size)
    sizes = {"": config.reach - 1} | ({"global_": config.global_tokens} if config.global_tokens else {})
    kept = {
        f"{part}{name}": StateSpec("recurrent", (*shape, size))
        for part, size in sizes.items()
        for name in ("key", "value")
    }
    return {**kept, "position": StateSpec("conv", (1,), torch.int64)}
