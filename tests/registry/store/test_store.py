"""The store: what is in it is whole, verified, read-only and named by its content, whoever lies and whatever dies."""

from __future__ import annotations

import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hubkit.documents.manifest import BaseFingerprint, FileEntry, Manifest
from hubkit.documents.schema import sha256
from hubkit.errors import HubkitError
from hubkit.registry.api import Arrived, Refs, RemoteFile
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.hub.huggingface import HuggingFaceRegistry
from hubkit.registry.store.selection import MAX_DOCUMENT
from hubkit.registry.store.store import ADAPTER_LIMITS, Store, StoredEntry, digest_files

if TYPE_CHECKING:
    from registry.conftest import HubServer

CONFIG = b'{"peft_type": "LORA", "r": 1}'


def tensors(count: int = 8, fill: int = 0) -> bytes:
    """A safetensors file with one float32 vector."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([fill]) * (4 * count)


def packed(version: str = "0.1.0", /, **files: bytes) -> dict[str, bytes]:
    """The files of an adapter with its manifest; keywords replace dots by two underscores."""
    content = {"adapter_model.safetensors": tensors(), "adapter_config.json": CONFIG}
    content |= {name.replace("__", "."): data for name, data in files.items()}
    entries = tuple(FileEntry(path, len(data), sha256(data)) for path, data in sorted(content.items()))
    base = BaseFingerprint(None, None, sha256(b"layout"), sha256(b"weights"), {}, {}, None, None)
    manifest = Manifest(kind="adapter", name="chat", version=version, method="lora", base=base, files=entries)
    return {**content, "hubkit.json": manifest.to_bytes()}


class Counting(DirectoryRegistry):
    """A directory that counts what is asked of it; `files` and `download` may be made to lie."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls: list[str] = []
        self.listing: list[RemoteFile] | None = None
        self.swap: dict[str, bytes] = {}
        self.down = False

    def resolve(self, repo: str, revision: str | None = None) -> str:
        self.calls.append("resolve")
        if self.down:
            raise HubkitError("HK-OFFLINE", "the registry does not answer")
        return super().resolve(repo, revision)

    def files(self, repo: str, commit: str) -> tuple[RemoteFile, ...]:
        self.calls.append("files")
        return super().files(repo, commit) if self.listing is None else tuple(self.listing)

    def refs(self, repo: str) -> Refs:
        if self.down:
            raise HubkitError("HK-OFFLINE", "the registry does not answer")
        return super().refs(repo)

    def download(
        self, repo: str, commit: str, path: str, dest: Path, progress: Arrived | None = None, *, resume: bool = False
    ) -> str:
        self.calls.append(f"download {path}")
        if path not in self.swap:
            return super().download(repo, commit, path, dest, progress, resume=resume)
        dest.write_bytes(self.swap[path])
        if progress is not None:
            progress(len(self.swap[path]))
        return sha256(self.swap[path])

    @property
    def downloads(self) -> list[str]:
        return sorted(call.removeprefix("download ") for call in self.calls if call.startswith("download"))


@pytest.fixture
def registry(tmp_path: Path) -> Counting:
    made = Counting(tmp_path / "registry")
    made.create("ana/chat")
    return made


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "home")
    yield made
    # whatever a test did, nothing unfinished is left and what is in the store cannot be written
    assert [path for path in (made.home / "staging").glob("*") if path.is_dir()] == []
    for place, _, names in os.walk(made.home / "store" / "sha256"):
        assert place == str(made.home / "store" / "sha256") or stat.S_IMODE(os.stat(place).st_mode) == 0o555
        for name in names:
            assert stat.S_IMODE(os.lstat(Path(place) / name).st_mode) == 0o444


def publish(registry: DirectoryRegistry, files: Mapping[str, bytes], delete: tuple[str, ...] = ()) -> str:
    return registry.commit("ana/chat", files, delete, message="m", parent=None)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(code: str, call: Any, *args: Any, **named: Any) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        call(*args, **named)
    assert caught.value.code == code, caught.value.render()
    return caught.value


