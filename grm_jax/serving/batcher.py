"""Continuous batching: what has been asked, from many callers, through one device.

One thread owns the device. It runs one stream of jobs of equal shape (`grm_jax.sampling.stream`),
which whoever asked for them share. Every few tokens it looks what has come in: new jobs of the
stream's shape enter as soon as there is room, as long as the oldest runs or is of that shape.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, final

from grm_jax.errors import UsageError
from grm_jax.sampling import Scheduler, Stream

Request = TypeVar("Request")

_LEAST_RETRY, _MOST_RETRY = 1, 60
# Steps after which the batcher looks up from the device.
_STEPS = 16


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """How a request is worked off.

    Attributes:
      jobs: What is to run; may be none.
      shape: Of a job; jobs of equal shape may share a stream.
      open_stream: Opens the stream for jobs of a shape.
      finish: Makes the answer of the results, in the order of the jobs.
    """

    jobs: Sequence[Any]
    shape: Callable[[Any], Hashable]
    open_stream: Callable[[Any], Stream[Any, Any]]
    finish: Callable[[Sequence[Any]], Any]


class RefusedError(Exception):
    """A request that is not taken on.

    Attributes:
      retry_after: Seconds after which it may be taken on.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFullError(RefusedError):
    """Too many requests are waiting."""


class DrainingError(RefusedError):
    """The service is about to end."""


@dataclass(kw_only=True, eq=False)
class _Ticket(Generic[Request]):
    request: Request
    future: "Future[Any]"
    plan: Plan | None = None
    shapes: list[Hashable] = field(default_factory=list)
    results: dict[int, Any] = field(default_factory=dict)


