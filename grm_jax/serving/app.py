"""The HTTP service: routes over a batcher.

| route | speaks |
| --- | --- |
| `POST /judge` | comparisons and judgements, the records of this library |
| `POST /get_reward` | OpenRLHF's remote reward |
| `POST /classify` | vLLM's classification: a scalar for each text |
| `POST /v1/chat/completions` | OpenAI's chat: what the model itself writes to a conversation |
| `GET /v1/models`, `/healthz`, `/metrics`, `/docs`, `/openapi.json` | about the service |

What a request can meet:

| status | when |
| --- | --- |
| 200 | it was answered; a record that is well formed and cannot be judged has `error` |
| 400 | it is no HTTP |
| 401 | the bearer token is missing or wrong |
| 408, 413 | the body is too slow or too long |
| 422 | it is no JSON, or not of the route's form |
| 429 | too many judgements are waiting; come back after `Retry-After` seconds |
| 503 | it took longer than the time limit, or the service is shutting down |

A client that closes its connection, or its sending half, is taken to be gone: what it asked for is
cancelled. Halves of surrogate pairs are read as U+FFFD. No request names a file of the server.
"""

import asyncio
import functools
import hashlib
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, final

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse

from grm_jax.adapters import Scorer, Task
from grm_jax.adapters.openrlhf import read_queries, rewards_record
from grm_jax.adapters.scoring import Rating
from grm_jax.data import Comparison, Judgement, Message, from_record, to_line
from grm_jax.errors import UsageError
from grm_jax.prompts import Template
from grm_jax.serving import schemas
from grm_jax.serving.batcher import Batcher, DrainingError, Plan, RefusedError
from grm_jax.serving.engine import Answers, ChatRequest, JudgeRequest
from grm_jax.serving.errors import error_response
from grm_jax.serving.gathering import Gathering
from grm_jax.serving.guards import BodyLimits, Counted, Token
from grm_jax.serving.metrics import Metrics
from grm_jax.serving.options import Options
from grm_jax.version import __version__

Work = JudgeRequest | ChatRequest

OPEN_PATHS = ("/healthz", "/docs", "/openapi.json")
PATHS = (*OPEN_PATHS, "/judge", "/get_reward", "/classify", "/v1/chat/completions", "/v1/models")


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": schemas.ErrorOut} for status in statuses}


_PROMETHEUS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
}
_ASKED = _errors(401, 408, 413, 422, 429, 503)


class _TimeLimitError(Exception):
    """A request was not answered in time."""


class _ClientGoneError(Exception):
    """There is nobody left to answer."""


