"""`hubkit serve` under load: mixed requests of many clients at once, slow connections, patterns that are hard to match.

    python tests/benchmarks/bench_serve.py [CLIENTS] [REQUESTS]

Clients are threads of four processes on the same machine, so their own work is in the times. `beside` measures what one
polite client meets meanwhile.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import random
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hubkit.registry.directory.directory import DirectoryRegistry

PROCESSES = 4
REPOS = 8


@contextmanager
def serving(root: Path, *options: str) -> Iterator[tuple[str, int]]:
    """A server's ``host:port`` and process number, with some repositories in it."""
    registry = DirectoryRegistry(root)
    for number in range(REPOS):
        registry.create(f"org/r{number}")
        files = {"w.safetensors": os.urandom(300_000), "README.md": b"---\nlicense: mit\n---\n", "c.json": b"{}"}
        registry.commit(f"org/r{number}", files, (), message="m", parent=None)
    command = [sys.executable, "-m", "hubkit", "serve", str(root), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield urlsplit(process.stdout.readline().split()[-1]).netloc, process.pid
    finally:
        process.terminate()
        process.wait(30)


def peak(process: int) -> float:
    """The most memory that a process has had, in MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))


class Client:
    """One client that keeps its connection and notes how long each request took."""

    def __init__(self, place: str, seed: int) -> None:
        self.connection = http.client.HTTPConnection(place, timeout=60)
        self.chance, self.seed = random.Random(seed), seed
        self.seconds: list[float] = []
        self.wrong: list[str] = []

    def ask(self, method: str, path: str, body: Any = None, want: int = 200, **headers: str) -> bytes:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        began = time.perf_counter()
        try:
            self.connection.request(method, path, data, headers)
            answer = self.connection.getresponse()
            found = answer.read()
            if answer.status != want:
                self.wrong.append(f"{method} {path}: {answer.status} {found[:80]!r}")
        except (OSError, http.client.HTTPException) as error:
            self.wrong.append(f"{method} {path}: {error!r}")
            self.connection.close()
            found = b""
        self.seconds.append(time.perf_counter() - began)
        return found

    def one(self) -> None:
        """Some request, or the few of an upload, as clients send them."""
        repo = f"org/r{self.chance.randrange(REPOS)}"
        api, files = f"/api/models/{repo}", f"/{repo}/resolve/main"
        kinds: list[Callable[[], object]] = [
            lambda: self.ask("GET", "/api/models?author=org"),
            lambda: self.ask("GET", api),
            lambda: self.ask("GET", f"{api}/tree/main?recursive=true"),
            lambda: self.ask("GET", f"{api}/refs"),
            lambda: self.ask("HEAD", f"{files}/w.safetensors"),
            lambda: self.ask("GET", f"{files}/w.safetensors"),
            lambda: self.ask("GET", f"{files}/w.safetensors", want=206, Range="bytes=1000-65000"),
            lambda: self.ask("GET", f"{files}/README.md"),
            lambda: self.ask("GET", f"{files}/none", want=404),
            lambda: self.ask("GET", f"{api}-none", want=404),
            lambda: self.ask("POST", f"{api}/paths-info/main", {"paths": ["c.json"]}),
            lambda: self.commit(repo),
            lambda: self.upload(repo),
        ]
        self.chance.choice(kinds)()

    def name(self) -> str:
        return f"c{self.seed}/{len(self.seconds) % 5}"

    def commit(self, repo: str) -> None:
        """A small file."""
        text = base64.b64encode(self.chance.randbytes(2000)).decode()
        line = {"key": "file", "value": {"path": f"{self.name()}.txt", "content": text, "encoding": "base64"}}
        self._commit(repo, line)

    def upload(self, repo: str) -> None:
        """A large file: batch, PUT, commit."""
        data = self.chance.randbytes(100_000)
        oid = hashlib.sha256(data).hexdigest()
        body = {"operation": "upload", "objects": [{"oid": oid, "size": len(data)}], "transfers": ["basic"]}
        offered = self.ask("POST", f"/{repo}.git/info/lfs/objects/batch", body)
        address = urlsplit(json.loads(offered)["objects"][0]["actions"]["upload"]["href"])
        self.ask("PUT", f"{address.path}?{address.query}", data)
        value = {"path": f"{self.name()}.safetensors", "algo": "sha256", "oid": oid, "size": len(data)}
        self._commit(repo, {"key": "lfsFile", "value": value})

    def _commit(self, repo: str, line: dict[str, Any]) -> None:
        header = {"key": "header", "value": {"summary": "load"}}
        body = b"\n".join(json.dumps(row).encode() for row in (header, line))
        self.ask("POST", f"/api/models/{repo}/commit/main", body)


def run_clients(place: str, seeds: list[int], requests: int) -> dict[str, Any]:
    """So many clients in this process, each with so many requests; what they noted."""
    clients = [Client(place, seed) for seed in seeds]

    def work(client: Client) -> None:
        while len(client.seconds) < requests:
            client.one()

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "seconds": [s for client in clients for s in client.seconds],
        "wrong": [text for client in clients for text in client.wrong],
    }


@dataclass
class Load:
    """What many clients met: seconds of each request, sorted, what went wrong, and the wall seconds of all."""

    seconds: list[float]
    wrong: list[str]
    wall: float

    def at(self, share: float) -> float:
        return self.seconds[min(len(self.seconds) - 1, int(share * len(self.seconds)))]


def load(place: str, clients: int, requests: int) -> Load:
    """`requests` in all, of `clients` at once."""
    began = time.perf_counter()
    running = []
    for number in range(min(PROCESSES, clients)):
        seeds = list(range(number, clients, PROCESSES))
        arguments = ["--clients", place, json.dumps(seeds), str(-(-requests // clients))]
        command = [sys.executable, __file__, *arguments]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    found = [json.loads(process.communicate(timeout=1200)[0]) for process in running]
    seconds = sorted(s for one in found for s in one["seconds"])
    return Load(seconds, [text for one in found for text in one["wrong"]], time.perf_counter() - began)


def beside(place: str, count: int = 200) -> list[float]:
    """Seconds, sorted, that each of `count` requests takes one client, each over a connection of its own."""
    found = []
    for number in range(count):
        client = Client(place, number)
        client.ask("GET", "/api/models/org/r0")
        client.connection.close()
        assert client.wrong == []
        found += client.seconds
        time.sleep(0.01)
    return sorted(found)


@dataclass
class Slow:
    """Connections that send a byte of a request's head now and then, and never end it."""

    place: str
    count: int
    sockets: list[socket.socket] = field(default_factory=list)
    closed: int = 0

    def __enter__(self) -> Slow:
        host, _, port = self.place.rpartition(":")
        for number in range(self.count):
            one = socket.create_connection((host, int(port)), timeout=30)
            body = number % 2  # half of them are slow with a body instead
            head = (
                "POST /api/validate-yaml HTTP/1.1\r\nContent-Length: 100000\r\n"
                if body
                else "GET /api/models HTTP/1.1\r\n"
            )
            one.sendall(f"{head}Host: {self.place}\r\n".encode() + (b"\r\n{" if body else b"X: "))
            one.setblocking(False)
            self.sockets.append(one)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._drip)
        self._thread.start()
        time.sleep(0.5)
        return self

    def _drip(self) -> None:
        with selectors.DefaultSelector() as ready:
            for one in self.sockets:
                ready.register(one, selectors.EVENT_READ)
            while not self._over.wait(0.2):
                for key, _ in ready.select(0):
                    ready.unregister(key.fileobj)
                    self.closed += 1
                for one in random.sample(self.sockets, len(self.sockets) // 5):
                    try:
                        one.send(b"x")
                    except OSError:
                        continue

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for one in self.sockets:
            one.close()


class Hard:
    """Clients that ask, again and again, for what is costly to match."""

    def __init__(self, place: str, count: int) -> None:
        path = "/".join("a" * 30) + "/b"
        files = [{"path": f"{path}{number}", "size": 1, "sample": ""} for number in range(256)]
        self.bodies = [
            {"files": files[:1], "gitIgnore": "**/" * 12 + "z"},
            {"files": files, "gitIgnore": "\n".join("*a" * 30 + str(number) for number in range(1000))},
            {"files": files[:1], "gitIgnore": "*" * 31 + "z"},
        ]
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(place, number)) for number in range(count)]
        self.asked = 0

    def _ask(self, place: str, number: int) -> None:
        while not self._over.is_set():
            client = Client(place, number)
            client.connection.request(
                "POST", "/api/models/org/r0/preupload/main", json.dumps(self.bodies[self.asked % 3]).encode()
            )
            client.connection.getresponse().read()
            client.connection.close()
            self.asked += 1

    def __enter__(self) -> Hard:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def shown(seconds: list[float]) -> str:
    """Median, 99 of 100 and the slowest, in milliseconds."""
    at = (len(seconds) // 2, int(len(seconds) * 0.99), len(seconds) - 1)
    return "median {:.1f}, p99 {:.1f}, slowest {:.1f} ms".format(*(seconds[n] * 1000 for n in at))


def main(clients: int = 32, requests: int = 5000) -> None:
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as (place, process):
        print(f"alone: {shown(beside(place))}; {peak(process):.0f} MB")
        with Slow(place, 500) as slow:
            print(f"beside 500 slow connections: {shown(beside(place))}; closed {slow.closed}; {peak(process):.0f} MB")
        with Hard(place, 1) as hard:
            print(f"beside 1 client with hard patterns: {shown(beside(place))}; it asked {hard.asked} times")
        with Hard(place, 4) as hard:
            print(f"beside 4 clients with hard patterns: {shown(beside(place))}; they asked {hard.asked} times")
        found = load(place, clients, requests)
        print(
            f"{clients} clients, {len(found.seconds)} requests in {found.wall:.1f} s: {shown(found.seconds)}; ", end=""
        )
        print(f"{len(found.wrong)} errors; {peak(process):.0f} MB", *found.wrong[:5], sep="\n  ")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--clients"]:
        print(json.dumps(run_clients(sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]))))
    else:
        main(*map(int, sys.argv[1:]))
