"""What a program has to compute, counted on paper.

A count by hand keeps the count from compiled text honest, and stands in for it where there is no
compiler. FLOPs are those of matrix products, two for each multiply-add, of the algorithm as it is
implemented: keys that are masked within a block are multiplied too, and what is computed again for
a gradient is counted again.
"""

import math
import re
from typing import NamedTuple

from grm_jax.models import DecoderConfig
from grm_jax.models.config import Stack
from grm_jax.models.kernels import BLOCK, LANES, MOST_BLOCKS, ROWS
from grm_jax.plan.chips import Kind


class Pass(NamedTuple):
    """Rows that go through the decoder.

    Attributes:
      rows: How many, over all chips.
      length: Tokens of each, without those of its branches.
      learns: Whether there is a gradient.
      logits: Whether log-probabilities of the tokens are taken.
      cached: Whether only keys and values are wanted of it.
      branches: Texts that follow each row and do not see one another; if there are any, only their
        log-probabilities are taken.
      behind: Tokens of each of them.
    """

    rows: int
    length: int
    learns: bool = False
    logits: bool = False
    cached: bool = False
    branches: int = 0
    behind: int = 0

    @property
    def tokens(self) -> int:
        """Of a row with its branches."""
        return self.length + self.branches * self.behind

    @property
    def targets(self) -> int:
        """Tokens of a row whose log-probabilities may be taken."""
        return self.branches * self.behind if self.branches else self.length


class Decoded(NamedTuple):
    """Tokens that are sampled one after the other.

    Attributes:
      prompts: B.
      samples: K of each.
      prompt: P, tokens of the cache that the samples of a prompt share.
      tokens: T, of each sample.
    """

    prompts: int
    samples: int
    prompt: int
    tokens: int


class Work(NamedTuple):
    """All that a program computes.

    Attributes:
      passes: Through the decoder.
      decoded: What is sampled after them; None for nothing.
    """

    passes: tuple[Pass, ...]
    decoded: Decoded | None = None


def flops(config: DecoderConfig, work: Work, kind: Kind = "gpu") -> float:
    """FLOPs of the work over all chips, with the attention that chips of this kind run."""
    total = sum(_pass_flops(config, one, kind) for one in work.passes)
    return total + (_decode_flops(config, work.decoded) if work.decoded else 0.0)


def model_flops(config: DecoderConfig, work: Work) -> float:
    """FLOPs that the work takes at the least: nothing twice, and only keys that are seen."""
    total = 0.0
    for one in work.passes:
        seen = sum(_seen(one.length, window) for window in config.windows)
        for window in config.windows:
            ahead = _seen(one.length + one.behind, window) - _seen(one.length, window)
            seen += one.branches * ahead
        each = one.tokens * _products(config) + seen * _pair(config)
        each += one.targets * _logit_products(config) * one.logits
        total += 2 * one.rows * each * (_backward(config) + 1 if one.learns else 1)
    if work.decoded:
        total += _decode_flops(config, work.decoded)
    return total


def _backward(config: DecoderConfig) -> int:
    """Products of a gradient for one of the forward pass; frozen parameters have no gradient."""
    return 2 if config.lora is None else 1


def kernel_flops(
    config: DecoderConfig, name: str, place: str, queries: tuple[int, ...], values: tuple[int, ...]
) -> float:
    """FLOPs of a call of splash attention, into which no compiler looks.

    Args:
      config: The decoder's.
      name: Of the call.
      place: Where in the program it is; a branch has the number of its window.
      queries: Their shape, `[..., T, head_dim]`.
      values: Theirs, `[..., S, value_dim]`.

    Returns:
      The FLOPs; 0 for a call of anything else.
    """
    shares = {"splash_mha_fwd": (1, 1), "splash_mha_dq": (2, 1), "splash_mha_dkv": (2, 2)}
    share = next((found for kind, found in shares.items() if name.startswith(kind)), None)
    if share is None:
        return 0.0
    *lead, length, size = queries
    windows = sorted({min(window, length) for window in config.windows})
    branch = re.search(r"cond/branch_(\d+)_fun", place)
    window = windows[int(branch[1])] if branch and int(branch[1]) < len(windows) else windows[-1]
    each = share[0] * size + share[1] * values[-1]
    return 2.0 * math.prod(lead) * _in_blocks(length, window) * each