class _CleanRequest(Request):
    """Reads JSON so that whatever is wrong with it is one kind of error."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            parsed = json.loads(body.decode(), parse_constant=_refuse_constant)
            # Only an escape can spell half of a surrogate pair.
            return _without_surrogates(parsed) if b"\\u" in body else parsed
        except json.JSONDecodeError:
            raise
        except RecursionError as error:
            raise json.JSONDecodeError("it is nested too deeply", "", 0) from error
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


class _CleanRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def clean(request: Request) -> Response:
            return await handler(_CleanRequest(request.scope, request.receive))

        return clean


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")


def _without_surrogates(value: Any) -> Any:
    match value:
        case str():
            return value.encode(errors="surrogatepass").decode(errors="replace")
        case list():
            return [_without_surrogates(item) for item in value]
        case dict():
            return {_without_surrogates(k): _without_surrogates(item) for k, item in value.items()}
        case _:
            return value


@final
class Service:
    """The batcher and what the routes share.

    Args:
      plan: Works off requests; `ModelEngine.plan`.
      template: Of the judge prompt; its range of scores is what rewards are made of.
      options: Limits and defaults.
    """

    def __init__(
        self, plan: Callable[[Work], Plan], *, template: Template, options: Options
    ) -> None:
        self.options = options
        self.metrics = Metrics(lambda: self.batcher.waiting)
        self.batcher: Batcher[Work] = Batcher(
            plan, capacity=options.queue, observe=self.metrics.batch
        )
        # It only groups and reads; the batcher judges.
        self.scorer = Scorer(judge=_NoJudge(), group=options.group, settings={"template": template})

    def judge_request(
        self, comparison: Comparison, settings: schemas.JudgeSettings | None = None
    ) -> JudgeRequest:
        """A request to judge, with the defaults where it leaves something out."""
        defaults = self.options.defaults
        named = {} if settings is None else settings.model_dump(exclude_none=True)
        return JudgeRequest(
            comparison=comparison,
            **{name: named.get(name, default) for name, default in vars(defaults).items()},
        )

    async def answer(self, request: Request, work: Sequence[Work]) -> list[Any]:
        """Has work done, unless it takes too long or the client goes.

        Raises:
          RefusedError: If there is no room for it, or the service is shutting down.
          UsageError: If it cannot be done.
        """
        futures = self.batcher.submit(work)
        try:
            found: list[Any] = await self.wait(request, asyncio.ensure_future(_all(futures)))
            return found
        finally:
            for future in futures:
                future.cancel()

    async def wait(self, request: Request, done: "asyncio.Future[Any]") -> Any:
        """Waits for what a request asked for, unless it takes too long or the client goes."""
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait(
                {done, gone},
                timeout=self.options.timeout,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if done.done():
                return done.result()
            if gone.done():
                raise _ClientGoneError
            raise _TimeLimitError
        finally:
            gone.cancel()
            done.cancel()

    async def judge(self, request: Request, work: Sequence[JudgeRequest]) -> list[Judgement]:
        """Has comparisons judged."""
        judgements: list[Judgement] = await self.answer(request, work)
        for judgement in judgements:
            self._count(judgement)
        return judgements

    async def rate_gathered(
        self, request: Request, tasks: Sequence[Task], completions: Sequence[str]
    ) -> list[Rating]:
        """As `rate`, beside what other requests ask for at the time, if the options say so."""
        if self.options.gather:
            found: list[Rating] = await self.wait(request, self._gathering.rate(tasks, completions))
            return found
        return (await self.rate(request, tasks, completions))[0]

    @functools.cached_property
    def _gathering(self) -> Gathering:
        return Gathering(self.scorer, self._submit, wait=self.options.gather)

    def _submit(self, comparisons: Sequence[Comparison]) -> "list[Future[Any]]":
        futures = self.batcher.submit([self.judge_request(one) for one in comparisons])
        for future in futures:
            future.add_done_callback(self._count_future)
        return futures

    def _count_future(self, future: "Future[Judgement]") -> None:
        if not future.cancelled() and future.exception() is None:
            self._count(future.result())

    def _count(self, judgement: Judgement) -> None:
        unreadable = len(judgement.samples) - judgement.valid_samples
        self.metrics.samples(judgement.valid_samples, unreadable)
        self.metrics.tokens(judgement.prompt_tokens, judgement.completion_tokens)

    async def rate(
        self, request: Request, tasks: Sequence[Task], completions: Sequence[str]
    ) -> tuple[list[Rating], list[Judgement]]:
        """Has completions rated, those of one prompt beside each other."""
        prepared = self.scorer.prepare(tasks, completions)
        work = [self.judge_request(comparison) for comparison in prepared.comparisons]
        judgements = await self.judge(request, work)
        return prepared.finish(judgements), judgements


class _NoJudge:
    def judge_batch(self, comparisons: Any, /, *args: Any, **settings: Any) -> Any:
        raise AssertionError("the batcher judges")


async def _all(futures: "Sequence[Future[Any]]") -> list[Any]:
    return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(service: Service) -> FastAPI:
    """The application, for any ASGI server."""
    options = service.options
    app = FastAPI(
        title="grm-jax",
        version=__version__,
        description="Generative reward models as a service.",
        redoc_url=None,
    )
    app.router.route_class = _CleanRoute

    @app.post("/judge", response_model=schemas.JudgementOut, responses=_ASKED)
    async def judge(body: schemas.JudgeBody, request: Request) -> Response:
        """Judges one comparison."""
        record = {
            "id": body.id if body.id is not None else _name("record", body),
            "messages": [turn.model_dump() for turn in body.messages],
            "responses": body.responses,
        }
        try:
            comparison = from_record(record)
        except UsageError as error:
            unjudged = Judgement(id=str(record["id"]), error=str(error))
            return _json(unjudged.to_record())
        work = [service.judge_request(comparison, body.settings)]
        (judgement,) = await service.judge(request, work)
        return _json(judgement.to_record())

    @app.post("/get_reward", response_model=schemas.RewardOut, responses=_ASKED)
    async def get_reward(body: schemas.RewardBody, request: Request) -> Response:
        """Rates whole texts as OpenRLHF asks for it; unreadable judgements count as the floor."""
        tasks, answers = read_queries(body.query, body.prompts)
        ratings = await service.rate_gathered(request, tasks, answers)
        return JSONResponse(rewards_record(ratings, service.scorer))

    @app.post("/classify", response_model=schemas.ClassifyOut, responses=_ASKED)
    async def classify(body: schemas.ClassifyBody, request: Request) -> Response:
        """Rates texts as vLLM's classifiers answer: one class, its probability the reward."""
        texts = [body.input] if isinstance(body.input, str) else body.input
        tasks, answers = read_queries(texts, None)
        ratings, judgements = await service.rate(request, tasks, answers)
        record = rewards_record(ratings, service.scorer)
        points = body.activation is False or body.use_activation is False
        values = record["rewards"] if points else record["scores"]
        data = [
            {"index": index, "label": "LABEL_0", "probs": [value], "num_classes": 1}
            for index, value in enumerate(values)
        ]
        prompt = sum(judgement.prompt_tokens for judgement in judgements)
        written = sum(judgement.completion_tokens for judgement in judgements)
        return JSONResponse(
            {
                "id": _name("classify", body),
                "object": "list",
                "created": int(time.time()),
                "model": options.model,
                "data": data,
                # In vLLM's order, which is not OpenAI's.
                "usage": {
                    "prompt_tokens": prompt,
                    "total_tokens": prompt + written,
                    "completion_tokens": written,
                    "prompt_tokens_details": None,
                },
            }
        )

    @app.post("/v1/chat/completions", response_model=schemas.ChatOut, responses=_ASKED)
    async def chat(body: schemas.ChatBody, request: Request) -> Response:
        """Answers a conversation with what the model writes, as OpenAI's clients expect it."""
        new = body.max_completion_tokens or body.max_tokens or options.defaults.max_new_tokens
        work = ChatRequest(
            messages=tuple(_message(turn) for turn in body.messages),
            samples=body.n or 1,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            max_new_tokens=new,
            seed=options.defaults.seed if body.seed is None else body.seed,
        )
        answers: list[Answers] = await service.answer(request, [work])
        written = sum(completion.tokens for completion in answers[0].completions)
        service.metrics.tokens(answers[0].prompt_tokens, written)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": completion.text},
                "finish_reason": completion.finish,
            }
            for index, completion in enumerate(answers[0].completions)
        ]
        return JSONResponse(
            {
                "id": _name("chatcmpl", body),
                "object": "chat.completion",
                "created": int(time.time()),
                "model": options.model,
                "choices": choices,
                "usage": {
                    "prompt_tokens": answers[0].prompt_tokens,
                    "completion_tokens": written,
                    "total_tokens": answers[0].prompt_tokens + written,
                },
            }
        )

    @app.get("/v1/models", response_model=schemas.ModelsOut, responses=_errors(401))
    async def models() -> Response:
        """The model that is served."""
        model = {"id": options.model, "object": "model", "created": 0, "owned_by": "grm-jax"}
        return _json({"object": "list", "data": [model]})

    @app.get(
        "/healthz",
        response_model=schemas.HealthOut,
        responses={503: {"model": schemas.HealthOut}},
    )
    async def healthz() -> Response:
        """Whether requests are taken on."""
        draining = service.batcher.draining
        state = {"status": "draining" if draining else "ok", "waiting": service.batcher.waiting}
        return _json(state, 503 if draining else 200)

    @app.get(
        "/metrics",
        response_class=Response,
        responses=_errors(401) | _PROMETHEUS,
    )
    async def metrics() -> Response:
        """Counts for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    _add_handlers(app)
    # The last one added stands first.
    app.add_middleware(BodyLimits, most=options.max_body, seconds=options.upload_timeout)
    if options.token is not None:
        app.add_middleware(Token, token=options.token, open_paths=OPEN_PATHS)
    app.add_middleware(Counted, paths=(*PATHS, "/metrics"), observe=service.metrics.request)
    return app


def _add_handlers(app: FastAPI) -> None:
    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        detail = first.get("ctx", {}).get("error") if first["type"] == "json_invalid" else None
        message = f"the body is not JSON: {detail}" if detail else first["msg"]
        shown = message if detail or not place else f"`{place[:80]}`: {message}"
        return error_response(422, shown)

    async def unusable(request: Request, error: Exception) -> Response:
        return error_response(422, str(error))

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)
        status = 503 if isinstance(error, DrainingError) else 429
        return error_response(status, str(error), headers={"Retry-After": str(error.retry_after)})

    async def late(request: Request, error: Exception) -> Response:
        return error_response(
            503, "the time limit of a request has passed", headers={"Retry-After": "1"}
        )

    async def gone(request: Request, error: Exception) -> Response:
        return error_response(499, "the client has gone")

    async def by_status(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        return error_response(error.status_code, str(error.detail), headers=error.headers)

    async def internal(request: Request, error: Exception) -> Response:
        return error_response(500, "the judge failed; the server's log says how")

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(UsageError, unusable)
    app.add_exception_handler(RefusedError, refused)
    app.add_exception_handler(_TimeLimitError, late)
    app.add_exception_handler(_ClientGoneError, gone)
    app.add_exception_handler(StarletteHTTPException, by_status)
    app.add_exception_handler(HTTPException, by_status)
    app.add_exception_handler(Exception, internal)


def _json(record: dict[str, Any], status: int = 200) -> Response:
    return Response(to_line(record), status_code=status, media_type="application/json")


def _message(turn: schemas.ChatTurn) -> Message:
    parts = turn.content
    text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
    role = "system" if turn.role == "developer" else turn.role
    return Message(role=role, content=text)


def _name(kind: str, body: Any) -> str:
    """A name for an answer: equal for equal requests, as the answers are."""
    digest = hashlib.blake2b(body.model_dump_json().encode(), digest_size=12).hexdigest()
    return f"{kind}-{digest}"