@final
class Batcher(Generic[Request]):
    """Takes requests from any thread and answers each by a future.

    A future that is cancelled is forgotten: what of it waits never runs, and what runs makes room.

    Args:
      plan: Says how a request is worked off; called in the batcher's thread. A `UsageError` from it
        becomes the future's.
      capacity: Requests that may be waiting or running at once.
      linger: Seconds that an idle batcher waits for company for the first request.
      observe: Called whenever the stream has run for a while, with its jobs and the seconds.
    """

    def __init__(
        self,
        plan: Callable[[Request], Plan],
        *,
        capacity: int,
        linger: float = 0.005,
        observe: Callable[[int, float], None] = lambda jobs, seconds: None,
    ) -> None:
        if capacity < 1:
            raise UsageError(f"the queue holds {capacity} requests; it must hold 1 or more")
        self._plan = plan
        self._capacity = capacity
        self._linger = linger
        self._observe = observe
        self._changed = threading.Condition()
        self._new: deque[_Ticket[Request]] = deque()
        self._active: list[_Ticket[Request]] = []
        self._draining = False
        # Only the thread uses these.
        self._scheduler: Scheduler[tuple[_Ticket[Request], int], Any, Hashable, Any] = Scheduler(
            self._open_stream
        )
        # Seconds of work for an answer, smoothed, and since the last one.
        self._pace = 1.0
        self._worked = 0.0
        self._thread = threading.Thread(target=self._work, name="grm-jax-device", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that have no answer yet."""
        with self._changed:
            return len(self._new) + len(self._active)

    @property
    def draining(self) -> bool:
        """Whether no more requests are taken on."""
        return self._draining

    def submit(self, requests: Sequence[Request]) -> "list[Future[Any]]":
        """Takes on all of some requests or none.

        Raises:
          QueueFullError: If there is no room for them now.
          DrainingError: If the batcher is being closed.
          UsageError: If they are more than there could ever be room for.
        """
        if len(requests) > self._capacity:
            raise UsageError(
                f"this asks for {len(requests)} judgements at once; at most {self._capacity} can "
                "wait, so send fewer at a time"
            )
        tickets = [_Ticket(request=request, future=Future()) for request in requests]
        with self._changed:
            if self._draining:
                raise DrainingError("the service is shutting down", _LEAST_RETRY)
            waiting = len(self._new) + len(self._active)
            if waiting + len(tickets) > self._capacity:
                seconds = math.ceil(self._pace * len(tickets))
                retry = min(_MOST_RETRY, max(_LEAST_RETRY, seconds))
                raise QueueFullError(f"{waiting} requests are waiting, the most that may", retry)
            self._new.extend(tickets)
            self._changed.notify_all()
        return [ticket.future for ticket in tickets]

    def drain(self, timeout: float | None = None) -> bool:
        """Takes on no more, and waits until what was taken on is answered.

        Returns:
          Whether it is; what is not after `timeout` seconds stays unanswered.
        """
        with self._changed:
            self._draining = True
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._changed:
                idle = not self._new and not self._active
                while not self._new and not self._active:
                    if self._draining:
                        return
                    self._changed.wait()
            if idle:
                time.sleep(self._linger)
            began = time.perf_counter()
            self._take_on()
            try:
                self._run()
            except Exception as error:  # the callers must hear of it, and the others are served
                at_fault = self._scheduler.running or {key for key, _, _ in self._unfinished()[:1]}
                for ticket in {ticket for ticket, _ in at_fault}:
                    self._fail(ticket, error)
                self._scheduler.reset()
            self._worked += time.perf_counter() - began
            self._answer()

    def _take_on(self) -> None:
        with self._changed:
            new = list(self._new)
            self._new.clear()
            self._active += new
        for ticket in new:
            if ticket.future.cancelled():
                continue
            try:
                ticket.plan = self._plan(ticket.request)
                ticket.shapes = [ticket.plan.shape(job) for job in ticket.plan.jobs]
            except Exception as error:  # the caller must hear of it, and the others are served
                self._fail(ticket, error)

    def _run(self) -> None:
        """Runs the stream for a while, with what may enter it now."""
        self._scheduler.drop({key for key in self._scheduler.running if key[0].future.done()})
        unfinished = self._unfinished()
        if not unfinished:
            return
        began = time.perf_counter()
        results = self._scheduler.run(unfinished, steps=_STEPS)
        jobs = len(results) + len(self._scheduler.running)
        self._observe(jobs, time.perf_counter() - began)
        for (ticket, number), result in results.items():
            ticket.results[number] = result

    @staticmethod
    def _open_stream(key: tuple[_Ticket[Request], int], shape: Hashable) -> Stream[Any, Any]:
        plan = key[0].plan
        assert plan is not None
        return plan.open_stream(shape)

    def _unfinished(self) -> list[tuple[tuple[_Ticket[Request], int], Any, Hashable]]:
        """Jobs without a result, the oldest first, by ticket and number; and their shapes."""
        return [
            ((ticket, number), ticket.plan.jobs[number], shape)
            for ticket in self._active
            if ticket.plan is not None and not ticket.future.done()
            for number, shape in enumerate(ticket.shapes)
            if number not in ticket.results
        ]

    def _answer(self) -> None:
        """Answers what is complete."""
        answered = 0
        for ticket in self._active:
            plan = ticket.plan
            if plan is None or ticket.future.done() or len(ticket.results) < len(plan.jobs):
                continue
            try:
                answer = plan.finish([ticket.results[number] for number in range(len(plan.jobs))])
            except Exception as error:  # the caller must hear of it, and the others are served
                self._fail(ticket, error)
                continue
            if ticket.future.set_running_or_notify_cancel():
                ticket.future.set_result(answer)
            answered += 1
        with self._changed:
            self._active = [ticket for ticket in self._active if not ticket.future.done()]
        if answered:
            self._pace += 0.2 * (self._worked / answered - self._pace)
            self._worked = 0.0

    def _fail(self, ticket: _Ticket[Request], error: Exception) -> None:
        if not ticket.future.done() and ticket.future.set_running_or_notify_cancel():
            ticket.future.set_exception(error)
