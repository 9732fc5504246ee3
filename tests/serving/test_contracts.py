"""The trainers' own clients, to the byte: what they send, what they must get, how they read it.

Each client is written after what the trainer does: OpenRLHF's `utils/agent.py`, verl's reward loop.
Both send by aiohttp, so the requests are spelled as it spells them.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from grm_jax.data import from_record
from grm_jax.serving import app
from tests.serving.live import Answer, Live, serve
from tests.serving.stub import StubEngine, make_service

CREATED = 1_700_000_000
HELD = from_record(
    {"id": "held", "messages": [{"role": "user", "content": "q"}], "responses": ["1"]}
)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serve(make_service(StubEngine(limit=64))) as found:
        yield found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.time, "time", lambda: CREATED)


def typed(value: Any) -> Any:
    """A JSON value with each leaf's type in its place."""
    match value:
        case dict():
            return {key: typed(item) for key, item in value.items()}
        case list():
            return [typed(item) for item in value]
        case _:
            return type(value).__name__


# --- OpenRLHF ---

TRIES = 5


class OpenRLHF:
    """Its remote reward: five tries with a pause between them, and then an error."""

    def __init__(self, live: Live, pause: Callable[[], object] = lambda: None) -> None:
        self._live = live
        self._pause = pause
        self.sent = b""
        self.answers: list[Answer] = []

    def fetch(self, queries: list[str], prompts: list[str], labels: list[Any]) -> dict[str, Any]:
        self.sent = json.dumps({"query": queries, "prompts": prompts, "labels": labels}).encode()
        for _ in range(TRIES):
            answer = self._live.post("/get_reward", self.sent)
            self.answers.append(answer)
            if answer.status < 400:
                # What aiohttp's `response.json()` insists on.
                assert answer.headers["content-type"] == "application/json"
                found: dict[str, Any] = json.loads(answer.body)
                return found
            self._pause()
        raise RuntimeError(f"Request error for {TRIES} times")

    def execute(self, prompt: str, said: str, label: Any) -> dict[str, Any]:
        """What a rollout keeps of the first and only entry."""
        info = self.fetch([prompt + said], [prompt], [label])
        return {
            "reward": info.get("rewards"),
            "scores": info.get("scores") or info.get("rewards"),
            "extra_logs": info.get("extra_logs") or {},
        }


PROMPT = "<|im_start|>user\nWie heißt das?<|im_end|>\n<|im_start|>assistant\n"


def test_openrlhf_to_the_byte(live: Live) -> None:
    client = OpenRLHF(live)
    client.fetch([PROMPT + "10<|im_end|>", PROMPT + "1"], [PROMPT] * 2, ["x", None])
    turn = r"<|im_start|>user\nWie hei\u00dft das?<|im_end|>\n<|im_start|>assistant\n"
    assert client.sent.decode() == (
        f'{{"query": ["{turn}10<|im_end|>", "{turn}1"], '
        f'"prompts": ["{turn}", "{turn}"], "labels": ["x", null]}}'
    )
    (answer,) = client.answers
    assert answer.status == 200
    assert answer.body == (
        b'{"rewards":[10.0,1.0],"scores":[1.0,0.0],"extra_logs":{"readable":[8.0,8.0]}}'
    )


def test_openrlhf_reads_a_rollouts_reward(live: Live) -> None:
    # The trainer hands over one rollout at a time and takes the lists as they are.
    assert OpenRLHF(live).execute(PROMPT, "4", "") == {
        "reward": [4.0],
        "scores": [pytest.approx(1 / 3)],
        "extra_logs": {"readable": [8.0]},
    }
    # A judgement that nobody could read is the floor, not a missing value.
    unread = OpenRLHF(live).execute(PROMPT, "nothing to read", "")
    assert unread["reward"] == [1.0]
    assert unread["extra_logs"] == {"readable": [0.0]}


@pytest.mark.parametrize("labels", [[None], [""], ["x"], [7], [{"answer": [1, 2]}]])
def test_openrlhf_sends_any_label(live: Live, labels: list[Any]) -> None:
    found = OpenRLHF(live).fetch([PROMPT + "4"], [PROMPT], labels)
    assert typed(found) == {
        "rewards": ["float"], "scores": ["float"], "extra_logs": {"readable": ["float"]},
    }  # fmt: skip
    assert list(found) == ["rewards", "scores", "extra_logs"]


