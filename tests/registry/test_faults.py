"""Faults that users met, each named by its number: what lost work, leaked, hung or said the wrong thing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from making import make_adapter
from registry.answering import Answering
from variants import refused, say

from hubkit.artifact.folder import open_adapter, write_adapter
from hubkit.documents.manifest import Manifest
from hubkit.errors import HubkitError
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.hub.huggingface import HuggingFaceRegistry
from hubkit.registry.opening import open_registry
from hubkit.registry.store.store import Store
from hubkit.registry.versions import resolve_revision
from hubkit.verbs.generate import generate
from hubkit.verbs.list import list as listed
from hubkit.verbs.pack import pack
from hubkit.verbs.pull import pull
from hubkit.verbs.push import push
from hubkit.verbs.serve import serve
from hubkit.verbs.verify import verify

WEIGHTS = "adapter_model.safetensors"
COMMIT, OTHER = "1" * 40, "2" * 40
TOKEN = "hf_canarycanarycanarycanary"


# 1: links

LINKS = [
    "README.md",
    "hubkit.json",
    "adapter_config.json",
    WEIGHTS,
    "tensors.json",
]


@pytest.mark.parametrize("name", LINKS)
def test_fault_01_no_link_is_followed(adapter: Path, registry: str, tmp_path: Path, name: str) -> None:
    """A link may lead to anything that its owner can read: it is neither published nor copied, dry or not."""
    secret = tmp_path / "secret"
    (adapter / name).rename(secret)
    (adapter / name).symlink_to(secret)
    for dry in (True, False):
        refused("HK-SYMLINK", push, adapter, "ana/chat", dry_run=dry)
    refused("HK-SYMLINK", pack, adapter, out=tmp_path / "new")
    assert not Path(registry).exists()
    assert not (tmp_path / "new").exists()


def test_fault_01_no_linked_folder_is_followed(adapter: Path, registry: str, tmp_path: Path) -> None:
    extra = tmp_path / "elsewhere"
    extra.mkdir()
    (extra / "a.json").write_text("{}")
    manifest = Manifest.read(adapter)
    inside = adapter / "more"
    shutil.copytree(extra, inside)
    entries = {entry.path: adapter / entry.path for entry in manifest.files} | {"more/a.json": inside / "a.json"}
    made = write_adapter(tmp_path / "linked" / "chat", manifest, {**entries, "README.md": b"# chat\n"})
    assert "more/a.json" in {entry.path for entry in made.files}
    place = tmp_path / "linked" / "chat"
    shutil.rmtree(place / "more")
    (place / "more").symlink_to(extra)
    refused("HK-SYMLINK", push, place, "ana/chat")
    refused("HK-SYMLINK", pack, place, out=tmp_path / "new")


def test_fault_01_a_snapshot_of_the_hubs_cache_is_packed(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """There every file is a link to a blob beside the snapshot: those mean what `hf download` fetched."""
    cache = tmp_path / "models--ana--chat"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for path in adapter.iterdir():
        blob = cache / "blobs" / hashlib.sha256(path.name.encode()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    pack(snapshot, out=tmp_path / "copied")
    open_adapter(tmp_path / "copied")
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to("/etc/hostname")
    refused("HK-SYMLINK", pack, snapshot, out=tmp_path / "other")


# 2: nothing is published that verify would refuse


def with_weights(adapter: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """The adapter with other tensors, and a manifest that vouches for them."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / WEIGHTS)
    edit(tensors)
    save_file(tensors, adapter / WEIGHTS)
    manifest = Manifest.read(adapter)
    files: dict[str, bytes | Path] = {entry.path: (adapter / entry.path).read_bytes() for entry in manifest.files}
    files["README.md"] = b"# chat\n"
    write_adapter(adapter, manifest, files, replace=True)
    return adapter


def half(tensors: dict[str, Any]) -> None:
    for name in sorted(tensors)[::2]:
        del tensors[name]


