"""Low-rank adapters beside frozen kernels, and the quantisation of those kernels.

An adapter is part of the parameters: leaves named `lora_a` and `lora_b` beside a kernel, which the
decoder multiplies by where the configuration's `lora` says so. Without them, and with `lora` None,
the decoder is the base model, to the last bit.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from grm_jax.errors import UsageError
from grm_jax.models.config import LORA_TARGETS, DecoderConfig, Lora, Quantization
from grm_jax.models.decoder import Params, abstract_params, init_params
from grm_jax.models.quantization import dequantise, quantise

FUSED = {"kv": ("k", "v"), "gate_up": ("gate", "up")}
"""Kernels that hold two projections, and what these are called among LoRA's targets."""


def lora_targets(config: DecoderConfig) -> tuple[str, ...]:
    """The projections of a decoder that can have an adapter."""
    if config.latent is None:
        attention: tuple[str, ...] = ("q", "k", "v", "out")
    elif config.latent.query_rank is None:
        attention = ("q", "kv_a", "kv_b", "out")
    else:
        attention = ("q_a", "q_b", "kv_a", "kv_b", "out")
    experts = () if config.experts is None else ("experts",)
    found = (*attention, "gate", "up", "down", *experts)
    return tuple(name for name in LORA_TARGETS if name in found)


def is_adapter(path: tuple[str, ...]) -> bool:
    """Whether the parameter at a path belongs to an adapter."""
    return path[-1].endswith(("lora_a", "lora_b"))


def split_lora(params: Params) -> tuple[Params, Params]:
    """The adapters' parameters and all others."""
    flat = flatten_dict(params)
    adapters = {path: leaf for path, leaf in flat.items() if is_adapter(path)}
    base = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    return unflatten_dict(adapters), unflatten_dict(base)


def join_lora(adapters: Params, base: Params) -> Params:
    """The inverse of `split_lora`."""
    return unflatten_dict(flatten_dict(base) | flatten_dict(adapters))


def add_lora(
    config: DecoderConfig, params: Params, lora: Lora, key: jax.Array
) -> tuple[DecoderConfig, Params]:
    """Adds fresh adapters, which change nothing yet.

    Args:
      config: The decoder's, without adapters.
      params: Its parameters, plain or quantised; they are shared, not copied.
      lora: Rank, strength and targets.
      key: For the random half of each adapter; the other half is zero.

    Returns:
      The configuration and parameters with adapters, which are float32.

    Raises:
      UsageError: If the decoder has no such projection, or has adapters already.
    """
    if config.lora is not None:
        raise UsageError("the model has adapters already; merge or remove them first")
    absent = [name for name in lora.targets if name not in lora_targets(config)]
    if absent:
        raise UsageError(
            f"a {config.family} decoder has no projection {absent[0]!r}; "
            f"LoRA can target {', '.join(lora_targets(config))}"
        )
    config = dataclasses.replace(config, lora=lora)
    # Only the adapters are asked for, so only they are made.
    adapters = jax.jit(lambda key: split_lora(init_params(config, key))[0])(key)
    return config, join_lora(adapters, params)


def remove_lora(config: DecoderConfig, params: Params) -> tuple[DecoderConfig, Params]:
    """The base model."""
    return dataclasses.replace(config, lora=None), split_lora(params)[1]


def merge_lora(config: DecoderConfig, params: Params) -> tuple[DecoderConfig, Params]:
    """Adds what the adapters do to the kernels they stand beside.

    Args:
      config: The decoder's.
      params: Its parameters, layers stacked; quantised kernels are written out first.

    Returns:
      The configuration and parameters of a plain decoder.
    """
    if config.quantization is not None:
        config, params = dequantise_params(config, params)
    if config.lora is None:
        return config, params
    flat = flatten_dict(params)
    out = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    for path, down in flat.items():
        if not path[-1].endswith("lora_a"):
            continue
        up = flat[(*path[:-1], path[-1].replace("lora_a", "lora_b"))]
        if path[-1] == "lora_a":
            kernel = (*path[:-1], "kernel")
            names = FUSED.get(path[-2])
            add = functools.partial(_merged, config.lora, names)
        else:
            kernel = (*path[:-1], path[-1].removesuffix("_lora_a"))
            add = functools.partial(_merged_experts, config.lora)
        out[kernel] = jax.jit(add)(out[kernel], down, up)
    return dataclasses.replace(config, lora=None), unflatten_dict(out)


