import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax import GRM
from grm_jax.models import cpu_decoder, layer_of, logits
from grm_jax.prompts import parse_scores
from grm_jax.sampling import (
    Controls,
    Layout,
    Rollouts,
    decode,
    judgement_layout,
    prefill,
    truncate,
)
from grm_jax.sampling.drawing import draw
from grm_jax.sampling.layout import LayoutState, advance, allowed_edges

EOS = 257
# Several, so that samples of a random model do end; they are the same in all tests, as are most
# shapes, because compiling takes most of the time.
ENDS = (EOS, *range(0, 256, 40))
CAPACITY = 32
PROMPTS = (b"Which one is better?", b"And this?")


_logits = jax.jit(logits, static_argnums=1)


def keys_of(seed: int, samples: int) -> jax.Array:
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return fold(jax.random.key(seed), jnp.arange(samples))


def sample(
    grm: GRM,
    keys: jax.Array,
    prompts: Sequence[bytes] = PROMPTS[:1],
    *,
    layout: Layout | None = None,
    layouts: Sequence[Layout] = (),
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = CAPACITY,
    on_cpu: bool = False,
    **static: Any,
) -> Rollouts:
    """Decodes with prompts padded to 24 tokens; keys are `[B, K]`, layouts one or B."""
    layouts = layouts if layout is None else [layout]
    tokens = np.zeros((len(prompts), 24), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt) - 1] = list(prompt[:-1])
    length = np.asarray([len(prompt) - 1 for prompt in prompts], np.int32)
    prefix = prefill(grm.params, grm.config, tokens, length)
    config, params = grm.config, grm.params
    if on_cpu:
        layers = range(config.num_layers)
        config, params = cpu_decoder(config, params)
        prefix = prefix._replace(
            keys=tuple(layer_of(prefix.keys, grm.config, layer) for layer in layers),
            values=tuple(layer_of(prefix.values, grm.config, layer) for layer in layers),
        )
    out = decode(
        params,
        config,
        prefix,
        np.asarray([prompt[-1] for prompt in prompts], np.int32),
        keys,
        Controls(jnp.float32(temperature), jnp.float32(top_p), jnp.int32(max_new_tokens)),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *layouts) if layouts else None,
        np.arange(258) < 256 if layouts else None,
        **{
            # All are always passed: one left out is another program to the compiler's cache.
            "eos_ids": ENDS,
            "capacity": CAPACITY,
            "greedy": False,
            "top_k": 0,
            "nucleus": False,
            **static,
        },
    )
    return jax.device_get(out)


def full_logits(grm: GRM, prompt: bytes, out: Rollouts, k: int, row: int = 0) -> np.ndarray:
    """Logits `[length, V]` from which each token of a sample was drawn, by one plain forward."""
    length = int(out.length[row, k])
    text = [*prompt, *out.tokens[row, k, : length - 1].tolist()]
    padded = np.zeros((1, 160), np.int32)
    padded[0, : len(text)] = text
    everything = _logits(grm.params, grm.config, padded)
    return np.asarray(everything[0, len(prompt) - 1 : len(text)], np.float64)


def log_softmax(values: np.ndarray) -> np.ndarray:
    top = values.max(axis=-1, keepdims=True)
    return values - top - np.log(np.exp(values - top).sum(axis=-1, keepdims=True))