def test_an_adapter_is_stored_under_its_manifests_digest(registry: Counting, store: Store) -> None:
    files = packed()
    commit = publish(
        registry, {**files, "README.md": b"# card", ".gitattributes": b"*.x filter=lfs\n", "n.txt": b"note"}
    )
    seen: list[tuple[int, int]] = []
    found = store.pull(registry, "ana/chat", progress=lambda done, total: seen.append((done, total)))
    assert found.commit == commit
    assert found.digest == sha256(files["hubkit.json"]) == Manifest.read(found.path).digest
    assert found.path == store.home / "store" / "sha256" / found.digest.removeprefix("sha256:")
    assert content(found.path) == {**files, "README.md": b"# card"}
    assert [file.path for file in found.files] == sorted(files)
    total = sum(map(len, files.values())) + len(b"# card")
    assert found.fetched == total
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_what_is_stored_is_not_downloaded_again(registry: Counting, store: Store) -> None:
    first = publish(registry, packed())
    registry.tag("ana/chat", "v0.1.0", first)
    pulled = store.pull(registry, "ana/chat", "v0.1.0")
    registry.calls.clear()
    again = store.pull(registry, "ana/chat", "^0.1")
    assert (again.path, again.fetched, again.revision) == (pulled.path, 0, "v0.1.0")
    assert registry.downloads == []
    assert "files" not in registry.calls
    registry.calls.clear()
    assert store.pull(registry, "ana/chat", first).path == pulled.path
    assert registry.calls == []
    publish(registry, {"README.md": b"# edited on the Hub"})
    edited = store.pull(registry, "ana/chat")
    assert (edited.digest, edited.fetched) == (pulled.digest, 0)
    assert registry.downloads == []
    other = Counting(registry.root.parent / "mirror")
    other.create("bob/chat")
    other.commit("bob/chat", packed(), [], message="m", parent=None)
    assert store.pull(other, "bob/chat").path == pulled.path
    assert other.downloads == []


def test_a_plain_peft_repository_brings_its_adapter_only(registry: Counting, store: Store) -> None:
    taken = {"adapter_model.safetensors": tensors(), "adapter_config.json": CONFIG, "tokenizer.json": b"{}"}
    left = {
        "training_args.bin": pickle.dumps({}),
        "optimizer.pt": b"PK\x03\x04",
        "run.py": b"print()",
        "x.png": b"\x89PNG",
        "checkpoint-5/adapter_config.json": CONFIG,
        "checkpoint-5/adapter_model.safetensors": tensors(9),
        ".gitattributes": b"",
        "runs/events.tfevents": b"x",
    }
    publish(registry, {**taken, **left, "README.md": b"# card"})
    found = store.pull(registry, "ana/chat")
    assert content(found.path) == {**taken, "README.md": b"# card"}
    assert found.digest == digest_files(found.files)
    lines = "".join(f"{path} {len(data)} {sha256(data)}\n" for path, data in sorted(taken.items()))
    assert found.digest == sha256(lines.encode())
    checkpoint = store.pull(registry, "ana/chat", folder="checkpoint-5")
    assert set(content(checkpoint.path)) == {"adapter_config.json", "adapter_model.safetensors"}


def test_several_adapters_in_one_repository(registry: Counting, store: Store) -> None:
    top, sub = packed(), packed("0.2.0", adapter_model__safetensors=tensors(3))
    publish(registry, {**top, **{f"sub/sql/{path}": data for path, data in sub.items()}})
    assert content(store.pull(registry, "ana/chat").path) == top
    assert content(store.pull(registry, "ana/chat", folder="sub/sql").path) == sub
    assert "sub/sql" in " ".join(refused("HK-NOT-FOUND", store.pull, registry, "ana/chat", folder="sub/sqll").have)
    publish(registry, {}, tuple(top))
    assert "sub/sql" in refused("HK-NOT-ADAPTER", store.pull, registry, "ana/chat").fix
    assert sorted(entry.folder or "" for entry in store.list()) == ["", "sub/sql"]


