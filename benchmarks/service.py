"""`grm-jax serve` under load: 200 clients at once, each answer compared with the one it got alone.

    python benchmarks/service.py                 # two minutes of load on smollm2-135m
    python benchmarks/service.py --quick         # a few clients and seconds; writes nothing

A server of its own is started on this machine. A pool of comparisons of mixed lengths is judged
one request at a time, twice: first to compile and to learn the right answers, then timed. Then all
clients draw from the pool at once, for as long as it says. A request's name is its nonce; its
answer must carry that nonce and, to the last character, the samples that the nonce got alone. Now
and then a client sends a comparison of its own, which is judged alone once more at the end. Clients
that are told to come back later do so. At last the server is told to end while requests are
waiting, and every one that it had accepted must be answered.

Writes `benchmarks/service.md`; the exit status is 1 if anything was wrong.
"""

import argparse
import asyncio
import collections
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).parent
WORDS = ("the", "river", "mountain", "seven", "runs", "quickly", "answer", "is", "not", "because")
MEMORY_GROWTH = 1.25
SPEEDUP = 3.0


@dataclass
class Load:
    """What the clients saw.

    Attributes:
      statuses: Answers by status.
      seconds: Of each request that was answered, from its first try on.
      wrong: Answers that were not their request's, in words.
      judged: Answers that have scores.
      own: Comparisons that only one client sent, with their answers.
    """

    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    judged: int = 0
    own: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)


class Server:
    """`grm-jax serve` in a process of its own."""

    def __init__(self, args: argparse.Namespace) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        program = "from grm_jax.cli.main import main; raise SystemExit(main())"
        flags = ["--model", args.model, "--port", str(port), "--samples", str(args.samples)]
        flags += ["--max-new-tokens", str(args.max_new_tokens), "--constrain"]
        # What is measured is the model by itself, whatever adapters come with the package.
        flags += ["--adapter", "none", *args.serve]
        self.process = subprocess.Popen([sys.executable, "-c", program, "serve", *flags])

    def wait(self) -> None:
        """Returns once it answers."""
        while True:
            if self.process.poll() is not None:
                raise SystemExit("the server has ended; see above")
            try:
                httpx.get(f"{self.address}/healthz")
                return
            except httpx.TransportError:
                time.sleep(0.2)

    def memory(self) -> int:
        """Bytes that it has held at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


def make_record(name: str, rng: random.Random) -> dict[str, Any]:
    """A comparison of two or three responses, from a few words to a few hundred."""
    count = rng.choice((2, 2, 3))
    texts = [" ".join(rng.choices(WORDS, k=rng.choice((3, 20, 80, 160)))) for _ in range(count)]
    asked = f"Which is best? ({name})"
    return {"id": name, "messages": [{"role": "user", "content": asked}], "responses": texts}


def substance(judgement: dict[str, Any]) -> dict[str, Any]:
    """A judgement without what depends on the time."""
    return {key: value for key, value in judgement.items() if key != "usage"}


def alone(address: str, records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], float]:
    """The answers to records that are asked about one at a time, and the seconds of all."""
    began = time.perf_counter()
    with httpx.Client(base_url=address, timeout=600) as http:
        found = [http.post("/judge", json=record).raise_for_status().json() for record in records]
    return [substance(answer) for answer in found], time.perf_counter() - began


async def client(
    address: str, number: int, pool: list[tuple[dict[str, Any], dict[str, Any]]], end: float,
    load: Load,
) -> None:  # fmt: skip
    """Asks for one judgement after another until it is time to stop."""
    rng = random.Random(number)
    async with httpx.AsyncClient(base_url=address, timeout=600) as http:
        for turn in range(1 << 30):
            if time.perf_counter() >= end:
                return
            expected = None
            if rng.random() < 0.1:
                record = make_record(f"client-{number}-{turn}", rng)
            else:
                record, expected = rng.choice(pool)
            began = time.perf_counter()
            answer = await ask(http, record, load)
            if answer is None:
                continue
            load.seconds.append(time.perf_counter() - began)
            found = substance(answer)
            load.judged += "scores" in found
            if found["id"] != record["id"]:
                load.wrong.append(f"{record['id']} got the answer of {found['id']}")
            elif expected is None:
                load.own.append((record, found))
            elif found != expected:
                load.wrong.append(f"{record['id']} got another answer than alone")


async def ask(http: httpx.AsyncClient, record: dict[str, Any], load: Load) -> dict[str, Any] | None:
    """The answer to a record; comes back when told to. None if it is refused for good."""
    while True:
        response = await http.post("/judge", json=record)
        load.statuses[response.status_code] += 1
        if response.status_code == 200:
            answer: dict[str, Any] = response.json()
            return answer
        if response.status_code not in (429, 503):
            return None
        await asyncio.sleep(float(response.headers["retry-after"]))


async def crowd(
    address: str, pool: list[tuple[dict[str, Any], dict[str, Any]]], clients: int, seconds: float
) -> tuple[Load, float]:
    """All clients at once; returns what they saw and how long it took to the last answer."""
    load = Load()
    began = time.perf_counter()
    end = began + seconds
    await asyncio.gather(*(client(address, n, pool, end, load) for n in range(clients)))
    return load, time.perf_counter() - began


async def end_under_load(server: Server, records: list[dict[str, Any]]) -> tuple[int, int, int]:
    """Tells the server to end while records wait: accepted, answered, and its exit status."""
    async with httpx.AsyncClient(base_url=server.address, timeout=600) as http:
        asked = [asyncio.ensure_future(http.post("/judge", json=record)) for record in records]
        accepted = 0
        while accepted < len(records) // 2 and not all(one.done() for one in asked):
            accepted = (await http.get("/healthz")).json()["waiting"]
            await asyncio.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        # Those whose connection was never taken on fail; nobody had accepted them.
        found = await asyncio.gather(*asked, return_exceptions=True)
    answered = sum(isinstance(one, httpx.Response) and one.status_code == 200 for one in found)
    return accepted, answered, await asyncio.to_thread(server.process.wait)


def percentile(values: list[float], share: float) -> float:
    """The value below which this share of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def machine() -> str:
    """What this was measured on."""
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}"


