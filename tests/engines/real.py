"""Real engines in environments of their own: where they are, how a deployment is started, what a server answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
LARGEST, MEAN = 2e-3, 5e-4
"""What log-probabilities in fp32 may differ by from transformers', in nats."""


def environment(name: str) -> Path:
    """The folder of an engine's environment; skips, by the name of the script that makes it, where there is none."""
    place = Path(os.environ.get(f"HUBKIT_{name.upper()}") or ROOT / ".cache" / "engines" / name).absolute()
    if not (place / "bin" / "python").exists():
        pytest.skip(f"no {name} here: scripts/engines/{name} {place}")
    return place


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def ask(url: str, body: Mapping[str, Any] | None = None, timeout: float = 300) -> tuple[int, Any]:
    """(status, answer) of one request: a POST of JSON where there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text, status = answer.read().decode(), answer.status
    except urllib.error.HTTPError as error:
        text, status = error.read().decode(), error.code
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


@contextmanager
def running(
    command: Sequence[str], folder: Path, place: Path, more: Mapping[str, str] | None = None, wait: float = 1200
) -> Iterator[str]:
    """The address of a server that `command` starts in `folder`, with the programs of the environment `place` first.

    Args:
        more: environment variables beside this process's own.
        wait: seconds until it must answer ``/health``.
    """
    port = free_port()
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "COV_"))}
    variables |= {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": "", **(more or {})}
    log = folder.parent / f"{folder.name}-{port}.log"
    with log.open("wb") as out:
        line = [*command, "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(
            line, cwd=folder, env=variables, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            url, until = f"http://127.0.0.1:{port}", time.monotonic() + wait
            while not _answers(url):
                tail = "\n".join(log.read_text("utf-8", "replace").splitlines()[-30:])
                assert process.poll() is None, f"{' '.join(line)} ended:\n{tail}"
                assert time.monotonic() < until, f"{' '.join(line)} does not answer:\n{tail}"
                time.sleep(0.5)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _answers(url: str) -> bool:
    try:
        return ask(f"{url}/health", timeout=5)[0] == 200
    except OSError:
        return False


def differences(have: Sequence[float], want: Sequence[float]) -> tuple[float, float]:
    """(largest, mean) distance of two rows of log-probabilities."""
    assert len(have) == len(want)
    apart = [abs(one - other) for one, other in zip(have, want, strict=True)]
    return max(apart), sum(apart) / len(apart)


def of_model(model: Any, ids: Sequence[int], first: int = 1) -> list[float]:
    """Log-probabilities that a model of transformers gives each token of a text from the `first` on."""
    import torch

    with torch.no_grad():
        rows = model(input_ids=torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)
    return [float(rows[at - 1, ids[at]]) for at in range(first, len(ids))]


def show(engine: str, what: str, have: Sequence[float], want: Sequence[float]) -> tuple[float, float]:
    """`differences`, told on the terminal for whoever runs with ``-s``."""
    largest, mean = differences(have, want)
    print(f"\n{engine:8} {what:40} {len(have)} tokens  largest {largest:.1e}  mean {mean:.1e}", end="")
    return largest, mean
