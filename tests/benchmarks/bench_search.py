"""Search among many: ``python tests/benchmarks/bench_search.py [COUNT]``, 10,000 adapters by default. Whole processes.

COUNT repositories in a directory, and as many artifacts in a store, each with a manifest and commit of its own.
Measured: `search` that reads everything for the first time, again, and after one repository changed, each beside the
start of an interpreter that imports the same modules and does nothing: what is beyond that has to be under 0.2 s. For
comparison: the time that looking at COUNT files takes alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from projects import GOLDEN

from hubkit.documents.manifest import Manifest
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.store.index import Source, _file_name

ROUNDS = 7
AIM = 0.2
MODULES = (
    "import hubkit.cli, hubkit.cli.search, hubkit.registry.store.finding, hubkit.registry.directory.finding, "
    "hubkit.registry.opening, hubkit.registry.directory.directory"
)


def dump(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def hashed(folder: Path, data: bytes, digits: int = 64) -> str:
    name = hashlib.sha256(data).hexdigest()[:digits]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return name


def prepared(work: Path, count: int) -> tuple[Path, Path]:
    """(registry, home): the layout of both, without the waiting for the disk that commits and pulls do."""
    registry, home = work / "registry", work / "home"
    DirectoryRegistry(registry).create("ana/first")
    golden = Manifest.read(GOLDEN / "lora")
    for number in range(count):
        words = ("chat", "sql", "story", "code", "legal")[number % 5]
        repo, data = f"org-{number % 97}/{words}-{number}", replace(golden, name=f"{words}-{number}").to_bytes()
        folder = registry / "repos" / repo
        digest = hashlib.sha256(data).hexdigest()
        (folder / "objects" / digest[:2]).mkdir(parents=True)
        (folder / "objects" / digest[:2] / digest).write_bytes(data)
        files = {"hubkit.json": [len(data), digest, "0" * 40, False]}
        tree = hashed(folder / "trees", dump({"files": files}))
        commit = {"author": "", "message": "m", "parents": [], "tree": tree}
        tip = hashed(folder / "commits", dump(commit), 40)
        (folder / "repo.json").write_bytes(dump({"private": False}))
        (folder / "refs.json").write_bytes(dump({"branches": {"main": tip}, "tags": {}}))
        stored = home / "store" / "sha256" / digest
        stored.mkdir(parents=True)
        (stored / "hubkit.json").write_bytes(data)
        source = Source("adapter", "https://huggingface.co", repo)
        facts = {**vars(source), "commit": tip, "digest": f"sha256:{digest}"}
        facts["files"] = [["hubkit.json", len(data), f"sha256:{digest}"]]
        (home / "index" / "pulled").mkdir(parents=True, exist_ok=True)
        (home / "index" / "pulled" / _file_name((*vars(source).values(), tip))).write_bytes(dump(facts))
    return registry, home


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def process(home: Path, *words: str) -> None:
    environment = {**os.environ, "HUBKIT_HOME": str(home)}
    subprocess.run([sys.executable, *words], env=environment, stdout=subprocess.DEVNULL, check=True)


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        registry, home = prepared(Path(folder), count)
        empty = Path(folder) / "empty"
        for name, words in (("directory", ["--registry", str(registry)]), ("store", ["--local"])):
            line = ["-m", "hubkit", "search", "legal", *words]
            first = timed(lambda line=line: process(home, *line))  # type: ignore[misc]
            pairs = []
            for _ in range(ROUNDS):
                start = timed(lambda: process(empty, "-c", MODULES))
                pairs.append(timed(lambda line=line: process(home, *line)) - start)  # type: ignore[misc]
            again = statistics.median(pairs)
            mark = "met" if again <= AIM else "MISSED"
            print(f"{name:10s} first time {first:6.2f} s   again {again:6.3f} s beyond the start   aim {AIM} {mark}")
        refs = registry / "repos" / "org-1" / "sql-1" / "refs.json"
        shutil.copy(refs, f"{refs}.new")
        os.replace(f"{refs}.new", refs)
        changed = timed(lambda: process(home, "-m", "hubkit", "search", "legal", "--registry", str(registry)))
        start = timed(lambda: process(empty, "-c", MODULES))
        paths = [str(path) for path in registry.glob("repos/*/*/refs.json")]
        look = timed(lambda: [os.stat(path) for path in paths])
        print(f"{'one changed':10s} {changed - start:6.3f} s beyond the start; a look at each file alone {look:6.3f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
