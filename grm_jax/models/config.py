"""What makes one decoder family differ from another, as data."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from grm_jax.errors import UsageError

DtypeName = Literal["float32", "bfloat16"]

GLOBAL_WINDOW = 2**30
"""The window of a layer that sees everything before it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything the decoder needs to know about a checkpoint; hashable, so it can be static.

    A family is a choice of these values. Sizes are in elements, `norm_eps` and the rope bases are
    dimensionless, windows are in tokens.

    Attributes:
      family: Name of the family, such as `"llama"` or `"gemma3"`.
      vocab_size: V, rows of the embedding.
      num_layers: L.
      width: D, the size of the residual stream.
      num_heads: H, query heads.
      num_kv_heads: Key and value heads; each serves `num_heads // num_kv_heads` query heads.
      head_dim: Size of one head.
      mlp_dim: Hidden size of the gated MLP.
      max_context: Longest sequence the checkpoint was trained for.
      activation: The gate's non-linearity.
      norm_eps: Added to the mean square in RMSNorm.
      norm_offset: 1 where the stored scale is an offset from one (Gemma), 0 where it is the scale
        itself (Llama).
      post_norms: Whether attention and MLP outputs are normalised before they are added.
      qk_norm: Whether queries and keys are normalised per head before the rotation.
      query_scale: Factor on the queries; `head_dim ** -0.5` unless the family says otherwise.
      embed_scale: Factor on the embedded tokens (`width ** 0.5` for Gemma).
      tie_embeddings: Whether the output matrix is the embedding.
      rope_theta: Rotary base of the layers that see everything.
      rope_theta_local: Rotary base of the sliding-window layers.
      windows: For each layer, how many tokens back it sees, itself included; `GLOBAL_WINDOW`
        where it sees all.
      dtype: Type that activations and matrix products are computed in.
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
    query_scale: float
    embed_scale: float = 1.0
    tie_embeddings: bool = True
    rope_theta: float = 10_000.0
    rope_theta_local: float = 10_000.0
    windows: tuple[int, ...]
    dtype: DtypeName = "float32"
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

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.num_heads // self.num_kv_heads


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


def llama_config(
    *,
    vocab_size: int,
    num_layers: int,
    width: int,
    num_heads: int,
    num_kv_heads: int,
    mlp_dim: int,
    max_context: int,
    head_dim: int | None = None,
    rope_theta: float = 10_000.0,
    norm_eps: float = 1e-5,
    tie_embeddings: bool = True,
) -> DecoderConfig:
    """Llama and what copies it: pre-norms, SwiGLU, full attention in every layer."""
    head_dim = head_dim or width // num_heads
    return DecoderConfig(
        family="llama",
        vocab_size=vocab_size,
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        max_context=max_context,
        norm_eps=norm_eps,
        query_scale=head_dim**-0.5,
        tie_embeddings=tie_embeddings,
        rope_theta=rope_theta,
        rope_theta_local=rope_theta,
        windows=(GLOBAL_WINDOW,) * num_layers,
    )


def gemma3_config(
    *,
    vocab_size: int,
    num_layers: int,
    width: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    mlp_dim: int,
    max_context: int,
    window: int,
    global_every: int = 6,
    query_scale: float | None = None,
    rope_theta: float = 1_000_000.0,
    rope_theta_local: float = 10_000.0,
    norm_eps: float = 1e-6,
) -> DecoderConfig:
    """Gemma 3 text: norms before and after, q/k norms, five sliding layers to one global."""
    return DecoderConfig(
        family="gemma3",
        vocab_size=vocab_size,
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        max_context=max_context,
        activation="gelu_tanh",
        norm_eps=norm_eps,
        norm_offset=1.0,
        post_norms=True,
        qk_norm=True,
        query_scale=query_scale if query_scale is not None else head_dim**-0.5,
        embed_scale=width**0.5,
        rope_theta=rope_theta,
        rope_theta_local=rope_theta_local,
        windows=tuple(
            GLOBAL_WINDOW if (layer + 1) % global_every == 0 else window
            for layer in range(num_layers)
        ),
    )
