"""Pull and push beside `hf download` and `hf upload`, to and from one served registry: whole processes, in turn.

python tests/benchmarks/bench_transfer.py [MB ...]       64 and 1000 by default

Every download begins with an empty store, every upload with an empty repository and another last byte: nothing is there
already. hubkit hashes what it gets, `hf` does not. Both use the same server and the same session library.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROUNDS = 5
WANTED = 1.1
BIN = Path(sys.executable).parent


def base_of(folder: Path, megabytes: int) -> Path:
    """A Llama of random weights in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = 1024
    rows = megabytes * 10**6 // 2 // wide
    config = LlamaConfig(vocab_size=rows - 16 * wide, hidden_size=wide, intermediate_size=4 * wide, num_hidden_layers=1)
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(folder, max_shard_size="10GB")
    return folder


def turned(folder: Path, number: int) -> None:
    """Changes the weights' last bytes: another content of the same size."""
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(number.to_bytes(8, "little"))


def timed(line: list[str], environment: Mapping[str, str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(line, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return time.perf_counter() - start


def compared(what: str, ours: Callable[[], float], theirs: Callable[[], float]) -> None:
    found: list[tuple[float, float]] = []
    for turn in range(ROUNDS + 1):
        if turn % 2:
            mine = ours()
            peers = theirs()
        else:
            peers = theirs()
            mine = ours()
        found.append((mine, peers))
    pairs = found[1:]  # the first warms the disk's cache
    mine, peers = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{what:24s} {mine:7.2f} s   hf {peers:7.2f} s   ratio {ratio:.2f} (wanted {WANTED})", flush=True)


def beside(work: Path, megabytes: int, url: str) -> None:
    hf, hubkit = str(BIN / "hf"), str(BIN / "hubkit")
    base, repo, count = base_of(work / f"base-{megabytes}", megabytes), f"ana/base-{megabytes}", iter(range(10**6))
    at = {"HUBKIT_REGISTRY": url, "HF_ENDPOINT": url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    timed([hubkit, "push", str(base), repo], {**at, "HUBKIT_HOME": str(work / "home")})

    def fresh(line: list[str]) -> float:
        home = work / f"home-{next(count)}"
        try:
            return timed(line, {**at, "HUBKIT_HOME": str(home), "HF_HOME": str(home)})
        finally:
            shutil.rmtree(home)

    def sent(line: Callable[[str], list[str]]) -> float:
        number = next(count)
        turned(base, number)
        home = work / f"home-{number}"
        return timed(line(f"{repo}-{number}"), {**at, "HUBKIT_HOME": str(home), "HF_HOME": str(home)})

    pull, download = [hubkit, "pull", "--base", repo], [hf, "download", repo]
    compared(f"pull of {megabytes} MB", lambda: fresh(pull), lambda: fresh(download))
    compared(
        f"push of {megabytes} MB",
        lambda: sent(lambda name: [hubkit, "push", str(base), name]),
        lambda: sent(lambda name: [hf, "upload", name, str(base), "."]),
    )


def stored(work: Path, url: str) -> None:
    """A pull of what is stored, by its full commit, beside the start of the command."""
    hubkit, at = str(BIN / "hubkit"), {"HUBKIT_REGISTRY": url, "HUBKIT_HOME": str(work / "home")}
    line = [hubkit, "pull", "--base", "ana/base-64"]
    said = subprocess.run(line, env={**os.environ, **at}, capture_output=True, text=True, check=True).stdout
    exact = next(word for word in said.split() if "@" in word)
    times = [(timed([*line[:-1], exact], at), timed([hubkit, "pull", "--help"], at)) for _ in range(ROUNDS)]
    beyond = statistics.median(a - b for a, b in times)
    print(f"pull of what is stored, by its commit: {beyond:.2f} s beyond start-up (wanted 0.15)", flush=True)


def main(sizes: list[int]) -> None:
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "registry").mkdir()
        line = [str(BIN / "hubkit"), "serve", str(work / "registry"), "--port", "0"]
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
            assert server.stdout is not None
            url = server.stdout.readline().split()[-1]
            try:
                for size in sizes:
                    beside(work, size, url)
                if 64 in sizes:
                    stored(work, url)
            finally:
                server.terminate()


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [64, 1000])
