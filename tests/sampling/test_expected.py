"""Expected scores: what sums over whole texts say, and votes that do not tie."""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import pytest

from grm_jax import GRM, grammar
from grm_jax.data import Judgement, from_record
from grm_jax.distributed import make_mesh, tree_shardings
from grm_jax.errors import UsageError
from grm_jax.models import (
    Experts,
    Latent,
    abstract_params,
    family_config,
    logits,
    param_axes,
)
from grm_jax.prompts import Tokenizer
from grm_jax.sampling import ScoreReader
from grm_jax.sampling.expected import score_places
from tests.sums import questions

SETTINGS: dict[str, Any] = {"samples": 1, "max_new_tokens": 60, "constrain": True}
MERGED = (b"10", b", ", b"}\n", b" 7", b"{3", b"1, 1")


def merged_encoder(text: str) -> list[int]:
    """The longest token first, as far as tokens of more than a byte go."""
    data, ids = text.encode(), []
    while data:
        whole = [index for index, piece in enumerate(MERGED) if data.startswith(piece)]
        best = max(whole, key=lambda index: len(MERGED[index]), default=None)
        ids.append(data[0] if best is None else 258 + best)
        data = data[1 if best is None else len(MERGED[best]) :]
    return ids


@pytest.fixture(scope="module")
def merging(tiny_grm: GRM) -> GRM:
    """A judge whose tokens cross the borders of numbers."""
    plain = tiny_grm.tokenizer
    tokenizer = Tokenizer(
        token_bytes=(*plain.token_bytes, *MERGED),
        control_ids=plain.control_ids,
        bos_id=None,
        eos_ids=plain.eos_ids,
        add_bos=False,
        chat_template=None,
        text_encoder=merged_encoder,
    )
    config = dataclasses.replace(tiny_grm.config, vocab_size=tokenizer.vocab_size)
    rng = np.random.default_rng(5)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put((0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype))

    return dataclasses.replace(
        tiny_grm,
        config=config,
        params=jax.tree.map(fill, abstract_params(config)),
        tokenizer=tokenizer,
        table=jax.device_put(grammar.token_table(tokenizer.token_bytes)),
    )


def reader(grm: GRM, *, low: int = 1, high: int = 10) -> ScoreReader:
    return ScoreReader(
        params=grm.params, config=grm.config, tokenizer=grm.tokenizer, low=low, high=high
    )


def exhaustive(
    grm: GRM, prompt: list[int], text: list[int], count: int, *, low: int, high: int
) -> np.ndarray:
    """Chances by one whole reading for every integer and every token that may end it."""
    places = score_places(grm.tokenizer.token_bytes, text, count)
    assert places is not None
    rows: list[tuple[int, int, list[int], int]] = []
    for column, place in enumerate(places):
        ending = b"}" if column == count - 1 else b","
        ends = [i for i, b in enumerate(grm.tokenizer.token_bytes) if b.startswith(ending)]
        before = prompt + text[: place.token]
        for value, end in itertools.product(range(low, high + 1), ends):
            spelled = grm.tokenizer.encode(place.lead.decode() + str(value))
            rows.append((column, value - low, [*before, *spelled, end], len(before)))
    size = max(len(row[2]) for row in rows)
    tokens = np.zeros((len(rows), size), np.int32)
    for row, (_, _, ids, _) in enumerate(rows):
        tokens[row, : len(ids)] = ids
    out = np.asarray(jax.jit(logits, static_argnames="config")(grm.params, grm.config, tokens))
    logprobs = np.asarray(jax.nn.log_softmax(out.astype(np.float64)))
    weights = np.zeros((count, high - low + 1))
    for row, (column, value, ids, start) in enumerate(rows):
        at = range(start, len(ids))
        weights[column, value] += np.exp(sum(logprobs[row, i - 1, ids[i]] for i in at))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("text", "count", "low", "high"),
    [
        (r"ab \boxed{7, 10}.", 2, 1, 10),
        (r"\boxed{1} then \boxed{10 ,3, 12}" + "\n", 3, 0, 12),
        (r"\boxed{1}", 1, 0, 1),
    ],
)
def test_chances_are_those_of_whole_texts(
    tiny_grm: GRM, text: str, count: int, low: int, high: int
) -> None:
    prompt, ids = list(b"user: 2+2?"), list(text.encode())
    (found,) = reader(tiny_grm, low=low, high=high).distributions(prompt, [ids], count)
    assert found is not None
    wanted = exhaustive(tiny_grm, prompt, ids, count, low=low, high=high)
    assert np.abs(found - wanted).max() < 1e-5
    (mean,) = reader(tiny_grm, low=low, high=high).expected(prompt, [ids], count)
    assert np.abs(mean - wanted @ np.arange(low, high + 1)).max() < 1e-5
    assert wanted.max() < 0.9


