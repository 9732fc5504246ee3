"""A service whose judge is a rule: the first number in a response is its score."""

import threading
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from grm_jax.completion import Completion
from grm_jax.errors import UsageError
from grm_jax.judge import DEFAULT_TEMPLATE
from grm_jax.prompts import load_template
from grm_jax.serving import Options, Plan, Service
from grm_jax.serving.engine import Answers, ChatRequest, JudgeRequest
from tests.adapters.stub import StubJudge


@dataclass
class StubEngine:
    """Works off requests at once, or when it is let go.

    Attributes:
      limit: Jobs in a batch.
      go: What each batch waits for.
      seconds: How long a batch then takes.
      batches: The jobs of each batch.
      turns: How many batches a job takes.
      full: Whether there is no room for the next stream that is opened.
    """

    limit: int = 4
    go: threading.Event = field(default_factory=threading.Event)
    seconds: float = 0.0
    batches: list[list[Any]] = field(default_factory=list)
    turns: int = 1
    full: bool = False

    def __post_init__(self) -> None:
        self.go.set()

    def plan(self, request: JudgeRequest | ChatRequest) -> Plan:
        if isinstance(request, ChatRequest):
            if not request.messages[-1]["content"]:
                raise UsageError("the conversation is empty")
            return self._plan([request] * request.samples, self._chat)
        return self._plan([request] * request.samples, self._judge)

    def _plan(self, jobs: Sequence[Any], finish: Any) -> Plan:
        return Plan(
            jobs=jobs,
            shape=lambda job: type(job),
            open_stream=self._open,
            finish=finish,
        )

    def _open(self, shape: Any) -> "StubStream":
        if self.full:
            self.full = False
            raise RuntimeError("no memory is left")
        return StubStream(self)

    def run(self, jobs: Sequence[Any]) -> None:
        """Runs jobs together."""
        self.batches.append(list(jobs))
        assert self.go.wait(30)
        time.sleep(self.seconds)
        if any("explode" in str(job) for job in jobs):
            raise RuntimeError("a device is gone")

    def _judge(self, results: Sequence[JudgeRequest]) -> Any:
        request = results[0]
        judge = StubJudge().judge_batch([request.comparison], samples=request.samples)
        return next(judge)

    def _chat(self, results: Sequence[ChatRequest]) -> Answers:
        said = results[0].messages[-1]["content"]
        return Answers(
            completions=tuple(
                Completion(text=f"{said} {number}", finish="stop", tokens=2)
                for number in range(len(results))
            ),
            prompt_tokens=len(said),
        )


@dataclass
class StubStream:
    """A stream whose jobs are done when they have run so many times."""

    engine: StubEngine
    jobs: dict[Any, Any] = field(default_factory=dict)
    turns: dict[Any, int] = field(default_factory=dict)

    @property
    def running(self) -> int:
        return len(self.jobs)

    @property
    def room(self) -> int:
        return self.engine.limit - len(self.jobs)

    def run(self, jobs: Mapping[Any, Any], *, steps: int | None = None) -> dict[Any, Any]:
        assert len(jobs) <= self.room
        self.jobs |= jobs
        self.engine.run(list(self.jobs.values()))
        self.turns = {key: self.turns.get(key, 0) + 1 for key in self.jobs}
        ended = [key for key, turns in self.turns.items() if turns == self.engine.turns]
        return {key: self.jobs.pop(key) for key in ended}

    def drop(self, keys: Set[Any]) -> None:
        for key in keys:
            del self.jobs[key], self.turns[key]


def make_service(engine: StubEngine, **options: Any) -> Service:
    """A service over a stub."""
    template = load_template(DEFAULT_TEMPLATE)
    return Service(engine.plan, template=template, options=Options(model="stub", **options))
