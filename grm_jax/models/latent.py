"""Multi-head latent attention (arXiv:2405.04434): keys and values share one small cached vector.

A token's keys and values, of all heads, are linear in a latent vector and one rotated key. Only
these two are cached, as one long key. Where there is a cache, the map from latent vectors to keys
is moved over to the queries, and that to values behind the attention (the absorbed form): then
every head attends to the same long keys, which are the values too. A sequence without a cache is
cheaper with keys and values written out.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from grm_jax.models.attention import (
    Bounds,
    Cache,
    KeysValues,
    cached_attention,
    self_attention,
)
from grm_jax.models.config import DecoderConfig
from grm_jax.models.layers import Linear, RMSNorm, Weight
from grm_jax.models.rope import rotate

# Checkpoints leave the eps of these two norms at this, whatever the decoder's other norms have.
_NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    """Latent attention over cached segments and the current tokens."""

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
        if c.latent is None:
            raise ValueError("the decoder's configuration has no latent attention")
        m = c.latent
        query = self._query(x)
        rotated = rotate(query[..., m.nope_dim :], *rope)
        query = jnp.concatenate([query[..., : m.nope_dim], rotated], axis=-1)
        query = query * jnp.asarray(c.query_scale, x.dtype)
        query = nn.with_logical_constraint(query, ("batch", "length", "heads", "head_dim"))

        names = ("head_dim", "embed")
        both = Linear(c, ("kv_a",), (m.rank + m.rope_dim,), names, name="kv_a")(x)
        latent = RMSNorm(_NORM_EPS, 0.0, None, name="kv_a_norm")(both[..., : m.rank])
        shared = rotate(both[:, :, None, m.rank :], *rope)  # [B, T, 1, rope_dim]
        key = jnp.concatenate([latent[:, :, None], shared], axis=-1)
        shape = (c.num_heads, m.nope_dim + m.value_dim, m.rank)
        # The rank is split as the width is: where heads are whole, nothing else could be.
        kv_b = Weight(c, "kv_b", shape, ("heads", "head_dim", "embed"), 2, name="kv_b")()
        to_key, to_value = kv_b[:, : m.nope_dim], kv_b[:, m.nope_dim :]

        if cache.own is None and not cache.past:
            mixed = self._written_out(query, latent, shared, to_key, to_value, bounds, window)
            new: KeysValues = (key.transpose(0, 2, 3, 1), None)
        else:
            absorbed = jnp.einsum("bthn,hnr->bthr", query[..., : m.nope_dim], to_key)
            absorbed = jnp.concatenate([absorbed, query[..., m.nope_dim :]], axis=-1)
            windows = tuple(set(c.windows))
            mixed, new = cached_attention(
                absorbed, key, None, bounds, cache, window, windows, c.attention_softcap
            )
            mixed = jnp.einsum("bthr,hvr->bthv", mixed[..., : m.rank], to_value)
        mixed = nn.with_logical_constraint(mixed, ("batch", "length", "heads", "head_dim"))
        axes = ("embed", "heads", "head_dim")
        return Linear(c, ("out",), (c.width,), axes, inputs=2, name="out")(mixed), new

    def _query(self, x: jax.Array) -> jax.Array:
        """`[B, T, heads, nope_dim + rope_dim]`."""
        c = self.config
        rank = c.latent.query_rank if c.latent is not None else None
        outputs = (c.num_heads, c.head_dim)
        if rank is None:
            return Linear(c, ("q",), outputs, ("heads", "head_dim", "embed"), name="q")(x)
        low = Linear(c, ("q_a",), (rank,), ("head_dim", "embed"), name="q_a")(x)
        low = RMSNorm(_NORM_EPS, 0.0, None, name="q_a_norm")(low)
        return Linear(c, ("q_b",), outputs, ("heads", "head_dim", "embed"), name="q_b")(low)

    def _written_out(
        self,
        query: jax.Array,
        latent: jax.Array,
        shared: jax.Array,
        to_key: jax.Array,
        to_value: jax.Array,
        bounds: Bounds,
        window: jax.Array,
    ) -> jax.Array:
        keys = jnp.einsum("btr,hnr->bthn", latent, to_key)
        shared = jnp.broadcast_to(shared, (*keys.shape[:3], shared.shape[-1]))
        keys = jnp.concatenate([keys, shared], axis=-1)
        return self_attention(
            query,
            keys,
            jnp.einsum("btr,hvr->bthv", latent, to_value),
            bounds,
            window,
            tuple(set(self.config.windows)),
            self.config.attention_softcap,
        )