def emptied(tensors: dict[str, Any]) -> None:
    for name in [*tensors]:
        tensors[name] = tensors[name].reshape(-1)[:0].clone()


def wider(tensors: dict[str, Any]) -> None:
    import torch

    for name in [*tensors]:
        tensors[name] = torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("edit", "code"), [(dict.clear, "HK-KEYS"), (half, "HK-KEYS"), (emptied, "HK-SHAPE"), (wider, "HK-SHAPE")]
)
def test_fault_02_what_verify_refuses_is_not_published(
    adapter: Path, registry: str, tiny_llama: Path, edit: Callable[[dict[str, Any]], None], code: str
) -> None:
    with_weights(adapter, edit)
    refused(code, verify, adapter, base=str(tiny_llama))
    for dry in (True, False):
        refused(code, push, adapter, "ana/chat", dry_run=dry)
    assert not Path(registry).exists()


def test_fault_02_zeros_and_huge_values_are_said(adapter: Path, registry: str, tiny_llama: Path, capsys: Any) -> None:
    def odd(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if "lora_B" in name:
                tensors[name].zero_()
        tensors[min(tensors)].reshape(-1)[0] = 1e30

    with_weights(adapter, odd)
    for command in (["verify", adapter, "--base", tiny_llama], ["pack", adapter], ["push", adapter, "ana/chat"]):
        out = say(capsys, *command).out
        assert "nothing but zeros" in out, command
        assert "1e+30" in out, command


def test_fault_02_an_ordinary_adapter_gives_no_note(adapter: Path, tiny_llama: Path) -> None:
    assert verify(adapter, base=str(tiny_llama)).notes == ()


# 3: tags come before branches


@pytest.fixture
def place(tmp_path: Path) -> DirectoryRegistry:
    made = DirectoryRegistry(tmp_path / "place")
    made.create("ana/chat")
    return made


def test_fault_03_a_tag_comes_before_a_branch(place: DirectoryRegistry) -> None:
    first = place.commit("ana/chat", {"a.json": b"1"}, [], message="one", parent=None)
    second = place.commit("ana/chat", {"a.json": b"2"}, [], message="two", parent=None)
    refs = place.root / "repos/ana/chat/refs.json"  # as an older hubkit, or another tool, may have left it
    names = {"main": second, "v1.0.0": second, "stable": second}
    refs.write_text(json.dumps({"branches": names, "tags": {"v1.0.0": first, "stable": first}}))
    for spelling in ("v1.0.0", "1.0.0", "^1.0", "=1.0.0", "stable", "refs/tags/v1.0.0"):
        assert resolve_revision(place, "ana/chat", spelling).commit == first, spelling
    for name in ("v1.0.0", "stable"):
        assert place.resolve("ana/chat", name) == first
        assert place.resolve("ana/chat", f"refs/heads/{name}") == second
    assert place.resolve("ana/chat", None) == second


def test_fault_03_the_server_says_the_same(open_server: Any, tmp_path: Path) -> None:
    place = DirectoryRegistry(open_server.root)
    place.create("ana/twins")
    first = place.commit("ana/twins", {"a.json": b"1"}, [], message="one", parent=None)
    second = place.commit("ana/twins", {"a.json": b"2"}, [], message="two", parent=None)
    refs = place.root / "repos/ana/twins/refs.json"
    refs.write_text(json.dumps({"branches": {"main": second, "v1.0.0": second}, "tags": {"v1.0.0": first}}))
    remote = HuggingFaceRegistry(open_server.url, token="")
    assert remote.resolve("ana/twins", "v1.0.0") == first
    assert resolve_revision(remote, "ana/twins", "v1.0.0").commit == first


def test_fault_03_a_registry_of_another_make_is_not_asked_which_it_means(tmp_path: Path) -> None:
    with Answering() as server:
        model = "/api/models/ana/chat"
        both = [{"name": "v1.0.0", "targetCommit": COMMIT}], [{"name": "v1.0.0", "targetCommit": OTHER}]
        server.routes[f"{model}/refs"] = (200, {}, {"branches": both[0], "tags": both[1]})
        server.routes[f"{model}/revision/v1.0.0"] = (200, {}, {"sha": COMMIT})
        assert resolve_revision(HuggingFaceRegistry(server.url, token=""), "ana/chat", "v1.0.0").commit == OTHER


@pytest.mark.parametrize("name", ["v1.0.0", "1.0.0", "v2.0.0-rc.1", "taken"])
def test_fault_03_a_branch_is_not_called_like_a_version(place: DirectoryRegistry, name: str) -> None:
    tip = place.resolve("ana/chat")
    place.tag("ana/chat", "taken", tip)
    with pytest.raises(HubkitError) as caught:
        place.branch("ana/chat", name, tip)
    assert caught.value.code == ("HK-EXISTS" if name == "taken" else "HK-NAME")
    place.branch("ana/chat", "next", tip)
    refused("HK-EXISTS", place.tag, "ana/chat", "next", tip)


# 4: the store heals


def damage(path: Path, *, quietly: bool = False) -> None:
    """Change one byte of a read-only file; quietly: with the times it had."""
    before = path.stat()
    path.parent.chmod(0o755)
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    path.chmod(0o444)
    path.parent.chmod(0o555)
    if quietly:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("quietly", [False, True])
def test_fault_04_store_heals(adapter: Path, registry: str, quietly: bool) -> None:
    push(adapter, "ana/chat")
    first = pull("ana/chat")
    good = (first.path / WEIGHTS).read_bytes()
    damage(first.path / WEIGHTS, quietly=quietly)
    again = pull("ana/chat")
    assert (again.path / WEIGHTS).read_bytes() == good
    card = (first.path / "README.md").stat().st_size
    assert len(good) <= again.fetched <= len(good) + card, "what is whole is not fetched again"
    assert pull("ana/chat").fetched == 0
    assert stat.S_IMODE((again.path / WEIGHTS).stat().st_mode) == 0o444
    assert [path.read_bytes() != good for path in (Store().home / "quarantine").rglob("*") if path.is_file()] == [True]


def test_fault_04_an_exact_commit_heals_too(adapter: Path, registry: str) -> None:
    commit = push(adapter, "ana/chat").commit
    first = pull(f"ana/chat@{commit}")
    damage(first.path / "adapter_config.json")
    assert pull(f"ana/chat@{commit}").fetched > 0
    open_adapter(first.path)


def test_fault_04_a_stored_base_heals_and_is_not_run_damaged(
    adapter: Path, registry: str, published_base: str, tiny_llama: Path
) -> None:
    found = pull(published_base, base=True)
    before = generate("hello", base=published_base, max_new_tokens=4).text
    damage(found.path / "model.safetensors")
    refused("HK-FILES", generate, "hello", base=published_base, max_new_tokens=4, offline=True)
    assert generate("hello", base=published_base, max_new_tokens=4).text == before
    whole = (tiny_llama / "model.safetensors").read_bytes()
    assert (found.path / "model.safetensors").read_bytes() == whole


def test_fault_04_offline_says_what_is_damaged_and_the_pull_that_mends_it(adapter: Path, registry: str) -> None:
    push(adapter, "ana/chat")
    found = pull("ana/chat")
    damage(found.path / WEIGHTS)
    fault = refused("HK-FILES", pull, "ana/chat", offline=True)
    assert fault.have == [f"{WEIGHTS}: missing or damaged"]
    assert fault.fix == f"hubkit pull {found.reference}" or "hubkit pull" in fault.fix
    assert pull("ana/chat").fetched > 0
    pull("ana/chat", offline=True)


def test_fault_04_what_no_look_shows_verify_finds(
    adapter: Path, registry: str, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes that a disk lost leave size and times as they were: the seal is made to say so."""
    push(adapter, "ana/chat")
    found = pull("ana/chat")
    for command in (["verify", "ana/chat", "--base", tiny_llama], ["cache", "verify"]):
        damage(found.path / WEIGHTS)
        info = (found.path / WEIGHTS).lstat()
        seal = Store().home / "index" / "seals" / f"{found.digest.removeprefix('sha256:')}.json"
        marks = json.loads(seal.read_bytes())
        marks[WEIGHTS] = [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]
        seal.write_text(json.dumps(marks))
        assert pull("ana/chat").fetched == 0, "nobody can see it"
        done = say(capsys, *command)
        assert done.status == 1
        assert WEIGHTS in done.out + done.err
        assert not (found.path / WEIGHTS).exists(), "it is in quarantine"
        assert pull("ana/chat").fetched > 0
        assert say(capsys, "cache", "verify").status == 0


def test_fault_04_a_look_reads_nothing(adapter: Path, registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hubkit.registry.store import seals

    commit = push(adapter, "ana/chat").commit
    pull(f"ana/chat@{commit}")
    read: list[Path] = []

    def holds(folder: Path, file: Any) -> bool:
        read.append(folder)
        return True

    monkeypatch.setattr(seals, "_holds", holds)
    pull(f"ana/chat@{commit}")
    pull("ana/chat")
    assert read == []


# 5: the token goes to one origin


def test_fault_05_the_token_never_goes_to_another_origin(tmp_path: Path) -> None:
    big = bytes(range(256)) * 100
    oid = hashlib.sha256(big).hexdigest()
    with Answering() as server, Answering() as other:
        model, git = "/api/models/ana/chat", "/ana/chat.git/info/lfs"
        server.routes[f"{model}/revision/main"] = (200, {}, {"sha": OTHER})
        modes = [{"path": "w.safetensors", "uploadMode": "lfs", "shouldIgnore": False}]
        server.routes[f"{model}/preupload/main"] = (200, {}, {"files": modes})
        actions = {"upload": {"href": f"{other.url}/put"}, "verify": {"href": f"{other.url}/verify"}}
        row = {"oid": oid, "size": len(big), "actions": actions}
        server.routes[f"{git}/objects/batch"] = (200, {}, {"transfer": "basic", "objects": [row]})
        other.routes["/put"] = other.routes["/verify"] = (200, {"ETag": '"x"'}, {})
        server.routes[f"{model}/commit/main"] = (200, {}, {"commitOid": COMMIT})
        server.routes[f"{model}/commits/main"] = (200, {}, [{"id": COMMIT}, {"id": OTHER}])
        listed = {"type": "file", "path": "w.safetensors", "size": len(big), "oid": OTHER}
        listed["lfs"] = {"oid": oid, "size": len(big)}
        server.routes[f"{model}/tree/{COMMIT}"] = (200, {}, [listed])
        registry = HuggingFaceRegistry(server.url, token=TOKEN)
        made = registry.commit("ana/chat", {"w.safetensors": big}, [], message="m", parent=OTHER)
        assert made == COMMIT
        assert [path for path, _, _ in other.seen] == ["/put", "/verify"]
        assert other.seen[0][2] == big
        assert TOKEN not in repr(other.seen)
        assert all(headers.get("authorization") == f"Bearer {TOKEN}" for _, headers, _ in server.seen)


def test_fault_05_nor_after_a_redirect(tmp_path: Path) -> None:
    with Answering() as server, Answering() as other:
        for path in ("/api/models/ana/chat", "/api/repos/create"):
            server.routes[path] = (307, {"Location": f"{other.url}{path}"}, b"")
            other.routes[path] = (200, {}, {"sha": COMMIT, "url": "x"})
        registry = HuggingFaceRegistry(server.url, token=TOKEN)
        registry.resolve("ana/chat", None)
        refused("HK-REGISTRY", registry.create, "ana/chat")
        assert TOKEN not in repr(other.seen)


# 6: what is no registry


@pytest.mark.parametrize("text", ["localhost:8471/", "hub.corp.example/models", "registri/", "127.0.0.1:80/x"])
def test_fault_06_a_forgotten_scheme_makes_no_folder(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HUBKIT_REGISTRY", text)
    fault = refused("HK-REFERENCE", push, adapter, "ana/chat")
    scheme = "http" if text.startswith(("localhost", "127.")) else "https"
    assert fault.fix == f"{scheme}://{text}    or, for a directory, ./{text}"
    assert fault.status == 2
    assert not (tmp_path / text.partition("/")[0]).exists()
    monkeypatch.setenv("HUBKIT_REGISTRY", f"./{text}")
    assert push(adapter, "ana/chat").created


def test_fault_06_a_directory_that_is_there_needs_no_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    assert open_registry(None, "made").name.endswith("/made")
    (tmp_path / "file").write_text("x")
    refused("HK-REFERENCE", open_registry, None, "./file")


def test_fault_06_only_a_registry_is_served(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    never: Any = lambda address: pytest.fail("it serves")  # noqa: E731
    assert "mkdir" in refused("HK-NOT-FOUND", serve, tmp_path / "typo", port=0, ready=never).fix
    refused("HK-NOT-FOUND", serve, adapter / WEIGHTS, port=0, ready=never)
    refused("HK-REGISTRY", serve, tiny_llama, port=0, ready=never)
    assert not (tmp_path / "typo").exists()
    before = sorted(tiny_llama.iterdir())
    refused("HK-REGISTRY", DirectoryRegistry(tiny_llama).create, "ana/chat")
    assert sorted(tiny_llama.iterdir()) == before


# 8 and 9: the base's name


def test_fault_08_a_base_that_others_cannot_get_is_said(adapter: Path, tiny_llama: Path, registry: str) -> None:
    folder = open_adapter(adapter)
    assert folder.manifest.base is not None
    local = replace(folder.manifest, base=replace(folder.manifest.base, source="./llama"))
    entries: dict[str, bytes | Path] = {e.path: (adapter / e.path).read_bytes() for e in folder.manifest.files}
    write_adapter(adapter, local, {**entries, "README.md": b"# chat\n"}, replace=True)
    assert any("others cannot get its base" in note for note in push(adapter, "ana/chat").notes)


def test_fault_08_a_base_in_a_repository_is_not(adapter: Path, registry: str) -> None:
    assert push(adapter, "ana/chat").notes == ()


def test_fault_09_a_stored_base_is_found_by_its_content(
    adapter: Path, registry: str, published_base: str, tiny_llama: Path, tmp_path: Path
) -> None:
    from hubkit.verbs.export import export

    export(str(adapter), tmp_path / "peft")
    stored = pull(published_base, base=True)
    made = pack(tmp_path / "peft", base=str(tiny_llama), out=tmp_path / "new").manifest
    assert made.base is not None
    assert (made.base.source, made.base.revision) == (published_base, stored.commit)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == published_base
    assert f"base_model: {published_base}" in (tmp_path / "new" / "README.md").read_text()


def test_fault_09_what_a_configuration_names_is_kept_as_its_word(
    adapter: Path, registry: str, tiny_llama: Path, tmp_path: Path
) -> None:
    from hubkit.verbs.export import export

    export(str(adapter), tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/declared"
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    made = pack(tmp_path / "peft", base=str(tiny_llama), out=tmp_path / "new").manifest
    assert made.base is not None
    assert made.base.declared == "org/declared"
    again = pack(tmp_path / "new", base=str(tiny_llama), version="2.0.0").manifest
    assert again.base is not None
    assert again.base.declared == "org/declared"
    assert listed() == ()


def test_fault_09_a_repositorys_name_is_not_lost_to_a_folders(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    made = pack(adapter, base=str(tiny_llama), version="2.0.0").manifest
    assert made.base is not None
    assert made.base.source == "ana/base"
    assert make_adapter(tmp_path / "again", tiny_llama).is_dir()
