"""An adapter's folder: same input, same bytes; opened only when it is what its manifest says."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from hubkit.artifact.folder import AdapterFolder, open_adapter, tensors_bytes, write_adapter
from hubkit.artifact.identity.digest import TensorDigest
from hubkit.documents.manifest import BaseFingerprint, FileEntry, Manifest, Parent
from hubkit.documents.schema import canonical, sha256
from hubkit.errors import HubkitError

DIGEST = sha256(b"")
BASE = BaseFingerprint("org/base", "a" * 40, DIGEST, DIGEST, {"model.safetensors": DIGEST}, {"layers": 2}, DIGEST, None)
TENSORS = (
    TensorDigest("b.weight", "BF16", (2, 3), sha256(b"b")),
    TensorDigest("a.weight", "F32", (), ""),
)
HEADER = b'{"x.A":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + b"\0" * 4
FILES: dict[str, bytes | Path] = {
    "adapter_model.safetensors": WEIGHTS,
    "tensors.json": tensors_bytes(TENSORS),
    "sub/notes.txt": b"text\n",
    "README.md": b"# card\n",
}
MANIFEST = Manifest(kind="adapter", name="chat", method="m", config={"rank": 8, "targets": ("q", "v")}, base=BASE)


@pytest.fixture(autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small adapter, written."""
    write_adapter(tmp_path / "chat", MANIFEST, FILES)
    return tmp_path / "chat"


def _refusal(function: Any, *args: Any, **options: Any) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        function(*args, **options)
    return caught.value


def test_what_is_written_opens_as_it_was_made(tmp_path: Path) -> None:
    made = write_adapter(tmp_path / "chat", MANIFEST, FILES)
    opened = open_adapter(tmp_path / "chat")
    assert opened.manifest == made
    assert [entry.path for entry in made.files] == ["adapter_model.safetensors", "sub/notes.txt", "tensors.json"]
    assert made.files[1] == FileEntry("sub/notes.txt", 5, sha256(b"text\n"))
    assert (opened.path / "README.md").read_bytes() == b"# card\n"
    assert opened.header().keys() == {"x.A"}
    assert opened.weights_path.read_bytes() == WEIGHTS
    assert opened.base_tensors() == (TENSORS[1], TENSORS[0])
    assert made.digest == sha256((tmp_path / "chat" / "hubkit.json").read_bytes())


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    copies = tmp_path / "sources"
    copies.mkdir()
    for index, (name, content) in enumerate(FILES.items()):
        assert isinstance(content, bytes)
        (copies / str(index)).write_bytes(content)
        os.utime(copies / str(index), (index, index))
        assert name
    paths = {name: copies / str(index) for index, name in enumerate(FILES)}
    for name, files in (("one", FILES), ("two", dict(reversed(paths.items())))):
        write_adapter(tmp_path / name, MANIFEST, files)
    for path in (tmp_path / "one").rglob("*"):
        twin = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.is_dir() or path.read_bytes() == twin.read_bytes()
        assert path.stat().st_mode == twin.stat().st_mode


def test_no_place_of_this_machine_is_written(tmp_path: Path) -> None:
    base = dataclasses.replace(BASE, source=str(tmp_path / "base"))
    manifest = dataclasses.replace(MANIFEST, base=base, parents=(Parent(str(tmp_path / "x"), DIGEST, 1.0),))
    made = write_adapter(tmp_path / "chat", manifest, FILES)
    assert made.base is not None
    assert (made.base.source, made.parents[0].reference) == ("base", "x")
    for path in (tmp_path / "chat").rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"../x.txt": b""}, "HK-NAME"),
        ({"a.txt": b"", "A.txt": b""}, "HK-NAME"),
        ({"hubkit.json": b"{}"}, "HK-NAME"),
        ({"Hubkit.json": b"{}"}, "HK-NAME"),
        ({"a.json": b"\x80\x04\x95"}, "HK-PICKLE"),
        ({"a.py": b"print()"}, "HK-FORBIDDEN-FILE"),
        ({"a.txt": Path("/nowhere/a.txt")}, "HK-IO"),
        ({"a.txt": Path("/dev/null")}, "HK-IO"),
        ({"a.txt": Path("/")}, "HK-IO"),
    ],
)
def test_what_could_not_be_published_is_refused_before_the_first_byte(
    tmp_path: Path, files: dict[str, bytes | Path], code: str
) -> None:
    assert _refusal(write_adapter, tmp_path / "chat", MANIFEST, files).code == code
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"name": "no good"}, "HK-SCHEMA"),
        ({"base": None}, "HK-SCHEMA"),
        ({"training": {"loss": float("nan")}}, "HK-JSON"),
        ({"training": {"token": "hf_" + "a" * 34}}, "HK-SECRET"),
    ],
)
def test_a_wrong_manifest_is_refused_before_the_first_byte(tmp_path: Path, changes: Any, code: str) -> None:
    assert _refusal(write_adapter, tmp_path / "chat", dataclasses.replace(MANIFEST, **changes), FILES).code == code
    assert os.listdir(tmp_path) == []