def test_tokens_that_cross_the_borders_of_numbers(merging: GRM) -> None:
    prompt = merging.tokenizer.encode("user: 2+2?")
    texts = [merging.tokenizer.encode(text) for text in (r"\boxed{3, 7}", r"\boxed{10,10, 7}")]
    for ids, count in zip(texts, (2, 3), strict=True):
        (found,) = reader(merging).distributions(prompt, [ids], count)
        wanted = exhaustive(merging, prompt, ids, count, low=1, high=10)
        assert found is not None
        assert np.abs(found - wanted).max() < 1e-5


def test_scores_are_found_where_their_tokens_begin() -> None:
    table = [bytes([byte]) for byte in range(256)] + [b"{3", b"1, 1", b" 7"]
    tokens = [*rb"\boxed{5} \boxed", 256, 257, *b"0,", 258, *b"} "]
    # The box holds 31, 10, 7; one token holds the end of the first number and the second's begin.
    found = score_places(table, tokens, 3)
    assert found is not None
    assert [(place.token, place.lead) for place in found] == [(16, b"{"), (17, b"1, "), (20, b" ")]
    assert score_places(table, tokens, 2) is None
    assert score_places(table, list(b"no box"), 1) is None
    assert score_places(table, list(rb"\boxed{3"), 1) is None


def test_unreadable_texts_are_left_out_and_neighbours_change_nothing(tiny_grm: GRM) -> None:
    ask = reader(tiny_grm)
    prompt = list(b"user: 2+2?")
    texts = [list(rb"\boxed{7, 2}"), None, list(rb"longer than that: \boxed{4, 4}")]
    found = ask.expected(prompt, texts, 2)
    assert found[1] is None
    for text, mean in zip(texts, found, strict=True):
        if text is not None:
            (alone,) = ask.expected(prompt, [text], 2)
            assert alone is not None
            assert mean is not None
            assert np.array_equal(alone, mean)
            assert np.all((mean > 1) & (mean < 10))


def test_texts_that_are_read_together_are_read_alike(tiny_grm: GRM) -> None:
    """Also where rows are left over."""
    prompt = list(b"user: 2+2?")
    texts = [list(f"{'.' * size}\\boxed{{7, {size}}}".encode()) for size in (1, 5, 9)]
    alone = reader(tiny_grm).distributions(prompt, texts, 2)
    together = dataclasses.replace(reader(tiny_grm), at_once=2).distributions(prompt, texts, 2)
    for one, other in zip(alone, together, strict=True):
        assert one is not None
        assert other is not None
        assert np.abs(one - other).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 2])
def test_experts_and_latent_attention(tiny_grm: GRM, at_once: int) -> None:
    """Families whose cache has another form."""
    config = family_config(
        "deepseek_v2",
        vocab_size=tiny_grm.tokenizer.vocab_size,
        num_layers=2,
        width=32,
        num_heads=2,
        num_kv_heads=2,
        mlp_dim=64,
        max_context=512,
        latent=Latent(query_rank=None, rank=16, nope_dim=8, rope_dim=4, value_dim=6),
        experts=Experts(count=4, per_token=2, mlp_dim=16, shared_dim=16, dense_layers=1),
    )
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jax.device_put((0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype)),
        abstract_params(config),
    )
    grm = dataclasses.replace(tiny_grm, config=config, params=params)
    prompt, text = list(b"user: 2+2?"), list(rb"ab \boxed{7, 10}.")
    ask = dataclasses.replace(reader(grm), at_once=at_once)
    (found,) = ask.distributions(prompt, [text], 2)
    assert found is not None
    assert np.abs(found - exhaustive(grm, prompt, text, 2, low=1, high=10)).max() < 1e-5


