"""One decoder for every family, in Flax Linen.

Layers are identical in shape and run under `nn.scan`, so their parameters are stacked along a
leading `layers` axis and compile time does not grow with depth. What differs from layer to layer
(window, rotary base) is scanned over as data. Every parameter and activation carries logical axis
names; which mesh axes they fall on is decided elsewhere.

Kernels are stored as `[outputs..., inputs...]`, the order of published checkpoints.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from grm_jax.models.attention import (
    Segment,
    attend,
    attend_parallel,
    rope_tables,
    rotate,
)
from grm_jax.models.config import GLOBAL_WINDOW, DecoderConfig

Params = Any
"""A pytree of parameters, as `init_params` and the checkpoint readers return it."""

KeysValues = tuple[Any, Any]
"""Keys and values: two arrays, or two tuples with an array for each layer."""


def _param(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
) -> jax.Array:
    """A parameter with logical axis names; an array once the module is applied."""
    value: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape)
    return value


def product(x: jax.Array, kernel: jax.Array, *, weights_first: bool) -> jax.Array:
    """`x [..., i]` times `kernel [o, i]`: `[..., o]`.

    With `weights_first` the compiler sees the product as kernel times x, which on CPUs is the fast
    order while x has few rows; the barrier keeps it from turning the order round again.
    """
    if not weights_first:
        return jnp.einsum("...i,oi->...o", x, kernel)
    rows = x.reshape(-1, x.shape[-1])
    out = jax.lax.optimization_barrier(jnp.einsum("oi,ri->or", kernel, rows))
    return out.T.reshape(*x.shape[:-1], -1)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32; `offset` is added to the stored scale."""

    eps: float
    offset: float
    axis: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(1.0 - self.offset)
        scale = _param(self, "scale", init, (self.axis,), x.shape[-1:])
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normed * (scale.astype(jnp.float32) + self.offset)).astype(x.dtype)


class Linear(nn.Module):
    """A matrix product without bias over the last `len(inputs)` axes of its argument.

    Attributes:
      outputs: Sizes of the output axes.
      axes: Logical names of the kernel's axes: the outputs', then the inputs'.
      inputs: How many trailing axes of the argument are contracted.
      weights_first: Whether the weights are the product's left operand.
    """

    outputs: tuple[int, ...]
    axes: tuple[str | None, ...]
    inputs: int = 1
    weights_first: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        contracted = x.shape[-self.inputs :]
        init = nn.initializers.variance_scaling(
            1.0,
            "fan_in",
            "truncated_normal",
            in_axis=tuple(range(-self.inputs, 0)),
            out_axis=tuple(range(len(self.outputs))),
        )
        kernel = _param(self, "kernel", init, self.axes, (*self.outputs, *contracted))
        flat_x = x.reshape(*x.shape[: -self.inputs], -1)
        flat_kernel = kernel.astype(x.dtype).reshape(-1, flat_x.shape[-1])
        out = product(flat_x, flat_kernel, weights_first=self.weights_first)
        return out.reshape(*out.shape[:-1], *self.outputs)


class Bounds(NamedTuple):
    """Where the current tokens and the cached segments begin and end; the same in every layer.

    Attributes:
      start: `i32[B]`, position of the first current token (`[B, K]` for parallel samples).
      length: `i32[B]`, real current tokens (`[B, K]` for parallel samples).
      past: For each shared segment, its start and length, `i32[B]`.
      own: The start and length of the samples' own segment, `i32[B, K]`, or None.
    """

    start: jax.Array
    length: jax.Array
    past: tuple[tuple[jax.Array, jax.Array], ...]
    own: tuple[jax.Array, jax.Array] | None


class Cache(NamedTuple):
    """Cached keys and values that go with `Bounds`, in one layer or stacked over all."""

    past: tuple[KeysValues, ...]
    own: KeysValues | None