def test_an_adapter_is_replaced_when_asked(folder: Path) -> None:
    assert _refusal(write_adapter, folder, MANIFEST, {"new.txt": b"x"}).code == "HK-EXISTS"
    write_adapter(folder, MANIFEST, {"new.txt": b"x", "kept.txt": folder / "sub" / "notes.txt"}, replace=True)
    assert sorted(os.listdir(folder)) == ["hubkit.json", "kept.txt", "new.txt"]
    assert (folder / "kept.txt").read_bytes() == b"text\n"
    assert os.listdir(folder.parent) == ["chat"]


def test_somebodys_other_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    write_adapter(tmp_path / "thesis", MANIFEST, FILES, replace=True)  # empty: nothing is lost
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "a.tex").touch()
    assert _refusal(write_adapter, tmp_path / "work", MANIFEST, FILES, replace=True).code == "HK-EXISTS"
    assert os.listdir(tmp_path / "work") == ["a.tex"]


def test_every_difference_is_shown(folder: Path) -> None:
    (folder / "sub" / "notes.txt").unlink()
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS[:-1] + b"\1")
    (folder / "tensors.json").write_bytes(b"{}")
    error = _refusal(open_adapter, folder)
    assert error.code == "HK-FILES"
    assert [line.split(":")[0] for line in error.have] == ["adapter_model.safetensors", "sub/notes.txt", "tensors.json"]
    assert len(_refusal(open_adapter, folder, verify=False).have) == 2


def test_a_folder_or_pipe_is_no_file(folder: Path) -> None:
    (folder / "tensors.json").unlink()
    (folder / "tensors.json").mkdir()
    (folder / "sub" / "notes.txt").unlink()
    os.mkfifo(folder / "sub" / "notes.txt")
    assert _refusal(open_adapter, folder).have == ["sub/notes.txt: not a file", "tensors.json: not a file"]


def test_a_changed_file_is_found_though_digests_are_kept(folder: Path) -> None:
    open_adapter(folder)
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS[:-1] + b"\1")
    assert _refusal(open_adapter, folder).code == "HK-FILES"


@pytest.mark.parametrize("name", ["../chat/sub/notes.txt", "/etc/hostname", "sub\\notes.txt", "a/../b"])
def test_a_hostile_manifest_does_not_lead_out(folder: Path, name: str) -> None:
    document = {**MANIFEST.to_document(), "files": [{"path": name, "size": 5, "sha256": DIGEST}]}
    (folder / "hubkit.json").write_bytes(canonical(document))
    assert _refusal(open_adapter, folder).code == "HK-NAME"


def test_no_adapter_there(tmp_path: Path) -> None:
    error = _refusal(open_adapter, tmp_path)
    assert (error.code, error.fix) == ("HK-NOT-ADAPTER", f"hubkit pack {tmp_path}")
    for path in (tmp_path / "absent", Path("/dev/null")):
        assert _refusal(open_adapter, path).code == "HK-NOT-ADAPTER"
    os.mkfifo(tmp_path / "hubkit.json")
    assert _refusal(open_adapter, tmp_path).code == "HK-IO"


def test_a_writer_killed_between_its_two_renames_is_mended_by_opening(folder: Path) -> None:
    """What lies on disk then, where names cannot be exchanged: the old folder aside, the draft, a lock nobody holds."""
    aside = folder.with_name(".chat." + "0" * 16)
    folder.rename(f"{aside}.old")
    aside.mkdir()
    Path(f"{aside}.lock").touch()
    assert open_adapter(folder).manifest.name == "chat"
    assert os.listdir(folder.parent) == ["chat"]


def test_only_listed_files_count(folder: Path) -> None:
    """A weights file beside a manifest that does not vouch for it is nobody's."""
    (folder / "extra.txt").touch()
    (folder / "sub" / "more.txt").touch()
    (folder / ".gitattributes").touch()
    assert open_adapter(folder).unlisted() == ("extra.txt", "sub/more.txt")
    (folder / "hubkit.json").write_bytes(MANIFEST.to_bytes())
    opened = open_adapter(folder)
    assert opened.base_tensors() is None
    assert _refusal(opened.header).code == "HK-FILES"
    assert set(opened.unlisted()) > {"adapter_model.safetensors", "tensors.json"}


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{}", b'{"schema":"hubkit/tensors/1"}', b'{"schema":"hubkit/tensors/2","tensors":[]}']
    + [
        json.dumps({"schema": "hubkit/tensors/1", "tensors": [row]}).encode()
        for row in (1, {}, {"name": "a", "dtype": "F32", "shape": [True]}, {"name": 1, "dtype": "F32", "shape": []})
    ],
)
def test_a_damaged_list_of_tensors_is_refused(tmp_path: Path, data: bytes) -> None:
    write_adapter(tmp_path / "x", MANIFEST, {**FILES, "tensors.json": data})
    assert _refusal(open_adapter(tmp_path / "x").base_tensors).code in ("HK-JSON", "HK-SCHEMA")


def test_a_vanished_list_of_tensors_is_refused(folder: Path) -> None:
    opened = open_adapter(folder)
    (folder / "tensors.json").unlink()
    assert _refusal(opened.base_tensors).code == "HK-FILES"


def test_opening_costs_little(folder: Path) -> None:
    """A bound far above the 2 ms measured: it catches work that grows with the weights, or imports left in the way."""
    open_adapter(folder)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        assert isinstance(open_adapter(folder), AdapterFolder)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05
