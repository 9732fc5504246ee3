"""The blocks that all layers are built of: norms, projections, the gated MLP.

Kernels are stored as `[outputs..., inputs...]`, the order of published checkpoints. A projection's
kernel may be stored quantised, and may have low-rank adapters beside it (`grm_jax.models.lora`).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from grm_jax.models.config import DecoderConfig
from grm_jax.models.quantization import code_shape, dequantise, scale_shape

Axes = tuple[str | None, ...]

# Up to so many rows a product is faster on CPUs with the weights on the left.
_FEW_ROWS = 128


def param(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    axes: Axes,
    shape: tuple[int, ...],
    dtype: Any = jnp.float32,
) -> jax.Array:
    """A parameter with logical axis names; an array once the module is applied."""
    value: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)
    return value


def kernel_init(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> nn.initializers.Initializer:
    """Normal numbers whose products keep the size of what they multiply; takes axis numbers."""
    return nn.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal", in_axis=inputs, out_axis=outputs
    )


def stored_kernel(
    module: nn.Module,
    config: DecoderConfig,
    name: str,
    init: nn.initializers.Initializer,
    axes: Axes,
    shape: tuple[int, ...],
) -> jax.Array:
    """A kernel in the compute type, from an array or from quantised codes."""
    if config.quantization is None:
        return param(module, name, init, axes, shape).astype(config.dtype)
    # Random weights are never quantised ones: codes and scales come from `quantise`.
    zeros = nn.initializers.zeros_init()
    codes_type = jnp.int8 if config.quantization == "int8" else jnp.uint8
    codes = param(
        module, f"{name}_codes", zeros, axes, code_shape(config.quantization, shape), codes_type
    )
    scales = param(module, f"{name}_scales", zeros, axes, scale_shape(config.quantization, shape))
    return dequantise(config.quantization, codes, scales).astype(config.dtype)


def product(
    x: jax.Array, kernel: jax.Array, *, weights_first: bool, dtype: DTypeLike | None = None
) -> jax.Array:
    """`x [..., i]` times `kernel [o, i]`: `[..., o]`, of the operands' type unless one is given.

    A kernel `[n, o, i]` gives `[..., n, o]`.

    With `weights_first` the compiler sees the product as kernel times x, which on CPUs is the fast
    order while x has few rows; the barrier keeps it from turning the order round again.
    """
    outputs = kernel.shape[:-1]
    if not weights_first or math.prod(x.shape[:-1]) > _FEW_ROWS:
        names = "no"[-len(outputs) :]
        return jnp.einsum(f"...i,{names}i->...{names}", x, kernel, preferred_element_type=dtype)
    rows, flat = x.reshape(-1, x.shape[-1]), kernel.reshape(-1, x.shape[-1])
    out = jnp.einsum("oi,ri->or", flat, rows, preferred_element_type=dtype)
    out = jax.lax.optimization_barrier(out)
    return out.T.reshape(*x.shape[:-1], *outputs)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32; `offset` is added to the stored scale."""

    eps: float
    offset: float
    axis: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(1.0 - self.offset)
        scale = param(self, "scale", init, (self.axis,), x.shape[-1:])
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normed * (scale.astype(jnp.float32) + self.offset)).astype(x.dtype)


class Adapter(NamedTuple):
    """The low-rank adapters of a projection, or of those n of several fused ones that have one.

    Attributes:
      down: `[n, r, inputs...]`.
      up: `[n, outputs..., r]`, without the axis that fused projections lie along.
      places: Which of the fused projections these are.
    """

    down: jax.Array
    up: jax.Array
    places: tuple[int, ...]


def adapter(
    module: nn.Module,
    config: DecoderConfig,
    names: tuple[str, ...],
    outputs: tuple[int, ...],
    inputs: tuple[int, ...],
    axes: Axes,
) -> Adapter | None:
    """The adapters of a projection whose kernel is `[outputs..., inputs...]`; None if it has none.

    The first of two output axes runs over `names` if there are several.
    """
    lora = config.lora
    places = tuple(i for i, name in enumerate(names) if lora is not None and name in lora.targets)
    if lora is None or not places:
        return None
    fused = len(names) > 1
    rest, rest_axes = outputs[fused:], axes[fused : len(outputs)]
    down_shape = (len(places), lora.rank, *inputs)
    init = kernel_init(tuple(range(2, len(down_shape))), (1,))
    down_axes = (None, None, *axes[len(outputs) :])
    down = param(module, "lora_a", init, down_axes, down_shape)
    zeros = nn.initializers.zeros_init()
    up = param(module, "lora_b", zeros, (None, *rest_axes, None), (len(places), *rest, lora.rank))
    dtype = config.dtype
    return Adapter(down.astype(dtype), (up * lora.scale).astype(dtype), places)


