"""Jobs that enter and leave a running batch."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from grm_jax import GRM
from grm_jax.distributed import make_mesh
from grm_jax.sampling import stream as module
from grm_jax.sampling.batching import PromptJob, PromptResult, SamplingSettings, sample_keys
from grm_jax.sampling.sampler import decode_until
from grm_jax.sampling.stream import JudgeStream

SETTINGS = SamplingSettings(temperature=1.0, max_new_tokens=48, batch_rows=8)


def jobs(count: int, samples: int = 2) -> list[PromptJob]:
    """Jobs with prompts of their own, of different lengths, but of one shape."""
    return [
        PromptJob(
            tokens=[1 + (number * 7 + place) % 200 for place in range(20 + 3 * number)],
            order=(0, 1) if number % 2 else (1, 0),
            keys=sample_keys(jax.random.key(number), samples),
            room=2,
        )
        for number in range(count)
    ]


def opened(grm: GRM, settings: SamplingSettings = SETTINGS) -> JudgeStream:
    # One token in twelve ends a sample, so that their lengths differ.
    tokenizer = dataclasses.replace(grm.tokenizer, eos_ids=tuple(range(200, 222)))
    sampler = dataclasses.replace(grm.sampler(settings), tokenizer=tokenizer)
    return JudgeStream(sampler, sampler.shape(jobs(1)[0]))


def finish(stream: JudgeStream, **how: Any) -> dict[Any, PromptResult]:
    """What is left in a stream."""
    found: dict[Any, PromptResult] = {}
    while stream.running:
        found |= stream.run({}, **how)
    return found


def through(stream: JudgeStream, work: Sequence[PromptJob], **how: Any) -> dict[int, PromptResult]:
    """All of the work, each job as soon as there is room, by its number."""
    waiting, found = dict(enumerate(work)), {}
    while waiting or stream.running:
        new = {number: waiting.pop(number) for number in list(waiting)[: stream.room]}
        found |= stream.run(new, **how)
    return found


def same(one: PromptResult, other: PromptResult) -> bool:
    """Whether two results are the same to the last bit."""
    ignored = ("seconds", "expected", "tokens", "logprobs", "sampled_logprobs")
    for name in (field.name for field in dataclasses.fields(one) if field.name not in ignored):
        if not np.array_equal(getattr(one, name), getattr(other, name)):
            return False
    return all(
        np.array_equal(one.tokens[at], other.tokens[at])
        and np.array_equal(one.logprobs[at][:length], other.logprobs[at][:length])
        for at, length in enumerate(one.lengths)
    )


@pytest.mark.parametrize("constrain", [False, True])
def test_a_job_gives_the_same_whenever_it_enters(tiny_grm: GRM, constrain: bool) -> None:
    settings = dataclasses.replace(
        SETTINGS, constrain=constrain, max_new_tokens=96 if constrain else 48
    )
    work = jobs(11)
    alone = [finish_one(tiny_grm, settings, job) for job in work]
    assert len({tuple(result.tokens[0].tolist()) for result in alone}) >= 8
    stream = opened(tiny_grm, settings)
    assert stream.room == 4
    found = through(stream, work)
    assert sorted(found) == list(range(11))
    assert all(same(found[number], alone[number]) for number in range(11))
    # Looking up from the device now and then, in the other order, in a stream that was used.
    found = through(stream, work[::-1], steps=5)
    assert all(same(found[number], alone[10 - number]) for number in range(11))


def finish_one(grm: GRM, settings: SamplingSettings, job: PromptJob) -> PromptResult:
    stream = opened(grm, settings)
    return (stream.run({"it": job}) or finish(stream))["it"]


def test_rows_do_not_wait_for_the_slowest(tiny_grm: GRM) -> None:
    """Fewer tokens are sampled one after another than in batches that run until all have ended."""
    work = jobs(24)
    stream, steps, ends = opened(tiny_grm), 0, {}
    waiting = dict(enumerate(work))
    while waiting or stream.running:
        new = {number: waiting.pop(number) for number in list(waiting)[: stream.room]}
        found = stream.run(new, steps=1)
        steps += 1
        ends |= {number: max(result.lengths) for number, result in found.items()}
    longest = [max(ends[number] for number in range(at, at + 4)) for at in range(0, 24, 4)]
    assert min(ends.values()) < max(ends.values()) / 2
    assert max(sum(ends.values()) / 4, max(ends.values())) <= steps < sum(longest)


def test_one_program_serves_all(tiny_grm: GRM) -> None:
    through(opened(tiny_grm), jobs(6))
    compiled = decode_until._cache_size()
    through(opened(tiny_grm), jobs(9, samples=1))
    assert decode_until._cache_size() == compiled


def test_what_is_given_up_makes_room(tiny_grm: GRM) -> None:
    work = jobs(6)
    usual = through(opened(tiny_grm), work)
    stream = opened(tiny_grm)
    assert not stream.run(dict(enumerate(work[:4])), steps=1)
    stream.drop({1, 2, "nothing"})
    assert (stream.running, stream.room) == (2, 2)
    found = stream.run({4: work[4]}) | finish(stream)
    assert sorted(found) == [0, 3, 4]
    assert all(same(result, usual[number]) for number, result in found.items())
    # With nothing else to run, it is not waited for.
    assert not stream.run({5: work[5]}, steps=1)
    stream.drop({5})
    assert stream.run({}) == {}
    assert stream.room == 4


def test_more_than_there_is_room_for(tiny_grm: GRM) -> None:
    with pytest.raises(ValueError, match="5 jobs for 4 free rows"):
        opened(tiny_grm).run(dict(enumerate(jobs(5))))


def test_the_seconds_of_samples_add_up(tiny_grm: GRM) -> None:
    found = through(opened(tiny_grm), jobs(5))
    assert all(result.seconds > 0 for result in found.values())


def test_few_jobs_are_dealt_to_all_devices(tiny_grm: GRM, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    sampler = tiny_grm.sampler(dataclasses.replace(SETTINGS, batch_rows=64))
    spread = dataclasses.replace(sampler, mesh=mesh)
    seen: list[np.ndarray] = []

    class SeenError(Exception):
        pass

    def look(*arguments: Any, **_: Any) -> None:
        seen.append(np.asarray(arguments[4]))
        raise SeenError

    monkeypatch.setattr(module, "admit", look)
    stream = JudgeStream(spread, spread.shape(jobs(1)[0]))
    assert stream.room == 32
    with pytest.raises(SeenError):
        stream.run(dict(enumerate(jobs(5))))
    assert seen[0].any(axis=1).nonzero()[0].tolist() == [0, 1, 8, 16, 24]