def plain_truncate(values: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Keeps a token if fewer than k are likelier, and then if the likelier weigh less than p."""
    values = np.asarray(values, np.float64)
    if top_k:
        likelier = (values[None, :] > values[:, None]).sum(axis=1)
        values = np.where(likelier < top_k, values, -np.inf)
    if top_p < 1:
        chances = np.exp(log_softmax(values))
        before = np.asarray([chances[values > value].sum() for value in values])
        values = np.where(before < top_p, values, -np.inf)
    return values


# --- what is sampled ---


def test_greedy_decoding_is_argmax_over_the_growing_text(tiny_grm: GRM) -> None:
    out = sample(tiny_grm, keys_of(0, 2)[None], greedy=True)
    text = list(PROMPTS[0])
    for _ in range(CAPACITY):
        padded = np.zeros((1, 160), np.int32)
        padded[0, : len(text)] = text
        text.append(
            int(_logits(tiny_grm.params, tiny_grm.config, padded)[0, len(text) - 1].argmax())
        )
        if text[-1] in ENDS:
            break
    written = text[len(PROMPTS[0]) :]
    assert len(set(written)) > 1
    for k in range(2):
        assert out.length[0, k] == len(written)
        assert out.tokens[0, k, : len(written)].tolist() == written
    assert not out.sampled_logprobs.any()
    expected = log_softmax(full_logits(tiny_grm, PROMPTS[0], out, 0))
    np.testing.assert_allclose(
        out.logprobs[0, 0, : len(written)],
        expected[np.arange(len(written)), written],
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (30, 0.8), (30, 0.3)], ids=["all", "k and p", "p"]
)
def test_logprobs_are_those_of_the_full_forward(tiny_grm: GRM, top_k: int, top_p: float) -> None:
    temperature = 0.7
    out = sample(
        tiny_grm,
        keys_of(1, 8)[None],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        nucleus=top_p < 1,
    )
    for k in range(3):
        scaled = full_logits(tiny_grm, PROMPTS[0], out, k) / temperature
        places = np.arange(len(scaled))
        chosen = out.tokens[0, k, : len(scaled)]
        kept = np.stack([plain_truncate(row, top_k, top_p) for row in scaled])
        np.testing.assert_allclose(
            out.logprobs[0, k, : len(scaled)], log_softmax(scaled)[places, chosen], atol=1e-4
        )
        np.testing.assert_allclose(
            out.sampled_logprobs[0, k, : len(scaled)],
            log_softmax(kept)[places, chosen],
            atol=1e-4,
        )


def test_constrained_samples_follow_the_layout(tiny_grm: GRM) -> None:
    layout = judgement_layout(tiny_grm.tokenizer, count=2, max_new_tokens=90)
    temperature, top_k = 1.3, 40
    out = sample(
        tiny_grm,
        keys_of(2, 8)[None],
        layout=layout,
        temperature=temperature,
        max_new_tokens=90,
        capacity=96,
        top_k=top_k,
        eos_ids=(EOS,),
    )
    assert out.stopped.all()
    for tokens, length in zip(out.tokens[0], out.length[0], strict=True):
        *written, last = tokens[:length].tolist()
        assert last == EOS
        assert max(written) < 256
        assert parse_scores(tiny_grm.tokenizer.decode(written), 2) is not None

    # The probabilities are those of what the layout allows, renormalised.
    edges, move = jax.jit(allowed_edges), jax.jit(advance)
    for k in range(2):
        scaled = full_logits(tiny_grm, PROMPTS[0], out, k) / temperature
        chosen = out.tokens[0, k, : len(scaled)]
        at = LayoutState(jnp.int32(0), jnp.int32(0))
        expected = []
        for row, token in zip(scaled, chosen, strict=True):
            free, tokens, open_ = jax.device_get(edges(layout, at))
            allowed = np.arange(256) if free else tokens[open_]
            kept = np.full_like(row, -np.inf)
            kept[allowed] = row[allowed]
            kept = plain_truncate(kept, top_k, 1.0)
            expected.append(log_softmax(kept)[token])
            at = move(layout, at, token)
        np.testing.assert_allclose(out.sampled_logprobs[0, k, : len(scaled)], expected, atol=1e-4)
        np.testing.assert_allclose(
            out.logprobs[0, k, : len(scaled)],
            log_softmax(scaled)[np.arange(len(scaled)), chosen],
            atol=1e-4,
        )


# --- where samples end ---


def test_a_sample_ends_with_its_first_end_of_turn(tiny_grm: GRM) -> None:
    out = sample(tiny_grm, keys_of(4, 8)[None], temperature=2.0)
    assert 0 < out.stopped.sum() < 8
    for tokens, length, stopped in zip(out.tokens[0], out.length[0], out.stopped[0], strict=True):
        found = np.flatnonzero(np.isin(tokens[:length], ENDS))
        assert found.tolist() == ([length - 1] if stopped else [])
        assert stopped or length == CAPACITY


@pytest.mark.parametrize("limit", [1, 9, CAPACITY])
def test_no_more_than_max_new_tokens_are_sampled(tiny_grm: GRM, limit: int) -> None:
    keys = keys_of(5, 8)[None]
    out = sample(tiny_grm, keys, max_new_tokens=limit)
    longer = sample(tiny_grm, keys)
    assert (out.length == np.minimum(longer.length, limit)).all()
    assert (out.stopped == (longer.stopped & (longer.length <= limit))).all()
    assert (out.tokens[..., :limit] == longer.tokens[..., :limit]).all()


# --- what a sample does not depend on ---


def test_prompts_of_other_lengths_in_the_batch_change_nothing(tiny_grm: GRM) -> None:
    keys = jnp.stack([keys_of(6, 8), keys_of(7, 8)])
    together = sample(tiny_grm, keys, PROMPTS, on_cpu=True)
    for row, prompt in enumerate(PROMPTS):
        alone = sample(tiny_grm, keys[row : row + 1], [prompt], on_cpu=True)
        assert (alone.tokens[0] == together.tokens[row]).all()
        assert (alone.length[0] == together.length[row]).all()
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[row], atol=1e-5)
    assert (together.tokens[0] != together.tokens[1]).any()


def test_samples_that_have_ended_leave_the_others_alone(tiny_grm: GRM) -> None:
    """Under a layout, too, where an ended sample has nothing left that it may write."""
    long, short = (
        judgement_layout(tiny_grm.tokenizer, count=2, max_new_tokens=size) for size in (96, 60)
    )
    settings: dict[str, Any] = {"max_new_tokens": 96, "capacity": 96, "eos_ids": (EOS,)}
    keys = jnp.stack([keys_of(9, 4), keys_of(10, 4)])
    together = sample(tiny_grm, keys, PROMPTS, layouts=[long, short], **settings)
    assert together.length[0].min() > together.length[1].max() + 20
    # Beside others that end when it does.
    alike = sample(tiny_grm, keys, PROMPTS, layouts=[long, long], **settings)
    for row in range(4):
        length = alike.length[0, row]
        assert length == together.length[0, row]
        assert (alike.tokens[0, row, :length] == together.tokens[0, row, :length]).all()


def test_a_sample_follows_its_key_whatever_samples_are_beside_it(tiny_grm: GRM) -> None:
    keys = keys_of(8, 32)
    many = sample(tiny_grm, keys[None], on_cpu=True)
    few = sample(tiny_grm, keys[None, :8], on_cpu=True)
    assert (few.tokens == many.tokens[:, :8]).all()
    assert (few.length == many.length[:, :8]).all()
    places = np.random.default_rng(0).permutation(32)
    permuted = sample(tiny_grm, keys[places][None], on_cpu=True)
    assert (permuted.tokens == many.tokens[:, places]).all()
    assert len(np.unique(many.tokens[0], axis=0)) == 32


def test_the_form_for_cpus_gives_the_same_samples(tiny_grm: GRM) -> None:
    keys = keys_of(9, 8)[None]
    stacked, unrolled = sample(tiny_grm, keys), sample(tiny_grm, keys, on_cpu=True)
    assert (stacked.tokens == unrolled.tokens).all()
    assert (stacked.length == unrolled.length).all()
    np.testing.assert_allclose(stacked.logprobs, unrolled.logprobs, atol=1e-5)


def test_other_settings_of_equal_shape_compile_nothing(tiny_grm: GRM) -> None:
    first = sample(tiny_grm, keys_of(10, 8)[None], nucleus=True, top_k=30, top_p=0.9)
    compiled = decode._cache_size()
    second = sample(
        tiny_grm,
        keys_of(11, 8)[None],
        PROMPTS[1:],
        nucleus=True,
        top_k=30,
        top_p=0.5,
        temperature=0.3,
        max_new_tokens=20,
    )
    assert decode._cache_size() == compiled
    assert (first.tokens != second.tokens).any()


# --- truncation ---


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(0, 1.0), (1, 1.0), (3, 1.0), (20, 1.0), (99, 1.0), (0, 0.01), (0, 0.61), (4, 0.73)],
)
def test_truncate_keeps_what_plain_code_keeps(
    seed: int, tied: bool, top_k: int, top_p: float
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 4, 20) if tied else rng.normal(size=20) * 2
    scaled = np.asarray(values, np.float32)
    scaled[rng.random(20) < 0.2] = -np.inf
    limit = jnp.float32(top_p) if top_p < 1 else None
    kept = np.asarray(truncate(jnp.asarray(scaled), top_k=top_k, top_p=limit))
    np.testing.assert_array_equal(kept, plain_truncate(scaled, top_k, top_p).astype(np.float32))


def test_truncate_always_leaves_the_likeliest() -> None:
    scaled = jnp.asarray([0.0, 3.0, 1.0, 2.0])
    inf = np.inf
    assert truncate(scaled, top_p=jnp.float32(1e-9)).tolist() == [-inf, 3.0, -inf, -inf]
    assert truncate(scaled, top_k=2).tolist() == [-inf, 3.0, -inf, 2.0]
    assert truncate(scaled) is scaled


# --- drawing ---


@functools.partial(jax.jit, static_argnames=("draws", "greedy"))
def draw_often(scaled: jax.Array, draws: int, greedy: bool = False) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), draws)
    return jax.vmap(lambda key: draw(key, scaled, greedy=greedy))(keys)


def test_draws_are_distributed_as_the_softmax() -> None:
    # Tokens in four blocks of the cumulative sum, with impossible ones before, between and after.
    places = np.asarray([3, 5, 126, 127, 128, 129, 300, 383, 384, 390])
    scaled = np.full(420, -np.inf, np.float32)
    scaled[places] = np.random.default_rng(0).normal(size=len(places)) - 40
    draws = 8000
    tokens, totals = draw_often(jnp.asarray(scaled), draws)
    counts = np.bincount(np.asarray(tokens), minlength=len(scaled))
    assert counts[places].sum() == draws
    chances = np.exp(log_softmax(scaled[places].astype(np.float64)))
    chi_square = ((counts[places] - draws * chances) ** 2 / (draws * chances)).sum()
    assert chi_square < 27.9  # the 99.9th percentile at 9 degrees of freedom
    np.testing.assert_allclose(
        totals, np.log(np.exp(scaled[places].astype(np.float64)).sum()), rtol=1e-5
    )


@pytest.mark.parametrize("place", [0, 127, 128, 200])
@pytest.mark.parametrize("greedy", [False, True])
def test_the_only_possible_token_is_always_drawn(place: int, greedy: bool) -> None:
    scaled = jnp.full(201, -jnp.inf).at[place].set(-5.0)
    tokens, totals = draw_often(scaled, 64, greedy=greedy)
    assert (tokens == place).all()
    np.testing.assert_allclose(totals, -5.0, rtol=1e-6)