def test_openrlhf_comes_back_after_a_refusal() -> None:
    engine = StubEngine()
    engine.go.clear()
    with serve(make_service(engine, queue=1)) as live:
        (held,) = live.service.batcher.submit([live.service.judge_request(HELD)])

        def pause() -> None:
            engine.go.set()
            assert held.result(60)
            while live.service.batcher.waiting:
                time.sleep(0.001)

        client = OpenRLHF(live, pause)
        assert client.execute(PROMPT, "4", "")["reward"] == [4.0]
    assert [answer.status for answer in client.answers] == [429, 200]
    assert int(client.answers[0].headers["retry-after"]) >= 1


# --- verl ---


class Verl:
    """Its reward loop: `_post_request` gives up on 4xx and comes back after 5xx."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self.sent: list[bytes] = []
        self.answers: list[Answer] = []

    def post(self, endpoint: str, payload: dict[str, Any]) -> dict[str, Any]:
        self.sent.append(json.dumps(payload).encode())
        answer = self._live.post(f"/{endpoint}", self.sent[-1])
        self.answers.append(answer)
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/json"
        found: dict[str, Any] = json.loads(answer.body)
        return found

    def scalar_score(self, model: str, text: str) -> float:
        """The route of discriminative rewards behind vLLM."""
        payload = {"model": model, "input": text, "use_activation": False}
        score: float = self.post("classify", payload)["data"][-1]["probs"][-1]
        return score


def test_verls_scalar_route_to_the_byte(live: Live, clock: None) -> None:
    client = Verl(live)
    score = client.scalar_score("Org/Model", PROMPT + "7<|im_end|>\n")
    assert (score, type(score)) == (7.0, float)
    turn = r"<|im_start|>user\nWie hei\u00dft das?<|im_end|>\n<|im_start|>assistant\n"
    assert client.sent[0].decode() == (
        f'{{"model": "Org/Model", "input": "{turn}7<|im_end|>\\n", "use_activation": false}}'
    )
    # As vLLM's `ClassificationResponse` is dumped: every field in its order, the empty one too.
    name = json.loads(client.answers[0].body)["id"]
    assert name.startswith("classify-")
    assert client.answers[0].body.decode() == (
        f'{{"id":"{name}","object":"list","created":{CREATED},"model":"stub",'
        '"data":[{"index":0,"label":"LABEL_0","probs":[7.0],"num_classes":1}],'
        '"usage":{"prompt_tokens":0,"total_tokens":0,"completion_tokens":0,'
        '"prompt_tokens_details":null}}'
    )


def test_verls_older_name_for_points(live: Live) -> None:
    payload = {"model": "m", "input": PROMPT + "7<|im_end|>\n", "activation": False}
    assert Verl(live).post("classify", payload)["data"][-1]["probs"][-1] == 7


def test_verls_generative_route_to_the_byte(live: Live, clock: None) -> None:
    client = Verl(live)
    sampling = {"temperature": 0.7, "top_p": 0.8, "max_tokens": 4096}
    messages = [{"role": "user", "content": "Judge «this»."}]
    answer = client.post("v1/chat/completions", {"messages": messages, **sampling})
    # How its reward functions read it.
    assert answer["choices"][0]["message"]["content"].strip() == "Judge «this». 0"
    assert client.sent[0] == (
        b'{"messages": [{"role": "user", "content": "Judge \\u00abthis\\u00bb."}], '
        b'"temperature": 0.7, "top_p": 0.8, "max_tokens": 4096}'
    )
    assert client.answers[0].body.decode() == (
        f'{{"id":"{answer["id"]}","object":"chat.completion","created":{CREATED},"model":"stub",'
        '"choices":[{"index":0,"message":{"role":"assistant","content":"Judge «this». 0"},'
        '"finish_reason":"stop"}],'
        '"usage":{"prompt_tokens":13,"completion_tokens":2,"total_tokens":15}}'
    )
    assert answer["id"].startswith("chatcmpl-")


def test_verl_asks_about_a_whole_batch_at_once(live: Live) -> None:
    texts = [PROMPT + f"{number}<|im_end|>\n" for number in range(1, 11)]

    async def batch() -> list[float]:
        ask = Verl(live).scalar_score
        return await asyncio.gather(*(asyncio.to_thread(ask, "m", text) for text in texts))

    assert asyncio.run(batch()) == list(range(1, 11))
