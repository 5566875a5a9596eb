"""What a lock pins moves only when it was asked to; what it says is proven; what it cannot say is said."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from projects import BASE, GOLDEN, make_project, put, ship

from hubkit.documents.lock import Lock
from hubkit.documents.manifest import Manifest
from hubkit.errors import HubkitError
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.opening import open_registry
from hubkit.verbs.add import add
from hubkit.verbs.lock import lock
from hubkit.verbs.remove import remove


@pytest.fixture
def project(tmp_path: Path, registry: str) -> Path:
    return make_project(tmp_path / "project")


def refused(work: Any, *arguments: Any, **options: Any) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        work(*arguments, **options)
    return caught.value


def change(project: Path, old: str, new: str) -> None:
    text = (project / "hubkit.toml").read_text()
    assert old in text
    (project / "hubkit.toml").write_text(text.replace(old, new))


def place() -> DirectoryRegistry:
    found = open_registry()
    assert isinstance(found, DirectoryRegistry)
    return found


def move_everything(tmp_path: Path) -> None:
    """A newer adapter in the range, and a base whose branch moved."""
    ship("lora", "ana/chat", tmp_path / "chat", version="1.2.0")
    place().commit("ana/base", {"generation_config.json": b"{}"}, [], message="moved", parent=None)


def test_a_changed_weight_moves_nothing_else(project: Path, tmp_path: Path) -> None:
    before = lock(project).lock
    move_everything(tmp_path)
    change(project, "weight = -0.5", "weight = 0.25")
    done = lock(project)
    assert [(one.name, one.what, one.before, one.after) for one in done.moved] == [("sql", "weight", "-0.5", "0.25")]
    assert (done.lock.base, done.lock.adapters[0]) == (before.base, before.adapters[0])


def test_only_the_entry_that_was_named_moves(project: Path, tmp_path: Path) -> None:
    before = lock(project).lock
    move_everything(tmp_path)
    done = lock(project, upgrade=["chat"])
    assert done.changed == ("chat",)
    assert done.moved[0].before.startswith("1.1.0 (")
    assert done.moved[0].after.startswith("1.2.0 (")
    assert done.lock.base == before.base
    assert lock(project, upgrade=["base"]).changed == ("base",)
    assert lock(project, upgrade=True).changed == ()
    error = refused(lock, project, upgrade=["cht"])
    assert (error.code, error.fix, error.status) == ("HK-UNKNOWN-ADAPTER", "--upgrade chat", 2)


def test_only_what_is_asked_for_in_other_words_moves(project: Path, tmp_path: Path) -> None:
    lock(project)
    move_everything(tmp_path)
    change(project, "ana/chat@^1", "ana/chat@~1.2")
    assert lock(project).changed == ("chat",)
    change(project, 'source = "ana/base"   # ours', 'source = "ana/base"\nrevision = "main"')
    assert lock(project).changed == ("base",)
    assert Lock.read(project).base.requested == "main"
    assert lock(project).changed == ()


def test_an_unchanged_lock_asks_nobody(project: Path) -> None:
    lock(project)
    shutil.rmtree(place().root)
    change(project, "weight = -0.5", "weight = 2")
    assert lock(project).changed == ("sql",)
    remove("chat", recipe=project)
    assert [one.name for one in lock(project).lock.adapters] == ["sql"]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("weight = -0.5", "weight = -0.25", "sql: weight -0.25 in hubkit.toml, -0.5 in the lock"),
        ('mix = "sum"', 'mix = "stack"', "mix: stack in hubkit.toml, sum in the lock"),
        ("ana/chat@^1", "ana/chat@^2", "chat: source ana/chat@^2 in hubkit.toml, ana/chat@^1 in the lock"),
        ("max_loras = 4", "max_loras = 5", 'targets.vllm: {"max_loras": 5} in hubkit.toml, '
                                           '{"max_loras": 4} in the lock'),
        ("[adapters.chat]", "[adapters.talk]", "talk: not in the lock"),
        ("ana/base", "ana/other", "base: source ana/other in hubkit.toml, ana/base in the lock"),
        ("# ours", "\nrevision='dev'", "base: revision dev in hubkit.toml, none in the lock"),
        ("[targets", '[policy]\nlicenses = ["MIT"]\n[targets', 'policy: {"licenses": ["MIT"]} in hubkit.toml, '
                                                                'none in the lock'),
    ],
)  # fmt: skip
def test_check_compares_everything_with_the_recipe(project: Path, old: str, new: str, line: str) -> None:
    lock(project)
    lock(project, check=True)
    change(project, old, new)
    error = refused(lock, project, check=True)
    assert error.code == "HK-LOCK-STALE"
    assert line in error.have


@pytest.mark.parametrize("name", sorted(path.name for path in (GOLDEN / "dora").iterdir() if path.suffix != ".md"))
def test_check_sees_one_changed_byte_in_a_folder(project: Path, name: str) -> None:
    lock(project)
    path = project / "sql" / name
    data = bytearray(path.read_bytes())
    for at in (0, len(data) // 2, len(data) - 1):
        path.write_bytes(bytes([*data[:at], data[at] ^ 1, *data[at + 1 :]]))
        assert refused(lock, project, check=True).code == "HK-LOCK-STALE"
    path.write_bytes(data)
    lock(project, check=True)


@pytest.mark.parametrize("name", sorted(path.name for path in BASE.iterdir()))
def test_check_sees_a_changed_base_in_a_folder(project: Path, name: str) -> None:
    shutil.copytree(BASE, project / "model")
    change(project, '"ana/base"', '"./model"')
    lock(project)
    lock(project, check=True)
    path = project / "model" / name
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    error = refused(lock, project, check=True)
    assert error.code == "HK-LOCK-STALE"
    assert error.have[0].startswith("base: ./model: ")
    path.unlink()
    assert refused(lock, project, check=True).code == "HK-LOCK-STALE"


def test_check_sees_a_changed_member_of_a_mix(project: Path) -> None:
    for name in ("mix", "lora", "dora", "full"):
        put(name, project / name)
    add(project / "mix", recipe=project)
    lock(project, check=True)
    put("full", project / "full", version="7.7.7")
    assert refused(lock, project, check=True).have == ["mix/full: ../full changed since"]


def test_the_same_lock_from_two_folders_orders_and_hash_seeds(project: Path, tmp_path: Path, registry: str) -> None:
    """Also from nothing, and one entry after the other."""
    lock(project)
    whole = (project / "hubkit.lock").read_bytes()
    other = tmp_path / "elsewhere" / "deeper"
    other.mkdir(parents=True)
    shutil.copytree(project / "sql", other / "sql")
    shutil.copy(project / "hubkit.toml", other)
    code = f"import hubkit; hubkit.lock({str(other)!r})"
    for seed in ("1", "2"):
        (other / "hubkit.lock").unlink(missing_ok=True)
        environment = {
            "HUBKIT_REGISTRY": registry,
            "HUBKIT_HOME": str(tmp_path / f"home{seed}"),
            "PYTHONHASHSEED": seed,
        }
        line = [sys.executable, "-c", code]
        subprocess.run(line, env={**os.environ, **environment}, check=True)
        assert (other / "hubkit.lock").read_bytes() == whole
    text = (other / "hubkit.toml").read_text()
    start, end = text.index("# the queries"), text.index("[targets")
    (other / "hubkit.toml").write_text(text[:start] + text[end:])
    lock(other)
    (other / "hubkit.toml").write_text(text)
    lock(other)
    assert (other / "hubkit.lock").read_bytes() == whole


def test_licences_that_a_policy_does_not_allow_are_refused_by_name(project: Path, tmp_path: Path) -> None:
    ship("selective", "ana/free", tmp_path / "free", license="MIT OR GPL-3.0-only")
    ship("full", "ana/none", tmp_path / "none", license=None)
    change(project, "[targets", '[policy]\nlicenses = ["Apache-2.0", "mit"]\n[targets')
    add("ana/free", recipe=project)
    terms = {one.name: one.license for one in lock(project).lock.adapters}
    assert terms == {"chat": "apache-2.0", "sql": "apache-2.0", "free": "MIT OR GPL-3.0-only"}
    before = (project / "hubkit.toml").read_bytes(), (project / "hubkit.lock").read_bytes()
    error = refused(add, "ana/none", recipe=project)
    assert (error.code, error.have) == ("HK-POLICY", ["none: it names no licence"])
    assert ((project / "hubkit.toml").read_bytes(), (project / "hubkit.lock").read_bytes()) == before
    change(project, '"Apache-2.0", ', "")
    assert refused(lock, project).have == ["chat: its licence is apache-2.0", "sql: its licence is apache-2.0"]


def test_a_policy_looks_into_mixes(project: Path) -> None:
    for name, terms in (("mix", None), ("lora", "MIT"), ("dora", "MIT"), ("full", "cc-by-nc-4.0")):
        put(name, project / name, license=terms)
    mix = Manifest.read(project / "mix").mix or {}
    members = {name: {**one, "digest": Manifest.read(project / name).digest} for name, one in mix["members"].items()}
    put("mix", project / "mix", mix={**mix, "members": members})
    change(project, "[targets", '[policy]\nlicenses = ["MIT", "Apache-2.0"]\nrequire-probes = true\n[targets')
    error = refused(add, project / "mix", recipe=project)
    assert "mix/full: its licence is cc-by-nc-4.0" in error.have
    assert "mix/full: it carries no probes" in error.have
    assert not any("its licence is MIT" in line for line in error.have)


def test_probes_that_a_policy_requires(project: Path) -> None:
    change(project, "[targets", "[policy]\nrequire-probes = true\n[targets")
    assert refused(lock, project).have == ["chat: it carries no probes", "sql: it carries no probes"]
    put("dora", project / "sql", probes={"prompts": 8})
    assert refused(lock, project).have == ["chat: it carries no probes"]
    remove("chat", recipe=project)
    assert lock(project).lock.policy.require_probes


def test_a_deleted_repository_is_named_as_one(project: Path) -> None:
    place().delete("ana/chat")
    error = refused(lock, project)
    assert (error.code, error.fix) == ("HK-NOT-FOUND", "another source in hubkit.toml, or: hubkit remove chat")
    assert "there is no repository ana/chat" in error.what
    change(project, "ana/base", "ana/gone")
    assert "'base': there is no repository ana/gone" in refused(lock, project).what


def test_a_version_is_a_tag_and_never_a_branch(project: Path) -> None:
    """In every spelling; a branch of such a name moves, and cannot be made here."""
    tagged = place().refs("ana/chat").tags["v1.0.0"]
    for name in ("v1.0.0", "v9.0.0"):
        with pytest.raises(HubkitError) as refusal:
            place().branch("ana/chat", name, tagged)
        assert refusal.value.code == "HK-NAME"
    for spelling in ("v1.0.0", "1.0.0", "=1.0.0"):
        change(project, "ana/chat@^1", f"ana/chat@{spelling}")
        assert lock(project).lock.adapters[0].revision == tagged
        change(project, f"ana/chat@{spelling}", "ana/chat@^1")
    change(project, "ana/chat@^1", "ana/chat@v9.0.0")
    assert refused(lock, project).code == "HK-NO-REVISION"


def test_a_lock_with_conflicts_is_rebuilt(project: Path, tmp_path: Path) -> None:
    lock(project)
    ours = (project / "hubkit.lock").read_text()
    ship("lora", "ana/chat", tmp_path / "chat", version="1.2.0")
    lock(project, upgrade=["chat"])
    theirs = (project / "hubkit.lock").read_text()
    ship("lora", "ana/chat", tmp_path / "chat", version="1.3.0")
    (project / "hubkit.lock").write_text(f"<<<<<<< HEAD\n{ours}=======\n{theirs}>>>>>>> other\n")
    assert refused(lock, project, check=True).code == "HK-JSON"
    done = lock(project)
    (line,) = done.lost
    assert line.startswith("chat: 1.1.0 (")
    assert " in other" in line
    assert [one.version for one in done.lock.adapters] == ["1.3.0", "1.2.3"]
    assert lock(project, check=True).digest == done.digest


def test_a_lock_in_another_layout_is_written_anew(project: Path) -> None:
    lock(project)
    path = project / "hubkit.lock"
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b"\n", b"\r\n"))
    assert refused(lock, project, check=True).code == "HK-LOCK-EDITED"
    lock(project)
    assert path.read_bytes() == sound


def test_an_edited_lock_and_one_of_a_newer_hubkit_are_refused_and_stay(project: Path) -> None:
    lock(project)
    path = project / "hubkit.lock"
    sound = path.read_bytes()
    for spoilt, code in (
        (sound.replace(b'"weight": -0.5', b'"weight": -0.75'), "HK-LOCK-EDITED"),
        (sound.replace(b"hubkit/lock/1", b"hubkit/lock/2"), "HK-NEWER"),
        (sound[:-40], "HK-JSON"),
    ):
        assert spoilt != sound
        path.write_bytes(spoilt)
        for check in (False, True):
            error = refused(lock, project, check=check)
            assert error.code == code
            assert error.fix or code == "HK-JSON"
        assert path.read_bytes() == spoilt


def test_a_range_that_nothing_meets(project: Path) -> None:
    change(project, "ana/chat@^1", "ana/chat@^7")
    error = refused(lock, project)
    assert (error.code, error.have) == ("HK-NO-REVISION", ["v1.1.0, v1.0.0"])
    assert not (project / "hubkit.lock").exists()


def test_an_override_stays_with_what_it_let_pass(project: Path, tmp_path: Path) -> None:
    base = shutil.copytree(BASE, tmp_path / "other")
    (base / "config.json").write_text((base / "config.json").read_text().replace("10000.0", "20000.0"))
    files = {path.name: path for path in base.iterdir()}
    place().create("ana/other")
    place().commit("ana/other", files, [], message="base", parent=None)
    change(project, "ana/base", "ana/other")
    assert refused(lock, project).code == "HK-BASE-MISMATCH"
    assert lock(project, allow_base_mismatch=True).lock.overrides == ("allow-base-mismatch",)
    change(project, "weight = -0.5", "weight = 1")
    assert lock(project).lock.overrides == ("allow-base-mismatch",)
    put("lora", project / "sql")
    assert refused(lock, project).code == "HK-BASE-MISMATCH"


def test_diff_compares_two_locks_and_writes_nothing(project: Path, tmp_path: Path) -> None:
    lock(project)
    shutil.copy(project / "hubkit.lock", tmp_path / "old.lock")
    move_everything(tmp_path)
    dry = lock(project, upgrade=["chat"], dry_run=True)
    assert dry.changed == ("chat",)
    assert lock(project, diff=tmp_path / "old.lock").moved == ()
    done = lock(project, upgrade=["chat"])
    assert done.moved == dry.moved == lock(project, diff=tmp_path / "old.lock").moved


def test_what_is_stored_gives_the_same_lock_offline(project: Path) -> None:
    from hubkit.verbs.sync import sync

    sync(project)
    whole = (project / "hubkit.lock").read_bytes()
    shutil.rmtree(place().root)
    (project / "hubkit.lock").unlink()
    assert refused(lock, project).code == "HK-NOT-FOUND"
    lock(project, offline=True)
    assert (project / "hubkit.lock").read_bytes() == whole