def run(args: argparse.Namespace, server: Server) -> tuple[str, list[str]]:
    """The report, and what was wrong."""
    rng = random.Random(args.seed)
    records = [make_record(f"nonce-{number}", rng) for number in range(args.pool)]
    expected, _ = alone(server.address, records)
    again, seconds = alone(server.address, records)
    warm = server.memory()
    single = len(records) / seconds
    pool = list(zip(records, expected, strict=True))
    load, took = asyncio.run(crowd(server.address, pool, args.clients, args.seconds))
    grown = server.memory() / warm
    rechecked = load.own[:: max(1, len(load.own) // 20)][:20]
    late, _ = alone(server.address, [record for record, _ in rechecked])
    last = [make_record(f"last-{number}", rng) for number in range(min(64, args.clients))]
    accepted, answered, status = asyncio.run(end_under_load(server, last))

    together = len(load.seconds) / took
    wrong = list(load.wrong)
    wrong += ["an answer was not the same twice"] * (again != expected)
    few = f"only {load.judged} of {len(load.seconds)} answers have scores, not {expected[0]}"
    wrong += [few] * (load.judged < len(load.seconds))
    wrong += [
        f"{record['id']} got another answer than alone"
        for (record, found), truth in zip(rechecked, late, strict=True)
        if found != truth
    ]
    wrong += [f"{count} answers of {status}" for status, count in load.statuses.items()
              if status not in (200, 429, 503)]  # fmt: skip
    wrong += [f"memory grew to {grown:.2f} of what it was"] * (grown > MEMORY_GROWTH)
    wrong += [f"{accepted - answered} accepted requests were lost"] * (answered < accepted)
    wrong += [f"the server ended with {status}"] * (status != 0)
    if not args.quick:
        few = f"throughput is only {together / single:.1f} times that of one at a time"
        wrong += [few] * (together < SPEEDUP * single)
    rows = [
        ("clients at once", f"{args.clients}"),
        ("load, until the last answer", f"{took:.0f} s"),
        ("answers, and those with scores", f"{len(load.seconds)}, {load.judged}"),
        ("statuses", ", ".join(f"{k}: {v}" for k, v in sorted(load.statuses.items()))),
        ("answers with another's nonce or scores", f"{len(load.wrong)}"),
        ("seconds to an answer, p50", f"{percentile(load.seconds, 0.5):.1f}"),
        ("seconds to an answer, p99", f"{percentile(load.seconds, 0.99):.1f}"),
        ("one request at a time", f"{single:.2f} a second"),
        ("all clients together", f"{together:.2f} a second"),
        ("ratio", f"**{together / single:.1f}**"),
        ("peak memory before the load", f"{warm / 2**30:.2f} GiB"),
        ("growth under the load", f"{grown - 1:.0%}"),
        ("accepted at SIGTERM, and answered", f"{accepted}, {answered}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    text = (
        f"# The service under load\n\n`python benchmarks/service.py` on {machine()}: "
        f"`{args.model}`, samples of up to {args.max_new_tokens} tokens, {args.samples} for each "
        "comparison of two or three responses of 3 to 160 words. A client that is told to come "
        "back later (429) does; the time to its answer begins with the first try.\n\n"
        f"| | |\n| --- | --- |\n{table}\n"
    )
    return text, wrong


def main(arguments: Sequence[str] | None = None) -> None:
    """Starts the server, runs, and reports."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes; writes nothing")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--pool", type=int, default=16, help="comparisons that are shared")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("serve", nargs="*", help="further flags of `grm-jax serve`, after --")
    args = parser.parse_args(arguments)
    if args.quick:
        args.clients, args.seconds, args.pool = 16, 5.0, 4
    server = Server(args)
    try:
        server.wait()
        text, wrong = run(args, server)
    finally:
        if server.process.poll() is None:
            server.process.kill()
    print(text)
    if not args.quick and not wrong:
        (HERE / "service.md").write_text(text)
    for one in wrong[:20]:
        print(f"wrong: {one}", file=sys.stderr)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
