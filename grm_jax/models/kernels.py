"""Attention of a sequence to itself, by the fastest kernel of the platform it is compiled for.

Three implementations give the same numbers:

- `xla`: blocks of queries in plain array code, for every platform, type and shape;
- `splash`: the Pallas kernel that ships with JAX for TPUs; serves every call;
- `cudnn`: the fused attention of cuDNN, for NVIDIA GPUs since Ampere; serves 16-bit types without
  soft cap or segments, in the head sizes that cuDNN itself accepts.

Which one runs is settled when a computation is lowered for its platform, so the same program can
be compiled for hardware that is not here. Whether a kernel serves a call follows from shapes and
types alone, and where it does not, `xla` takes its place.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from grm_jax.distributed import BATCH_AXES
from grm_jax.errors import UsageError

Implementation = Literal["xla", "splash", "cudnn"]

ROWS = 512
"""Queries that plain attention scores at once: bounds memory and leaves out keys that lie ahead."""

MOST_BLOCKS = 16
"""Blocks of queries that plain attention writes out, each with the keys it can see; a longer
sequence runs in a loop."""

BLOCK = 512
"""Queries, and keys, that splash attention scores at once in a long sequence."""

LANES = 128
"""Splash blocks are multiples of this."""

AMPERE = 8.0
"""Compute capability of the first GPUs on which cuDNN's fused attention runs."""

HEAD_AXIS = "tensor"
"""Mesh axis over which a kernel's heads are split."""

_Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]
"""From query, key, value and segment ids to the output, for one window."""


@functools.partial(jax.jit, static_argnames=("windows", "softcap", "implementation"))
def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    length: jax.Array,
    window: jax.Array,
    windows: tuple[int, ...],
    softcap: float | None = None,
    segment_ids: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Attends causally within each row of left-aligned sequences.

    On a mesh (`jax.set_mesh`) the kernels run on each device's own rows and heads: rows are split
    over the batch axes, heads over `tensor`, each where it divides evenly. The partitioner cannot
    look into the kernels, so a program for several TPUs needs its mesh to be set.

    Args:
      query: `[B, T, heads, head_dim]`, already scaled and rotated.
      key: `[B, T, kv_heads, head_dim]`; `kv_heads` divides `heads`.
      value: `[B, T, kv_heads, value_dim]`.
      length: `i32[B]`, real tokens in each row.
      window: `i32[]`, how many tokens back a query sees, itself included.
      windows: Every value that `window` may take. Kernels are compiled for each of them that is
        shorter than the sequence, and once for all that are not.
      softcap: Scores become `softcap * tanh(scores / softcap)`, if not None.
      segment_ids: `i32[B, T]`; a token sees only tokens of its own segment. None is one segment.
      implementation: Which one to run, where it serves the call; None is the best one for the
        platform. `splash` is interpreted, slowly, on a CPU.

    Returns:
      `[B, T, heads, value_dim]` in the type of `query`; zeros at and beyond `length`.

    Raises:
      UsageError: There is no such implementation.
    """
    time = query.shape[1]
    distinct = sorted({min(size, time) for size in windows})
    branches = [
        functools.partial(_attend, window=size, softcap=softcap, implementation=implementation)
        for size in distinct
    ]
    operands = (query, key, value, segment_ids)
    # The index of the window among the distinct ones; no switch is left if there is but one.
    index = sum(((window > size).astype(jnp.int32) for size in distinct[:-1]), jnp.int32(0))
    out = jax.lax.switch(index, branches, *operands)
    # Causality alone keeps padding from the real tokens before it, so no kernel is told lengths.
    real = jnp.arange(time) < length[:, None]
    return jnp.where(real[..., None, None], out, 0)


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *,
    window: int,
    softcap: float | None,
    implementation: Implementation | None,
) -> jax.Array:
    """Attention with one window that is known in advance, by the implementation asked for."""
    operands = (query, key, value, segment_ids)
    plain = functools.partial(_xla, window=window, softcap=softcap)
    tpu = functools.partial(_splash, window=window, softcap=softcap)
    cuda = functools.partial(_cudnn, window=window)
    fits_cudnn = functools.partial(_fits_cudnn, cuda, *operands, softcap=softcap)
    match implementation:
        case None:
            kernels = {"tpu": _per_device(tpu)}
            if fits_cudnn():
                kernels["cuda"] = _per_device(cuda)
            return jax.lax.platform_dependent(*operands, **kernels, default=plain)
        case "xla":
            return plain(*operands)
        case "splash":
            interpreted = _per_device(functools.partial(tpu, interpret=True))
            return jax.lax.platform_dependent(*operands, cpu=interpreted, default=_per_device(tpu))
        case "cudnn":
            if not fits_cudnn():
                return plain(*operands)
            return jax.lax.platform_dependent(*operands, cuda=_per_device(cuda), default=plain)
        case _:
            raise UsageError(
                f"attention implementation {implementation!r} does not exist; it can be 'xla', "
                "'splash', 'cudnn' or None for the best"
            )


def _xla(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *,
    window: int,
    softcap: float | None,
) -> jax.Array:
    """Plain attention, one block of queries after another, each with the keys it can see."""
    batch, time, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, time, kv_heads, heads // kv_heads, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4)  # [B, kv_heads, group, T, head_dim]
    key = key.transpose(0, 2, 3, 1)  # [B, kv_heads, head_dim, T]: the score product is contiguous
    value = value.transpose(0, 2, 1, 3)  # [B, kv_heads, T, value_dim]
    # Scores are computed again for the gradient.
    block: Any = jax.checkpoint(
        functools.partial(_xla_block, window=window, softcap=softcap), prevent_cse=False
    )

    def attend(begin: int, end: int) -> jax.Array:
        """Queries from `begin` to `end` to the keys that they can see."""
        first = max(0, begin - window + 1)
        ids = None
        if segment_ids is not None:
            ids = (segment_ids[:, begin:end], segment_ids[:, first:end])
        keys, values = key[..., first:end], value[:, :, first:end]
        return block(grouped[..., begin:end, :], keys, values, ids, begin - first)

    if time <= ROWS * MOST_BLOCKS:
        parts = [attend(begin, min(begin + ROWS, time)) for begin in range(0, time, ROWS)]
        out = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)
    else:
        # Compilers may compute the blocks above side by side; in a loop they cannot. It costs the
        # products with keys that lie ahead.
        padded = _round_up(time, ROWS)
        wide = jnp.pad(grouped, [(0, 0)] * 3 + [(0, padded - time), (0, 0)])
        query_ids = None if segment_ids is None else _pad(segment_ids, padded)

        def one(begin: jax.Array) -> jax.Array:
            ids = None
            if query_ids is not None:
                ids = (jax.lax.dynamic_slice_in_dim(query_ids, begin, ROWS, 1), segment_ids)
            return block(jax.lax.dynamic_slice_in_dim(wide, begin, ROWS, 3), key, value, ids, begin)

        looped = jax.lax.map(one, jnp.arange(0, padded, ROWS))
        out = jnp.moveaxis(looped, 0, 3).reshape(*grouped.shape[:3], padded, -1)[..., :time, :]
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, -1)
    return out.astype(query.dtype)


def _xla_block(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    ids: tuple[jax.Array, jax.Array] | None,
    back: jax.Array | int,
    *,
    window: int,
    softcap: float | None,
) -> jax.Array:
    """Attention of `[B, kv_heads, group, rows, head_dim]` queries, the first of them at `back`."""
    scores = jnp.einsum("bkgqd,bkds->bkgqs", query, key, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    behind = (back + jnp.arange(query.shape[3]))[:, None] - jnp.arange(key.shape[-1])
    seen = (behind >= 0) & (behind < window)
    if ids is not None:
        seen = (seen & (ids[0][..., None] == ids[1][:, None]))[:, None, None]
    # Finite, because queries that pad the last block may see nothing.
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = jnp.einsum(
        "bkgqs,bksd->bkgqd",
        weights.astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    return mixed / weights.sum(axis=-1, keepdims=True)


def _splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *,
    window: int,
    softcap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention on one device; the sequence is padded to whole blocks."""
    time, heads = query.shape[1:3]
    block = min(BLOCK, _round_up(time, LANES))
    padded = _round_up(time, block)

    shape = (padded, padded)
    mask = splash.LocalMask(shape, (window - 1, 0), offset=0)
    kernel: Any = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask(shape) if window >= time else mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    operands = [_pad(x, padded).swapaxes(1, 2) for x in (query, key, value)]
    if segment_ids is not None:
        ids = _pad(segment_ids, padded)
        out = jax.vmap(kernel)(*operands, splash.SegmentIds(q=ids, kv=ids))
    else:
        out = jax.vmap(kernel)(*operands)
    return out.swapaxes(1, 2)[:, :time]


