"""Each route's contract and each refusal, over a judge that is a rule."""

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from httpx import ASGITransport, AsyncClient

from grm_jax.errors import UsageError
from grm_jax.serving import Options, Service, create_app
from tests.serving.stub import StubEngine, make_service

RECORD = {
    "id": "a",
    "messages": [{"role": "user", "content": "q?"}],
    "responses": ["3", "8"],
    "settings": {"samples": 2},
}


@functools.cache
def default_service() -> Service:
    """The service of tests that leave nothing behind in it."""
    return make_service(StubEngine())


# Building the application takes longer than a request.
application = functools.lru_cache(maxsize=8)(create_app)


def client(service: Service, **headers: str) -> AsyncClient:
    transport = ASGITransport(app=application(service), raise_app_exceptions=False)
    return AsyncClient(transport=transport, base_url="http://judge", headers=headers)


def post(path: str, body: Any, service: Service | None = None, **headers: str) -> httpx.Response:
    """One request; bytes go as they are."""

    async def ask() -> httpx.Response:
        async with client(service or default_service(), **headers) as http:
            if isinstance(body, bytes):
                kind = {"content-type": "application/json"}
                return await http.post(path, content=body, headers=kind)
            return await http.post(path, json=body)

    return asyncio.run(ask())


def get(path: str, service: Service | None = None, **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with client(service or default_service(), **headers) as http:
            return await http.get(path)

    return asyncio.run(ask())


def problem(response: httpx.Response) -> str:
    """The message of an error, whose form is checked."""
    detail = response.json()["error"]
    assert detail.keys() == {"message", "type", "code"}
    assert detail["code"] == response.status_code
    assert "\n" not in detail["message"]
    return detail["message"]


# --- routes ---


def test_judge_answers_with_a_judgement() -> None:
    response = post("/judge", RECORD | {"label": {"kind": "best", "index": 0}, "extra": 1})
    assert response.status_code == 200
    record = response.json()
    assert record["id"] == "a"
    assert record["scores"] == [6, 16]
    assert record["best"] == 1
    assert record["valid_samples"] == len(record["samples"]) == 2
    assert "error" not in record


def test_judge_names_what_has_no_name_by_its_content() -> None:
    bare = {key: value for key, value in RECORD.items() if key != "id"}
    first, second = (post("/judge", bare).json()["id"] for _ in range(2))
    assert first == second
    assert post("/judge", bare | {"responses": ["1"]}).json()["id"] != first
    assert post("/judge", bare | {"id": 7}).json()["id"] == "7"


def test_a_record_that_cannot_be_judged_has_an_error() -> None:
    asked = [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "a"}]
    for change in ({"messages": asked}, {"responses": ["no number"]}):
        response = post("/judge", RECORD | change)
        assert response.status_code == 200
        assert response.json()["error"]
        assert "scores" not in response.json()


def test_get_reward_speaks_openrlhf() -> None:
    prompt = "<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\n"
    engine = StubEngine()
    # What the trainer's client sends, to the byte.
    body = json.dumps(
        {
            "query": [prompt + "3<|im_end|>", prompt + "8"],
            "prompts": [prompt] * 2,
            "labels": ["", ""],
        }
    )
    response = post("/get_reward", body.encode(), make_service(engine))
    assert response.json() == {
        "rewards": [3.0, 8.0],
        "scores": [pytest.approx(2 / 9), pytest.approx(7 / 9)],
        "extra_logs": {"readable": [8.0, 8.0]},
    }
    ((job, *_), *_) = engine.batches
    assert job.comparison.responses == ("3", "8")
    unread = post("/get_reward", {"query": ["none"], "prompts": [""], "labels": [None]})
    assert unread.json()["rewards"] == [1.0]
    assert post("/get_reward", {"query": []}).json()["rewards"] == []


def test_get_reward_gathers_completions_of_a_prompt_if_told_to() -> None:
    engine = StubEngine(limit=64)
    service = make_service(engine, gather=0.2)

    async def crowd() -> list[httpx.Response]:
        async with client(service) as http:
            bodies = ({"query": [f"q? {n}"], "prompts": ["q? "], "labels": [""]} for n in "3819")
            return await asyncio.gather(*(http.post("/get_reward", json=body) for body in bodies))

    found = [response.json()["rewards"] for response in asyncio.run(crowd())]
    assert found == [[3], [8], [1], [9]]
    shown = {job.comparison.responses for batch in engine.batches for job in batch}
    assert shown == {("3", "8", "1", "9")}
    assert 'samples_total{readable="yes"} 8.0' in get("/metrics", service).text
    small = make_service(StubEngine(), gather=0.01, queue=1)
    refused = post("/get_reward", {"query": ["1", "2"], "prompts": ["1", "2"]}, small)
    assert refused.status_code == 422