def test_listing_and_manifest_must_agree_before_anything_is_downloaded(registry: Counting, store: Store) -> None:
    files = packed(tokenizer__json=b"{}", vocab__json=b"{}")
    del files["vocab.json"]
    files["tokenizer.json"] = b"[]"
    files["adapter_config.json"] = CONFIG + b" "
    publish(registry, {**files, "extra.safetensors": tensors(), "deep/pytorch_model.bin": b"x"})
    fault = refused("HK-FILES", store.pull, registry, "ana/chat")
    text = "\n".join(fault.have)
    for path in ("tokenizer.json", "vocab.json", "adapter_config.json", "extra.safetensors", "deep/pytorch_model.bin"):
        assert path in text
    assert registry.downloads == []


@pytest.mark.parametrize("path", ["adapter_model.safetensors", "adapter_config.json"])
def test_other_bytes_of_the_same_length_are_refused(registry: Counting, store: Store, path: str) -> None:
    files = packed()
    commit = publish(registry, files)
    swapped = tensors(fill=1) if path.endswith(".safetensors") else CONFIG.replace(b"1", b"2")
    assert len(swapped) == len(files[path])
    registry.swap[path] = swapped
    refused("HK-FILES", store.pull, registry, "ana/chat")
    # a registry that knows no digest of the file, as a Hub of its small ones: the manifest does
    registry.listing = [replace(file, sha256=None) for file in registry.files("ana/chat", commit)]
    fault = refused("HK-FILES", store.pull, registry, "ana/chat")
    assert path in fault.have[0]
    registry.swap[path] = swapped[:-1]
    refused("HK-FILES", store.pull, registry, "ana/chat")
    registry.swap[path] = swapped * 1000
    refused("HK-LIMIT", store.pull, registry, "ana/chat")
    registry.swap.clear()
    assert content(store.pull(registry, "ana/chat").path) == files


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "tokenizer.json", "notes.txt", "LICENSE", "spiece.model"]
)
@pytest.mark.parametrize("data", [pickle.dumps({"a": 1}), b"PK\x03\x04zip", b"\x93NUMPY\x01"])
def test_pickles_are_refused_under_any_name(registry: Counting, store: Store, name: str, data: bytes) -> None:
    publish(registry, {"adapter_model.safetensors": tensors(), "adapter_config.json": CONFIG, name: data})
    refused("HK-PICKLE", store.pull, registry, "ana/chat")
    publish(registry, packed(**{name.replace(".", "__"): data}))
    refused("HK-PICKLE", store.pull, registry, "ana/chat")


def test_weights_that_are_pickles_only_are_refused_unread(registry: Counting, store: Store) -> None:
    publish(registry, {"adapter_model.bin": pickle.dumps({}), "adapter_config.json": CONFIG})
    assert "adapter_model.bin" in refused("HK-PICKLE", store.pull, registry, "ana/chat").have
    assert registry.downloads == []
    publish(registry, packed(evil__bin=b"x"), ("adapter_model.bin",))
    refused("HK-PICKLE", store.pull, registry, "ana/chat")


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("adapter_model.safetensors", tensors()[:-1], "HK-SAFETENSORS"),
        ("adapter_model.safetensors", b"", "HK-SAFETENSORS"),
        ("adapter_config.json", b'{"r": 1, "r": 2}', "HK-JSON"),
        ("adapter_config.json", b'{"r": NaN}', "HK-JSON"),
        ("setup__py", b"import os", "HK-FORBIDDEN-FILE"),
        ("run__txt", b"#!/bin/sh\n", "HK-FORBIDDEN-FILE"),
    ],
)
def test_formats_are_checked(registry: Counting, store: Store, name: str, data: bytes, code: str) -> None:
    publish(registry, packed(**{name.replace(".", "__"): data}))
    refused(code, store.pull, registry, "ana/chat")


