"""A tiny policy for Tunix: digits, each drawn after the one before it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

DIGITS = "0123456789"
PAD, BOS, EOS = 10, 11, 12
VOCABULARY = 13


class DigitTokenizer:
    """A token for each digit, with the methods that Tunix asks for."""

    def encode(self, text: str, **_: Any) -> list[int]:
        """The digits of a text; what is none of them is passed over."""
        return [DIGITS.index(char) for char in text if char in DIGITS]

    def decode(self, ids: Any, **_: Any) -> str:
        """The digits alone."""
        return "".join(DIGITS[int(token)] for token in ids if int(token) < len(DIGITS))

    def bos_id(self) -> int:
        """Begins a prompt."""
        return BOS

    def eos_id(self) -> int:
        """Ends an answer."""
        return EOS

    def pad_id(self) -> int:
        """Fills up."""
        return PAD


class Shape(NamedTuple):
    """What Tunix makes a cache of; this policy keeps nothing in it."""

    num_layers: int = 1
    num_kv_heads: int = 1
    head_dim: int = 4


class DigitPolicy(nnx.Module):
    """Draws a token after the last one alone, so it needs neither cache nor mask."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.config = Shape()
        self.embed = nnx.Embed(VOCABULARY, 16, rngs=rngs)
        self.head = nnx.Linear(16, VOCABULARY, rngs=rngs)

    @property
    def num_embed(self) -> int:
        """Tokens of the vocabulary."""
        return VOCABULARY

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, cache: Any, attention_mask: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Logits f32[B, T, V] of tokens i32[B, T]."""
        logits = self.head(jnp.tanh(self.embed(tokens)))
        return logits, cache
