"""What makes one decoder family differ from another, as data."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from grm_jax.errors import UsageError
from grm_jax.models.rope import Rope

DtypeName = Literal["float32", "bfloat16"]
Quantization = Literal["int8", "int4"]

GLOBAL_WINDOW = 2**30
"""The window of a layer that sees everything before it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention (arXiv:2405.04434, section 2.1); sizes in elements.

    Attributes:
      query_rank: Size of the queries' latent vector; None if they are projected directly.
      rank: Size of the latent vector that keys and values are made of, and that is cached.
      nope_dim: Elements of a key that do not depend on the position.
      rope_dim: Elements that are rotated; one such key serves all heads.
      value_dim: Elements of a value.
    """

    query_rank: int | None
    rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in place of the MLP (arXiv:2401.06066).

    Attributes:
      count: E, routed experts.
      per_token: Experts that a token is sent to.
      mlp_dim: Hidden size of one expert.
      shared_dim: Hidden size of the MLP that sees every token; 0 for none.
      dense_layers: Leading layers that keep an ordinary MLP.
      gating: `"softmax"` over experts (DeepSeek-V2), or `"sigmoid"` of each with a bias that only
        the choice sees (DeepSeek-V3, arXiv:2412.19437, eq 16).
      groups: Groups of experts of which only the best may be chosen from.
      top_groups: How many those are.
      normalise: Whether the chosen experts' weights are made to sum to one.
      scale: Factor on the weights.
    """

    count: int
    per_token: int
    mlp_dim: int
    shared_dim: int = 0
    dense_layers: int = 0
    gating: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    top_groups: int = 1
    normalise: bool = False
    scale: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (arXiv:2106.09685).

    Attributes:
      rank: Of each adapter.
      alpha: Its output is multiplied by `alpha / rank`.
      targets: The projections that have one, of `LORA_TARGETS`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = set(self.targets) - set(LORA_TARGETS)
        if unknown or not self.targets:
            raise UsageError(
                f"LoRA targets {', '.join(sorted(unknown)) or 'nothing'}; "
                f"it can target {', '.join(LORA_TARGETS)}"
            )
        if self.rank < 1:
            raise UsageError(f"LoRA rank is {self.rank}; it must be 1 or more")

    @property
    def scale(self) -> float:
        """Factor on an adapter's output."""
        return self.alpha / self.rank


