"""Merging beside its peers, each side in a fresh process: wall and CPU seconds, peak memory.

python tests/benchmarks/bench_merge.py MODEL_FOLDER
    small: beside peft's load, merge_and_unload, save
python tests/benchmarks/bench_merge.py --scale FOLDER [GB]
    a synthetic Llama of 8B, made in FOLDER (16 GB and as much again; fewer layers where there is less room), beside a
    warm `cp` and one pass of sha256 over the same files
python tests/benchmarks/bench_merge.py --mergekit PYTHON MODEL_FOLDER
    beside mergekit, which the interpreter PYTHON has
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ROUNDS = 5
SHARD = 5 * 10**9
HIDDEN, INNER, VOCABULARY, KEYS = 4096, 14336, 128256, 1024
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""
ADAPTER = """
import sys
from pathlib import Path
from making import make_adapter
from hubkit.methods.host import host
make_adapter(Path(sys.argv[1]), Path(sys.argv[2]), method=host().load("lora"), rank=16, alpha=32.0)
"""


def size_of(shape: Sequence[int]) -> int:
    count = 2
    for n in shape:
        count *= n
    return count


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Tensor -> shape of a Llama of 8B with so many of its 32 layers."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LAYER.items()}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make_llama(folder: Path, layers: int) -> Path:
    """Writes the base in bf16, in shards of 5 GB; one block of random values, over and over."""
    import torch

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(1 << 25, generator=generator) * 0.02).bfloat16().view(torch.uint8).numpy()
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes(layers).items():
        if sum(map(size_of, files[-1].values())) + size_of(shape) > SHARD:
            files.append({})
        files[-1][name] = shape
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        header, offset = {}, 0
        for name, shape in tensors.items():
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size_of(shape)]}
            offset += size_of(shape)
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for turn, shape in enumerate(tensors.values()):
                left, at = size_of(shape), 4096 * turn % len(block)
                while left:
                    piece = block[at : at + left]
                    out.write(piece.tobytes())
                    left, at = left - len(piece), 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": 32,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def timed(command: Sequence[object], home: Path | None = None) -> tuple[float, float, float, str]:
    """Wall seconds, CPU seconds, peak resident MB and stdout of one process."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", **({"HUBKIT_HOME": str(home)} if home else {})}
    start = time.perf_counter()
    process = subprocess.Popen([*map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    said = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, said


def anonymous() -> float:
    """Anonymous memory of this process, MB."""
    # not smaps_rollup: it walks every page table, which costs more than the merge that is watched
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


@contextmanager
def watched(peak: list[float]) -> Iterator[None]:
    """Puts into `peak` the most anonymous memory there is during the block."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    done.set()
    thread.join()


def child(base: str, adapter: str, out: str) -> None:
    """One merge in this process, with what it takes beyond the imports."""
    import hubkit.engines.merged
    import hubkit.methods.reading
    import hubkit.tensors.weights.merging  # noqa: F401
    from hubkit.compat.python import leave
    from hubkit.verbs.merge import merge

    before = anonymous()
    peak = [before]
    with watched(peak):
        merge(base, adapter, out)
    print(json.dumps({"imported": before, "more": peak[0] - before}))
    leave(0, [sys.stdout])


def adapter_of(base: Path, folder: Path, home: Path) -> Path:
    """A random adapter of rank 16 on all linear layers; the base's digests are known afterwards."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    timed([sys.executable, "-c", ADAPTER, folder, base], home)
    return folder


def machine() -> str:
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model name", "model\t"))
    ]
    kind = ", ".join(dict.fromkeys(names))
    return f"{platform.machine()}, {kind}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def hashed(files: Sequence[Path]) -> float:
    start, buffer = time.perf_counter(), bytearray(1 << 22)
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb", 0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
    return time.perf_counter() - start


def scale(place: Path, gigabytes: float) -> None:
    """The large merge, and what copying and hashing as much costs."""
    layer, ends = sum(map(size_of, LAYER.values())), 2 * size_of((VOCABULARY, HIDDEN))
    room = (shutil.disk_usage(place).free - (3 << 30)) / 2
    layers = int(min((gigabytes * 1e9 - ends) / layer, (room - ends) / layer, 32))
    size = (layer * layers + ends) / 1e9
    print(f"base of {size:.1f} GB, {layers} of 32 layers" + ("" if layers == 32 else ", for want of room or as asked"))
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        work = Path(scratch)
        base = make_llama(work / "base", layers)
        adapter = adapter_of(base, work / "adapter", work / "home")
        files = sorted(base.glob("*.safetensors"))
        time.sleep(1)
        merge = [sys.executable, __file__, "--child", base, adapter, work / "out"]

        def ours(home: Path) -> tuple[float, float, float, str]:
            hashed(files)  # as warm as memory allows
            done = timed(merge, home)
            shutil.rmtree(work / "out")
            return done

        def theirs() -> tuple[float, float, float, float]:
            hashed(files)
            (work / "copy").mkdir()
            copy = timed(["cp", *files, work / "copy"])
            start = time.perf_counter()
            subprocess.run(["sync", "-f", str(work / "copy")], check=True)
            synced = time.perf_counter() - start
            shutil.rmtree(work / "copy")
            cpu = time.process_time()
            digests = hashed(files)
            return copy[0] + digests, copy[1] + time.process_time() - cpu, copy[0], synced

        first = ours(work / "fresh")
        print(f"first merge, which also hashes the base: {first[0]:.1f} s, {first[1]:.1f} CPU s", flush=True)
        ours_, theirs_ = [], []
        for turn in range(ROUNDS):
            pair: list[Callable[[], object]] = [
                lambda: ours_.append(ours(work / "home")),
                lambda: theirs_.append(theirs()),
            ]
            for side in pair if turn % 2 else pair[::-1]:
                side()
            print(
                f"merge {ours_[-1][0]:6.1f} s {ours_[-1][1]:6.1f} CPU s {ours_[-1][3].strip()}   cp + sha256"
                f" {theirs_[-1][0]:6.1f} s {theirs_[-1][1]:6.1f} CPU s (cp {theirs_[-1][2]:.1f} s, sync after it"
                f" {theirs_[-1][3]:.1f} s)   ratio {ours_[-1][0] / theirs_[-1][0]:.2f}   load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
        pairs = [*zip(ours_, theirs_, strict=True)]
        print(
            f"median ratio {statistics.median(a[0] / b[0] for a, b in pairs):.2f} (aim 1.5), of CPU seconds "
            f"{statistics.median(a[1] / b[1] for a, b in pairs):.2f}; with the copy on the disk, too, "
            f"{statistics.median(a[0] / (b[0] + b[3]) for a, b in pairs):.2f}; anonymous memory beyond the imports "
            f"{max(json.loads(a[3])['more'] for a in ours_):.0f} MB (300)"
        )


def small(model: Path, mergekit: str | None = None) -> None:
    """Beside peft, or mergekit, on one model: the same adapter, from process to process."""
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        adapter = adapter_of(model, work / "adapter", work / "home")
        (work / "theirs.py").write_text(PEFT)
        peer: list[object] = [sys.executable, work / "theirs.py", model, adapter, work / "theirs"]
        if mergekit:
            (work / "merge.yml").write_text(
                f"models: [{{model: {model.absolute()}+{adapter}}}]\nmerge_method: passthrough\ndtype: bfloat16\n"
            )
            cache = ["--lora-merge-cache", work / "cache", "--lora-merge-dtype", "bfloat16"]
            peer = [Path(mergekit).parent / "mergekit-yaml", work / "merge.yml", work / "theirs", *cache]
        sides: dict[str, list[object]] = {
            "torch": [sys.executable, "-c", "import torch"],
            "ours": [sys.executable, "-m", "hubkit", "merge", adapter, "-b", model, "-o", work / "ours"],
            "peer": peer,
        }
        timed(sides["ours"], work / "home")  # digests of the base are known
        found: dict[str, list[tuple[float, float, float, str]]] = {name: [] for name in sides}
        for _ in range(ROUNDS):
            for name, command in sides.items():
                for out in ("ours", "theirs", "cache") if name != "torch" else ():
                    if out != ("ours" if name == "peer" else "theirs"):
                        shutil.rmtree(work / out, ignore_errors=True)
                found[name].append(timed(command, work / "home"))
        for name, runs in found.items():
            figures = [(run[:3], peers[:3]) for run, peers in zip(runs, found["peer"], strict=True)]
            wall, cpu, memory = (statistics.median(ours[n] for ours, _ in figures) for n in range(3))
            ratio = [statistics.median(ours[n] / peers[n] for ours, peers in figures) for n in range(3)]
            print(
                f"{name:6s} {wall:6.2f} s {cpu:6.2f} CPU s {memory:6.0f} MB   of the peer's"
                f" {ratio[0]:.2f} {ratio[1]:.2f} {ratio[2]:.2f}"
            )
        print(f"wanted 0.27 of its time, 0.40 of its memory; {differing(work / 'ours', work / 'theirs')} values differ")


def differing(one: Path, other: Path) -> int:
    from safetensors.torch import load_file

    mine, peers = (
        {k: v for f in sorted(p.glob("*.safetensors")) for k, v in load_file(f).items()} for p in (one, other)
    )
    return sum(int((mine[name] != peers[name]).sum()) for name in mine if name in peers)


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(*sys.argv[2:])
    elif sys.argv[1] == "--scale":
        scale(Path(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 16.1)
    elif sys.argv[1] == "--mergekit":
        small(Path(sys.argv[3]), sys.argv[2])
    else:
        small(Path(sys.argv[1]))
