"""A tag that moved is refused until the user allows it; a name that looks like another one's is told, once."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from projects import publish_base, ship

from hubkit.errors import HubkitError, Notice
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.store.alike import alike
from hubkit.registry.store.store import Store
from hubkit.verbs.lock import lock
from hubkit.verbs.pull import pull
from hubkit.verbs.verify import verify


@pytest.fixture
def moved(registry: str, tmp_path: Path) -> tuple[str, str]:
    """ana/chat@v1.0.0 was pulled and then tagged anew at another commit: (then, now)."""
    then = ship("lora", "ana/chat", tmp_path / "chat", version="1.0.0")
    pull("ana/chat@^1")
    now = ship("lora", "ana/chat", tmp_path / "chat", version="1.1.0")
    place = DirectoryRegistry(Path(registry))
    for name in ("v1.0.0", "v1.1.0"):
        place.delete_tag("ana/chat", name)
    place.tag("ana/chat", "v1.0.0", now)
    return then, now


@pytest.mark.parametrize("reference", ["ana/chat@1.0.0", "ana/chat@v1.0.0", "ana/chat@^1"])
def test_a_tag_that_moved_is_refused(moved: tuple[str, str], reference: str) -> None:
    then, now = moved
    stored = Store().list()
    with pytest.raises(HubkitError) as refusal:
        pull(reference)
    assert refusal.value.code == "HK-MOVED"
    assert refusal.value.want[0].split() == [then, stored[0].digest]
    assert refusal.value.have[0].startswith(f"{now}  sha256:")
    assert refusal.value.fix.endswith("/ana/chat@v1.0.0 --allow-moved")
    assert Store().list() == stored
    assert pull(f"ana/chat@{then}").commit == then
    assert pull(reference, allow_moved=True).commit == now
    assert pull(reference).commit == now


def test_whoever_pulls_on_the_way_is_refused_too(moved: tuple[str, str], tmp_path: Path) -> None:
    publish_base()
    with pytest.raises(HubkitError) as refusal:
        verify("ana/chat@1.0.0")
    assert "hubkit pull" in refusal.value.fix
    (tmp_path / "hubkit.toml").write_text('[base]\nsource = "ana/base"\n[adapters.chat]\nsource = "ana/chat@1.0.0"\n')
    with pytest.raises(HubkitError) as refusal:
        lock(tmp_path)
    assert refusal.value.code == "HK-MOVED"
    assert pull("ana/chat@main").commit == moved[1]  # branches move


def test_a_base_too(registry: str) -> None:
    place = DirectoryRegistry(Path(registry))
    place.tag("ana/base", "v1.0.0", publish_base())
    pull("ana/base@v1.0.0", base=True)
    place.delete_tag("ana/base", "v1.0.0")
    place.tag("ana/base", "v1.0.0", place.commit("ana/base", {"x.txt": b"x"}, [], message="m", parent=None))
    with pytest.raises(HubkitError) as refusal:
        pull("ana/base@1.0.0", base=True)
    assert (refusal.value.code, "pull --base " in refusal.value.fix) == ("HK-MOVED", True)


@pytest.mark.parametrize(
    ("repo", "like"),
    [
        ("HuggingFaceTB/other", None),
        ("HugginFaceTB/other", "HuggingFaceTB"),
        ("HuggingFaceTBs/x", "HuggingFaceTB"),
        ("HuggignFaceTB/x", "HuggingFaceTB"),
        ("huggingfacetb/x", "HuggingFaceTB"),
        ("acrne/x", "acme"),
        ("ac-me/x", "acme"),
        ("o1abs/x", "olabs"),
        ("oIabs/x", "olabs"),
        ("0labs/x", "olabs"),
        ("a_b/x", "a.b"),
        ("a-c/x", None),
        ("team2/x", None),
        ("bob/x", None),
        ("bob/sql-v1", "acme/sql-v1"),
        ("bob/sql-v2", None),
        ("acme/sql-v2", None),
    ],
)
def test_names_that_could_be_taken_for_others(repo: str, like: str | None) -> None:
    known = ["HuggingFaceTB/SmolLM2", "acme/sql-v1", "olabs/y", "a.b/z", "team1/w", "rob/v"]
    said = alike(repo, known)
    assert (said is None) == (like is None), said
    assert like is None or like in (said or "")


def test_the_first_pull_of_such_a_name_says_so(registry: str, tmp_path: Path) -> None:
    ship("lora", "acme/chat", tmp_path / "chat", version="1.0.0")
    ship("lora", "acrne/sql", tmp_path / "chat", version="1.0.0")
    pull("acme/chat")
    with pytest.warns(Notice, match="its owner 'acrne' looks like 'acme', of whom acme/chat is stored"):
        pull("acrne/sql")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pull("acrne/sql")
        pull("acme/chat@1.0.0")
