"""Data sets of the `datasets` library: folders of this machine, and the Hub by name and revision."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from hubkit.errors import HubkitError
from hubkit.training.rows.data import read_data, read_rows
from hubkit.training.rows.sets import SetReference, digest_of, parse_set

TALK = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two", "weight": 0}]
CALLS = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}]
ROWS: list[dict[str, Any]] = [{"messages": TALK, "tools": None}, {"messages": CALLS, "tools": [{"type": "function"}]}]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = pytest.importorskip("datasets")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return found


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None or k == "content"}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def refused(code: str, data: Path | str, **options: Any) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        read_data(data, **options)
    assert caught.value.code == code, str(caught.value)
    return caught.value


def test_how_a_data_set_is_named() -> None:
    full = SetReference("org/name", "main", "v1.0", "train[:10]")
    assert parse_set("datasets:org/name:main@v1.0#train[:10]") == full
    assert parse_set("datasets:./dir") == SetReference("./dir")
    for text in ("datasets:", "datasets:a@", "datasets:a#", "datasets:a#b#c", "datasets:a:b:c"):
        with pytest.raises(HubkitError, match="HK-DATA"):
            parse_set(text)


def test_a_saved_folder_says_what_was_saved(library: Any, tmp_path: Path) -> None:
    made = library.Dataset.from_list(ROWS)
    made.save_to_disk(str(tmp_path / "one"))
    library.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(str(tmp_path / "two"))
    for name in (str(tmp_path / "one"), f"datasets:{tmp_path / 'one'}", str(tmp_path / "two")):
        records, origin = read_data(name)
        assert [without_none(dict(record.values)) for record in records] == without_none(ROWS)
        assert origin["digest"] == digest_of(records)
        assert str(tmp_path) not in json.dumps(origin) + records[0].where
    assert len(read_rows(f"datasets:{tmp_path / 'two'}#test")) == 1
    assert refused("HK-DATA", f"datasets:{tmp_path / 'two'}#tset").have == ["#train", "#test"]
    refused("HK-DATA", f"datasets:{tmp_path / 'one'}#train")


def test_a_folder_of_files_keeps_its_splits_apart(library: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in (("train", ROWS), ("test", ROWS[:1])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records, origin = read_data(f"datasets:{folder}")
    assert [without_none(dict(record.values)) for record in records] == without_none(ROWS)
    assert (origin["split"], len(read_rows(f"datasets:{folder}#test"))) == ("train", 1)
    assert f"datasets:{folder}" in refused("HK-DATA", folder).fix


def test_pictures_stay_bytes(library: Any, tmp_path: Path) -> None:
    features = library.Features({"text": library.Value("string"), "image": library.Image()})
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{"text": "x", "image": {"bytes": b"no picture", "path": None}}]
    table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)  # from_list would want Pillow
    library.Dataset(library.table.InMemoryTable(table)).save_to_disk(str(tmp_path / "d"))
    (record,) = read_rows(tmp_path / "d")
    assert record.values["image"] == {"bytes": b"no picture"}


def test_what_is_not_there(library: Any, tmp_path: Path) -> None:
    refused("HK-OFFLINE", "datasets:org/name", offline=True)
    (tmp_path / "empty").mkdir()
    refused("HK-DATA", f"datasets:{tmp_path / 'empty'}")


COMMIT, OLDER = "c" * 40, "d" * 40
FILES = {
    COMMIT: {"train.jsonl": b'{"text": "new"}\n'},
    OLDER: {"train.jsonl": b'{"text": "old"}\n', "test.jsonl": b'{"text": "held"}\n'},
}


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a data set needs: what a revision is, its files, their bytes."""

    def _answer(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._answer(json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        api = re.fullmatch(r"/api/datasets/org/name(?:/(revision|tree)/([^/]+)(/.*)?)?", path)
        file = re.fullmatch(r"/datasets/org/name/resolve/([^/]+)/(.+)", path)
        commit = {"v1": OLDER, OLDER: OLDER, "main": COMMIT, COMMIT: COMMIT, None: COMMIT}.get(
            (api and api[2]) or (file and file[1]) or None
        )
        if commit and api and api[1] == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in FILES[commit].items()
            ]
            self._json(entries)
        elif commit and api:
            siblings = [{"rfilename": name} for name in FILES[commit]]
            self._json(
                {"_id": "1", "id": "org/name", "sha": commit, "siblings": siblings, "private": False, "tags": []}
            )
        elif commit and file and file[2] in FILES[commit]:
            data = FILES[commit][file[2]]
            self._answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=commit)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if commit else "RevisionNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_data_set_of_the_hub_at_its_commit(hub: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    probe = (
        "import json, sys\nfrom hubkit.training.rows.data import read_data\n"
        "for name in sys.argv[1:]:\n    records, origin = read_data(name)\n"
        "    print(json.dumps([[dict(r.values) for r in records], origin]))"
    )
    names = ["datasets:org/name", "datasets:org/name@v1", f"datasets:org/name@{OLDER}#test"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env = {**plain, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", probe, *names], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    new, old, held = map(json.loads, done.stdout.splitlines())
    assert [one[0] for one in (new, old, held)] == [[{"text": "new"}], [{"text": "old"}], [{"text": "held"}]]
    assert [one[1]["revision"] for one in (new, old, held)] == [COMMIT, OLDER, OLDER]
    assert [one[1]["split"] for one in (new, old, held)] == ["train", "train", "test"]
    assert new[1]["dataset"] == "org/name"


@pytest.mark.parametrize(("module", "data"), [("datasets", "datasets:org/name"), ("pyarrow", "r.parquet")])
def test_without_the_library_the_extra_is_named(
    module: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    Path("r.parquet").write_bytes(b"PAR1")
    assert refused("HK-EXTRA", data).fix == "pip install 'hubkit-adapters[data]'"
