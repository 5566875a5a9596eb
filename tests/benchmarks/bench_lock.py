"""Locks of many adapters: ``python tests/benchmarks/bench_lock.py [COUNT]``, 200 by default. Whole processes.

COUNT versions of a tiny adapter are published to a directory and pulled. Measured: `lock` of a recipe of all of them
from nothing and again, `lock --check`, and `sync --frozen` of the synced project, beside the start of an interpreter
that imports the same modules and does nothing. Each figure is wall time, and behind it the processor's.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from projects import publish_base, ship

ROUNDS = 7
START = "import hubkit.cli, hubkit.cli.sync, hubkit.verbs.sync; from hubkit.documents.schema import _validator"


def spent() -> float:
    """Processor seconds of the processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(wall, processor) seconds."""
    start, before = time.perf_counter(), spent()
    work()
    return time.perf_counter() - start, spent() - before


def hubkit(project: Path, *words: str) -> None:
    line = [sys.executable, "-m", "hubkit", *words]
    subprocess.run(line, cwd=project, stdout=subprocess.DEVNULL, check=True)


def said(name: str, seconds: list[tuple[float, float]], aim: str = "") -> None:
    wall, cpu = (statistics.median(column) for column in zip(*seconds, strict=True))
    print(f"{name:44s} {wall:7.2f} s   processor {cpu:6.2f} s   {aim}", flush=True)


def prepared(work: Path, count: int) -> Path:
    """A project of a published base and `count` published adapters, all of them stored."""
    project = work / "project"
    project.mkdir()
    publish_base()
    lines = ["[base]", 'source = "ana/base"']
    for number in range(count):
        ship("lora", f"ana/adapter-{number}", work / "adapter", version=f"1.0.{number}")
        lines += [f"[adapters.a{number}]", f'source = "ana/adapter-{number}@^1"']
    (project / "hubkit.toml").write_text("\n".join(lines) + "\n")
    hubkit(project, "sync")
    return project


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ |= {"HUBKIT_HOME": str(work / "home"), "HUBKIT_REGISTRY": str(work / "registry")}
        project = prepared(work, count)
        whole = (project / "hubkit.lock").read_bytes()
        times: dict[str, list[tuple[float, float]]] = {
            name: [] for name in ("start", "new", "again", "check", "frozen")
        }
        for _ in range(ROUNDS):
            times["start"].append(timed(lambda: subprocess.run([sys.executable, "-c", START], check=True)))
            (project / "hubkit.lock").unlink()
            times["new"].append(timed(lambda: hubkit(project, "lock")))
            times["again"].append(timed(lambda: hubkit(project, "lock")))
            times["check"].append(timed(lambda: hubkit(project, "lock", "--check")))
            times["frozen"].append(timed(lambda: hubkit(project, "sync", "--frozen")))
            assert (project / "hubkit.lock").read_bytes() == whole
        pairs = zip(times["frozen"], times["start"], strict=True)
        beyond = [(one[0] - start[0], one[1] - start[1]) for one, start in pairs]
        said("start-up: the same imports", times["start"])
        said(f"lock of {count} stored adapters, from nothing", times["new"], "aim: under 2 s")
        said(f"lock of {count} stored adapters, unchanged", times["again"])
        said(f"lock --check of {count}", times["check"])
        said(f"sync --frozen of {count}, all synced", times["frozen"])
        said("  the same beyond start-up", beyond, "aim: 0.3 s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