def _merged(
    lora: Lora, names: tuple[str, ...] | None, kernel: jax.Array, down: jax.Array, up: jax.Array
) -> jax.Array:
    """A kernel `[L, (p,) outputs..., inputs...]` with adapters `[L, n, …]` added in."""
    layers, count, rank = down.shape[:3]
    flat_up = up.reshape(layers, count, -1, rank).astype(jnp.float32)
    flat_down = down.reshape(layers, count, rank, -1).astype(jnp.float32)
    added = lora.scale * jnp.einsum("lnor,lnri->lnoi", flat_up, flat_down)
    wide = kernel.astype(jnp.float32)
    if names is None:
        return (wide + added.reshape(kernel.shape)).astype(kernel.dtype)
    places = jnp.asarray([place for place, name in enumerate(names) if name in lora.targets])
    added = added.reshape(layers, count, *kernel.shape[2:])
    return wide.at[:, places].add(added).astype(kernel.dtype)


def _merged_experts(lora: Lora, kernel: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
    """Experts' kernels `[L, E, inputs, outputs...]` with adapters added in."""
    parts = kernel.shape[3:-1]
    down = down.reshape(*kernel.shape[:3], *parts, -1).astype(jnp.float32)
    letters = "x"[: len(parts)]
    added = jnp.einsum(
        f"lei{letters}r,ler{letters}o->lei{letters}o", down, up.astype(jnp.float32) * lora.scale
    )
    return (kernel.astype(jnp.float32) + added).astype(kernel.dtype)


def quantise_params(
    config: DecoderConfig, params: Params, quantization: Quantization
) -> tuple[DecoderConfig, Params]:
    """Stores the projections' kernels, the experts' included, in 8 or 4 bits.

    Embeddings, the output matrix, norms, routers and biases stay as they are.

    Args:
      config: The decoder's, not yet quantised.
      params: Its parameters.
      quantization: `"int8"` or `"int4"`.
    """
    if config.quantization is not None:
        raise UsageError(f"the model is quantised already, to {config.quantization}")
    config = dataclasses.replace(config, quantization=quantization)
    flat = flatten_dict(params)
    out: dict[tuple[str, ...], Any] = {}
    # A layer at a time, so that the float32 copy is small.
    encode = jax.jit(lambda kernel: jax.lax.map(functools.partial(quantise, quantization), kernel))
    for path in flatten_dict(abstract_params(config)):
        stem = (*path[:-1], path[-1].removesuffix("_codes"))
        if path[-1].endswith("_codes"):
            out[path], out[(*path[:-1], f"{stem[-1]}_scales")] = encode(flat[stem])
        elif not path[-1].endswith("_scales"):
            out[path] = flat[path]
    return config, unflatten_dict(out)


def dequantise_params(
    config: DecoderConfig, params: Params, dtype: DTypeLike | None = None
) -> tuple[DecoderConfig, Params]:
    """Writes quantised kernels out as arrays, of the compute type unless another is given."""
    if config.quantization is None:
        return config, params
    dtype = config.dtype if dtype is None else dtype
    decode = jax.jit(functools.partial(dequantise, config.quantization))
    out: dict[tuple[str, ...], Any] = {}
    flat = flatten_dict(params)
    for path, leaf in flat.items():
        if path[-1].endswith("_codes"):
            stem = path[-1].removesuffix("_codes")
            scales = flat[(*path[:-1], f"{stem}_scales")]
            out[(*path[:-1], stem)] = decode(leaf, scales).astype(dtype)
        elif not path[-1].endswith("_scales"):
            out[path] = leaf
    return dataclasses.replace(config, quantization=None), unflatten_dict(out)
