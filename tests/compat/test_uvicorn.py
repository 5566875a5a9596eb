"""What hubkit uses of uvicorn that it does not promise: when a connection waits for the head of a request."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from hubkit.compat.uvicorn import impatient

SECONDS = 0.4


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """The body's length, after a while that is longer than a head may take; or, at another address, 20 MB."""
    if scope["path"] == "/much":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"20000000")]})
        for _ in range(200):
            await send({"type": "http.response.body", "body": bytes(100_000), "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return
    count, more = 0, True
    while more:
        message = await receive()
        count, more = count + len(message.get("body", b"")), message.get("more_body", False)
    await asyncio.sleep(2 * SECONDS)
    text = str(count).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
    await send({"type": "http.response.body", "body": text})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(answer, http=impatient(SECONDS, SECONDS), lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(10)


HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"


def reply(connection: socket.socket) -> bytes:
    """A whole answer: its head, and the one byte of its body."""
    found = b""
    while not found.partition(b"\r\n\r\n")[2]:
        data = connection.recv(1000)
        assert data, "closed"
        found += data
    return found


def until_closed(connection: socket.socket) -> float:
    """Seconds until the other side closes, while a byte goes to it now and then."""
    began = time.monotonic()
    connection.settimeout(0.05)
    while time.monotonic() - began < 10:
        try:
            connection.send(b"x")
            if connection.recv(100) == b"":
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - began


def test_a_head_that_does_not_end(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        assert SECONDS * 0.8 < until_closed(connection) < SECONDS * 4


def test_a_second_head_that_does_not_end(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(HEAD + b"body")
        assert reply(connection).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        assert SECONDS * 0.8 < until_closed(connection) < SECONDS * 4


def test_bodies_and_answers_take_their_time(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(2):
            connection.sendall(HEAD)
            for byte in b"body":
                time.sleep(SECONDS / 2)
                connection.sendall(bytes([byte]))
            assert reply(connection).endswith(b"\r\n\r\n4")


def much(port: int, first: float, pause: float) -> int:
    """How many of 20 MB come to a client that waits before it reads, and before each piece."""
    with socket.socket() as connection:
        connection.settimeout(20)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET /much HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        time.sleep(first)
        found = 0
        try:
            while data := connection.recv(1_000_000):
                found += len(data)
                time.sleep(pause)
        except ConnectionResetError:
            pass
        return found


def test_a_client_that_takes_nothing(port: int) -> None:
    assert much(port, 4 * SECONDS, 0) < 20_000_000


def test_a_client_that_takes_its_time(port: int) -> None:
    assert much(port, 0, 0.01) >= 20_000_000
