"""Rotary position embeddings (arXiv:2104.09864) and the ways of stretching them."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How positions become rotations; hashable.

    Attributes:
      theta: The base.
      kind: How frequencies are stretched beyond the context of pretraining: `"default"` not at
        all, `"linear"` all alike, `"llama3"` only the slow ones, `"yarn"` by arXiv:2309.00071.
      factor: How many times longer the context is.
      original_context: Tokens of context in pretraining (llama3 and yarn).
      low_freq_factor: Turns within the original context below which a frequency is slowed by the
        whole factor (llama3).
      high_freq_factor: Turns above which it is left alone (llama3).
      beta_fast: Turns within the original context above which a frequency is left alone (yarn).
      beta_slow: Turns below which it is slowed by the whole factor (yarn).
      truncate: Whether yarn rounds its range of frequencies outwards.
      mscale: Strength of the growth of cosines and sines with the factor (yarn).
      mscale_all_dim: Strength of the same growth for all of a head's elements (yarn).
      attention_factor: What cosines and sines are multiplied by (yarn); worked out if None.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind in ("llama3", "yarn") and self.original_context < 1:
            raise ValueError(f"rope of kind {self.kind} needs original_context, the pretraining's")

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_growth(self.factor, self.mscale) / yarn_growth(
                self.factor, self.mscale_all_dim
            )
        return yarn_growth(self.factor, 1.0)


def yarn_growth(factor: float, strength: float) -> float:
    """How much larger yarn makes attention's logits for a context `factor` times longer."""
    return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0


def inverse_frequencies(rope: Rope, dim: int) -> np.ndarray:
    """Radians a token for each pair of elements: `f32[dim // 2]`."""
    powers = np.float32(rope.theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    plain = (1.0 / powers).astype(np.float32)
    slowed = (1.0 / (np.float32(rope.factor) * powers)).astype(np.float32)
    match rope.kind:
        case "default":
            return plain
        case "linear":
            return slowed
        case "llama3":
            turns = rope.original_context * plain / (2 * math.pi)
            low, high = rope.low_freq_factor, rope.high_freq_factor
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        case "yarn":
            first, last = _yarn_range(rope, dim)
            kept = 1.0 - np.clip((np.arange(dim // 2) - first) / (last - first), 0.0, 1.0)
    return (slowed * (1.0 - kept) + plain * kept).astype(np.float32)


def _yarn_range(rope: Rope, dim: int) -> tuple[float, float]:
    """Pairs between which yarn goes over from leaving frequencies alone to slowing them."""

    def pair(turns: float) -> float:
        spread = math.log(rope.original_context / (turns * 2 * math.pi))
        return dim * spread / (2 * math.log(rope.theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    return first, last if last != first else last + 0.001


def rope_tables(positions: jax.Array, dim: int, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotations, first half with second half of a head.

    Args:
      positions: `i32[...]`.
      dim: Elements that are rotated.
      rope: The frequencies.

    Returns:
      Two `f32[..., dim // 2]`.
    """
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope, dim)
    amplitude = rope.amplitude
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates `x [B, T, heads, dim]` by tables `[B, T, dim // 2]`, in float32."""
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    sines = jnp.stack([-sin, sin], axis=-2)[:, :, None]
    # Swapping the halves fuses into the sum; a concatenation would not.
    turned = halves * cos[:, :, None, None] + jnp.flip(halves, axis=-2) * sines
    return turned.reshape(x.shape).astype(x.dtype)
