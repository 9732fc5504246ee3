"""Which tensor of a file goes where in the decoder, for every family and file format, both ways.

A `Piece` ties one tensor of a file to one place in one parameter. Reading places every tensor in
the shards of its devices as it comes, so that the host never holds a second copy of the model;
writing takes the same pieces the other way round.
"""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from grm_jax.errors import UsageError
from grm_jax.models import DecoderConfig, DtypeName, Params, abstract_params

Place = tuple[int | slice, ...]

Reader = Callable[[str], np.ndarray]
"""Reads a tensor of a file by its name."""

_ALL = slice(None)
_WHOLE_BYTES = 64 << 20  # parameters up to this size are put together on the host


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A checkpoint that has been opened and found complete, its weights not yet read.

    Attributes:
      path: The file or folder.
      config: The decoder's configuration.
      load: Reads the parameters, given their type and a tree of their shardings (or None, for the
        default device).
      dtype: Type that loses nothing of what is stored, or as little as makes sense.
      metadata: A GGUF file's; None for a folder, whose tokenizer lies in files of its own.
      base: For a folder of adapters, what it calls the model they belong to, of which `path`,
        `dtype` and `metadata` then are; None for others.
    """

    path: Path
    config: DecoderConfig
    load: Callable[[DTypeLike, Params | None], Params]
    dtype: DtypeName
    metadata: Mapping[str, Any] | None
    base: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """What tensors are called in a file format.

    Attributes:
      templates: Name of each kind of tensor, with `{layer}` and `{expert}` where these go.
      interleaved: Whether rotated elements lie in pairs; the decoder rotates halves.
      offset: What is added to norms' scales in the file.
    """

    templates: Mapping[str, str]
    interleaved: bool = False
    offset: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor of a file and its place in a parameter.

    Attributes:
      name: Of the tensor.
      shape: Of the tensor.
      path: Of the parameter.
      place: Index of the tensor in the parameter; the first number is the layer's if there are
        layers.
      heads: Blocks of rows of which the trailing `pairs` rows are rotated, in pairs.
      pairs: 0 where rows lie as in the decoder.
      transposed: Whether the file has inputs last and the parameter has them first.
      offset: What the file has added to the values.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    place: Place
    heads: int = 1
    pairs: int = 0
    transposed: bool = False
    offset: float = 0.0

    def to_param(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor in the decoder's order, of its own rank."""
        if self.pairs:
            tensor = self._permuted(tensor, (self.pairs // 2, 2))
        if self.offset:
            tensor = tensor.astype(np.float32) - np.float32(self.offset)
        return tensor.T if self.transposed else tensor

    def to_file(self, part: np.ndarray) -> np.ndarray:
        """The inverse of `to_param`, from a part of a parameter of any rank."""
        shape = self.shape[::-1] if self.transposed else self.shape
        tensor = part.reshape(shape)
        if self.transposed:
            tensor = tensor.T
        if self.offset:
            tensor = (tensor.astype(np.float32) + np.float32(self.offset)).astype(part.dtype)
        if self.pairs:
            tensor = self._permuted(tensor, (2, self.pairs // 2))
        return np.ascontiguousarray(tensor)

    def _permuted(self, tensor: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """With the rotated rows of each head, seen as a grid, taken column by column."""
        rows = tensor.reshape(self.heads, -1, *tensor.shape[1:])
        kept, turned = rows[:, : -self.pairs], rows[:, -self.pairs :]
        turned = turned.reshape(self.heads, *grid, *tensor.shape[1:]).swapaxes(1, 2)
        turned = turned.reshape(self.heads, self.pairs, *tensor.shape[1:])
        return np.concatenate([kept, turned], axis=1).reshape(tensor.shape)


def pieces(config: DecoderConfig, names: Names) -> Iterator[Piece]:
    """Every tensor that a checkpoint of this decoder has in a file format."""
    c = config
    matrices = [("embedding", (c.vocab_size, c.width))]
    if c.num_labels:
        matrices += [("score", (c.num_labels, c.width))]
    elif not c.tie_embeddings:
        matrices += [("head", (c.vocab_size, c.width))]
    for kind, shape in matrices:
        yield Piece(name=names.templates[kind], shape=shape, path=(kind,), place=())
    yield Piece(
        name=names.templates["final_norm"],
        shape=(c.width,),
        path=("final_norm", "scale"),
        place=(),
        offset=names.offset,
    )
    tops = ("dense_layers", "layers")[-len(c.stacks) :]
    for top, stack in zip(tops, c.stacks, strict=True):
        for index in range(stack.count):
            for kind, piece in _layer(c, names, stack.experts):
                yield dataclasses.replace(
                    piece,
                    name=names.templates[kind].format(
                        layer=stack.first + index, expert=piece.place[0] if piece.place else 0
                    ),
                    path=(top, *piece.path),
                    place=(index, *piece.place),
                )


def _layer(config: DecoderConfig, names: Names, experts: bool) -> Iterator[tuple[str, Piece]]:
    """The kinds of tensors of one layer, each with its piece but for the layer."""

    def piece(path: str, shape: tuple[int, ...], place: Place = (), **rest: Any) -> Piece:
        return Piece(name="", shape=shape, path=tuple(path.split("/")), place=place, **rest)

    def norm(path: str, size: int) -> Piece:
        return piece(f"{path}/scale", (size,), offset=names.offset)

    def mlp(path: str, hidden: int, prefix: str = "") -> Iterator[tuple[str, Piece]]:
        yield f"{prefix}gate", piece(f"{path}/gate_up/kernel", (hidden, c.width), (0,))
        yield f"{prefix}up", piece(f"{path}/gate_up/kernel", (hidden, c.width), (1,))
        yield f"{prefix}down", piece(f"{path}/down/kernel", (c.width, hidden))

    c = config
    pairs = c.rope_dim if names.interleaved else 0
    yield "attention_norm", norm("attention_norm", c.width)
    yield "mlp_norm", norm("mlp_norm", c.width)
    if c.post_norms:
        yield "attention_post_norm", norm("attention_post_norm", c.width)
        yield "mlp_post_norm", norm("mlp_post_norm", c.width)

    queries = c.num_heads * c.head_dim
    turned: dict[str, Any] = {"pairs": pairs, "heads": c.num_heads}
    if c.latent is None:
        rows = c.num_kv_heads * c.head_dim
        kv_turned: dict[str, Any] = {"pairs": pairs, "heads": c.num_kv_heads}
        yield "q", piece("attention/q/kernel", (queries, c.width), **turned)
        yield "k", piece("attention/kv/kernel", (rows, c.width), (0,), **kv_turned)
        yield "v", piece("attention/kv/kernel", (rows, c.width), (1,))
        if c.qkv_bias:
            yield "q_bias", piece("attention/q/bias", (queries,), **turned)
            yield "k_bias", piece("attention/kv/bias", (rows,), (0,), **kv_turned)
            yield "v_bias", piece("attention/kv/bias", (rows,), (1,))
        if c.qk_norm:
            yield "q_norm", norm("attention/q_norm", c.head_dim)
            yield "k_norm", norm("attention/k_norm", c.head_dim)
        yield "out", piece("attention/out/kernel", (c.width, queries))
    else:
        m = c.latent
        if m.query_rank is None:
            yield "q", piece("attention/q/kernel", (queries, c.width), **turned)
        else:
            yield "q_a", piece("attention/q_a/kernel", (m.query_rank, c.width))
            yield "q_a_norm", norm("attention/q_a_norm", m.query_rank)
            yield "q_b", piece("attention/q_b/kernel", (queries, m.query_rank), **turned)
        yield "kv_a", piece("attention/kv_a/kernel", (m.rank + m.rope_dim, c.width), pairs=pairs)
        yield "kv_a_norm", norm("attention/kv_a_norm", m.rank)
        rows = c.num_heads * (m.nope_dim + m.value_dim)
        yield "kv_b", piece("attention/kv_b/kernel", (rows, m.rank))
        yield "out", piece("attention/out/kernel", (c.width, c.num_heads * m.value_dim))

    if not experts or c.experts is None:
        yield from mlp("mlp", c.mlp_dim)
        return
    e = c.experts
    yield "router", piece("mlp/router", (e.count, c.width))
    if e.gating == "sigmoid":
        yield "router_bias", piece("mlp/router_bias", (e.count,))
    for expert in range(e.count):
        shape = (e.mlp_dim, c.width)
        yield "expert_gate", piece("mlp/gate_up", shape, (expert, _ALL, 0), transposed=True)
        yield "expert_up", piece("mlp/gate_up", shape, (expert, _ALL, 1), transposed=True)
        yield "expert_down", piece("mlp/down", shape[::-1], (expert,), transposed=True)
    if e.shared_dim:
        yield from mlp("mlp/shared", e.shared_dim, "shared_")


def check_pieces(
    wanted: Sequence[Piece],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    source: object,
    family: str,
    ignored: Callable[[str], bool] = lambda name: False,
) -> None:
    """Compares what a checkpoint must have with what its files have, before anything is read.

    Args:
      wanted: The pieces.
      shapes: Shape of each tensor in the files.
      source: What to call the checkpoint.
      family: What to call the decoder.
      ignored: Which tensors may be left over.

    Raises:
      UsageError: If a tensor is missing, unexpected or of another shape; it names the first.
    """
    for piece in wanted:
        if piece.name not in shapes:
            raise UsageError(f"{source} lacks tensor {piece.name}")
        if shapes[piece.name] != piece.shape:
            raise UsageError(
                f"{source}: tensor {piece.name} has shape {shapes[piece.name]}, the configuration "
                f"implies {piece.shape}"
            )
    left = sorted(
        name for name in shapes.keys() - {piece.name for piece in wanted} if not ignored(name)
    )
    if left:
        raise UsageError(
            f"{source} has {len(left)} tensors that a {family} decoder has no place for, the "
            f"first is {left[0]}"
        )


def read_params(
    config: DecoderConfig,
    wanted: Sequence[Piece],
    read: Reader,
    dtype: DTypeLike,
    shardings: Params | None = None,
) -> Params:
    """Reads the pieces into the decoder's parameters, tensor by tensor.

    Args:
      config: The decoder's.
      wanted: From `pieces`; only the parameters that these make up are read.
      read: Reads a tensor.
      dtype: Type of the parameters.
      shardings: A tree like the parameters' with a `jax.sharding.Sharding` at each leaf, or None
        for the default device.

    Returns:
      The parameters. On top of them, the host holds one layer of one parameter at a time.
    """
    groups: dict[tuple[str, ...], list[Piece]] = defaultdict(list)
    for piece in wanted:
        groups[piece.path].append(piece)
    params: dict[str, Any] = {}
    # A tensor may be asked for once for each device that has a part of it, in a row.
    last = functools.lru_cache(maxsize=2)(read)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(abstract_params(config, dtype))[0]:
        path = tuple(key.key for key in keys)
        if path not in groups:
            continue
        sharding: Any = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        if shardings is not None:
            sharding = shardings
            for key in path:
                sharding = sharding[key]
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = _read_param(groups[path], leaf, sharding, last)
        last.cache_clear()
    return params


def _read_param(
    group: Sequence[Piece], leaf: jax.ShapeDtypeStruct, sharding: Any, read: Reader
) -> jax.Array:
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    if size <= _WHOLE_BYTES or not group[0].place:
        return jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: _region(group, leaf, index, read)
        )
    layers: dict[int, list[Piece]] = defaultdict(list)
    for piece in group:
        layer, *rest = piece.place
        layers[int(layer)].append(dataclasses.replace(piece, place=tuple(rest)))  # type: ignore[arg-type]
    part = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    part_sharding = sharding
    if isinstance(sharding, NamedSharding):
        part_sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    whole = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=sharding)()
    put = jax.jit(
        lambda whole, part, layer: jax.lax.dynamic_update_index_in_dim(whole, part, layer, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )
    for layer in sorted(layers):
        array = jax.make_array_from_callback(
            part.shape,
            part_sharding,
            lambda index: _region(layers[layer], part, index, read),  # noqa: B023
        )
        whole = put(whole, array, layer)
        # Otherwise the host would run ahead and hold many layers.
        whole.block_until_ready()
    return whole


def _region(
    group: Sequence[Piece],
    leaf: jax.ShapeDtypeStruct,
    index: tuple[slice, ...] | None,
    read: Reader,
) -> np.ndarray:
    """The part of a parameter that one device holds."""
    index = (_ALL,) * len(leaf.shape) if index is None else index
    spans = [range(*one.indices(size)) for one, size in zip(index, leaf.shape, strict=True)]
    out = np.empty([len(span) for span in spans], leaf.dtype)
    for piece in group:
        found = _overlap(piece.place, spans)
        if found is None:
            continue
        target, source = found
        shape = [
            size
            for axis, size in enumerate(leaf.shape)
            if axis >= len(piece.place) or isinstance(piece.place[axis], slice)
        ]
        out[target] = piece.to_param(read(piece.name)).reshape(shape)[source]
    return out


def _overlap(place: Place, spans: Sequence[range]) -> tuple[Place, Place] | None:
    """Where a piece goes in a region, and which part of the piece; None if nowhere."""
    target: list[int | slice] = []
    source: list[int | slice] = []
    for axis, span in enumerate(spans):
        at = place[axis] if axis < len(place) else _ALL
        if isinstance(at, slice):
            target.append(at)
            source.append(slice(span.start, span.stop))
        elif at in span:
            target.append(at - span.start)
        else:
            return None
    return tuple(target), tuple(source)


def piece_of(params: Params, piece: Piece) -> Any:
    """The part of the parameters that becomes a tensor of a file, not yet in the file's order."""
    node = params
    for key in piece.path:
        node = node[key]
    return node[piece.place]