@pytest.mark.parametrize(
    "path", ["../evil.json", "/evil.json", "a\\evil.json", "evil\u202e.json", ".git/x.json", "CON.json"]
)
def test_hostile_names_of_a_lying_listing_are_refused(registry: Counting, store: Store, path: str) -> None:
    commit = publish(registry, {"adapter_model.safetensors": tensors(), "adapter_config.json": CONFIG})
    listing = registry.files("ana/chat", commit)
    registry.listing = [*listing, RemoteFile(path, 2)]
    registry.swap[path] = b"{}"
    if "/" in path:
        # below a folder it is no part of a plain adapter; above it, neither
        assert path not in content(store.pull(registry, "ana/chat").path)
    else:
        refused("HK-NAME", store.pull, registry, "ana/chat")
    assert list(store.home.parent.rglob("*evil*")) == []


def test_hostile_names_of_a_manifest_are_refused(registry: Counting, store: Store) -> None:
    entries = (FileEntry("../evil.json", 2, sha256(b"{}")), FileEntry("a.json", 2, sha256(b"{}")))
    document = {**json.loads(packed()["hubkit.json"]), "files": [entry.to_document() for entry in entries]}
    manifest = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    commit = publish(registry, {"hubkit.json": manifest, "a.json": b"{}"})
    registry.listing = [*registry.files("ana/chat", commit), RemoteFile("../evil.json", 2)]
    registry.swap["../evil.json"] = b"{}"
    with pytest.raises(HubkitError) as caught:
        store.pull(registry, "ana/chat")
    assert caught.value.code in ("HK-NAME", "HK-SCHEMA")
    assert list(store.home.parent.rglob("*evil*")) == []


def test_limits_name_every_excess_and_hold_before_the_download(registry: Counting, store: Store) -> None:
    publish(registry, packed())
    tight = replace(ADAPTER_LIMITS, max_files=2, max_bytes=100, max_file_bytes=60)
    fault = refused("HK-LIMIT", store.pull, registry, "ana/chat", limits=tight)
    assert len(fault.have) >= 3
    assert registry.downloads == []


def test_an_endless_manifest_is_not_read(registry: Counting, store: Store) -> None:
    publish(registry, {**packed(), "hubkit.json": b" " * (MAX_DOCUMENT + 1)})
    fault = refused("HK-LIMIT", store.pull, registry, "ana/chat")
    assert "hubkit.json" in fault.where
    assert registry.downloads == []


def test_offline_serves_what_names_meant(registry: Counting, store: Store) -> None:
    first = publish(registry, packed())
    registry.tag("ana/chat", "v1.0.0", first)
    second = publish(registry, packed("1.1.0"))
    registry.tag("ana/chat", "v1.1.0", second)
    old, new = store.pull(registry, "ana/chat", "v1.0.0"), store.pull(registry, "ana/chat")
    store.pull(registry, "ana/chat", "^1.1")
    registry.down = True
    for revision, found in (
        (None, new),
        ("v1.0.0", old),
        ("1.0.0", old),
        ("^1", new),
        ("~1.0", old),
        (first, old),
        (second[:10], new),
        ("v1.1.0", new),
    ):
        assert store.pull(registry, "ana/chat", revision, offline=True).path == found.path
    assert store.pull(registry, "ana/chat", first).path == old.path
    for revision in ("v2.0.0", "^2", "dev", "0" * 40):
        assert "v1.0.0" in refused("HK-OFFLINE", store.pull, registry, "ana/chat", revision, offline=True).have[0]
    refused("HK-OFFLINE", store.pull, registry, "ana/other", offline=True)
    refused("HK-OFFLINE", store.pull, registry, "ana/chat", folder="x", offline=True)
    refused("HK-OFFLINE", store.pull_base, registry, "ana/chat", offline=True)
    assert "--offline" in refused("HK-OFFLINE", store.pull, registry, "ana/chat").fix
    for damaged in (store.home / "index").rglob("*.json"):
        damaged.write_bytes(b"{")
    refused("HK-OFFLINE", store.pull, registry, "ana/chat", offline=True)
    registry.down = False
    assert store.pull(registry, "ana/chat").fetched == 0


