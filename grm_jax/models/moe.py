"""A mixture of experts in place of the MLP: routing, and products grouped by expert.

No token is dropped: tokens are sorted by the expert they are sent to, and one grouped product
serves all experts (`jax.lax.ragged_dot`). On a mesh, each device keeps its part of the experts (and
of each expert's hidden units), sees the tokens of all devices that keep other experts, and the sums
go back to whoever has the token.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jax.sharding import PartitionSpec

from grm_jax.distributed import BATCH_AXES
from grm_jax.models.config import DecoderConfig, Experts
from grm_jax.models.layers import MLP, gated, kernel_init, param, stored_kernel

_TENSOR, _EXPERT = "tensor", "expert"
# Of the TPU kernel: rows that it works on at once, which are a multiple of the first, and columns.
_LANES, _TILE, _TILE_WIDTH = 128, 512, 1024


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
    split = x.shape[0] % math.prod(sizes[axis] for axis in BATCH_AXES) == 0
    batch = PartitionSpec(BATCH_AXES if split else None)
    expert = _EXPERT if gate_up.shape[0] % sizes[_EXPERT] == 0 else None
    tensor = _TENSOR if gate_up.shape[-1] % sizes[_TENSOR] == 0 else None

    def local(
        x: jax.Array, weights: jax.Array, chosen: jax.Array, gate_up: jax.Array, down: jax.Array
    ) -> jax.Array:
        tokens, first = (x, weights, chosen), jnp.int32(0)
        if expert is not None:
            first = jax.lax.axis_index(expert) * gate_up.shape[0]
            if split:
                # Of all devices whose experts are others.
                tokens = jax.lax.all_gather(tokens, expert, tiled=True)
        out = run_experts(config, *tokens, gate_up, down, first=first)
        if expert is not None and split:
            out = jax.lax.psum_scatter(out, expert, tiled=True)
        elif expert is not None:
            out = jax.lax.psum(out, expert)
        return out if tensor is None else jax.lax.psum(out, tensor)

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
    both = grouped_product(rows, gate_up.reshape(count, width, 2 * hidden), sizes)
    out = grouped_product(gated(config, both[:, :hidden], both[:, hidden:]), down, sizes)
    # Rows beyond the last group may hold anything.
    ours = jnp.arange(len(order)) < sizes.sum()
    share = weights.reshape(-1)[order].astype(jnp.float32)
    out = jnp.where(ours[:, None], out.astype(jnp.float32) * share[:, None], 0.0)
    total = jnp.zeros((x.shape[0], out.shape[-1]), jnp.float32).at[order // per_token].add(out)
    return total.astype(x.dtype)


@jax.custom_vjp
def grouped_product(rows: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """Each row times the kernel of its group: `jax.lax.ragged_dot`, by groups both ways.

    Args:
      rows: `[M, D]`, those of a group together and groups in order.
      kernels: `[G, D, F]`.
      sizes: `i32[G]`, rows of each group; what is behind the last one belongs to none.

    Returns:
      `[M, F]`; rows of no group may hold anything.
    """
    return jax.lax.ragged_dot(rows, kernels, sizes)


def _grouped_forward(
    rows: jax.Array, kernels: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return grouped_product(rows, kernels, sizes), (rows, kernels, sizes)


def _grouped_backward(
    kept: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    rows, kernels, sizes = kept
    of_rows = jax.lax.ragged_dot(gradient, kernels.swapaxes(1, 2), sizes)
    ours = jnp.arange(len(rows)) < sizes.sum()
    of_kernels = jax.lax.platform_dependent(
        rows, gradient, sizes, tpu=kernel_gradient, default=_plain_kernel_gradient
    )
    return jnp.where(ours[:, None], of_rows, 0), of_kernels.astype(kernels.dtype), None


grouped_product.defvjp(_grouped_forward, _grouped_backward)


def _plain_kernel_gradient(rows: jax.Array, gradient: jax.Array, sizes: jax.Array) -> jax.Array:
    zeros = jnp.zeros((len(sizes), rows.shape[1], gradient.shape[1]), gradient.dtype)
    _, backwards = jax.vjp(lambda kernels: jax.lax.ragged_dot(rows, kernels, sizes), zeros)
    of_kernels: jax.Array = backwards(gradient)[0]
    return of_kernels


def kernel_gradient(
    rows: jax.Array, gradient: jax.Array, sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """The gradient `[G, D, F]` of `grouped_product` to the kernels, by Megablox's TPU kernel.

    XLA would have TPUs multiply every row with the zeros of all groups that are not its own.

    Args:
      rows: `[M, D]`.
      gradient: `[M, F]`, of the product.
      sizes: `i32[G]`.
      interpret: Whether the kernel is run step by step, on any platform.
    """
    short = -len(rows) % _LANES
    rows, gradient = (jnp.pad(x, ((0, short), (0, 0))) for x in (rows, gradient))
    tile = math.gcd(len(rows), _TILE)
    widths = (min(_TILE_WIDTH, x.shape[1]) for x in (rows, gradient))
    of_kernels: jax.Array = tgmm(
        rows.T, gradient, sizes, gradient.dtype, (tile, *widths), interpret=interpret
    )
    return of_kernels
