"""Kernels in 8 or 4 bits: codes, and a scale for each block of them along the last axis.

- int8: whole numbers from -127 to 127, one scale a row;
- int4: two codes a byte, each one of the 16 levels of NormalFloat4 (arXiv:2305.14314, appendix E),
  which split normal numbers into equally likely parts; a scale for every 64.
"""

import itertools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from grm_jax.models.config import Quantization

INT4_BLOCK = 64

NORMAL_FLOAT = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The levels of NormalFloat4, as its paper lists them."""


def _block(quantization: "Quantization", size: int) -> int:
    return size if quantization == "int8" else math.gcd(size, INT4_BLOCK)


def code_shape(quantization: "Quantization", shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the codes of a kernel: `int8` as the kernel's, or `uint8` with half the last axis.

    Raises:
      ValueError: If the last axis is odd and codes come in pairs.
    """
    if quantization == "int8":
        return shape
    if shape[-1] % 2:
        raise ValueError(f"a kernel of shape {shape} cannot be held in pairs of 4-bit codes")
    return (*shape[:-1], shape[-1] // 2)


def scale_shape(quantization: "Quantization", shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a kernel: a number for each block of its last axis."""
    return (*shape[:-1], shape[-1] // _block(quantization, shape[-1]))


def quantise(quantization: "Quantization", kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The codes and scales nearest to a kernel.

    Args:
      quantization: `"int8"` or `"int4"`.
      kernel: `[..., n]`.

    Returns:
      Codes of shape `code_shape` and scales `f32` of shape `scale_shape`.
    """
    block = _block(quantization, kernel.shape[-1])
    blocks = kernel.astype(jnp.float32).reshape(*kernel.shape[:-1], -1, block)
    scales = jnp.abs(blocks).max(axis=-1)
    relative = blocks / jnp.where(scales > 0, scales, 1.0)[..., None]
    if quantization == "int8":
        codes = jnp.round(relative * 127).astype(jnp.int8).reshape(kernel.shape)
        return codes, scales / 127
    middles = jnp.asarray([(low + high) / 2 for low, high in itertools.pairwise(NORMAL_FLOAT)])
    codes = jnp.searchsorted(middles, relative).astype(jnp.uint8).reshape(kernel.shape)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales


def dequantise(quantization: "Quantization", codes: jax.Array, scales: jax.Array) -> jax.Array:
    """The kernel that codes and scales stand for: `f32[..., n]`."""
    if quantization == "int8":
        return codes.astype(jnp.float32) * scales
    pairs = jnp.stack([codes & 15, codes >> 4], axis=-1)
    values = jnp.asarray(NORMAL_FLOAT, jnp.float32)[pairs]
    return (values.reshape(*scales.shape, -1) * scales[..., None]).reshape(*codes.shape[:-1], -1)
