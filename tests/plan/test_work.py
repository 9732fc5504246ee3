"""Counts on paper, against counts by hand."""

import pytest

from grm_jax.models import family_config
from grm_jax.plan.architectures import KNOWN, decoder_of
from grm_jax.plan.work import Decoded, Pass, Work, flops, kernel_flops, model_flops

CONFIG = family_config(
    "llama",
    vocab_size=100,
    num_layers=3,
    width=8,
    num_heads=2,
    num_kv_heads=1,
    mlp_dim=16,
    max_context=4096,
)
WINDOWED = family_config(
    "gemma2",
    vocab_size=100,
    num_layers=2,
    width=512,
    num_heads=4,
    num_kv_heads=4,
    mlp_dim=16,
    max_context=4096,
    windows=(512, 2**30),
)


def test_products_by_hand() -> None:
    kernels = 3 * (8 * 4 * (2 + 1 + 1 + 2) + 3 * 8 * 16)
    scores = 3 * 10 * 10 * 2 * (4 + 4)
    one = Pass(rows=5, length=10, logits=True)
    assert flops(CONFIG, Work((one,))) == 2 * 5 * (10 * kernels + scores + 10 * 8 * 100)
    learns = one._replace(learns=True)
    assert flops(CONFIG, Work((learns,))) == 2 * 5 * (
        3 * 10 * kernels + 4 * scores + 4 * 10 * 8 * 100
    )
    # At the least, a query meets half of the keys, and nothing is done twice.
    seen = 3 * 55 * 2 * (4 + 4)
    assert model_flops(CONFIG, Work((learns,))) == 3 * 2 * 5 * (10 * kernels + seen + 10 * 8 * 100)
    decoded = Decoded(prompts=5, samples=2, prompt=7, tokens=4)
    each = kernels + 8 * 100 + 3 * (7 + 4) * 2 * (4 + 4)
    assert flops(CONFIG, Work((), decoded)) == 2 * 5 * 2 * 4 * each


def test_branches_by_hand() -> None:
    """Two texts of 600 tokens behind each prompt of 10: two blocks of queries."""
    kernels = 3 * (8 * 4 * (2 + 1 + 1 + 2) + 3 * 8 * 16)
    pairs = 10 * 10 + 2 * (600 * 10 + 512 * 512 + 88 * 600)
    scores = 3 * pairs * 2 * (4 + 4)
    one = Pass(rows=5, length=10, logits=True, branches=2, behind=600)
    assert one.tokens == 1210
    logits = 1200 * 8 * 100
    assert flops(CONFIG, Work((one,))) == 2 * 5 * (1210 * kernels + scores + logits)
    learns = Work((one._replace(learns=True),))
    wanted = 2 * 5 * (3 * 1210 * kernels + 4 * scores + 4 * logits)
    assert flops(CONFIG, learns) == wanted
    # On TPUs it is a kernel of blocks of 128 that reads the prompt.
    assert flops(CONFIG, learns, "tpu") == wanted + 2 * 5 * 3 * 16 * (4.5 * 128**2 - 4 * 10**2)
    seen = 3 * (55 + 2 * (600 * 10 + 600 * 601 // 2)) * 2 * (4 + 4)
    assert model_flops(CONFIG, Work((one,))) == 2 * 5 * (1210 * kernels + seen + logits)


def test_attention_on_tpus() -> None:
    """Splash attention leaves out blocks of 512 in which nothing is seen."""
    rows, length, heads, size = 6, 2048, 4, 128
    one = Work((Pass(rows=rows, length=length),))
    kernels = 2 * (512 * 4 * 4 * 128 + 3 * 512 * 16)
    # Of four blocks of queries: with a window of 512 one block of keys, then two; or all before.
    scored = (1 + 2 + 2 + 2) + (1 + 2 + 3 + 4)
    pairs = scored * 512**2 * heads * 2 * size
    assert flops(WINDOWED, one, "tpu") == 2 * rows * (length * kernels + pairs)
    # As the calls of the kernels are counted, one for each of two windows.
    shape = (rows, heads, length, size)
    forwards = [
        kernel_flops(WINDOWED, "splash_mha_fwd.1", f"x/cond/branch_{index}_fun/y", shape, shape)
        for index in range(2)
    ]
    assert sum(forwards) == 2 * rows * pairs
    backwards = sum(
        kernel_flops(WINDOWED, f"splash_mha_{kind}", f"cond/branch_{index}_fun", shape, shape)
        for index in range(2)
        for kind in ("dq", "dkv")
    )
    assert backwards == sum(forwards) / 2 * (3 + 4)
    learns = Work((Pass(rows=rows, length=length, learns=True),))
    products = 2 * rows * 3 * length * kernels
    assert flops(WINDOWED, learns, "tpu") == products + sum(forwards) + backwards
    assert kernel_flops(WINDOWED, "gmm.1", "", shape, shape) == 0


# What their makers say, in billions.
SIZES = {
    "smollm2-135m": 0.135,
    "gemma3-270m": 0.268,
    "hf:google/gemma-2-2b": 2.61,
    "hf:google/gemma-2-9b": 9.24,
    "hf:google/gemma-2-27b": 27.2,
    "hf:deepseek-ai/DeepSeek-V2-Lite": 15.7,
    "hf:deepseek-ai/DeepSeek-V3": 671.0,
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_shapes_have_their_number_of_parameters(name: str) -> None:
    config = decoder_of(name)
    latent, experts = config.latent, config.experts
    if latent is None:
        heads = 2 * config.num_heads + 2 * config.num_kv_heads
        attention = config.width * config.head_dim * heads
    else:
        queries = config.num_heads * config.head_dim
        rank = latent.query_rank
        attention = rank * (config.width + queries) if rank else config.width * queries
        attention += config.width * (latent.rank + latent.rope_dim)
        attention += latent.rank * config.num_heads * (latent.nope_dim + latent.value_dim)
        attention += config.num_heads * latent.value_dim * config.width
    total = config.vocab_size * config.width * (1 if config.tie_embeddings else 2)
    for stack in config.stacks:
        hidden = config.mlp_dim
        if stack.experts and experts is not None:
            hidden = experts.count * experts.mlp_dim + experts.shared_dim
        total += stack.count * (attention + 3 * config.width * hidden)
    listed = SIZES.get(name) or next(
        size for other, size in SIZES.items() if KNOWN[other] is KNOWN[name]
    )
    assert total / 1e9 == pytest.approx(listed, rel=0.01)