class Attention(nn.Module):
    """Grouped-query attention over cached segments and the current tokens."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        bounds: Bounds,
        cache: Cache,
        window: jax.Array,
        rope: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, KeysValues]:
        c = self.config
        linear = functools.partial(Linear, weights_first=c.weights_first)
        query = linear((c.num_heads, c.head_dim), ("heads", "head_dim", "embed"), name="q")(x)
        kv_axes = (None, "kv_heads", "head_dim", "embed")
        both = linear((2, c.num_kv_heads, c.head_dim), kv_axes, name="kv")(x)
        key, value = both[:, :, 0], both[:, :, 1]
        if c.qk_norm:
            query = RMSNorm(c.norm_eps, c.norm_offset, "head_dim", name="q_norm")(query)
            key = RMSNorm(c.norm_eps, c.norm_offset, "head_dim", name="k_norm")(key)
        query = rotate(query, *rope) * jnp.asarray(c.query_scale, x.dtype)
        key = rotate(key, *rope)
        past = tuple(
            Segment(*kv, *bound) for kv, bound in zip(cache.past, bounds.past, strict=True)
        )
        if cache.own is not None and bounds.own is not None:
            names = ("batch", None, "kv_heads", "head_dim")
            key = nn.with_logical_constraint(key, names)
            value = nn.with_logical_constraint(value, names)
            own = Segment(*cache.own, *bounds.own)
            mixed = attend_parallel(query, key, value, past, own, window)
        else:
            key = nn.with_logical_constraint(
                key.transpose(0, 2, 3, 1), ("batch", "kv_heads", "head_dim", "length")
            )
            value = nn.with_logical_constraint(
                value.transpose(0, 2, 1, 3), ("batch", "kv_heads", "length", "head_dim")
            )
            current = Segment(key, value, bounds.start, bounds.length)
            mixed = attend(query, current, past, window)
        mixed = nn.with_logical_constraint(mixed, ("batch", "length", "heads", "head_dim"))
        out = linear((c.width,), ("embed", "heads", "head_dim"), inputs=2, name="out")(mixed)
        return out, (key, value)


class MLP(nn.Module):
    """Gated MLP; gate and up projections are one product."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        linear = functools.partial(Linear, weights_first=c.weights_first)
        both = linear((2, c.mlp_dim), (None, "mlp", "embed"), name="gate_up")(x)
        gate, up = both[:, :, 0], both[:, :, 1]
        act = nn.silu(gate) if c.activation == "silu" else nn.gelu(gate, approximate=True)
        hidden = nn.with_logical_constraint(act * up, ("batch", "length", "mlp"))
        return linear((c.width,), ("embed", "mlp"), name="down")(hidden)


class Layer(nn.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        bounds: Bounds,
        ropes: tuple[jax.Array, jax.Array],
        cache: Cache,
        window: jax.Array,
    ) -> tuple[jax.Array, KeysValues]:
        c = self.config

        def norm(name: str) -> RMSNorm:
            return RMSNorm(c.norm_eps, c.norm_offset, "embed", name=name)

        local = (window < GLOBAL_WINDOW).astype(jnp.int32)
        rope = (ropes[0][local], ropes[1][local])
        out, new = Attention(c, name="attention")(
            norm("attention_norm")(x), bounds, cache, window, rope
        )
        x = x + (norm("attention_post_norm")(out) if c.post_norms else out)
        out = MLP(c, name="mlp")(norm("mlp_norm")(x))
        x = x + (norm("mlp_post_norm")(out) if c.post_norms else out)
        return nn.with_logical_constraint(x, ("batch", "length", "embed_act")), new