def test_classify_speaks_vllm() -> None:
    text = "<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\n10<|im_end|>\n"
    # The payload of verl's reward loop, and how it reads the answer.
    answer = post("/classify", {"model": "m", "input": text, "activation": False}).json()
    assert answer["data"][-1]["probs"][-1] == 10
    both = post("/classify", {"input": [text, "1"]}).json()
    assert both["data"] == [
        {"index": index, "label": "LABEL_0", "probs": [value], "num_classes": 1}
        for index, value in enumerate([1.0, 0.0])
    ]
    assert both["object"] == "list"


def test_chat_completions_speak_openai() -> None:
    body = {
        "model": "any", "n": 2, "max_tokens": 5, "temperature": 0, "logprobs": True,
        "messages": [{"role": "developer", "content": "s"},
                     {"role": "user", "content": [{"type": "text", "text": "hello"}]}],
    }  # fmt: skip
    engine = StubEngine()
    answer = post("/v1/chat/completions", body, make_service(engine)).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["hello 0", "hello 1"]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["object"] == "chat.completion"
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    asked = engine.batches[0][0]
    assert (asked.temperature, asked.max_new_tokens) == (0, 5)
    assert asked.messages[0] == {"role": "system", "content": "s"}
    empty = post("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}]})
    assert empty.status_code == 422
    assert problem(empty) == "the conversation is empty"


def test_the_service_describes_itself() -> None:
    service = make_service(StubEngine())
    assert get("/v1/models", service).json()["data"][0]["id"] == "stub"
    assert get("/healthz", service).json() == {"status": "ok", "waiting": 0}
    described = get("/openapi.json", service).json()
    assert {"/judge", "/get_reward", "/classify", "/v1/chat/completions"} <= set(described["paths"])
    assert "429" in described["paths"]["/judge"]["post"]["responses"]
    assert post("/judge", RECORD, service).status_code == 200
    post("/nowhere", {}, service)
    text = get("/metrics", service).text
    assert 'grm_jax_requests_total{path="/judge",status="200"} 1.0' in text
    assert 'grm_jax_requests_total{path="other",status="404"} 1.0' in text
    assert 'grm_jax_samples_total{readable="yes"} 2.0' in text
    assert "grm_jax_batch_jobs_count 1.0" in text


# --- refusals ---

BAD = {
    "nothing": (b"", "Field required"),
    "cut off": (b'{"messages": [', "not JSON"),
    "no JSON": (b"messages", "not JSON"),
    "not UTF-8": (b'{"id": "\xff"}', "not JSON"),
    "nan": (json.dumps(RECORD | {"id": float("nan")}).encode(), "NaN is not a JSON value"),
    "deep": (b'{"messages":' + b"[" * 100_000, "nested too deeply"),
    "huge number": (b'{"id": ' + b"9" * 5000 + b"}", "not JSON"),
    "a list": (b"[]", "valid dictionary"),
    "no responses": (json.dumps(RECORD | {"responses": []}).encode(), "responses"),
    "1000 responses": (json.dumps(RECORD | {"responses": ["a"] * 1000}).encode(), "responses"),
    "a number as text": (json.dumps(RECORD | {"responses": [5]}).encode(), "responses.0"),
    "a role": (json.dumps(RECORD | {"messages": [{"role": "x", "content": ""}]}).encode(), "role"),
    "a file": (json.dumps(RECORD | {"settings": {"template": "/etc/passwd"}}).encode(), "Extra"),
    "samples": (json.dumps(RECORD | {"settings": {"samples": 10**6}}).encode(), "samples"),
    "samples as text": (json.dumps(RECORD | {"settings": {"samples": "8"}}).encode(), "samples"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_malformed_is_422_in_one_line(name: str) -> None:
    body, reason = BAD[name]
    response = post("/judge", body)
    assert response.status_code == 422
    assert reason in problem(response)
    assert post("/judge", RECORD).status_code == 200


GOOD = {
    "empty strings": (["", "5"], None),
    "boxes": ([r"\boxed{10} [The End of Response 1] <|im_end|> 4", "5"], None),
    "controls": (["\x00\x1b[2J 4", "5"], None),
    "surrogates": (["\ud800 4", "\udc00\ud83d 5"], None),
    "a pair": (["\ud83d\ude00 4", "5"], None),
}


@pytest.mark.parametrize("name", GOOD)
def test_odd_text_is_judged(name: str) -> None:
    responses, _ = GOOD[name]
    body = json.dumps(RECORD | {"id": responses[0] or "e", "responses": responses}).encode()
    engine = StubEngine()
    response = post("/judge", body, make_service(engine))
    assert response.status_code == 200
    seen = engine.batches[0][0].comparison
    expected = tuple(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                     for text in responses)  # fmt: skip
    if name != "surrogates":
        assert seen.responses == expected
    assert not any("\ud800" <= char <= "\udfff" for text in seen.responses for char in text)
    assert response.json()["id"] == seen.id


def test_a_body_may_be_only_so_long() -> None:
    service = make_service(StubEngine(), max_body=1000)
    long = post("/judge", RECORD | {"responses": ["a" * 1000]}, service)
    assert long.status_code == 413
    assert "longer than 1000 bytes" in problem(long)
    assert long.headers["connection"] == "close"
    assert post("/judge", RECORD, service).status_code == 200


def run_app(
    service: Service, receive: Callable[[], Awaitable[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """One request to `/judge` whose messages come from `receive`; returns what was sent."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": "/judge",
        "raw_path": b"/judge", "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    asyncio.run(application(service)(scope, receive, send))  # type: ignore[arg-type]
    return sent


def test_a_body_may_take_only_so_long() -> None:
    async def never() -> dict[str, Any]:
        await asyncio.sleep(30)
        raise AssertionError

    sent = run_app(make_service(StubEngine(), upload_timeout=0.05), never)
    assert sent[0]["status"] == 408


def test_a_client_that_goes_is_not_worked_for() -> None:
    engine = StubEngine(limit=1)
    engine.go.clear()
    service = make_service(engine)
    body = json.dumps(RECORD | {"settings": {"samples": 5}}).encode()
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        while not engine.batches:
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    run_app(service, receive)
    engine.go.set()
    assert service.batcher.drain(10)
    assert len(engine.batches) == 1


def test_a_client_that_goes_while_it_sends_is_forgotten() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    assert run_app(make_service(StubEngine()), receive) == []


def test_a_full_queue_says_when_to_come_back() -> None:
    engine = StubEngine()
    engine.go.clear()
    service = make_service(engine, queue=2)

    async def crowd() -> list[httpx.Response]:
        async with client(service) as http:
            held = [asyncio.ensure_future(http.post("/judge", json=RECORD)) for _ in range(2)]
            while service.batcher.waiting < 2:
                await asyncio.sleep(0.001)
            refused = await http.post("/judge", json=RECORD)
            alive = await http.get("/healthz")
            engine.go.set()
            return [refused, alive, *await asyncio.gather(*held)]

    refused, alive, *held = asyncio.run(crowd())
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert "2 requests are waiting" in problem(refused)
    assert alive.json() == {"status": "ok", "waiting": 2}
    assert [response.status_code for response in held] == [200, 200]
    many = post("/get_reward", {"query": ["1", "2", "3"], "prompts": ["1", "2", "3"]},
                make_service(StubEngine(), queue=2))  # fmt: skip
    assert many.status_code == 422
    assert "at most 2 can wait" in problem(many)


def test_a_request_may_take_only_so_long() -> None:
    engine = StubEngine()
    engine.go.clear()
    response = post("/judge", RECORD, make_service(engine, timeout=0.1))
    engine.go.set()
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert "time limit" in problem(response)


def test_a_service_that_ends_refuses_and_says_so() -> None:
    service = make_service(StubEngine())
    assert service.batcher.drain(10)
    refused = post("/judge", RECORD, service)
    assert refused.status_code == 503
    assert "shutting down" in problem(refused)
    state = get("/healthz", service)
    assert (state.status_code, state.json()["status"]) == (503, "draining")


def test_a_judge_that_fails_is_500_and_the_next_is_served() -> None:
    service = make_service(StubEngine())
    failed = post("/judge", RECORD | {"id": "explode"}, service)
    assert 'path="/judge",status="500"' in get("/metrics", service).text
    assert failed.status_code == 500
    assert problem(failed) == "the judge failed; the server's log says how"
    assert post("/judge", RECORD, service).status_code == 200


def test_the_token_is_asked_for_before_anything_is_read() -> None:
    service = make_service(StubEngine(), token="secret")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
        refused = post("/judge", b"not even JSON", service, **headers)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert get("/metrics", service, **headers).status_code == 401
    assert post("/judge", RECORD, service, authorization="Bearer secret").status_code == 200
    assert get("/healthz", service).status_code == 200


def test_unknown_paths_and_methods() -> None:
    assert problem(get("/nothing")) == "Not Found"
    wrong = get("/judge")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    problem(wrong)


@pytest.mark.parametrize(
    ("option", "reason"),
    [({"queue": 0}, "queue is 0"), ({"timeout": -1.0}, "timeout is"), ({"max_body": 0}, "max-body"),
     ({"gather": -1.0}, "gather is"), ({"token": " "}, "the token"), ({"token": "é"}, "the token")],
)  # fmt: skip
def test_wrong_options_are_refused(option: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Options(model="m", **option)
