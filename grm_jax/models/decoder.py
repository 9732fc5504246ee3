"""One decoder for every family, in Flax Linen.

Layers of one shape run under `nn.scan`, so their parameters are stacked along a leading `layers`
axis and compile time does not grow with depth. Most families have one such stack; a mixture of
experts may have ordinary layers before it (`dense_layers`). What differs from layer to layer
(window, rotary base) is scanned over as data. Every parameter and activation carries logical axis
names; which mesh axes they fall on is decided elsewhere.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from grm_jax.models.attention import Bounds, Cache, KeysValues, Segment, cached_attention, soft_cap
from grm_jax.models.config import GLOBAL_WINDOW, DecoderConfig, Stack
from grm_jax.models.latent import LatentAttention
from grm_jax.models.layers import MLP, Axes, Linear, RMSNorm, param, product
from grm_jax.models.moe import MixtureOfExperts
from grm_jax.models.rope import rope_tables, rotate

Params = Any
"""A pytree of parameters, as `init_params` and the checkpoint readers return it."""


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
        axes: Axes = ("heads", "head_dim", "embed")
        query = Linear(c, ("q",), (c.num_heads, c.head_dim), axes, bias=c.qkv_bias, name="q")(x)
        axes = (None, "kv_heads", "head_dim", "embed")
        shape = (2, c.num_kv_heads, c.head_dim)
        both = Linear(c, ("k", "v"), shape, axes, bias=c.qkv_bias, name="kv")(x)
        key, value = both[:, :, 0], both[:, :, 1]
        if c.qk_norm:
            query = RMSNorm(c.norm_eps, c.norm_offset, "head_dim", name="q_norm")(query)
            key = RMSNorm(c.norm_eps, c.norm_offset, "head_dim", name="k_norm")(key)
        query = rotate(query, *rope) * jnp.asarray(c.query_scale, x.dtype)
        mixed, new = cached_attention(
            query,
            rotate(key, *rope),
            value,
            bounds,
            cache,
            window,
            tuple(set(c.windows)),
            c.attention_softcap,
        )
        mixed = nn.with_logical_constraint(mixed, ("batch", "length", "heads", "head_dim"))
        axes = ("embed", "heads", "head_dim")
        return Linear(c, ("out",), (c.width,), axes, inputs=2, name="out")(mixed), new


class Layer(nn.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual stream.

    Attributes:
      config: The decoder's.
      experts: Whether the MLP is a mixture of experts.
    """

    config: DecoderConfig
    experts: bool

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
        attention = Attention if c.latent is None else LatentAttention
        out, new = attention(c, name="attention")(
            norm("attention_norm")(x), bounds, cache, window, rope
        )
        x = x + (norm("attention_post_norm")(out) if c.post_norms else out)
        hidden = norm("mlp_norm")(x)
        mlp = MixtureOfExperts(c, name="mlp") if self.experts else MLP(c, c.mlp_dim, name="mlp")
        out = mlp(hidden)
        x = x + (norm("mlp_post_norm")(out) if c.post_norms else out)
        return nn.with_logical_constraint(x, ("batch", "length", "embed_act")), new


