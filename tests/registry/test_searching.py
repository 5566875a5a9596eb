"""search: the same adapters are found in a directory, on a server by its official list, and in the store."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from projects import BASE, GOLDEN, publish_base, put, ship
from registry.conftest import HubServer

from hubkit.artifact.card import render_card
from hubkit.documents.manifest import Manifest
from hubkit.errors import HubkitError
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.opening import open_registry
from hubkit.registry.store.store import Store
from hubkit.verbs.cache import cache
from hubkit.verbs.pull import pull
from hubkit.verbs.push import push
from hubkit.verbs.search import search

WEIGHTS = str(getattr(Manifest.read(GOLDEN / "lora").base, "weights", "")).removeprefix("sha256:")
PLAIN = {
    "README.md": b"---\nbase_model: ana/base\npipeline_tag: text-generation\nlicense: mit\n---\n# plain\n",
    "adapter_config.json": b'{"peft_type": "LORA", "base_model_name_or_path": "ana/base"}',
}

WRONG = json.dumps({"format": 1, "entries": {"ana/chat": [[1, 2, 3], [[7] * 13]]}}).encode()


@pytest.fixture
def four(registry: str, tmp_path: Path) -> str:
    """A registry with two adapters of one base, one of another, and one of another tool."""
    for method, repo in (("lora", "ana/chat"), ("dora", "ana/sql-chat"), ("lora", "ben/tale")):
        folder = put(method, tmp_path / repo)
        manifest = replace(Manifest.read(folder), name=repo.partition("/")[2])
        assert manifest.base is not None
        base = replace(manifest.base, source="ana/base")
        if repo == "ben/tale":
            base = replace(base, source="ben/other", weights=f"sha256:{'0' * 64}")
        manifest = replace(manifest, base=base)
        (folder / "hubkit.json").write_bytes(manifest.to_bytes())
        card = render_card(manifest, "---\npipeline_tag: text-generation\n---\n" if repo == "ana/chat" else None)
        (folder / "README.md").write_text(card)
        push(folder, repo)
    place = open_registry(None)
    place.create("zoe/plain")
    place.commit("zoe/plain", PLAIN, [], message="m", parent=None)
    return registry


@pytest.fixture
def served(four: str, start_server: Callable[[Path, Mapping[str, str] | None], HubServer]) -> str:
    return start_server(Path(four), None).url


def repos(text: str = "", **wanted: object) -> list[str]:
    return sorted(hit.repo for hit in search(text, **wanted).hits)  # type: ignore[arg-type]


CASES: list[tuple[str, dict[str, object], list[str]]] = [
    ("", {}, ["ana/chat", "ana/sql-chat", "ben/tale", "zoe/plain"]),
    ("CHAT", {}, ["ana/chat", "ana/sql-chat"]),
    ("chat sql", {}, ["ana/sql-chat"]),
    ("nothing", {}, []),
    ("", {"owner": "ana"}, ["ana/chat", "ana/sql-chat"]),
    ("", {"base": "ana/base"}, ["ana/chat", "ana/sql-chat", "zoe/plain"]),
    ("", {"base": f"sha256:{WEIGHTS}"}, ["ana/chat", "ana/sql-chat"]),
    ("", {"base": WEIGHTS[:16]}, ["ana/chat", "ana/sql-chat"]),
    ("", {"base": BASE}, ["ana/chat", "ana/sql-chat"]),
    ("", {"base": "0" * 16}, ["ben/tale"]),
    ("", {"method": "dora"}, ["ana/sql-chat"]),
    ("", {"task": "text-generation"}, ["ana/chat", "zoe/plain"]),
    ("", {"license": "mit"}, ["zoe/plain"]),
    ("tale", {"base": "ana/base"}, []),
]


@pytest.mark.parametrize("where", ["directory", "server"])
def test_what_is_found_in_a_registry(four: str, served: str, where: str) -> None:
    for text, wanted, found in CASES:
        assert repos(text, registry=four if where == "directory" else served, **wanted) == found, (text, wanted)


def test_what_is_found_in_the_store(four: str) -> None:
    assert repos(local=True) == []
    for repo in ("ana/chat", "ana/sql-chat", "ben/tale"):
        pull(repo)
    for text, wanted, found in CASES:
        assert repos(text, local=True, **wanted) == [one for one in found if one != "zoe/plain"], (text, wanted)
    cache("remove", "ben/tale")
    assert repos(local=True) == ["ana/chat", "ana/sql-chat"]
    pull("ben/tale")
    assert repos(local=True, base="0" * 64) == ["ben/tale"]


def test_hits_say_what_they_are(four: str, served: str) -> None:
    (here,), (there,) = search("sql", registry=four).hits, search("sql", registry=served).hits
    manifest = Manifest.read(pull("ana/sql-chat").path)
    assert (here.method, here.base, here.digest, here.kind) == ("dora", "ana/base", WEIGHTS, "adapter")
    assert (here.version, here.artifact, here.license) == (manifest.version, manifest.digest, manifest.license)
    assert (there.method, there.base, there.digest) == ("dora", "ana/base", WEIGHTS[:16])
    assert here.commit == there.commit
    (plain,) = search("plain", registry=four).hits
    assert (plain.method, plain.base, plain.task) == ("lora", "ana/base", "text-generation")
    limited = search(registry=served, limit=2)
    assert (len(limited.hits), limited.more) == (2, True)
    assert not search(registry=served, limit=4).more


def test_the_real_client_finds_the_same(served: str) -> None:
    """By the tags that cards carry: what a Hub's own users have."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=served, token=False)
    for tags, found in (
        (["hubkit", f"hubkit:base:{WEIGHTS[:16]}"], ["ana/chat", "ana/sql-chat"]),
        (["hubkit:method:dora"], ["ana/sql-chat"]),
        (["peft", "base_model:ana/base", "license:mit"], ["zoe/plain"]),
    ):
        assert sorted(model.id for model in api.list_models(filter=tags)) == found
    assert [model.id for model in api.list_models(author="ana", search="sql")] == ["ana/sql-chat"]


