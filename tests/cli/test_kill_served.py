"""kill -9 at seeded moments of everything that moves large files to, from and in a served registry: nothing is lost.

``HUBKIT_KILLS=60 pytest -m slow -s tests/cli/test_kill_served.py`` gives the figures of RESULTS.md; a few kills each by
default.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

KILLS = int(os.environ.get("HUBKIT_KILLS") or 4)
TWICE = 1 << 20
"""Bytes of one file that may be fetched a second time."""
pytestmark = pytest.mark.slow


@dataclass
class Served:
    """A `hubkit serve` that can be killed and started again, at the same address."""

    root: Path
    port: int = 0
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        line = [sys.executable, "-m", "hubkit", "serve", str(self.root), "--port", str(self.port)]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().split()[-1].rpartition(":")[2].rstrip("/"))

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def sound(self) -> bool:
        """Whether every byte of it is what it should be."""
        line = [sys.executable, "-m", "hubkit", "serve", str(self.root), "--check"]
        return subprocess.run(line, capture_output=True).returncode == 0


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    server = Served(tmp_path / "registry")
    server.root.mkdir()
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 33 MB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model") / "base"
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 8}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=14000, **shape)).save_pretrained(folder)
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def another(model: Path, folder: Path, number: int) -> Path:
    """The base with other last bytes."""
    shutil.copytree(model, folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(number.to_bytes(8, "little"))
    return folder


@dataclass
class Machine:
    """Where commands run: a store of its own, one registry."""

    home: Path
    url: str
    ran: dict[str, float] = field(default_factory=dict)

    def popen(self, *words: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "HUBKIT_HOME": str(self.home), "HUBKIT_REGISTRY": self.url}
        line = [sys.executable, "-m", "hubkit", *words]
        return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *words: str) -> bytes:
        start = time.monotonic()
        process = self.popen(*words)
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, (words, error.decode())
        self.ran[words[0]] = time.monotonic() - start
        return out

    def killed(self, pick: random.Random, *words: str) -> None:
        """Kills a command after a part of the time that its like took before."""
        process = self.popen(*words)
        time.sleep(pick.uniform(0.15, 1.0) * self.ran[words[0]])
        process.kill()
        process.communicate()


def require_arrived(reader: Machine, repo: str, folder: Path) -> None:
    """An empty machine pulls the very bytes of a folder."""
    found = json.loads(reader.run("pull", "--base", repo, "--json"))
    assert weights(Path(found["path"])) == weights(folder)
    shutil.rmtree(reader.home, ignore_errors=True)


def test_push(model: Path, served: Served, tmp_path: Path) -> None:
    machine, pick = Machine(tmp_path / "home", served.url), random.Random(1)
    machine.run("push", str(another(model, tmp_path / "first", 10**6)), "ana/first")
    for number in range(KILLS):
        folder = another(model, tmp_path / f"base-{number}", number)
        machine.killed(pick, "push", str(folder), f"ana/base-{number}")
        machine.run("push", str(folder), f"ana/base-{number}")
        require_arrived(Machine(tmp_path / f"home-{number}", served.url), f"ana/base-{number}", folder)
        shutil.rmtree(folder)
    assert served.sound()


class Watched:
    """A way to a registry that notes from which byte each file is asked for."""

    def __init__(self, url: str) -> None:
        self.starts: list[tuple[str, int]] = []
        starts = self.starts

        class Passing(BaseHTTPRequestHandler):
            def answer(self) -> None:
                asked = self.headers.get("Range")
                if self.command == "GET" and self.path.endswith("model.safetensors"):
                    starts.append((self.path, int(asked[6:].partition("-")[0]) if asked else 0))
                length = int(self.headers.get("Content-Length") or 0)
                heads = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "accept-encoding")}
                request = urllib.request.Request(url + self.path, self.rfile.read(length) or None, heads)
                request.method = self.command
                try:
                    answer = urllib.request.urlopen(request, timeout=60)
                except urllib.error.HTTPError as error:
                    answer = error
                with answer:
                    self.send_response(answer.status)
                    for key, value in answer.headers.items():
                        if key.lower() not in ("connection", "transfer-encoding", "date", "server"):
                            self.send_header(key, value)
                    self.send_header("Connection", "close")
                    self.end_headers()
                    while self.command != "HEAD" and (data := answer.read(1 << 16)):
                        self.wfile.write(data)
                        time.sleep(0.001)  # 33 MB take half a second, in which there is time to be killed
                self.close_connection = True

            do_GET = do_HEAD = do_POST = answer

            def handle(self) -> None:
                with suppress(OSError):  # who asked was killed
                    super().handle()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Passing)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


def test_pull(model: Path, served: Served, tmp_path: Path) -> None:
    Machine(tmp_path / "pusher", served.url).run("push", str(model), "ana/base")
    watched, pick, resumed = Watched(served.url), random.Random(2), 0
    Machine(tmp_path / "warm", watched.url).run("pull", "--base", "ana/base")
    machine = Machine(tmp_path / "measured", watched.url)
    machine.run("pull", "--base", "ana/base")
    took = machine.ran
    for number in range(KILLS):
        machine = Machine(tmp_path / f"home-{number}", watched.url, dict(took))
        machine.killed(pick, "pull", "--base", "ana/base")
        there = max((p.stat().st_size for p in machine.home.glob("partial/*") if p.suffix != ".lock"), default=0)
        watched.starts.clear()
        found = json.loads(machine.run("pull", "--base", "ana/base", "--json"))
        assert weights(Path(found["path"])) == weights(model)
        for _, start in watched.starts:
            assert start >= there - TWICE, (start, there)
        resumed += bool(there and watched.starts)
        machine.run("cache", "verify")
        shutil.rmtree(machine.home, ignore_errors=True)
    print(f"\npull: {resumed} of {KILLS} had begun the file and went on with it", end="")
    watched.server.shutdown()


def test_copy(model: Path, served: Served, tmp_path: Path) -> None:
    machine, pick = Machine(tmp_path / "home", served.url), random.Random(3)
    machine.run("push", str(model), "ana/base")
    machine.run("copy", "ana/base", str(tmp_path / "first"))
    for number in range(KILLS):
        target = tmp_path / f"target-{number}"
        machine.killed(pick, "copy", "ana/base", str(target))
        machine.run("copy", "ana/base", str(target))
        assert Served(target).sound()
        require_arrived(Machine(tmp_path / f"home-{number}", str(target)), "ana/base", model)
        shutil.rmtree(target)


def test_prune(model: Path, served: Served, tmp_path: Path) -> None:
    pusher, pick = Machine(tmp_path / "pusher", served.url), random.Random(4)
    for number in range(3):
        pusher.run("push", str(another(model, tmp_path / f"base-{number}", number)), f"ana/base-{number}")
    machine = Machine(tmp_path / "home", served.url)
    for turn in range(KILLS + 1):
        for number in range(3):
            machine.run("pull", "--base", f"ana/base-{number}")
        words = ("cache", "prune", "--older-than", "0m")
        if turn:
            machine.killed(pick, *words)
        else:
            machine.run(*words)
        machine.run("cache", "verify")
    kept = json.loads(machine.run("cache", "list", "--json"))
    print(f"\nprune: {len(kept)} artifacts after the last kill, each whole", end="")


def test_collecting(model: Path, served: Served, tmp_path: Path) -> None:
    machine, pick = Machine(tmp_path / "home", served.url), random.Random(5)
    machine.run("push", str(model), "ana/base")
    machine.run("serve", str(served.root), "--gc")
    for number in range(KILLS):
        folder = another(model, tmp_path / f"base-{number}", number)
        with_loss = machine.popen("push", str(folder), f"ana/base-{number}")
        machine.killed(pick, "serve", str(served.root), "--gc")
        _, error = with_loss.communicate(timeout=120)
        assert with_loss.returncode == 0, error.decode()
        require_arrived(Machine(tmp_path / f"home-{number}", served.url), f"ana/base-{number}", folder)
        shutil.rmtree(folder)
    assert served.sound()


def test_serve_under_load(model: Path, served: Served, tmp_path: Path) -> None:
    """What was acknowledged before a kill is there after it."""
    pick, done, stop = random.Random(6), dict[str, str](), threading.Event()
    from hubkit.errors import HubkitError
    from hubkit.registry.hub.huggingface import HuggingFaceRegistry

    HuggingFaceRegistry(served.url, trusted=True).create("ana/notes")

    def writing(number: int) -> None:
        """Commits small files until it is told to stop; what is refused or cut off is not noted."""
        place, turn = HuggingFaceRegistry(served.url, trusted=True), 0
        while not stop.is_set():
            turn += 1
            name = f"{number}-{turn}.txt"
            try:
                commit = place.commit("ana/notes", {name: name.encode()}, [], message=name, parent=None)
            except HubkitError:
                time.sleep(0.05)
            else:
                done[name] = commit

    threads = [threading.Thread(target=writing, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(KILLS):
        time.sleep(pick.uniform(0.3, 1.2))
        served.kill()
        served.start()
    stop.set()
    for thread in threads:
        thread.join(60)
    place = HuggingFaceRegistry(served.url, trusted=True)
    files = {file.path for file in place.files("ana/notes", place.resolve("ana/notes", None))}
    assert [name for name in done if name not in files] == []
    assert served.sound()
    print(f"\nserve: {KILLS} kills, {len(done)} acknowledged commits, lost 0", end="")