class Decoder(nn.Module):
    """Embedding, scanned layers, final norm and output matrix or classifier's head."""

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        shape = (c.vocab_size, c.width)
        self.embedding = param(self, "embedding", init, ("vocab", "embed"), shape)
        if c.num_labels:
            self.score = param(self, "score", init, (None, "embed"), (c.num_labels, c.width))
        elif not c.tie_embeddings:
            self.head = param(self, "head", init, ("vocab", "embed"), shape)
        if c.scan_layers:
            *dense, last = c.stacks
            if dense:
                self.dense_layers = _scanned(c, dense[0])
            self.layers: Any = _scanned(c, last)
        else:
            self.layers = [
                Layer(c, stack.experts) for stack in c.stacks for _ in range(stack.count)
            ]
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
        x = self.embedding[tokens].astype(c.dtype)
        if c.scale_embedding:
            x = x * jnp.asarray(c.width**0.5, c.dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed_act"))
        tables = [rope_tables(positions, c.rope_dim, rope) for rope in (c.rope, c.rope_local)]
        ropes = (
            jnp.stack([cos for cos, _ in tables]),
            jnp.stack([sin for _, sin in tables]),
        )
        windows = jnp.asarray(c.windows, jnp.int32)
        if c.scan_layers:
            stacks = [self.layers] if len(c.stacks) == 1 else [self.dense_layers, self.layers]
            parts = [windows[stack.first : stack.first + stack.count] for stack in c.stacks]
        else:
            stacks, parts = self.layers, list(windows)
        keys, values = [], []
        for index, (stack, part) in enumerate(zip(stacks, parts, strict=True)):
            x, (key, value) = stack(x, bounds, ropes, cache.at(index), part)
            keys.append(key)
            values.append(value)
        return self.final_norm(x), (tuple(keys), tuple(values))

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits `f32[..., V]` of hidden states `[..., D]`."""
        c = self.config
        matrix = self.embedding if c.tie_embeddings else self.head
        # Summed in float32, as a learner's log-probabilities are.
        logits = product(
            hidden,
            matrix.astype(hidden.dtype),
            weights_first=c.weights_first,
            dtype=jnp.float32,
        )
        logits = soft_cap(logits, c.logit_softcap)
        names = ("batch", "length", "vocab")[-logits.ndim :]
        return nn.with_logical_constraint(logits, names)

    def classify(self, hidden: jax.Array) -> jax.Array:
        """The classifier's outputs `f32[..., num_labels]` of hidden states `[..., D]`."""
        return jnp.einsum("...d,nd->...n", hidden, self.score.astype(hidden.dtype)).astype(
            jnp.float32
        )

    def initialise(self, tokens: jax.Array) -> jax.Array:
        """Touches every parameter, for `init`."""
        positions = jnp.zeros_like(tokens)
        bounds = Bounds(positions[:, 0], positions[:, 0] + 1, (), None)
        hidden, _ = self(tokens, positions, bounds, Cache((), None))
        return self.classify(hidden) if self.config.num_labels else self.unembed(hidden)


def _scanned(config: DecoderConfig, stack: Stack) -> Any:
    """Layers of one shape, run one after the other with stacked parameters."""
    return nn.scan(
        nn.remat(Layer, prevent_cse=False) if config.remat else Layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, 0, 0),
        out_axes=0,
        length=stack.count,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(config, stack.experts)


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
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, Segment]:
    """Runs the decoder on tokens that follow the past segments.

    Args:
      params: Parameters, as `init_params` lays them out.
      config: The decoder's configuration.
      tokens: `i32[B, T]`, left-aligned.
      length: `i32[B]`, real tokens in each row; what lies beyond is never attended to.
      start: `i32[B]`, position of the first token; zeros if left out.
      past: Cached segments, in order, that every token here may attend to.
      segment_ids: `i32[B, T]`, where a row holds several sequences one after the other: each has a
        number of its own, sees only itself, and counts its positions from zero. Not with a past.

    Returns:
      Hidden states after the final norm, `[B, T, D]`, and the `Segment` of these tokens in all
      layers, with keys `[L', B, kv_heads, head_dim, T]` and values `[L', B, kv_heads, T, head_dim]`
      for each stack of L' layers.
    """
    start = jnp.zeros_like(length) if start is None else start
    bounds = Bounds(start, length, tuple((s.start, s.length) for s in past), None, segment_ids)
    cache = Cache(tuple((s.keys, s.values) for s in past), None)
    index = jnp.arange(tokens.shape[1])
    positions = start[:, None] + index
    if segment_ids is not None:
        if past:
            raise ValueError("rows of several sequences cannot go on from a cache")
        begins = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
        positions = index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    hidden, (keys, values) = _apply(params, config, tokens, positions, bounds, cache)
    return hidden, Segment(keys, values, start, length)