class Decoder(nn.Module):
    """Embedding, scanned layers, final norm and output matrix."""

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        shape = (c.vocab_size, c.width)
        self.embedding = _param(self, "embedding", init, ("vocab", "embed"), shape)
        if not c.tie_embeddings:
            self.head = _param(self, "head", init, ("vocab", "embed"), shape)
        if c.scan_layers:
            self.layers: Any = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, 0, 0),
                out_axes=0,
                length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c)
        else:
            self.layers = [Layer(c) for _ in range(c.num_layers)]
        self.final_norm = RMSNorm(c.norm_eps, c.norm_offset, "embed")

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        bounds: Bounds,
        cache: Cache,
    ) -> tuple[jax.Array, KeysValues]:
        """Final hidden states `[B, T, D]` and the keys and values of these tokens, all layers."""
        c = self.config
        x = self.embedding[tokens].astype(c.dtype) * jnp.asarray(c.embed_scale, c.dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed_act"))
        tables = [
            rope_tables(positions, c.head_dim, theta)
            for theta in (c.rope_theta, c.rope_theta_local)
        ]
        ropes = (
            jnp.stack([cos for cos, _ in tables]),
            jnp.stack([sin for _, sin in tables]),
        )
        if c.scan_layers:
            x, new = self.layers(x, bounds, ropes, cache, jnp.asarray(c.windows, jnp.int32))
            return self.final_norm(x), new
        keys, values = [], []
        for index, layer in enumerate(self.layers):
            own = None if cache.own is None else (cache.own[0][index], cache.own[1][index])
            here = Cache(tuple((k[index], v[index]) for k, v in cache.past), own)
            x, (key, value) = layer(x, bounds, ropes, here, jnp.int32(c.windows[index]))
            keys.append(key)
            values.append(value)
        return self.final_norm(x), (tuple(keys), tuple(values))

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits `f32[..., V]` of hidden states `[..., D]`."""
        matrix = self.embedding if self.config.tie_embeddings else self.head
        matrix = matrix.astype(hidden.dtype)
        logits = product(hidden, matrix, weights_first=self.config.weights_first)
        logits = logits.astype(jnp.float32)
        names = ("batch", "length", "vocab")[-logits.ndim :]
        return nn.with_logical_constraint(logits, names)

    def initialise(self, tokens: jax.Array) -> jax.Array:
        """Touches every parameter, for `init`."""
        positions = jnp.zeros_like(tokens)
        bounds = Bounds(positions[:, 0], positions[:, 0] + 1, (), None)
        hidden, _ = self(tokens, positions, bounds, Cache((), None))
        return self.unembed(hidden)


def _apply(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array,
    positions: jax.Array,
    bounds: Bounds,
    cache: Cache,
) -> tuple[jax.Array, KeysValues]:
    out: Any = Decoder(config).apply({"params": params}, tokens, positions, bounds, cache)
    return out


def forward(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array,
    *,
    length: jax.Array,
    start: jax.Array | None = None,
    past: tuple[Segment, ...] = (),
) -> tuple[jax.Array, Segment]:
    """Runs the decoder on tokens that follow the past segments.

    Args:
      params: Parameters, as `init_params` lays them out.
      config: The decoder's configuration.
      tokens: `i32[B, T]`, left-aligned.
      length: `i32[B]`, real tokens in each row; what lies beyond is never attended to.
      start: `i32[B]`, position of the first token; zeros if left out.
      past: Cached segments, in order, that every token here may attend to.

    Returns:
      Hidden states after the final norm, `[B, T, D]`, and the `Segment` of these tokens in all
      layers, with keys `[L, B, kv_heads, head_dim, T]` and values `[L, B, kv_heads, T, head_dim]`.
    """
    start = jnp.zeros_like(length) if start is None else start
    bounds = Bounds(start, length, tuple((s.start, s.length) for s in past), None)
    cache = Cache(tuple((s.keys, s.values) for s in past), None)
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    hidden, (keys, values) = _apply(params, config, tokens, positions, bounds, cache)
    return hidden, Segment(keys, values, start, length)


def forward_parallel(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array,
    *,
    past: tuple[Segment, ...],
    own: Segment,
) -> tuple[jax.Array, KeysValues]:
    """Runs the decoder on the next token of K parallel samples of each row.

    Samples of a row share the past segments and do not see one another.

    Args:
      params: Parameters, as `init_params` lays them out.
      config: The decoder's configuration.
      tokens: `i32[B, K]`, one token for each sample.
      past: Cached segments shared by the samples of a row.
      own: What each sample has written so far, batch axes `[B, K]`.

    Returns:
      Hidden states after the final norm, `[B, K, D]`, and the tokens' keys and values in all
      layers, each `[L, B, K, kv_heads, head_dim]`.
    """
    positions = own.start + own.length
    bounds = Bounds(
        positions,
        jnp.ones_like(positions),
        tuple((s.start, s.length) for s in past),
        (own.start, own.length),
    )
    cache = Cache(tuple((s.keys, s.values) for s in past), (own.keys, own.values))
    return _apply(params, config, tokens, positions, bounds, cache)


def unembed(params: Params, config: DecoderConfig, hidden: jax.Array) -> jax.Array:
    """Logits `f32[..., V]` of hidden states `[..., D]`."""
    out: Any = Decoder(config).apply({"params": params}, hidden, method=Decoder.unembed)
    return out


def cpu_decoder(config: DecoderConfig, params: Params) -> tuple[DecoderConfig, Params]:
    """The same model in the form that decodes fastest on CPUs.

    A scan over stacked layers compiles fast and is how parameters are stored. But XLA on CPUs
    copies each layer's slice before it is used, which in decoding costs as much as the products.
    Here every layer has arrays of its own, and products are written weights first. Caches are then
    tuples of one array a layer, wherever stacked ones have a leading axis L.

    Args:
      config: With `scan_layers` true.
      params: Stacked parameters.

    Returns:
      The configuration and parameters of the unrolled decoder; the embedding is shared.
    """
    apart = {name: leaf for name, leaf in params.items() if name != "layers"}
    for index in range(config.num_layers):
        apart[f"layers_{index}"] = jax.tree.map(lambda leaf: leaf[index], params["layers"])  # noqa: B023
    return dataclasses.replace(config, scan_layers=False, weights_first=True), apart


def logits(params: Params, config: DecoderConfig, tokens: jax.Array) -> jax.Array:
    """Logits of every position: `i32[B, T]` to `f32[B, T, V]`. Pure; jit with static `config`."""
    length = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    hidden, _ = forward(params, config, tokens, length=length)
    return unembed(params, config, hidden)


def init_params(config: DecoderConfig, key: jax.Array) -> Params:
    """Random float32 parameters."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = Decoder(config).init(key, tokens, method=Decoder.initialise)
    return nn.meta.unbox(variables["params"])


def abstract_params(config: DecoderConfig, dtype: Any = jnp.float32) -> Params:
    """Shapes of the parameters as `jax.ShapeDtypeStruct`s, without allocating any."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def param_axes(config: DecoderConfig) -> Params:
    """Logical axis names of every parameter: a tree like the parameters', with tuple leaves."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    boxed = jax.eval_shape(
        lambda: Decoder(config).init(jax.random.key(0), tokens, method=Decoder.initialise)
    )
    specs = nn.get_partition_spec(boxed)["params"]
    return jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