def _cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *,
    window: int,
) -> jax.Array:
    """Fused attention on one GPU; values are padded to the size of keys, as JAX wants them."""
    del segment_ids  # None; an argument because all kernels are called alike
    time, size = query.shape[1], value.shape[-1]
    value = jnp.pad(value, [(0, 0)] * 3 + [(0, key.shape[-1] - size)])
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=1.0,
        is_causal=True,
        local_window_size=None if window >= time else (window - 1, 0),
        implementation="cudnn",
    )
    return out[..., :size]


def _fits_cudnn(
    kernel: _Kernel,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *,
    softcap: float | None,
) -> bool:
    """Whether cuDNN serves this call on the GPUs at hand."""
    if softcap is not None or segment_ids is not None or value.shape[-1] > key.shape[-1]:
        return False
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    try:
        # Which sizes it takes depends on its version and the GPU; JAX knows, and refuses the rest.
        jax.eval_shape(kernel, query, key, value, None)
    except RuntimeError:
        return False
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return True  # compiled for GPUs elsewhere
    # JAX does not ask for this much by itself, and compiling would fail.
    return all(float(device.compute_capability) >= AMPERE for device in devices)


def _per_device(kernel: _Kernel) -> _Kernel:
    """Lets a kernel work on each device's own rows and heads, if a mesh of devices is set."""

    def run(
        query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None
    ) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        free = {axis: mesh.shape[axis] for axis, kind in kinds if kind != AxisType.Manual}
        if math.prod(free.values()) == 1:
            return kernel(query, key, value, segment_ids)
        rows: tuple[str, ...] | None = tuple(axis for axis in BATCH_AXES if axis in free)
        if query.shape[0] % math.prod(free[axis] for axis in rows or ()):
            rows = None
        heads, kv_heads = query.shape[2], key.shape[2]
        # Fewer key-value heads than devices are repeated until each device has one.
        shared = math.lcm(kv_heads, free.get(HEAD_AXIS, 1))
        split = HEAD_AXIS if HEAD_AXIS in free and heads % shared == 0 else None
        if split is not None:
            key, value = (jnp.repeat(x, shared // kv_heads, axis=2) for x in (key, value))
        spec = P(rows, None, split)
        return jax.shard_map(
            kernel,
            in_specs=(spec, spec, spec, P(rows)),
            out_specs=spec,
            axis_names=set(free),
            check_vma=False,  # kernels do not say along which axes their outputs vary
        )(query, key, value, segment_ids)

    return run


def _pad(x: jax.Array, time: int) -> jax.Array:
    """Pads `[B, T, ...]` with zeros to `time` tokens."""
    return jnp.pad(x, [(0, 0), (0, time - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