def forward_branches(
    params: Params,
    config: DecoderConfig,
    prompts: jax.Array,
    texts: jax.Array,
    *,
    length: jax.Array,
) -> jax.Array:
    """Runs the decoder on prompts, and on G texts behind each that do not see one another.

    All of it is one pass, in which a prompt is computed once for its texts.

    Args:
      params: Parameters, as `init_params` lays them out.
      config: The decoder's configuration.
      prompts: `i32[B, P]`, left-aligned.
      texts: `i32[B, G, T]`, left-aligned; what fills them up may be anything.
      length: `i32[B]`, tokens of each prompt that the texts follow.

    Returns:
      Hidden states of the texts after the final norm, `[B, G, T, D]`.
    """
    rows, size = prompts.shape
    before = jnp.broadcast_to(jnp.arange(size), prompts.shape)
    behind = length[:, None, None] + jnp.arange(texts.shape[2])
    behind = jnp.broadcast_to(behind, texts.shape)
    tokens, positions = (
        jnp.concatenate([one, other.reshape(rows, -1)], axis=1)
        for one, other in ((prompts, texts), (before, behind))
    )
    bounds = Bounds(jnp.zeros_like(length), length, (), None, branches=behind)
    hidden, _ = _apply(params, config, tokens, positions, bounds, Cache((), None))
    return hidden[:, size:].reshape(*texts.shape, -1)


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
      Hidden states after the final norm, `[B, K, D]`, and the tokens' keys and values, each
      `[L', B, K, kv_heads, head_dim]` for each stack of L' layers.
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


def reward(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    past: Segment | None = None,
) -> jax.Array:
    """The scalar that a sequence classifier gives each sequence, read at its last token.

    Args:
      params: Parameters of a decoder with `num_labels` 1.
      config: Its configuration.
      tokens: `i32[B, T]`, left-aligned.
      lengths: `i32[B]`, real tokens of each row, at least 1.
      past: What stands before each row, if it was read already.

    Returns:
      `f32[B]`. Pure; jit with static `config`.

    Raises:
      ValueError: If the decoder has no head of one output.
    """
    if config.num_labels != 1:
        raise ValueError(f"a reward needs a head of one output; num_labels={config.num_labels}")
    if past is None:
        hidden, _ = forward(params, config, tokens, length=lengths)
    else:
        start = past.start + past.length
        hidden, _ = forward(params, config, tokens, length=lengths, start=start, past=(past,))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    out: Any = Decoder(config).apply({"params": params}, last, method=Decoder.classify)
    return out[:, 0]


def layer_of(stacked: tuple[Any, ...], config: DecoderConfig, layer: int) -> Any:
    """The part of one layer, of what is a tuple with a tree of stacked arrays for each stack."""
    for stack, tree in zip(config.stacks, stacked, strict=True):
        if stack.first <= layer < stack.first + stack.count:
            return jax.tree.map(lambda leaf: leaf[layer - stack.first], tree)  # noqa: B023
    raise IndexError(f"layer {layer} of {config.num_layers}")


def cpu_decoder(config: DecoderConfig, params: Params) -> tuple[DecoderConfig, Params]:
    """The same model in the form that decodes fastest on CPUs.

    A scan over stacked layers compiles fast and is how parameters are stored. But XLA on CPUs
    copies each layer's slice before it is used, which in decoding costs as much as the products.
    Here every layer has arrays of its own, and products are written weights first. Caches are then
    tuples of one array a layer.

    Args:
      config: Its configuration.
      params: Its parameters, stacked or already apart.

    Returns:
      The configuration and parameters of the unrolled decoder; the embedding is shared.
    """
    if not config.scan_layers:
        return dataclasses.replace(config, weights_first=True), params
    names = ("dense_layers", "layers")[-len(config.stacks) :]
    apart = {name: leaf for name, leaf in params.items() if name not in names}
    stacked = tuple(params[name] for name in names)
    for layer in range(config.num_layers):
        apart[f"layers_{layer}"] = layer_of(stacked, config, layer)
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
    """Shapes of the parameters as `jax.ShapeDtypeStruct`s, without allocating any.

    Args:
      config: The decoder's configuration.
      dtype: Type of all floating parameters but those that must be exact: the routers' biases and
        the scales of quantised kernels stay float32.
    """
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def typed(path: jax.tree_util.KeyPath, leaf: Any) -> jax.ShapeDtypeStruct:
        name = path[-1].key
        exact = name == "router_bias" or name.endswith(("_codes", "_scales"))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if exact else dtype)

    return jax.tree_util.tree_map_with_path(typed, shapes)


def param_axes(config: DecoderConfig) -> Params:
    """Logical axis names of every parameter: a tree like the parameters', with tuple leaves."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    boxed = jax.eval_shape(
        lambda: Decoder(config).init(jax.random.key(0), tokens, method=Decoder.initialise)
    )
    specs = nn.get_partition_spec(boxed)["params"]
    return jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
