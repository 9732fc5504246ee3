"""A service on a real socket of this machine, and what goes over the wire to it."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import uvicorn

from grm_jax.serving import Service, create_app


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
      status: 0 where the connection was closed without an answer.
      headers: By lower-case name.
      body: As it came.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Live:
    """A service that is being served.

    Attributes:
      port: On the loopback address.
      service: What is behind it.
    """

    port: int
    service: Service

    def connect(self) -> socket.socket:
        """A connection, which the caller closes."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def post(self, path: str, body: bytes) -> Answer:
        """Sends these bytes as JSON."""
        with self.connect() as connection:
            connection.sendall(request_head(path, self.port, len(body)) + body)
            return read_answer(connection)


def request_head(path: str, port: int, length: int) -> bytes:
    """The head of a request as aiohttp, which the trainers send theirs by, writes it."""
    return (
        f"POST {path} HTTP/1.1\r\n"
        f"Host: 127.0.0.1:{port}\r\n"
        "Accept: */*\r\n"
        "Accept-Encoding: gzip, deflate\r\n"
        "User-Agent: Python/3.11 aiohttp/3.13.2\r\n"
        f"Content-Length: {length}\r\n"
        "Content-Type: application/json\r\n\r\n"
    ).encode()


def read_answer(connection: socket.socket) -> Answer:
    """Reads one answer off a connection."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = connection.recv(1 << 16)
        if not part:
            assert not received
            return Answer(0, {}, b"")
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    while len(body) < int(headers["content-length"]):
        part = connection.recv(1 << 16)
        assert part
        body += part
    return Answer(int(status.split()[1]), headers, body)


@contextlib.contextmanager
def serve(service: Service) -> Iterator[Live]:
    """Serves on a free port from a thread of its own, as `grm-jax serve` does from its process."""
    config = uvicorn.Config(create_app(service), log_level="error", server_header=False)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        end = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive() and time.monotonic() < end
            time.sleep(0.005)
        try:
            yield Live(listening.getsockname()[1], service)
        finally:
            server.should_exit = True
            thread.join(60)
            service.batcher.drain(60)