def test_a_damaged_artifact_is_fetched_again(registry: Counting, store: Store) -> None:
    files = packed()
    commit = publish(registry, files)
    path = store.pull(registry, "ana/chat").path
    os.chmod(path, 0o755)
    (path / "adapter_config.json").unlink()
    assert "hubkit pull" in refused("HK-FILES", store.pull, registry, "ana/chat", offline=True).fix
    assert store.list() == ()
    assert store.pull(registry, "ana/chat", commit).fetched > 0
    assert content(path) == files
    store.remove(store.pull(registry, "ana/chat").digest)
    assert not path.exists()
    store.remove("sha256:" + "0" * 64)


def test_list(registry: Counting, store: Store) -> None:
    assert store.list() == ()
    commit = publish(registry, packed())
    registry.tag("ana/chat", "v1.0.0", commit)
    found = store.pull(registry, "ana/chat", "^1")
    size = sum(file.size for file in found.files)
    reference = f"{registry.name}/ana/chat@{commit}"
    assert store.list() == (
        StoredEntry(
            reference,
            "adapter",
            registry.name,
            "ana/chat",
            None,
            commit,
            found.digest,
            size,
            ("^1", "v1.0.0"),
            found.path,
        ),
    )


def test_an_interrupt_leaves_nothing(registry: Counting, store: Store) -> None:
    publish(registry, packed(adapter_model__safetensors=tensors(1 << 20)))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.pull(registry, "ana/chat", progress=stop)
    assert not (store.home / "index").exists()
    assert list((store.home / "store").rglob("*.json")) == []


SLOW = """
import os, sys, time
from pathlib import Path
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.store.store import Store
class Slow(DirectoryRegistry):
    def download(self, *args, **named):
        found = super().download(*args, **named)
        os.write(1, b"arrived" + bytes([10]))
        time.sleep(float(sys.argv[3]))
        return found
print(Store(Path(sys.argv[2])).pull(Slow(Path(sys.argv[1])), "ana/chat").digest, flush=True)
"""