def test_the_index_follows_what_changes(four: str, tmp_path: Path) -> None:
    assert len(repos()) == 4
    ship("dora", "ana/chat", tmp_path / "again", version="9.0.0")
    assert [hit.version for hit in search(base=WEIGHTS).hits if hit.repo == "ana/chat"] == ["9.0.0"]
    DirectoryRegistry(four).delete("ben/tale")
    assert repos() == ["ana/chat", "ana/sql-chat", "zoe/plain"]
    (index,) = (Store().home / "index" / "search").glob("*.json")
    for damage in (b"{", b"[]", b'{"format": 1, "entries": {"ana/chat": [[1, 2, 3], [["x"]]]}}', WRONG, b"\xff\x00"):
        index.write_bytes(damage)
        assert len(repos()) == 3
        assert json.loads(index.read_bytes())["format"] == 1
    (Path(four) / "repos" / "ana" / "chat" / "refs.json").write_text("{")
    assert repos() == ["ana/sql-chat", "zoe/plain"]


def test_processes_that_search_at_once(four: str) -> None:
    line = [sys.executable, "-m", "hubkit", "search", "--json"]
    running = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [json.loads(process.communicate()[0]) for process in running]
    assert [len(answer["hits"]) for answer in answers] == [4, 4, 4]


def test_what_is_not_to_be_searched(registry: str) -> None:
    for code, wanted in (
        ("HK-NOT-FOUND", {}),
        ("HK-OPTIONS", {"local": True, "registry": registry}),
        ("HK-OPTIONS", {"limit": 0}),
        ("HK-OFFLINE", {"base": "ana/base@v1"}),
        ("HK-REFERENCE", {"base": "base"}),
    ):
        with pytest.raises(HubkitError) as refusal:
            search(**wanted)
        assert refusal.value.code == code, wanted


def test_a_stored_base_is_looked_for_by_its_digest(four: str) -> None:
    commit = publish_base()
    pull("ana/base", base=True)
    assert repos(base=f"ana/base@{commit}") == ["ana/chat", "ana/sql-chat"]


def test_nothing_heavy_is_imported(four: str) -> None:
    """Reading and asking a directory's index, and the store's."""
    probe = "import sys; from hubkit.cli import run; run(sys.argv[1:]); print('LOADED', *sys.modules)"
    for words in (["search"], ["search", "chat", "--local"]):
        done = subprocess.run([sys.executable, "-c", probe, *words], capture_output=True, text=True, check=True)
        loaded = set(done.stdout.rsplit("LOADED", 1)[1].split())
        assert not loaded & {"torch", "jsonschema", "numpy", "huggingface_hub", "yaml"}, words


def test_as_typed(four: str, capsys: pytest.CaptureFixture[str]) -> None:
    from hubkit.cli import run

    assert run(["search", "sql", "chat"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["REPOSITORY", "VERSION", "METHOD", "BASE"],
        ["ana/sql-chat", "1.2.3", "dora", "ana/base"],
        ["1", "found", "in", open_registry(None).name],
    ]
    assert run(["search", "x y", "--method", "none"]) == 0
    assert capsys.readouterr().out == f"nothing fits in {open_registry(None).name}: x y --method none\n"
