"""Bundles: the same bytes everywhere; whatever was done to one is refused before anything of it is stored."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from projects import make_project, put

from hubkit.documents.bundle import Bundle
from hubkit.documents.manifest import FileEntry
from hubkit.documents.schema import sha256
from hubkit.errors import HubkitError
from hubkit.registry.store.archive import open_archive
from hubkit.verbs.add import add
from hubkit.verbs.bundle import bundle
from hubkit.verbs.lock import lock
from hubkit.verbs.sync import sync


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of a published base, a published adapter, a folder, and a mix of three folders; bundled beside it."""
    work = tmp_path_factory.mktemp("bundled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HUBKIT_HOME", str(work / "home"))
        patch.setenv("HUBKIT_REGISTRY", str(work / "registry"))
        project = make_project(work / "project")
        for name in ("mix", "lora", "dora", "full"):
            put(name, project / name)
        add(project / "mix", recipe=project)
        bundle(project, out=work / "all.tar", base=True)
    return work


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, with what it names in its registry and its store."""
    monkeypatch.setenv("HUBKIT_HOME", str(made / "home"))
    monkeypatch.setenv("HUBKIT_REGISTRY", str(made / "registry"))
    return Path(shutil.copytree(made / "project", tmp_path / "project"))


@pytest.fixture
def archive(made: Path, tmp_path: Path) -> Path:
    """A copy of the bundle."""
    return Path(shutil.copy(made / "all.tar", tmp_path / "all.tar"))


def refused(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubkitError:
    """Read into an empty store and an empty folder: nothing may be in either afterwards."""
    home, target = tmp_path / "empty-home", tmp_path / "target"
    monkeypatch.setenv("HUBKIT_HOME", str(home))
    target.mkdir(exist_ok=True)
    with pytest.raises(HubkitError) as caught:
        sync(target, bundle=path, offline=True)
    stored = [path for path in home.rglob("*") if path.is_file()] if home.exists() else []
    assert (stored, list(target.iterdir())) == ([], [])
    return caught.value


def test_it_holds_everything_that_the_lock_names_and_tar_reads_it(archive: Path, project: Path) -> None:
    with tarfile.open(archive) as file:
        members = file.getmembers()
        names = [one.name for one in members]
        data = {one.name: file.extractfile(one).read() for one in members}  # type: ignore[union-attr]
    assert names[:2] == ["bundle.json", "hubkit.lock"]
    assert data["hubkit.lock"] == (project / "hubkit.lock").read_bytes()
    contents = Bundle.from_bytes(data["bundle.json"], "x")
    assert [entry.path for entry in contents.members()] == names[1:]
    assert all(sha256(data[entry.path]) == entry.sha256 for entry in contents.members())
    folders = [one.folder.rpartition("/")[2].rpartition("-")[0] for one in contents.artifacts]
    assert sorted(filter(None, folders)) == ["chat", "full", "lora", "mix", "sql"]  # dora is sql, by its digest
    assert {(one.mode, one.mtime, one.uid, one.uname) for one in members} == {(0o644, 0, 0, "")}
    assert {one.license for one in contents.artifacts} == {"apache-2.0", None}


def test_the_same_bytes_from_two_folders_and_hash_seeds(project: Path, archive: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "deeper"
    shutil.copytree(project, other)
    for file in other.rglob("*"):
        os.utime(file, (1, 1))
    for seed in ("1", "2"):
        out = tmp_path / f"{seed}.tar"
        code = f"import hubkit; hubkit.bundle({str(other)!r}, out={str(out)!r}, base=True)"
        home = {"PYTHONHASHSEED": seed, "HUBKIT_HOME": str(tmp_path / f"home{seed}")}
        subprocess.run([sys.executable, "-c", code], env={**os.environ, **home}, check=True)
        assert out.read_bytes() == archive.read_bytes()


def test_any_changed_byte_is_seen(archive: Path, tmp_path: Path) -> None:
    """Headers, padding, contents, the end: a bundle is one string of bytes."""
    sound = archive.read_bytes()
    spots = {0, 100, 124, 148, 156, 157, 257, 345, 500, 512, len(sound) - 1, len(sound) - 1024, len(sound) - 1025}
    spots |= set(range(0, len(sound), 1499))
    for spot in sorted(spots):
        archive.write_bytes(sound[:spot] + bytes([sound[spot] ^ 1]) + sound[spot + 1 :])
        with pytest.raises(HubkitError):
            open_archive(archive)
    archive.write_bytes(sound)
    open_archive(archive)


def rewritten(path: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], object]) -> None:
    """The archive with other members, as anybody's tar would write it."""
    with tarfile.open(path) as file:
        members = [(one, file.extractfile(one).read()) for one in file.getmembers()]  # type: ignore[union-attr]
    change(members)
    out = io.BytesIO()
    long = any(len(info.name) > 256 for info, _ in members)
    form = tarfile.GNU_FORMAT if long else tarfile.USTAR_FORMAT
    with tarfile.open(fileobj=out, mode="w", format=form) as file:
        for info, data in members:
            file.addfile(info, io.BytesIO(data))
    path.write_bytes(out.getvalue())


def link(kind: bytes, target: str) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        info = tarfile.TarInfo(members[3][0].name)
        info.type, info.linkname = kind, target
        members[3] = (info, b"")

    return change


def renamed(name: str) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[3][0].name = name

    return change