def _process(registry: Counting, store: Store, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, str(registry.root), str(store.home), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_kill_nine_leaves_only_what_the_next_pull_sweeps(registry: Counting, store: Store) -> None:
    files = packed()
    publish(registry, files)
    process = _process(registry, store, 60)
    assert process.stdout is not None
    assert process.stdout.readline() == "arrived\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [path for path in (store.home / "staging").glob("*") if path.is_dir()] != []
    assert store.list() == ()
    assert content(store.pull(registry, "ana/chat").path) == files


def test_a_pull_beside_does_not_sweep_the_living(registry: Counting, store: Store) -> None:
    files = packed()
    publish(registry, files)
    process = _process(registry, store, 0.5)
    assert process.stdout is not None
    assert process.stdout.readline() == "arrived\n"
    found = store.pull(registry, "ana/chat")
    assert process.stdout.read().splitlines()[-1] == found.digest
    assert process.wait() == 0
    process.stdout.close()
    assert content(found.path) == files


def test_many_locks_are_remembered_at_once(store: Store, tmp_path: Path) -> None:
    """And those that are gone are forgotten beside it, none of the others with them."""
    kept = [tmp_path / f"{number}.lock" for number in range(12)]
    for path in kept:
        path.touch()

    def work(number: int) -> None:
        store.needs.register(tmp_path / f"gone.{number}")
        store.needs.forget_gone()
        store.needs.register(kept[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(kept))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.needs.forget_gone()
    assert store.needs.documents() == tuple(sorted(kept))


def test_many_pulls_at_once(registry: Counting, store: Store) -> None:
    publish(registry, packed())
    start, found = threading.Barrier(6), []

    def pull() -> None:
        start.wait()
        found.append(Store(store.home).pull(registry, "ana/chat"))
        assert set(content(found[-1].path)) == set(packed())

    threads = [threading.Thread(target=pull) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len({one.path for one in found}) == 1


# bases


def test_a_base_brings_config_tokenizer_and_safetensors_only(registry: Counting, store: Store) -> None:
    taken = {"config.json": b'{"x": 1e999}', "tokenizer.json": b"{}", "model.safetensors": tensors(), "vocab.txt": b"a"}
    left = {
        "pytorch_model.bin": b"x",
        "model.fp16.safetensors": tensors(1),
        "original/consolidated.safetensors": b"x",
        "tf_model.h5": b"x",
        "README.md": b"#",
        "onnx/model.onnx": b"x",
    }
    publish(registry, {**taken, **left})
    found = store.pull_base(registry, "ana/chat")
    assert content(found.path) == taken
    assert found.digest == digest_files(found.files)
    refused("HK-NOT-ADAPTER", store.pull, registry, "ana/chat")


def test_a_sharded_base(registry: Counting, store: Store) -> None:
    shards = {f"model-{n}-of-2.safetensors": tensors(n) for n in (1, 2)}
    index = {"metadata": {}, "weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    taken = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode(), **shards}
    publish(registry, {**taken, "model-3-of-2.safetensors": tensors(3)})
    assert content(store.pull_base(registry, "ana/chat").path) == taken
    publish(registry, {}, ("model-2-of-2.safetensors",))
    assert "model-2-of-2.safetensors" in refused("HK-FILES", store.pull_base, registry, "ana/chat").have[0]
    for names, code in (
        ({"a": "../x.safetensors"}, "HK-FILES"),
        ({"a": "pytorch_model.bin"}, "HK-PICKLE"),
        ({}, "HK-JSON"),
        ([], "HK-JSON"),
        ({"a": 1}, "HK-JSON"),
    ):
        publish(registry, {"model.safetensors.index.json": json.dumps({"weight_map": names}).encode()})
        refused(code, store.pull_base, registry, "ana/chat")


def test_a_base_of_pickles_is_refused(registry: Counting, store: Store) -> None:
    publish(registry, {"config.json": b"{}", "pytorch_model.bin": b"x"})
    assert refused("HK-PICKLE", store.pull_base, registry, "ana/chat").have == ["pytorch_model.bin"]
    publish(registry, {}, ("pytorch_model.bin",))
    refused("HK-MISSING", store.pull_base, registry, "ana/chat")
    publish(registry, {}, ("config.json",))
    refused("HK-NOT-MODEL", store.pull_base, registry, "ana/chat")


def test_over_http_the_same_artifact(hub_server: HubServer, registry: Counting, store: Store) -> None:
    files = packed()
    publish(registry, {**files, "README.md": b"# card"})
    remote = HuggingFaceRegistry(hub_server.url, token=hub_server.tokens["ana"])
    remote.create("ana/over-http")
    commit = remote.commit("ana/over-http", {**files, "README.md": b"# card"}, [], message="m", parent=None)
    remote.tag("ana/over-http", "v0.1.0", commit)
    far, near = Store(store.home.parent / "far"), store.pull(registry, "ana/chat")
    found = far.pull(remote, "ana/over-http", "^0.1")
    assert found.digest == near.digest
    assert content(found.path) == content(near.path)
    assert far.pull(remote, "ana/over-http", "^0.1").fetched == 0
    started = time.monotonic()
    dead = HuggingFaceRegistry("http://127.0.0.1:9")
    refused("HK-OFFLINE", far.pull, dead, "ana/over-http")
    assert time.monotonic() - started < 5
    assert far.pull(remote, "ana/over-http", "^0.1", offline=True).path == found.path


def test_home_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "mine"))
    assert Store().home == tmp_path / "mine"
    monkeypatch.delenv("HUBKIT_HOME")
    assert Store().home == Path("~/.cache/hubkit").expanduser()
