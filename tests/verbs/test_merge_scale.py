"""Merges that are large or killed: what a dry run says of them, how much memory they take, how they go on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from making import make_adapter
from variants import names, refused, say, tree

from hubkit.artifact.folder import tensors_bytes, write_adapter
from hubkit.artifact.identity.digest import fingerprint_folder
from hubkit.documents.arguments import size_of
from hubkit.documents.manifest import Manifest, Plugin
from hubkit.methods.host import host
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.verbs.merge import Merged, merge

SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 MB in eight files or so: enough for a kill to find a merge at work."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("scale") / "base"
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, tie_word_embeddings=False, **SIZES))
    model.save_pretrained(folder, max_shard_size="3MB")
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return make_adapter(base.parent / "adapter", base)


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from hubkit.verbs.merge import merge
import hubkit.tensors.weights.merging, hubkit.tensors.weights.estimate, hubkit.methods.reading, jsonschema, rfc8785
base, adapter, work, count = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
def begun(out):
    child = os.fork()
    if not child:
        try:
            merge(base, adapter, out)
            os._exit(0)
        finally:
            os._exit(1)
    return child
def merged(out):
    assert os.waitpid(begun(out), 0)[1] == 0
    return {p.name: p.read_bytes() for p in out.iterdir()}
start = time.perf_counter()
want = merged(work / "out")
taken, random, reused, killed = time.perf_counter() - start, random.Random(5), 0, 0
for number in range(count):
    out = work / str(number) / "out"
    out.parent.mkdir()
    child = begun(out)
    time.sleep(random.uniform(0.1, 1) * taken)
    os.kill(child, signal.SIGKILL)
    ended = os.waitpid(child, 0)[1]
    if out.exists():
        assert {p.name: p.read_bytes() for p in out.iterdir()}.keys() == want.keys()
        continue
    killed += 1
    noted = [p for p in out.parent.glob(".out.*/.finished.json")]
    left = [(note.read_text(), p) for note in noted for p in note.parent.glob("*.safetensors")]
    inodes = {p.name: p.stat().st_ino for text, p in left if p.name in text}
    assert merged(out) == {**want, "hubkit.json": want["hubkit.json"]}, number
    assert all((out / name).stat().st_ino == inode for name, inode in inodes.items())
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    reused += len(inodes)
print(killed, reused)
"""


