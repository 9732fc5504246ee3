"""What shares a batch with what, and what becomes of requests that fail or are given up."""

import time
from concurrent.futures import wait
from typing import Any

import pytest

from grm_jax.data import from_record
from grm_jax.errors import UsageError
from grm_jax.serving import Batcher
from grm_jax.serving.batcher import DrainingError, QueueFullError
from grm_jax.serving.engine import ChatRequest, JudgeRequest
from tests.serving.stub import StubEngine


def request(text: str, samples: int = 1) -> JudgeRequest:
    record = {"id": text, "messages": [{"role": "user", "content": "q"}], "responses": [text]}
    return JudgeRequest(
        comparison=from_record(record), samples=samples, temperature=1.0, top_p=1.0,
        max_new_tokens=8, orders="fixed", constrain=False, seed=0,
    )  # fmt: skip


def names(batch: list[Any]) -> list[str]:
    return [job.comparison.id for job in batch]


def until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_requests_share_batches_and_join_as_batches_end() -> None:
    engine = StubEngine(limit=3)
    engine.go.clear()
    batcher: Batcher[Any] = Batcher(engine.plan, capacity=16)
    (first,) = batcher.submit([request("1", samples=4)])
    until(lambda: len(engine.batches) == 1)
    late = batcher.submit([request("2"), request("3")])
    engine.go.set()
    wait([first, *late], timeout=10)
    assert [names(batch) for batch in engine.batches] == [["1"] * 3, ["1", "2", "3"]]
    assert [future.result().scores for future in (first, *late)] == [(4,), (2,), (3,)]
    assert batcher.drain(10)


def test_requests_join_what_runs() -> None:
    engine = StubEngine(limit=2, turns=3)
    engine.go.clear()
    batcher: Batcher[Any] = Batcher(engine.plan, capacity=16)
    (first,) = batcher.submit([request("1")])
    until(lambda: len(engine.batches) == 1)
    late = batcher.submit([request("2"), request("3")])
    engine.go.set()
    assert [future.result(10).scores for future in (first, *late)] == [(1,), (2,), (3,)]
    assert [names(batch) for batch in engine.batches] == [
        ["1"], ["1", "2"], ["1", "2"], ["2", "3"], ["3"], ["3"],
    ]  # fmt: skip


def test_what_is_given_up_while_it_runs_makes_room() -> None:
    engine = StubEngine(limit=1, turns=50)
    engine.go.clear()
    batcher: Batcher[Any] = Batcher(engine.plan, capacity=8)
    first, second = batcher.submit([request("1"), request("2")])
    until(lambda: engine.batches)
    assert first.cancel()
    engine.go.set()
    assert second.result(10).scores == (2,)
    assert [names(batch) for batch in engine.batches] == [["1"]] + [["2"]] * 50


def test_another_kind_of_job_waits_until_the_stream_has_ended() -> None:
    engine = StubEngine(limit=2, turns=2)
    engine.go.clear()
    batcher: Batcher[Any] = Batcher(engine.plan, capacity=8)
    (first,) = batcher.submit([request("1")])
    until(lambda: engine.batches)
    chat = ChatRequest(
        messages=({"role": "user", "content": "2"},), samples=1, temperature=1.0, top_p=1.0,
        max_new_tokens=8, seed=0,
    )  # fmt: skip
    other, third = batcher.submit([chat, request("3")])
    engine.go.set()
    wait([first, other, third], timeout=10)
    # The third joins what runs, as the oldest that is unfinished runs; then the second begins.
    kinds = [[type(job).__name__ for job in batch] for batch in engine.batches]
    assert kinds == [
        ["JudgeRequest"],
        ["JudgeRequest"] * 2,
        ["JudgeRequest"],
        *[["ChatRequest"]] * 2,
    ]


def test_more_than_the_queue_holds_is_refused_as_a_whole() -> None:
    engine = StubEngine()
    engine.go.clear()
    batcher: Batcher[Any] = Batcher(engine.plan, capacity=3)
    held = batcher.submit([request("1"), request("2")])
    with pytest.raises(QueueFullError, match="2 requests are waiting") as refusal:
        batcher.submit([request("3"), request("4")])
    assert 1 <= refusal.value.retry_after <= 60
    held += batcher.submit([request("3")])
    with pytest.raises(UsageError, match="at most 3 can wait"):
        batcher.submit([request("5")] * 4)
    engine.go.set()
    assert [future.result(10).scores for future in held] == [(1,), (2,), (3,)]
    until(lambda: batcher.waiting == 0)
    assert batcher.submit([request("7")] * 3)[2].result(10).scores == (7,)


def test_what_is_given_up_does_not_run() -> None:
    engine = StubEngine(limit=1)
    engine.go.clear()
    batcher: Batcher[Any] = Batcher(engine.plan, capacity=8)
    futures = batcher.submit([request("1"), request("2", samples=5), request("3")])
    until(lambda: engine.batches)
    assert futures[1].cancel()
    engine.go.set()
    assert futures[2].result(10).scores == (3,)
    assert [names(batch) for batch in engine.batches] == [["1"], ["3"]]
    until(lambda: batcher.waiting == 0)


def test_a_failure_is_its_own_alone() -> None:
    engine = StubEngine(limit=1)
    batcher: Batcher[Any] = Batcher(engine.plan, capacity=8)
    bad, good = batcher.submit([request("explode 1"), request("2")])
    with pytest.raises(RuntimeError, match="a device is gone"):
        bad.result(10)
    assert good.result(10).scores == (2,)
    none = batcher.submit([request("5", samples=0)])[0]
    with pytest.raises(IndexError):
        none.result(10)
    assert batcher.submit([request("3")])[0].result(10).scores == (3,)


def test_a_stream_that_cannot_be_opened_fails_the_first_alone() -> None:
    engine = StubEngine(full=True)
    batcher: Batcher[Any] = Batcher(engine.plan, capacity=8)
    bad, good = batcher.submit([request("1"), request("2")])
    with pytest.raises(RuntimeError, match="no memory is left"):
        bad.result(10)
    assert good.result(10).scores == (2,)


def test_draining_answers_what_was_accepted_and_takes_on_no_more() -> None:
    engine = StubEngine(limit=1, seconds=0.02)
    batcher: Batcher[Any] = Batcher(engine.plan, capacity=8)
    futures = batcher.submit([request(str(n)) for n in range(1, 6)])
    assert batcher.drain(10)
    assert [future.result(0).scores for future in futures] == [(n,) for n in range(1, 6)]
    with pytest.raises(DrainingError):
        batcher.submit([request("6")])


def test_what_does_not_end_in_time_is_said_not_to_have() -> None:
    engine = StubEngine()
    engine.go.clear()
    batcher: Batcher[Any] = Batcher(engine.plan, capacity=8)
    batcher.submit([request("1")])
    assert not batcher.drain(0.05)
    engine.go.set()
    assert batcher.drain(10)


def test_a_queue_must_hold_something() -> None:
    with pytest.raises(UsageError, match="holds 0 requests"):
        Batcher(StubEngine().plan, capacity=0)