def spread(added: jax.Array, places: tuple[int, ...], count: int, axis: int) -> jax.Array:
    """What n of `count` fused projections add, with zeros for the others, along an axis."""
    if len(places) == count:
        return added
    zero = jnp.zeros_like(jax.lax.index_in_dim(added, 0, axis, keepdims=False))
    found = dict(zip(places, range(len(places)), strict=True))
    return jnp.stack(
        [
            jax.lax.index_in_dim(added, found[place], axis, keepdims=False)
            if place in found
            else zero
            for place in range(count)
        ],
        axis=axis,
    )


def _in_parts() -> bool:
    """Whether a mesh is set that splits outputs of projections."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape.get("tensor", 1) > 1


def adapted_product(x: jax.Array, kernel: jax.Array, low_rank: Adapter, count: int) -> jax.Array:
    """`x [..., i]` times a kernel `[o, i]` with its adapters added in: one large product.

    So are the gradients: the large product with the whole kernel's transpose, and small ones for
    the adapters. With a product for each half of an adapter, CPUs take twice as long.

    Args:
      x: The argument.
      kernel: `[o, i]` of all `count` fused projections, or `[count, o / count, i]`.
      low_rank: The adapters.
      count: Of fused projections.

    Returns:
      `[..., *kernel.shape[:-1]]`.
    """
    down, up, places = low_rank
    down = down.reshape(*down.shape[:2], -1)
    up = up.reshape(len(places), -1, up.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    out = _whole_product(places, count, rows, kernel.reshape(-1, x.shape[-1]), down, up)
    return out.reshape(*x.shape[:-1], *kernel.shape[:-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _whole_product(
    places: tuple[int, ...],
    count: int,
    rows: jax.Array,
    kernel: jax.Array,
    down: jax.Array,
    up: jax.Array,
) -> jax.Array:
    return jnp.einsum("ri,oi->ro", rows, _with_adapters(places, count, kernel, down, up))


def _with_adapters(
    places: tuple[int, ...], count: int, kernel: jax.Array, down: jax.Array, up: jax.Array
) -> jax.Array:
    added = spread(jnp.einsum("nor,nri->noi", up, down), places, count, 0)
    return kernel + added.reshape(kernel.shape)


def _whole_product_forward(
    places: tuple[int, ...], count: int, *operands: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _whole_product(places, count, *operands), operands


def _whole_product_backward(
    places: tuple[int, ...], count: int, saved: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, ...]:
    rows, kernel, down, up = saved
    whole = _with_adapters(places, count, kernel, down, up)
    parts = gradient.reshape(len(rows), count, -1)
    d_down, d_up = [], []
    for place, one_down, one_up in zip(places, down, up, strict=True):
        part = parts[:, place]
        d_down.append(jnp.einsum("ro,ok,ri->ki", part, one_up, rows, optimize=[(0, 1), (0, 1)]))
        d_up.append(jnp.einsum("ro,rk->ok", part, jnp.einsum("ri,ki->rk", rows, one_down)))
    return (
        jnp.einsum("ro,oi->ri", gradient, whole),
        jnp.einsum("ro,ri->oi", gradient, rows),
        jnp.stack(d_down),
        jnp.stack(d_up),
    )


_whole_product.defvjp(_whole_product_forward, _whole_product_backward)


class Linear(nn.Module):
    """A projection, or several fused ones, of trailing axes.

    Attributes:
      config: The decoder's.
      names: What the projections are called among LoRA's targets; the first output axis runs over
        them if there are several.
      outputs: Sizes of the output axes.
      axes: Logical names of the kernel's axes: the outputs', then the inputs'.
      inputs: How many trailing axes of the argument are contracted.
      bias: Whether a bias is added.
    """

    config: DecoderConfig
    names: tuple[str, ...]
    outputs: tuple[int, ...]
    axes: Axes
    inputs: int = 1
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        lead, contracted = x.shape[: -self.inputs], x.shape[-self.inputs :]
        kernel = _kernel(self, self.config, self.outputs, contracted, self.axes)
        flat = x.reshape(*lead, -1)
        low_rank = adapter(self, self.config, self.names, self.outputs, contracted, self.axes)
        # An axis over fused projections cannot be shared out as each of them is. Where nothing is,
        # it spares compilers for CPUs a copy of the kernel.
        fused = self.outputs[:1] if len(self.names) > 1 and _in_parts() else ()
        kernel = kernel.reshape(*fused, -1, flat.shape[-1])
        # Rounded to fewer bits, a kernel would lose what is added to it.
        whole = self.config.dtype == "float32" and math.prod(lead) > _FEW_ROWS
        if low_rank is not None and whole:
            out, low_rank = adapted_product(flat, kernel, low_rank, len(self.names)), None
        else:
            out = product(flat, kernel, weights_first=self.config.weights_first)
        out = out.reshape(*lead, *self.outputs)
        if self.bias:
            zeros = nn.initializers.zeros_init()
            names = self.axes[: len(self.outputs)]
            out = out + param(self, "bias", zeros, names, self.outputs).astype(out.dtype)
        if low_rank is not None:
            down, up, places = low_rank
            low = jnp.einsum("...i,nri->...nr", flat, down.reshape(*down.shape[:2], -1))
            added = jnp.einsum("...nr,nor->...no", low, up.reshape(len(places), -1, up.shape[-1]))
            added = spread(added, places, len(self.names), len(lead))
            out = out + added.reshape(out.shape)
        return out


class Weight(nn.Module):
    """A `Linear`'s kernel with its adapter added in, for products of another form.

    Attributes:
      config: The decoder's.
      name_: What the projection is called among LoRA's targets.
      shape: The kernel's, outputs before inputs.
      axes: Logical names of its axes.
      outputs: How many of them are outputs.
    """

    config: DecoderConfig
    name_: str
    shape: tuple[int, ...]
    axes: Axes
    outputs: int

    @nn.compact
    def __call__(self) -> jax.Array:
        outputs, inputs = self.shape[: self.outputs], self.shape[self.outputs :]
        kernel = _kernel(self, self.config, outputs, inputs, self.axes)
        low_rank = adapter(self, self.config, (self.name_,), outputs, inputs, self.axes)
        if low_rank is None:
            return kernel
        down, up, _ = low_rank
        rank = up.shape[-1]
        return kernel + (up.reshape(-1, rank) @ down.reshape(rank, -1)).reshape(kernel.shape)


def _kernel(
    module: nn.Module,
    config: DecoderConfig,
    outputs: tuple[int, ...],
    inputs: tuple[int, ...],
    axes: Axes,
) -> jax.Array:
    init = kernel_init(tuple(range(-len(inputs), 0)), tuple(range(len(outputs))))
    return stored_kernel(module, config, "kernel", init, axes, (*outputs, *inputs))


class MLP(nn.Module):
    """Gated MLP; gate and up projections are one product.

    Attributes:
      config: The decoder's.
      hidden: Its hidden size.
    """

    config: DecoderConfig
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        axes = (None, "mlp", "embed")
        both = Linear(c, ("gate", "up"), (2, self.hidden), axes, name="gate_up")(x)
        hidden = gated_pair(c, both)
        hidden = nn.with_logical_constraint(hidden, ("batch", "length", "mlp"))
        return Linear(c, ("down",), (c.width,), ("embed", "mlp"), name="down")(hidden)


def gated(config: DecoderConfig, gate: jax.Array, up: jax.Array) -> jax.Array:
    """The gate's non-linearity times what it lets through."""
    act = nn.silu(gate) if config.activation == "silu" else nn.gelu(gate, approximate=True)
    return act * up


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated_pair(config: DecoderConfig, both: jax.Array) -> jax.Array:
    """`gated` of `[..., 2, hidden]`, gate and up; for the gradient nothing else is kept."""
    return gated(config, both[..., 0, :], both[..., 1, :])


def _gated_forward(config: DecoderConfig, both: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gated_pair(config, both), both


def _gated_backward(
    config: DecoderConfig, both: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    # Written once: what autodiff makes of two slices is the sum of two padded arrays.
    pull = jax.vjp(functools.partial(gated, config), both[..., 0, :], both[..., 1, :])[1]
    return (jnp.stack(pull(gradient), axis=-2),)


gated_pair.defvjp(_gated_forward, _gated_backward)