@pytest.mark.parametrize("count", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_merge_that_is_killed_goes_on(count: int, base: Path, adapter: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLS, str(base), str(adapter), str(tmp_path), str(count)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    killed, reused = map(int, done.stdout.split())
    assert killed >= count // 8  # a busy machine may finish before most of them
    assert reused >= (1 if count > 4 else 0)


@pytest.mark.slow
def test_another_merge_takes_nothing_over(base: Path, adapter: Path, tmp_path: Path) -> None:
    """What a merge in bfloat16 left is no use to one in fp32, and goes away."""
    script = (
        KILLS.split("start = ")[0]
        .replace("merge(base", "kill(); merge(base")
        .replace("out)\n", "out, dtype='bfloat16')\n", 1)
    )
    script += "merged(work / 'out')"
    kill = (
        "import hubkit.tensors.weights.finished as f\nadd = f.Finished._add\ndone = []\ndef after(*a):\n    add(*a)\n"
        "    done.append(a)\n    len(done) == 3 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "def kill():\n    f.Finished._add = after\n"
    )
    subprocess.run(
        [sys.executable, "-c", script.replace("def begun", kill + "def begun"), base, adapter, tmp_path, "0"]
    )
    (left,) = (path for path in tmp_path.glob(".out.*") if path.is_dir())
    assert len(json.loads((left / ".finished.json").read_text())["shards"]) == 3
    merge(base, adapter, tmp_path / "out")
    assert names(tmp_path) == {"out"}
    merge(base, adapter, tmp_path / "fresh", name="out")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_no_room_is_known_before_the_first_byte(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size // 2))
    monkeypatch.setattr("hubkit.tensors.weights.merging.write_file", lambda *_: pytest.fail("something was written"))
    for dry in (False, True):
        error = refused("HK-DISK", merge, base, adapter, tmp_path / "out", dry_run=dry)
        assert error.have == [f"{size // 2} bytes free"]
    assert say(capsys, "merge", adapter, "-b", base, "-o", tmp_path / "out").refusal() == "HK-DISK"
    assert merge(base, adapter, tmp_path / "out", dtype="bfloat16", dry_run=True).plan.disk <= size / 2  # type: ignore[union-attr]
    assert names(tmp_path) == set()


def test_a_file_that_is_missing(base: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    sorted((tmp_path / "base").glob("*.safetensors"))[2].unlink()
    for dry in (False, True):
        refused("HK-BASE-FILES", merge, tmp_path / "base", adapter, tmp_path / "out", dry_run=dry)
    assert names(tmp_path) == {"base"}


def test_an_adapter_that_changes_meanwhile(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its values are read where its file is."""
    from hubkit.tensors.files.shards import write_file

    shutil.copytree(adapter, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"

    def changing(*arguments: Any) -> str:
        data = bytearray(weights.read_bytes())
        data[-8:] = bytes(8)
        with weights.open("r+b") as file:
            file.write(data)
        return write_file(*arguments)

    monkeypatch.setattr("hubkit.tensors.weights.merging.write_file", changing)
    error = refused("HK-IO", merge, base, tmp_path / "adapter", tmp_path / "out")
    assert "adapter_model.safetensors" in error.where
    assert names(tmp_path) == {"adapter"}


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), (" 1.5 gib ", 3 << 29), ("7", 7), (12, 12), ("2kb", 2000)],
)
def test_sizes(text: int | str, size: int) -> None:
    assert size_of(text, "x") == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-5GB", "5 parsecs", "5,0GB", "1e9", "nan", 0, "0.0000001KB"])
def test_what_is_no_size(text: int | str, base: Path, adapter: Path, tmp_path: Path) -> None:
    assert refused("HK-OPTIONS", merge, base, adapter, tmp_path / "out", max_shard_size=text).status == 2


def test_files_of_another_size_hold_the_same_tensors(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole: Merged = merge(base, adapter, tmp_path / "whole")
    said = say(capsys, "merge", adapter, "-b", base, "-o", tmp_path / "one", "--max-shard-size", "1GB")
    assert said.status == 0
    assert (tmp_path / "one" / "model.safetensors").is_file()
    planned = merge(base, adapter, tmp_path / "x", max_shard_size="2MB", dry_run=True).plan
    assert planned is not None
    merge(base, adapter, tmp_path / "many", max_shard_size="2MB")
    assert set(planned.shards) == {path.name for path in (tmp_path / "many").glob("*.safetensors")}
    assert planned.disk == whole.size - sum(8 + header(path) for path in (tmp_path / "whole").glob("*.safetensors"))
    digests = {fingerprint_folder(tmp_path / name).fingerprint.weights for name in ("whole", "one", "many")}
    assert len(digests) == 1


def header(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def test_a_dry_run_says_what_is_needed(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dora = make_adapter(tmp_path / "dora", base, method=host().load("dora"), rank=2)
    said = say(capsys, "merge", dora, "-b", base, "-o", tmp_path / "out", "--dry-run")
    assert re.search(r"memory  \S+ MB beside", said.out)
    assert re.search(r"disk    26\.8 MB in \d+ weight files; .* free", said.out)
    assert re.search(r"time    about \d+ s", said.out)
    assert "56 weights are changed as a whole, in memory" in said.out
    document = json.loads(say(capsys, "merge", adapter, "-b", base, "-o", tmp_path / "out", "--dry-run", "--json").out)
    assert document["plan"]["whole"] == []
    assert sum(document["plan"]["shards"].values()) == document["plan"]["disk"] == document["size"]
    assert not (tmp_path / "out").exists()


def test_a_plan_pulls_no_weights(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a base in a registry a dry run reads what is small and the headers, and says what it says of a folder."""
    from hubkit.registry.store.store import Store

    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "home"))
    place = str(tmp_path / "registry")
    registry = DirectoryRegistry(tmp_path / "registry")
    registry.create("ana/base")
    registry.commit("ana/base", {path.name: path for path in base.iterdir()}, (), message="x", parent=None)
    monkeypatch.setattr(DirectoryRegistry, "download", lambda *_: pytest.fail("a file was pulled"))
    here = merge(base, adapter, tmp_path / "out", dry_run=True).plan
    there = merge("ana/base", adapter, tmp_path / "out", registry=place, dry_run=True).plan
    assert here is not None
    assert there is not None
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert weights - (1 << 20) < there.pull <= weights
    assert (there.shards, there.disk, there.memory) == (here.shards, here.disk, here.memory)
    assert Store().list() == ()
    said = say(capsys, "merge", adapter, "-b", "ana/base", "-o", tmp_path / "out", "--registry", place, "--dry-run")
    assert "the base was not pulled: 26.8 MB are, before anything is written" in said.out
    assert not (tmp_path / "out").exists()


def test_a_base_of_the_registry_is_read_where_it_was_pulled(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "home"))
    registry = DirectoryRegistry(tmp_path / "registry")
    registry.create("ana/base")
    registry.commit("ana/base", {path.name: path for path in base.iterdir()}, (), message="x", parent=None)
    merge("ana/base", adapter, tmp_path / "out", registry=str(tmp_path / "registry"))
    sizes = [path.stat().st_size for path in (tmp_path / "home").rglob("*.safetensors")]
    assert sorted(sizes) == sorted(path.stat().st_size for path in base.glob("*.safetensors"))


SHAPES = {
    "self_attn.q_proj": (8192, 8192),
    "self_attn.k_proj": (1024, 8192),
    "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192),
    "mlp.gate_proj": (28672, 8192),
    "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
}
"""Of a layer of Llama 70B."""


def hollow(path: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of zeros that takes no room on the disk."""
    entries, offset = {}, 0
    for name, shape in tensors.items():
        stop = offset + 2 * (shape[0] if len(shape) == 1 else shape[0] * shape[1])
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + offset)


def llama_70b(folder: Path) -> Path:
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for layer in range(80):
        tensors: dict[str, tuple[int, ...]] = {f"model.layers.{layer}.{n}.weight": s for n, s in SHAPES.items()}
        tensors |= {f"model.layers.{layer}.{n}_layernorm.weight": (8192,) for n in ("input", "post_attention")}
        if layer == 0:
            tensors |= {"model.embed_tokens.weight": (128256, 8192), "model.norm.weight": (8192,)}
            tensors["lm_head.weight"] = (128256, 8192)
        hollow(folder / f"{layer}.safetensors", tensors)
        weight_map |= dict.fromkeys(tensors, f"{layer}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "num_hidden_layers": 80,
    }
    config |= {"intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "tie_word_embeddings": False}))
    return folder


def adapter_of_zeros(folder: Path, base: Path, rank: int = 16) -> Path:
    """Of all linear layers of `llama_70b`, 414 MB; for the very weights that the base's files hold, nobody knows."""
    record = fingerprint_folder(base, source="ana/base", at_most=0)
    assert record.fingerprint.weights is None
    method = host().load("lora")
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(80):
        for name, (out, features) in SHAPES.items():
            place = f"base_model.model.model.layers.{layer}.{name}"
            tensors |= {f"{place}.lora_A.weight": (rank, features), f"{place}.lora_B.weight": (out, rank)}
    hollow(folder.parent / "weights", tensors)
    manifest = Manifest(
        kind="adapter",
        name="zeros",
        version="0.1.0",
        method=method.name,
        plugin=Plugin(method.offer.distribution, method.offer.version),
        config={"rank": rank, "alpha": 32.0},
        base=dataclasses.replace(record.fingerprint, weights="sha256:" + hashlib.sha256(b"").hexdigest()),
    )
    files: dict[str, bytes | Path] = {"tensors.json": tensors_bytes(record.tensors)}
    files["adapter_model.safetensors"] = folder.parent / "weights"
    write_adapter(folder, manifest, files)
    return folder


@pytest.mark.slow
def test_a_plan_for_70b_takes_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama_70b(tmp_path / "base")
    adapter = adapter_of_zeros(tmp_path / "adapter", base)
    line = ["merge", adapter, "-b", base, "-o", tmp_path / "out", "--dry-run", "--json", "--max-shard-size", "5GB"]
    code = (
        "import json, resource, shutil, sys\nfree = shutil.disk_usage('/')\n"
        "shutil.disk_usage = lambda _: free._replace(free=1 << 40)\n"
        "from hubkit.cli import run\nassert run(sys.argv[1:]) == 0\nused = resource.getrusage(resource.RUSAGE_SELF)\n"
        "lines = open('/proc/self/status').read().splitlines()\n"  # ru_maxrss begins with what this process has
        "memory = next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) / 1024\n"
        "print(json.dumps([used.ru_utime + used.ru_stime, memory]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, line)], text=True, stdout=subprocess.PIPE, check=True)
    *document, figures = done.stdout.strip().splitlines()
    plan = json.loads("".join(document))["plan"]
    seconds, memory = json.loads(figures)
    print(f"a plan for 70B: {seconds:.1f} CPU s, {memory:.0f} MB at most")
    assert seconds < 5
    assert memory < 1000
    assert plan["disk"] == plan["unread"] == 141107412992
    assert plan["memory"] < 300 << 20
    assert len(plan["shards"]) == 30


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_memory_is_what_the_plan_says(method: str, tmp_path: Path) -> None:
    """On a base of 1.3 GB; of LoRA at most 300 MB beyond the imports."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 3, "num_attention_heads": 32}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, tie_word_embeddings=False, **shape)).bfloat16()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(tmp_path / "base", max_shard_size="500MB")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", method=host().load(method), rank=16)
    plan = merge(tmp_path / "base", adapter, tmp_path / "out", dry_run=True).plan
    assert plan is not None
    bench = Path(__file__).parent.parent / "benchmarks" / "bench_merge.py"
    command = [sys.executable, bench, "--child", tmp_path / "base", adapter, tmp_path / "out"]
    done = subprocess.run([*map(str, command)], text=True, stdout=subprocess.PIPE, check=True)
    more = json.loads(done.stdout)["more"] * 2**20
    print(f"{method}: {more / 2**20:.0f} MB, planned {plan.memory / 2**20:.0f}")
    assert more <= plan.memory
    assert plan.memory <= 300 << 20 or method == "dora"