def _pass_flops(config: DecoderConfig, one: Pass, kind: Kind) -> float:
    products, adapters = _products(config), _adapter_products(config)
    pairs = sum(_scored(one.length, window, kind) for window in config.windows)
    plain = config.num_layers * one.branches * _scored_behind(one.length, one.behind)
    logits = one.targets * _logit_products(config) * one.logits
    forwards = (pairs + plain) * _pair(config)
    if one.cached and kind == "cpu":
        # CPUs have each layer by itself, and nothing comes of the last one but keys and values.
        products -= _layer_products(config, config.stacks[-1]) - _key_products(config)
        forwards -= _scored(one.length, config.windows[-1], kind) * _pair(config)
    if not one.learns:
        return 2.0 * one.rows * (one.tokens * (products + adapters) + forwards + logits)
    again = 1 + config.remat
    each = one.tokens * products * (again + _backward(config))
    each += one.tokens * adapters * (again + 2)
    # Scores are kept by nobody: the gradient takes them, and what they weigh, once more.
    each += forwards * again
    if kind == "tpu":
        # Two kernels for the gradient, both of which take scores and their gradients anew.
        key, value = _sizes(config)
        each += pairs * config.num_heads * (4 * key + 3 * value)
        each += plain * _pair(config) * (1 + 2)
    else:
        each += forwards * (1 + 2)
    each += logits * (2 + _backward(config))
    return 2.0 * one.rows * each


def _decode_flops(config: DecoderConfig, one: Decoded) -> float:
    rows = one.prompts * one.samples * one.tokens
    _, key, value = config.cache_heads
    # Latent keys are met in the absorbed form, where they are the values too.
    pair = config.num_heads * (key + (key if value is None else value))
    each = _products(config) + _adapter_products(config) + _logit_products(config)
    each += config.num_layers * (one.prompt + one.tokens) * pair
    return 2.0 * rows * each


def _products(config: DecoderConfig) -> int:
    """Multiply-adds of a token with the kernels of all layers, those of its own experts only."""
    return sum(stack.count * _layer_products(config, stack) for stack in config.stacks)


def _layer_products(config: DecoderConfig, stack: Stack) -> int:
    c = config
    if c.latent is None:
        attention = c.width * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    else:
        m, queries = c.latent, c.num_heads * c.head_dim
        rank = m.query_rank
        attention = c.width * queries if rank is None else rank * (c.width + queries)
        attention += c.width * (m.rank + m.rope_dim)
        attention += m.rank * c.num_heads * (m.nope_dim + m.value_dim)
        attention += c.num_heads * m.value_dim * c.width
    if not stack.experts or c.experts is None:
        return attention + 3 * c.width * c.mlp_dim
    e = c.experts
    hidden = e.per_token * e.mlp_dim + e.shared_dim
    return attention + c.width * e.count + 3 * c.width * hidden


def _key_products(config: DecoderConfig) -> int:
    """Multiply-adds of a token with the kernels that make what a layer caches."""
    c = config
    if c.latent is None:
        return c.width * c.head_dim * 2 * c.num_kv_heads
    return c.width * (c.latent.rank + c.latent.rope_dim)


def _adapter_products(config: DecoderConfig) -> int:
    """Multiply-adds of a token with adapters of plain projections; those of experts are few."""
    c = config
    if c.lora is None:
        return 0
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    ends = {
        "q": c.width + queries,
        "k": c.width + keys,
        "v": c.width + keys,
        "out": queries + c.width,
        "gate": c.width + c.mlp_dim,
        "up": c.width + c.mlp_dim,
        "down": c.mlp_dim + c.width,
    }
    if c.latent is not None:
        ends = {name: ends[name] for name in ("gate", "up", "down")}
    rank = c.lora.rank
    return c.num_layers * rank * sum(ends.get(target, 0) for target in c.lora.targets)


def _pair(config: DecoderConfig) -> int:
    """Multiply-adds of a query and a key in one layer, where keys are written out."""
    return config.num_heads * sum(_sizes(config))


def _sizes(config: DecoderConfig) -> tuple[int, int]:
    """Elements of a key and of a value, where these are written out."""
    latent = config.latent
    return config.head_dim, config.head_dim if latent is None else latent.value_dim


def _logit_products(config: DecoderConfig) -> int:
    return config.width * config.vocab_size


def _seen(length: int, window: int) -> int:
    """Pairs of a query and a key that it sees."""
    window = min(window, length)
    return window * (window + 1) // 2 + (length - window) * window


def _scored(length: int, window: int, kind: Kind) -> int:
    """Pairs that are scored; plain attention takes blocks of queries with all that any sees."""
    if kind == "tpu":
        return _in_blocks(length, window)
    if length > ROWS * MOST_BLOCKS:
        return -(-length // ROWS) * ROWS * length
    total = 0
    for begin in range(0, length, ROWS):
        end = min(begin + ROWS, length)
        total += (end - begin) * (end - max(0, begin - window + 1))
    return total


def _scored_behind(length: int, behind: int) -> int:
    """Pairs that a text scores behind a prompt, in blocks of queries."""
    begins = range(0, behind, ROWS)
    own = sum(min(ROWS, behind - begin) * min(begin + ROWS, behind) for begin in begins)
    return behind * length + own


def _in_blocks(length: int, window: int) -> int:
    """Pairs of queries and keys that splash attention scores: blocks in which anything is seen."""
    block = min(BLOCK, -(-length // LANES) * LANES)
    blocks = -(-length // block)
    # In the block of queries i, the first key that is seen is window - 1 before the first query.
    first = (max(0, (index * block - window + 1) // block) for index in range(blocks))
    return sum(index - start + 1 for index, start in enumerate(first)) * block**2