HOSTILE: dict[str, tuple[Callable[[list[tuple[tarfile.TarInfo, bytes]]], object], str]] = {
    "traversal": (renamed("../../evil"), "a file named '../../evil'"),
    "absolute": (renamed("/etc/passwd"), "a file named '/etc/passwd'"),
    "symbolic link": (link(tarfile.SYMTYPE, "/etc/passwd"), "a symbolic link"),
    "hard link": (link(tarfile.LNKTYPE, "hubkit.lock"), "a hard link"),
    "device": (link(tarfile.CHRTYPE, ""), "a device"),
    "pipe": (link(tarfile.FIFOTYPE, ""), "a pipe"),
    "folder": (link(tarfile.DIRTYPE, ""), "a folder"),
    "twice": (lambda members: members.insert(4, members[3]), "a file named 'adapters/"),
    "one more at the end": (lambda members: members.append(members[3]), "which nobody listed"),
    "one less": (lambda members: members.pop(5), "a file named 'adapters/"),
    "another order": (lambda members: members.reverse(), "not with bundle.json"),
    "another format": (renamed("adapters/" + "x" * 300), "not with bundle.json"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives(name: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, word = HOSTILE[name]
    rewritten(archive, change)
    error = refused(archive, tmp_path, monkeypatch)
    assert error.code == "HK-BUNDLE"
    assert any(word in line for line in error.have), error.have


def listing(path: Path, change: Callable[[str], str]) -> None:
    """The archive with another table of contents, its header mended."""

    def edit(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        text = change(members[0][1].decode())
        members[0][0].size = len(text.encode())
        members[0] = (members[0][0], text.encode())

    rewritten(path, edit)


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("hubkit/bundle/1", "hubkit/bundle/2", "HK-NEWER"),
        ('"folder": "base"', '"folder": "../base"', "HK-SCHEMA"),
        ('"path": "adapter_config.json"', '"path": "../adapter_config.json"', "HK-NAME"),
        ('"path": "hubkit.lock"', '"path": "other.lock"', "HK-BUNDLE"),
        ('"size": 590', '"size": 9007199254740991', "HK-LIMIT"),
        ('"size": 590', '"size": 591', "HK-BUNDLE"),
        ('"kind": "base"', '"kind": "adapter"', "HK-BUNDLE"),
        ("  ", "   ", "HK-BUNDLE"),
    ],
)
def test_tables_of_contents_that_lie(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, code: str
) -> None:
    listing(archive, lambda text: text.replace(old, new, 1))
    assert refused(archive, tmp_path, monkeypatch).code == code


def test_a_bomb_is_refused_by_its_size(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of zeros that takes no room on the disk, where a header of 8 EiB says it is to be believed."""
    info = tarfile.TarInfo("bundle.json")
    info.size, info.mode, info.mtime = 1 << 40, 0o644, 0
    archive.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(archive, 1 << 40)
    assert refused(archive, tmp_path, monkeypatch).code in ("HK-LIMIT", "HK-BUNDLE")


def test_other_files_are_no_bundles(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = archive.read_bytes()
    for data, word in (
        (gzip.compress(sound), "a compressed archive; a bundle is none"),
        (b"", "no tar archive"),
        (b"hello", "no tar archive"),
        (bytes(4096), "no tar archive"),
        (sound[:700], "bundle.json is cut off"),
        (sound[:-1024], "it is cut off"),
        (sound + bytes(512), "behind its last file"),
    ):
        archive.write_bytes(data)
        error = refused(archive, tmp_path, monkeypatch)
        assert error.code == "HK-BUNDLE"
        assert error.have[0].startswith(word), error.have
    archive.unlink()
    assert refused(archive, tmp_path, monkeypatch).code == "HK-MISSING"


def test_a_bundle_that_lacks_an_adapter_of_its_lock(
    project: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubkit.registry.store.archive import write_archive

    whole = open_archive(archive).bundle
    chat = next(one for one in whole.artifacts if one.folder.startswith("adapters/chat"))
    less = Bundle(whole.lock, tuple(one for one in whole.artifacts if one != chat))
    sources = {one.folder: tmp_path / "out" / one.folder for one in less.artifacts}
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "out", filter="data")
    write_archive(tmp_path / "less.tar", less, (project / "hubkit.lock").read_bytes(), sources, replace=False)
    error = refused(tmp_path / "less.tar", tmp_path, monkeypatch)
    assert (error.code, error.have) == ("HK-BUNDLE", [f"chat: {chat.digest} is not in it"])


def test_nothing_is_left_of_a_bundle_that_cannot_be_written(
    project: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubkitError) as caught:
        bundle(project, out=archive)
    assert caught.value.code == "HK-EXISTS"
    before = archive.read_bytes()
    put("full", project / "sql")
    with pytest.raises(HubkitError) as caught:
        bundle(project, out=archive, replace=True)
    assert caught.value.code == "HK-LOCK-DRIFT"
    assert archive.read_bytes() == before
    lock(project)
    bundle(project, out=archive, replace=True)
    assert archive.read_bytes() != before
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_names_that_no_archive_holds() -> None:
    from hubkit.registry.store.archive import _header

    assert len(_header("a" * 100, 1)) == 512
    assert len(_header("base/model.safetensors", 1 << 40)) == 512
    for name in ("a" * 101, "b/" * 200):
        with pytest.raises(HubkitError) as caught:
            _header(name, 1)
        assert caught.value.code == "HK-NAME"
    assert FileEntry("a", 1, "").path == "a"
