"""Continuous batching: what has been asked, from many callers, through one device.

One thread owns the device. It runs one stream of jobs of equal shape (`grm_jax.sampling.stream`),
which whoever asked for them share. Every few tokens it looks what has come in: new jobs of the
stream's shape enter as soon as there is room. Once the oldest job that is not answered is of
another shape, nothing more enters, and the next stream begins when this one has ended: so the wait
of none depends on how many come after it.
"""

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, final

from grm_jax.errors import UsageError
from grm_jax.sampling import Stream

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
        # What runs now; only the thread uses these.
        self._stream: Stream[Any, Any] | None = None
        self._opened: Hashable = None
        self._flying: set[tuple[_Ticket[Request], int]] = set()
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
                at_fault = self._flying or {key for key, _, _ in self._unfinished()[:1]}
                for ticket in {ticket for ticket, _ in at_fault}:
                    self._fail(ticket, error)
                self._stream, self._flying = None, set()
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
        given_up = {job for job in self._flying if job[0].future.done()}
        if self._stream is not None and given_up:
            self._stream.drop(given_up)
            self._flying -= given_up
        unfinished = self._unfinished()
        if not unfinished:
            return
        (ticket, _), _, oldest = first = unfinished[0]
        if self._stream is None or (not self._flying and oldest != self._opened):
            # The room of the last one, before there is room for another.
            self._stream = None
            assert ticket.plan is not None
            self._stream, self._opened = ticket.plan.open_stream(oldest), oldest
        entering = {}
        if first[0] in self._flying or oldest == self._opened:
            entering = {
                key: job
                for key, job, shape in unfinished
                if shape == self._opened and key not in self._flying
            }
            entering = dict(itertools.islice(entering.items(), self._stream.room))
        self._flying |= entering.keys()
        began = time.perf_counter()
        jobs = len(self._flying)
        results = self._stream.run(entering, steps=_STEPS)
        self._observe(jobs, time.perf_counter() - began)
        self._flying -= results.keys()
        for (ticket, number), result in results.items():
            ticket.results[number] = result

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