LORA_TARGETS = (
    *("q", "k", "v", "out", "q_a", "q_b", "kv_a", "kv_b"),
    *("gate", "up", "down", "experts"),
)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Consecutive layers of one shape.

    Attributes:
      first: Number of the first layer.
      count: How many there are.
      experts: Whether they have a mixture of experts.
    """

    first: int
    count: int
    experts: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything the decoder needs to know about a checkpoint; hashable, so it can be static.

    A family is a choice of these values; `family_config` fills in what the family fixes. Sizes are
    in elements, `norm_eps` is dimensionless, windows are in tokens.

    Attributes:
      family: One of `FAMILIES`.
      vocab_size: V, rows of the embedding.
      num_layers: L.
      width: D, the size of the residual stream.
      num_heads: H, query heads.
      num_kv_heads: Key and value heads; each serves `num_heads // num_kv_heads` query heads.
      head_dim: Size of one head of queries and keys.
      mlp_dim: Hidden size of the gated MLP.
      max_context: Longest sequence the checkpoint was trained for.
      activation: The gate's non-linearity.
      norm_eps: Added to the mean square in RMSNorm.
      norm_offset: 1 where the stored scale is an offset from one (Gemma), 0 where it is the scale
        itself (Llama).
      post_norms: Whether attention and MLP outputs are normalised before they are added.
      qk_norm: Whether queries and keys are normalised per head before the rotation.
      qkv_bias: Whether queries, keys and values have a bias.
      query_scale: Factor on the queries.
      scale_embedding: Whether embedded tokens are multiplied by `width ** 0.5`.
      tie_embeddings: Whether the output matrix is the embedding.
      rope: Rotations of the layers that see everything.
      rope_local: Rotations of the sliding-window layers.
      windows: For each layer, how many tokens back it sees, itself included; `GLOBAL_WINDOW`
        where it sees all.
      attention_softcap: Attention's logits are kept within this by a tanh; None for no cap.
      logit_softcap: The same for the output logits.
      latent: Latent attention in place of keys and values per head.
      experts: Mixture of experts.
      num_labels: Outputs of a sequence classifier's head, which then takes the place of the output
        matrix; 0 for a language model.
      lora: Adapters beside the projections' kernels.
      quantization: How the projections' kernels are stored; None for plain arrays.
      dtype: Type that activations and matrix products are computed in.
      remat: Whether a layer is computed again for its gradient, instead of kept.
      scan_layers: Whether layers are stacked and scanned over.
      weights_first: Whether products are written with the weights on the left; see
        `cpu_decoder`.
    """

    family: str
    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_context: int
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    query_scale: float
    scale_embedding: bool = False
    tie_embeddings: bool = False
    rope: Rope
    rope_local: Rope
    windows: tuple[int, ...]
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    latent: Latent | None = None
    experts: Experts | None = None
    num_labels: int = 0
    lora: Lora | None = None
    quantization: Quantization | None = None
    dtype: DtypeName = "float32"
    remat: bool = False
    scan_layers: bool = True
    weights_first: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if len(self.windows) != self.num_layers:
            raise ValueError(
                f"windows has {len(self.windows)} entries for num_layers={self.num_layers}"
            )
        if self.experts is not None and self.experts.count % self.experts.groups:
            raise ValueError(f"{self.experts.count} experts in {self.experts.groups} groups")

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.num_heads // self.num_kv_heads

    @property
    def rope_dim(self) -> int:
        """Elements of a head that are rotated."""
        return self.latent.rope_dim if self.latent is not None else self.head_dim

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The layers in order, those of one shape together."""
        if self.experts is None:
            return (Stack(0, self.num_layers, False),)
        dense = min(self.experts.dense_layers, self.num_layers)
        found = (Stack(0, dense, False), Stack(dense, self.num_layers - dense, True))
        return tuple(stack for stack in found if stack.count)

    @property
    def cache_leads(self) -> tuple[tuple[int, ...], ...]:
        """Leading axes of each array of a cache: one array a stack or, unscanned, one a layer."""
        if not self.scan_layers:
            return ((),) * self.num_layers
        return tuple((stack.count,) for stack in self.stacks)

    @property
    def cache_heads(self) -> tuple[int, int, int | None]:
        """Heads that are cached, sizes of a key and of a value; None where keys are the values."""
        if self.latent is not None:
            return 1, self.latent.rank + self.latent.rope_dim, None
        return self.num_kv_heads, self.head_dim, self.head_dim

    @property
    def cache_width(self) -> int:
        """Elements that are cached for each token, over all layers."""
        heads, key, value = self.cache_heads
        return self.num_layers * heads * (key + (value or 0))


_GEMMA: Mapping[str, Any] = {
    "activation": "gelu_tanh",
    "norm_eps": 1e-6,
    "norm_offset": 1.0,
    "post_norms": True,
    "scale_embedding": True,
    "tie_embeddings": True,
}

FAMILIES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": {},
        "qwen2": {"qkv_bias": True, "norm_eps": 1e-6},
        "qwen3": {"qk_norm": True, "norm_eps": 1e-6},
        "gemma2": _GEMMA,
        "gemma3": {**_GEMMA, "qk_norm": True},
        "deepseek_v2": {"norm_eps": 1e-6},
        "deepseek_v3": {"norm_eps": 1e-6},
    }
)
"""What each family fixes."""


def family_config(family: str, **values: Any) -> DecoderConfig:
    """A decoder of a family.

    Args:
      family: One of `FAMILIES`.
      **values: Fields of `DecoderConfig`. Where left out, a head is `width // num_heads` wide (or
        as wide as latent attention says), queries are scaled by `head_dim ** -0.5`, every layer
        sees everything, and all layers are rotated by `rope`.

    Raises:
      UsageError: If there is no such family.
      ValueError: If the values contradict each other.
    """
    if family not in FAMILIES:
        raise UsageError(f"no decoder family {family!r}; there are {', '.join(FAMILIES)}")
    full = {"family": family, **FAMILIES[family], **values}
    latent: Latent | None = full.get("latent")
    if latent is not None:
        full["head_dim"] = latent.nope_dim + latent.rope_dim
    head_dim = full.setdefault("head_dim", full["width"] // full["num_heads"])
    full.setdefault("query_scale", head_dim**-0.5)
    full.setdefault("windows", (GLOBAL_WINDOW,) * full["num_layers"])
    full.setdefault("rope_local", full.setdefault("rope", Rope()))
    return DecoderConfig(**full)


def sliding_windows(num_layers: int, window: int, global_every: int) -> tuple[int, ...]:
    """The window of each layer where every `global_every`-th, counted from one, sees everything."""
    return tuple(
        GLOBAL_WINDOW if (layer + 1) % global_every == 0 else window for layer in range(num_layers)
    )


def dtype_name(dtype: DTypeLike) -> DtypeName:
    """The name of a type that the decoder computes in.

    Raises:
      UsageError: If it computes in no such type.
    """
    match jnp.dtype(dtype).name:
        case "float32":
            return "float32"
        case "bfloat16":
            return "bfloat16"
        case other:
            raise UsageError(f"dtype is {other}; choose float32 or bfloat16")
