"""pull, list, inspect: what was pushed comes back, into an empty store, read-only, and once."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from making import make_adapter

from hubkit.documents.manifest import Manifest
from hubkit.errors import HubkitError
from hubkit.registry.opening import open_registry
from hubkit.verbs.inspect import inspect
from hubkit.verbs.list import list as list_verb
from hubkit.verbs.pull import pull
from hubkit.verbs.push import push


def test_what_was_pushed_is_pulled(adapter: Path, registry: str) -> None:
    pushed = push(adapter, "ana/chat")
    pulled = pull("ana/chat@^0.1")
    assert (pulled.commit, pulled.digest, pulled.revision) == (pushed.commit, pushed.digest, "v0.1.0")
    assert pulled.reference == f"ana/chat@{pushed.commit}"
    assert {path.name: path.read_bytes() for path in pulled.path.iterdir() if path.name != "README.md"} == {
        path.name: path.read_bytes() for path in adapter.iterdir() if path.name != "README.md"
    }
    assert pulled.fetched > 0
    assert pull("ana/chat").fetched == 0
    assert not os.stat(pulled.path / "hubkit.json").st_mode & 0o222


def test_a_folder_is_not_pulled(adapter: Path) -> None:
    with pytest.raises(HubkitError) as refusal:
        pull(str(adapter))
    assert (refusal.value.code, refusal.value.status) == ("HK-REFERENCE", 2)


def test_offline_serves_what_was_pulled(adapter: Path, registry: str) -> None:
    push(adapter, "ana/chat")
    with pytest.raises(HubkitError) as refusal:
        pull("ana/chat", offline=True)
    assert refusal.value.code == "HK-OFFLINE"
    first = pull("ana/chat")
    os.rename(registry, f"{registry}.away")
    assert pull("ana/chat", offline=True).path == first.path


def test_progress_ends_with_everything(adapter: Path, registry: str) -> None:
    push(adapter, "ana/chat")
    seen: list[tuple[int, int]] = []
    pulled = pull("ana/chat", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (pulled.fetched, pulled.fetched)


def test_a_base_is_pulled_by_its_name_or_its_adapters(adapter: Path, registry: str, published_base: str) -> None:
    push(adapter, "ana/chat")
    base = pull(published_base, base=True)
    assert (base.path / "model.safetensors").is_file()
    assert pull("ana/chat", base=True).path == base.path  # the manifest names ana/base


@pytest.mark.parametrize("source", [None, "base", "./base", "https://ana@host/base"])
def test_an_adapter_of_a_base_in_no_repository(adapter: Path, registry: str, source: str | None) -> None:
    manifest = Manifest.read(adapter)
    assert manifest.base is not None
    manifest = replace(manifest, base=replace(manifest.base, source=source))
    (adapter / "hubkit.json").write_bytes(manifest.to_bytes())
    push(adapter, "ana/chat")
    with pytest.raises(HubkitError) as refusal:
        pull("ana/chat", base=True)
    assert refusal.value.code == "HK-BASE-MISSING"
    assert list_verb() == ()


def test_the_store_and_a_registry_are_listed(adapter: Path, registry: str, tiny_llama: Path) -> None:
    assert list_verb() == ()
    push(adapter, "ana/chat")
    make_adapter(adapter, tiny_llama, seed=1, version="0.2.0")
    push(adapter, "ana/chat")
    pull("ana/chat@v0.1.0")
    (stored,) = list_verb()
    assert (stored.kind, stored.versions) == ("adapter", ("v0.1.0",))
    assert list_verb("ben") == ()
    (remote,) = list_verb("ana/", remote=True)
    assert (remote.reference, remote.versions) == ("ana/chat", ("v0.1.0", "v0.2.0"))
    assert list_verb("ben", registry=registry) == ()


def test_inspect_reads_a_folder_and_a_repository_alike(adapter: Path, registry: str) -> None:
    pushed = push(adapter, "ana/chat")
    here, there = inspect(str(adapter)), inspect("ana/chat")
    assert there.reference == f"ana/chat@{pushed.commit}"
    assert (here.digest, here.size, here.tensors, here.parameters) == (
        there.digest,
        there.size,
        there.tensors,
        there.parameters,
    )
    assert here.tensors == 28  # two layers of seven linears, two tensors each
    assert here.dtypes == ("F32",)
    assert list_verb() == ()  # nothing was downloaded for it


def test_inspect_needs_a_manifest(registry: str) -> None:
    place = open_registry(None, registry)
    place.create("ana/plain")
    with pytest.raises(HubkitError) as refusal:
        inspect("ana/plain")
    assert refusal.value.code == "HK-NOT-ADAPTER"
