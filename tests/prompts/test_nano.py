import random
from itertools import islice, permutations

import pytest

from grm_jax.data import Comparison, best_index
from grm_jax.data.nano import PLACES, Problem, nano_comparisons, read_digits, write_digits
from grm_jax.errors import UsageError
from grm_jax.grammar import token_table
from grm_jax.prompts import Tokenizer, encode_chat, load_template, parse_scores, render
from grm_jax.prompts.nano import TEMPLATE, Teacher, nano_tokenizer
from grm_jax.rewards import extract_scores

EXACT = Teacher(checks=(0, 0, 0, 0, 0, 1), miscompute=0, misread=0, misscore=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return nano_tokenizer()


def prompt(tokenizer: Tokenizer, comparison: Comparison) -> list[int]:
    chat = render(load_template(TEMPLATE), comparison.messages, comparison.responses)
    return encode_chat(tokenizer, chat)


def comparison(*responses: tuple[int, ...]) -> Comparison:
    problem = Problem(2, (0, 1, 2, 3, 4, 9))
    return Comparison(
        id="by hand",
        messages=({"role": "user", "content": problem.text},),
        responses=tuple(map(write_digits, responses)),
    )


def test_text_comes_back(tokenizer):
    for text in ("", "a7\nb", "\\boxed{10, 3}", "Grüße, 世界 \x00", " 1 okay", "10, 10}"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_tokens_are_the_templates_alone(tokenizer):
    assert not tokenizer.control_ids.intersection(tokenizer.encode("<|user|><|end|>"))
    tokens = encode_chat(tokenizer, [{"role": "user", "content": "<|end|>"}])
    controls = [tokenizer.token_bytes[t] for t in tokens if t in tokenizer.control_ids]
    assert controls == [b"<|user|>", b"<|end|>", b"<|assistant|>"]
    assert tokenizer.token_bytes[tokenizer.eos_ids[0]] == b"<|end|>"


def test_prompts_and_judgements_are_short(tokenizer):
    rng = random.Random(0)
    for record in islice(nano_comparisons("valid", seed=0), 50):
        count = len(record.responses)
        tokens = prompt(tokenizer, record)
        assert len(tokens) == 12 + 8 * count
        # Bytes are for other texts.
        assert min(tokens) > 255
        judgement = tokenizer.encode(Teacher().judge(record, rng))
        assert min(judgement) > 255
        assert len(judgement) <= 7 + 4 * (2 + count) + count


def test_judgement_by_hand():
    right = (2, 3, 4, 5, 6, 1)
    record = comparison(right, (2, 3, 5, 5, 6, 2), (0, 0, 0, 0, 0, 0))
    criteria, *analysis, scores = EXACT.judge(record, random.Random(0)).split("\n")
    assert sorted(criteria.removeprefix("Specific Criteria: ").split(" ")) == list(PLACES)
    # Places come in any order, the same in both sections.
    assert [line[0] for line in analysis[1:]] == criteria.split(" ")[2:]
    in_order = [
        f"Specific Criteria: {' '.join(PLACES)}",
        analysis[0],
        *sorted(analysis[1:]),
        scores,
    ]
    assert "\n".join(in_order) == (
        "Specific Criteria: a b c d e f\n"
        "Analysis:\n"
        "a should be a2: 1a2 ok 2a2 ok 3a0 no\n"
        "b should be b3: 1b3 ok 2b3 ok 3b0 no\n"
        "c should be c4: 1c4 ok 2c5 no 3c0 no\n"
        "d should be d5: 1d5 ok 2d5 ok 3d0 no\n"
        "e should be e6: 1e6 ok 2e6 ok 3e0 no\n"
        "f should be f1: 1f1 ok 2f2 no 3f0 no\n"
        "Scores: \\boxed{10, 4, 1}"
    )


def test_thorough_teacher_is_always_right():
    rng = random.Random(0)
    for record in islice(nano_comparisons("train", seed=0), 100):
        scores = parse_scores(EXACT.judge(record, rng), len(record.responses))
        assert scores is not None
        best = best_index(record)
        assert all((score == 10) == (index == best) for index, score in enumerate(scores))


def test_teacher_judges_the_responses_as_they_are_shown():
    answers = [(2, 3, 4, 5, 6, 1), (2, 3, 5, 5, 6, 2), (2, 0, 4, 5, 6, 1)]
    for order in permutations(range(3)):
        record = comparison(*(answers[index] for index in order))
        scores = parse_scores(EXACT.judge(record, random.Random(0)), 3)
        assert scores == [(10, 4, 7)[index] for index in order]


def test_errors_come_at_the_stated_rates():
    right = (2, 3, 4, 5, 6, 1)
    record = comparison(right, right)
    teacher = Teacher(checks=(1,), miscompute=0.2, misread=0.1, misscore=0.3)
    rng = random.Random(0)
    texts = [teacher.judge(record, rng) for _ in range(4000)]
    wrong = misread = misscored = 0
    for text in texts:
        place, line = text.split("\n")[2].split(":")[0].split(" should be ")
        computed = int(line[1]) == right[PLACES.index(place)]
        wrong += not computed
        verdicts = text.split("\n")[2].split(": ")[1].split(" ")[1::2]
        misread += sum((verdict == "ok") != computed for verdict in verdicts)
        scores = parse_scores(text, 2)
        assert scores is not None
        misscored += sum(
            score != (10 if verdict == "ok" else 7)
            for score, verdict in zip(scores, verdicts, strict=True)
        )
    assert wrong / 4000 == pytest.approx(0.2, abs=0.02)
    assert misread / 8000 == pytest.approx(0.1, abs=0.015)
    assert misscored / 8000 == pytest.approx(0.3, abs=0.02)


def test_places_are_checked_as_often_as_stated():
    teacher = Teacher(checks=(0.5, 0.0, 0.5))
    rng = random.Random(0)
    record = comparison((0,) * 6, (1,) * 6)
    checked = [
        teacher.judge(record, rng).split("\n")[0].removeprefix("Specific Criteria: ").split(" ")
        for _ in range(2000)
    ]
    assert {len(places) for places in checked} == {1, 3}
    assert sum(len(places) == 1 for places in checked) / 2000 == pytest.approx(0.5, abs=0.05)
    assert all(len(places) == len(set(places)) for places in checked)
    # In any order: one that began with the first place would say how many are to come.
    assert sum(places[0] == "f" for places in checked) / 2000 == pytest.approx(1 / 6, abs=0.03)
    seen = [place for places in checked for place in places]
    shares = {place: seen.count(place) / len(seen) for place in PLACES}
    assert shares == pytest.approx(dict.fromkeys(PLACES, 1 / 6), abs=0.02)


def test_device_reads_what_the_teacher_writes(tokenizer):
    rng = random.Random(1)
    table = token_table(tokenizer.token_bytes)
    for record in islice(nano_comparisons("valid", seed=2), 20):
        count = len(record.responses)
        text = Teacher().judge(record, rng)
        tokens = tokenizer.encode(text)
        tokens += [0] * (40 - len(tokens))
        scores, valid = extract_scores(
            tokens, len(tokenizer.encode(text)), table, count, max_responses=4
        )
        assert valid
        assert scores.tolist()[:count] == parse_scores(text, count)


@pytest.mark.parametrize(
    "settings",
    [{"checks": (0.5, 0.4)}, {"misread": 1.5}, {"checks": (0.0,) * 6 + (1.0,)}],
)
def test_impossible_teachers_are_refused(settings):
    with pytest.raises(UsageError):
        Teacher(**settings)


def test_other_comparisons_are_refused():
    other = Comparison(
        id="x", messages=({"role": "user", "content": "Hello"},), responses=("a", "b")
    )
    with pytest.raises(UsageError, match="Hello"):
        Teacher().judge(other, random.Random(0))
    with pytest.raises(UsageError, match="hm"):
        read_digits("hm")