@pytest.mark.parametrize(
    "shape", [pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow), {"data": 8}]
)
def test_a_judge_on_a_mesh(tiny_grm: GRM, shape: dict[str, int]) -> None:
    mesh = make_mesh(shape)
    config = tiny_grm.config
    shardings = tree_shardings(param_axes(config), mesh, abstract_params(config))
    prompt = list(b"user: 2+2?")
    texts = [list(rb"ab \boxed{7, 10}."), list(rb"\boxed{1, 2}"), None]
    wanted = reader(tiny_grm).expected(prompt, texts, 2)
    params = jax.device_put(tiny_grm.params, shardings)
    spread = dataclasses.replace(reader(tiny_grm), params=params, mesh=mesh)
    for one, other in zip(spread.expected(prompt, texts, 2), wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or one == pytest.approx(other, abs=1e-4)


@pytest.fixture(scope="module")
def judged(tiny_grm: GRM) -> list[Judgement]:
    return list(tiny_grm.judge_batch(questions(100), scores="expected", **SETTINGS))


def test_one_sample_hardly_ever_ties(tiny_grm: GRM, judged: list[Judgement]) -> None:
    assert all(judgement.valid_samples == 1 for judgement in judged)
    assert sum(len(judgement.tied) > 1 for judgement in judged) == 0
    sampled = [judgement.samples[0].scores or () for judgement in judged]
    assert sum(scores[0] == scores[1] for scores in sampled) > 0


def test_expected_scores_vote_and_sampled_ones_are_kept(
    tiny_grm: GRM, judged: list[Judgement]
) -> None:
    plain = list(tiny_grm.judge_batch(questions(3), **SETTINGS))
    for judgement, usual in zip(judged[:3], plain, strict=True):
        (sample,), (other,) = judgement.samples, usual.samples
        assert (sample.scores, sample.text, sample.order) == (
            other.scores,
            other.text,
            other.order,
        )
        assert other.expected is None
        assert "expected" not in usual.to_record()["samples"][0]
        assert sample.expected is not None
        assert judgement.scores == pytest.approx(sample.expected, abs=1e-4)
        record = judgement.to_record()["samples"][0]
        assert record["expected"] == list(sample.expected)
        assert record["scores"] == list(sample.scores or ())


def test_expected_scores_go_with_their_responses(tiny_grm: GRM) -> None:
    """A sample's expected scores are read in the order of its prompt and kept in input order."""
    (judgement,) = tiny_grm.judge_batch(
        questions(1), scores="expected", **(SETTINGS | {"samples": 2, "orders": "balanced"})
    )
    turned = next(sample for sample in judgement.samples if sample.order == (1, 0))
    (record,) = questions(1)
    swapped = from_record(
        {
            "id": "x",
            "messages": [dict(turn) for turn in record.messages],
            "responses": list(record.responses[::-1]),
        }
    )
    from grm_jax.judge import DEFAULT_TEMPLATE
    from grm_jax.prompts import encode_chat, load_template, render

    messages = [{"role": "user", "content": swapped.messages[0]["content"]}]
    chat = render(load_template(DEFAULT_TEMPLATE), messages, list(swapped.responses))
    prompt = encode_chat(tiny_grm.tokenizer, chat)
    text = list(turned.text.encode(errors="surrogatepass"))
    if turned.text.encode().decode() == turned.text and "\ufffd" not in turned.text:
        (mean,) = reader(tiny_grm).expected(prompt, [text], 2)
        assert mean is not None
        assert turned.expected == pytest.approx(tuple(mean[::-1]), abs=1e-5)


def test_an_unknown_policy_is_refused(tiny_grm: GRM) -> None:
    with pytest.raises(UsageError, match="scores is 'mean'"):
        tiny_grm.judge_batch([], scores="mean")
