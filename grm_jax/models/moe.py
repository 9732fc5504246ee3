"""A mixture of experts in place of the MLP: routing, and products grouped by expert.

No token is dropped: tokens are sorted by the expert they are sent to, and one grouped product
serves all experts (`jax.lax.ragged_dot`). On a mesh, each device keeps its part of the experts (and
of each expert's hidden units), works on its own part of the batch, and the parts are summed.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from grm_jax.models.config import DecoderConfig, Experts
from grm_jax.models.layers import MLP, gated, kernel_init, param, stored_kernel

_BATCH_AXES, _TENSOR, _EXPERT = ("data", "fsdp"), "tensor", "expert"


class MixtureOfExperts(nn.Module):
    """Routed experts beside an MLP that sees every token."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, e = self.config, self.config.experts
        if e is None:
            raise ValueError("the decoder's configuration has no experts")
        flat = x.reshape(-1, c.width)
        router = param(self, "router", kernel_init((1,), (0,)), (None, "embed"), (e.count, c.width))
        logits = flat.astype(jnp.float32) @ router.astype(jnp.float32).T
        bias = None
        if e.gating == "sigmoid":
            zeros = nn.initializers.zeros_init()
            bias = param(self, "router_bias", zeros, (None,), (e.count,))
        weights, chosen = route(logits, bias, e)
        gate_up_axes = ("experts", "embed", None, "mlp")
        gate_up = self._experts("gate_up", (e.count, c.width, 2, e.mlp_dim), gate_up_axes)
        down = self._experts("down", (e.count, e.mlp_dim, c.width), ("experts", "mlp", "embed"))
        out = _over_mesh(c, flat, weights, chosen, gate_up, down).reshape(x.shape)
        if e.shared_dim:
            out = out + MLP(c, e.shared_dim, name="shared")(x)
        return out

    def _experts(
        self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]
    ) -> jax.Array:
        """The kernels `[E, inputs, outputs...]` of all experts, with their adapters added in."""
        lora = self.config.lora
        init = kernel_init((1,), tuple(range(2, len(shape))))
        kernel = stored_kernel(self, self.config, name, init, axes, shape)
        if lora is None or "experts" not in lora.targets:
            return kernel
        dtype = self.config.dtype
        experts, inputs, *outputs = shape
        down = param(
            self,
            f"{name}_lora_a",
            kernel_init((1,), (2,)),
            (*axes[:2], None),
            (experts, inputs, lora.rank * math.prod(outputs[:-1])),
        )
        zeros = nn.initializers.zeros_init()
        up = param(
            self,
            f"{name}_lora_b",
            zeros,
            (axes[0], None, *axes[2:]),
            (experts, lora.rank, *outputs),
        )
        down = down.reshape(experts, inputs, *outputs[:-1], lora.rank).astype(dtype)
        letters = "xy"[: len(outputs) - 1]
        added = jnp.einsum(
            f"ei{letters}r,er{letters}o->ei{letters}o", down, (up * lora.scale).astype(dtype)
        )
        return kernel + added


def route(
    logits: jax.Array, bias: jax.Array | None, experts: Experts
) -> tuple[jax.Array, jax.Array]:
    """Which experts each token is sent to, and with what weight.

    Args:
      logits: `f32[M, E]` of M tokens.
      bias: `f32[E]`, added where experts are chosen but not to their weights; None for none.
      experts: The mixture.

    Returns:
      Weights `f32[M, per_token]` and experts `i32[M, per_token]`.
    """
    e = experts
    scores = jax.nn.softmax(logits) if e.gating == "softmax" else jax.nn.sigmoid(logits)
    ranked = scores if bias is None else scores + bias.astype(jnp.float32)
    if e.groups > 1:
        grouped = ranked.reshape(-1, e.groups, e.count // e.groups)
        # A group is as good as its best expert or, with a sigmoid, as its two best together.
        best = jax.lax.top_k(grouped, 1 if e.gating == "softmax" else 2)[0].sum(axis=-1)
        kept = jax.lax.top_k(best, e.top_groups)[1]
        open_ = jax.nn.one_hot(kept, e.groups, dtype=bool).any(axis=-2)
        closed = 0.0 if e.gating == "softmax" else -jnp.inf
        ranked = jnp.where(open_[..., None], grouped, closed).reshape(ranked.shape)
    chosen = jax.lax.top_k(ranked, e.per_token)[1]
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if e.normalise:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return weights * e.scale, chosen


def _over_mesh(
    config: DecoderConfig,
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
) -> jax.Array:
    """`run_experts` on the mesh that is set, if one is; on one device otherwise."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run_experts(config, x, weights, chosen, gate_up, down)
    sizes = mesh.shape
    rows = math.prod(sizes[axis] for axis in _BATCH_AXES)
    batch = PartitionSpec(_BATCH_AXES if x.shape[0] % rows == 0 else None)
    expert = _EXPERT if gate_up.shape[0] % sizes[_EXPERT] == 0 else None
    tensor = _TENSOR if gate_up.shape[-1] % sizes[_TENSOR] == 0 else None
    summed = tuple(axis for axis in (expert, tensor) if axis is not None)

    def local(*args: jax.Array) -> jax.Array:
        first = jax.lax.axis_index(expert) * args[3].shape[0] if expert is not None else 0
        out = run_experts(config, *args, first=first)
        return jax.lax.psum(out, summed) if summed else out

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            *(batch, batch, batch),
            PartitionSpec(expert, None, None, tensor),
            PartitionSpec(expert, tensor, None),
        ),
        out_specs=batch,
        check_vma=False,
    )(x, weights, chosen, gate_up, down)


def run_experts(
    config: DecoderConfig,
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    *,
    first: jax.Array | int = 0,
) -> jax.Array:
    """What consecutive experts make of the tokens that are sent to them.

    Args:
      config: The decoder's.
      x: `[M, D]`, tokens.
      weights: `f32[M, per_token]`.
      chosen: `i32[M, per_token]`, numbers of experts.
      gate_up: `[E', D, 2, F]`, kernels of the experts from `first` on.
      down: `[E', F, D]`.
      first: Number of the first of these experts; tokens sent to others get nothing.

    Returns:
      `[M, D]`.
    """
    count, width, _, hidden = gate_up.shape
    per_token = chosen.shape[-1]
    local = chosen.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < count), local, count)  # those of others come last
    order = jnp.argsort(local)
    sizes = jnp.bincount(local, length=count + 1)[:count].astype(jnp.int32)
    rows = x[order // per_token]
    grouped = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
    both = grouped(rows, gate_up.reshape(count, width, 2 * hidden))
    out = grouped(gated(config, both[:, :hidden], both[:, hidden:]), down)
    # Rows beyond the last group may hold anything.
    ours = jnp.arange(len(order)) < sizes.sum()
    share = weights.reshape(-1)[order].astype(jnp.float32)
    out = jnp.where(ours[:, None], out.astype(jnp.float32) * share[:, None], 0.0)
    total = jnp.zeros((x.shape[0], out.shape[-1]), jnp.float32).at[order // per_token].add(out)
    return total.astype(x.dtype)
