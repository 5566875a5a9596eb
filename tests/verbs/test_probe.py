"""probe: is what was locked what a server applies? And probes as pack makes them, and verify computes them again."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from every_method import METHODS
from loopback import loopback
from making import make_adapter
from probing import aged, gentle, key_of, scaled
from variants import other_weights, refused, say, tree

from hubkit.artifact.folder import open_adapter
from hubkit.documents.manifest import FileEntry, Manifest
from hubkit.documents.probes import Probes
from hubkit.documents.schema import sha256
from hubkit.engines.runtimes.fit import BOUNDS, effect_of
from hubkit.methods.host import host
from hubkit.verbs.lock import lock
from hubkit.verbs.mix import mix
from hubkit.verbs.pack import pack
from hubkit.verbs.probe import probe
from hubkit.verbs.pull import pull
from hubkit.verbs.push import push
from hubkit.verbs.rebase import rebase
from hubkit.verbs.verify import verify


@pytest.fixture
def chat(tiny_llama: Path, tmp_path: Path) -> Path:
    """An adapter named chat, with probes."""
    folder = gentle(tmp_path / "chat", tiny_llama)
    pack(folder, base=tiny_llama, probes=True)
    return folder


def locked(folder: Path, base: Path, adapters: Mapping[str, object], more: str = "") -> Path:
    """A recipe of adapters, name -> folder or (source, weight), and its lock."""
    folder.mkdir(exist_ok=True)
    lines = ["[base]", f'source = "{base}"']
    for name, given in adapters.items():
        source, weight = given if isinstance(given, tuple) else (given, 1.0)
        lines += [f"[adapters.{name}]", f'source = "{source}"', f"weight = {weight}"]
    (folder / "hubkit.toml").write_text("\n".join([*lines, more]) + "\n")
    lock(folder)
    return folder / "hubkit.lock"


def test_packing_with_probes_twice_gives_the_same_bytes(chat: Path, tiny_llama: Path) -> None:
    before = tree(chat)
    again = pack(chat, base=tiny_llama, probes=True)
    assert (again.changed, tree(chat)) == (False, before)
    probes = Probes.read(chat)
    assert again.effect == effect_of(probes) > 0.3
    assert (len(probes.prompts), probes.scales) == (8, (0.0, 0.25, 0.5, 1.0, 2.0))
    assert 20 <= len(probes.prompts[0].tokens) <= 100
    assert "probes.json" in {entry.path for entry in open_adapter(chat).manifest.files}
    assert (chat / "probes.json").stat().st_size <= 64 << 10
    kept = pack(chat, version="1.0.0")
    assert (kept.effect, kept.stale, Probes.read(chat)) == (None, False, probes)


def test_probes_of_other_tensors_are_left_out_and_said(chat: Path, tiny_llama: Path) -> None:
    weights = scaled(chat, chat.parent / "copy", 0.5) / "adapter_model.safetensors"
    shutil.copy(weights, chat / weights.name)
    shutil.rmtree(weights.parent)
    done = pack(chat)
    assert done.stale
    assert not (chat / "probes.json").exists()
    assert not pack(chat, base=tiny_llama, probes=True).stale
    assert verify(chat, base=tiny_llama, probes=True).checks[-1].name == "probes"


def test_a_stray_file_of_that_name_is_not_taken_for_probes(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    from hubkit.verbs.export import export

    export(adapter, tmp_path / "peft")
    (tmp_path / "peft" / "probes.json").write_text("{}")
    done = pack(tmp_path / "peft", base=tiny_llama, out=tmp_path / "own")
    assert "probes.json" not in {entry.path for entry in done.manifest.files}


def test_prompts_of_ones_own(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("name[Blue Spice], food[French]\n\nWhat is the capital of France?\n")
    pack(adapter, base=tiny_llama, prompts=file)
    assert [one.text for one in Probes.read(adapter).prompts] == [
        "name[Blue Spice], food[French]",
        "What is the capital of France?",
    ]
    before = tree(adapter)
    file.write_text("\n")
    refused("HK-NO-ROWS", pack, adapter, base=tiny_llama, prompts=file)
    refused("HK-MISSING", pack, adapter, base=tiny_llama, prompts=tmp_path / "none")
    file.write_text("word " * 300)
    assert "context" not in refused("HK-PROBES", pack, adapter, base=tiny_llama, prompts=file).what
    file.write_text("\n".join(f"prompt number {n} of many" for n in range(64)))
    refused("HK-PROBES", pack, adapter, base=tiny_llama, prompts=file)
    assert tree(adapter) == before


def test_more_prompts_take_fewer_tokens_each(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"prompt {n}" for n in range(20)))
    pack(adapter, base=tiny_llama, prompts=file)
    probes = Probes.read(adapter)
    assert len(probes.prompts) == 20
    assert 10 <= probes.likeliest < 20


@pytest.mark.parametrize("method", ["prompt", "dora", "full"])
def test_every_method_has_probes_and_they_are_computed_again(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    name, options = METHODS[method]
    folder = make_adapter(tmp_path / method, tiny_llama, method=host().load(name), **options)
    pack(folder, base=tiny_llama, probes=True)
    scales = Probes.read(folder).scales
    assert scales == ((0.0, 1.0) if method == "prompt" else (0.0, 0.25, 0.5, 1.0, 2.0))
    assert verify(folder, base=tiny_llama, probes=True).checks[-1].name == "probes"


def test_verify_computes_them_again_and_refuses_others(chat: Path, tiny_llama: Path, tmp_path: Path) -> None:
    done = verify(chat, base=tiny_llama, probes=True)
    assert [check.name for check in done.checks] == ["files", "base", "tensors", "probes"]
    assert verify(chat, base=tiny_llama, probes=True, dtype="bf16").checks
    other = gentle(tmp_path / "other", tiny_llama, seed=5)
    shutil.copy(chat / "probes.json", other / "probes.json")
    data = (other / "probes.json").read_bytes()
    manifest = Manifest.read(other)
    entries = sorted((*manifest.files, FileEntry("probes.json", len(data), sha256(data))), key=lambda one: one.path)
    (other / "hubkit.json").write_bytes(replace(manifest, files=tuple(entries)).to_bytes())
    refused("HK-PROBE-ADAPTER", verify, other, base=tiny_llama, probes=True)
    assert (
        refused(
            "HK-PROBES-MISSING", verify, make_adapter(tmp_path / "bare", tiny_llama), base=tiny_llama, probes=True
        ).status
        == 3
    )


def test_a_mix_has_probes_of_the_whole(chat: Path, tiny_llama: Path, tmp_path: Path) -> None:
    other = gentle(tmp_path / "sql", tiny_llama, seed=3)
    mix(f"sum({chat}, -0.5*{other})", tmp_path / "both")
    pack(tmp_path / "both", base=tiny_llama, probes=True)
    assert verify(tmp_path / "both", base=tiny_llama, probes=True).checks[-1].name == "probes"


def test_rebasing_leaves_the_old_bases_probes_behind(chat: Path, tiny_llama: Path, tmp_path: Path) -> None:
    moved = other_weights(tiny_llama, tmp_path / "moved")
    rebase(chat, moved, tmp_path / "new", base=tiny_llama, max_drift=100.0)
    assert not (tmp_path / "new" / "probes.json").exists()


def test_a_server_is_ready_when_it_applies_the_lock(
    chat: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = locked(tmp_path / "one", tiny_llama, {"chat": chat})
    with loopback("vllm", tiny_llama, {key_of(chat): chat}) as url:
        done = probe(url, lock=file)
        assert (done.engine, [one.name for one in done.adapters]) == ("vllm", ["chat"])
        said = say(capsys, "probe", url, "--lock", str(file), "--json")
        assert (said.status, json.loads(said.out)["adapters"][0]["fit"]["finding"]) == (0, "applied")
        said = say(capsys, "probe", url, "--lock", str(file))
        assert (said.status, said.out.splitlines()[1].split()[:2]) == (0, ["ok", "chat"])
        began = time.monotonic()
        probe(url, lock=file)
        assert time.monotonic() - began < 20
    with loopback("vllm", tiny_llama, {key_of(chat): scaled(chat, tmp_path / "noop", 0.0)}) as url:
        said = say(capsys, "probe", url, "--lock", str(file), "--json")
        assert (said.status, json.loads(said.out)["error"]["code"]) == (1, "HK-NOOP")
    assert say(capsys, "probe", url, "--lock", str(file)).refusal(3) == "HK-RUNTIME-OFFLINE"


def test_a_weight_of_the_lock_is_the_scale_that_is_wanted(chat: Path, tiny_llama: Path, tmp_path: Path) -> None:
    file = locked(tmp_path / "half", tiny_llama, {"chat": (chat, 0.5)})
    with loopback("vllm", tiny_llama, {"chat": scaled(chat, tmp_path / "lowered", 0.5)}) as url:
        assert probe(url, lock=file).adapters[0].fit.expected == 0.5
    with loopback("vllm", tiny_llama, {"chat": chat}) as url:
        assert "2 times" in refused("HK-SCALE", probe, url, lock=file).what


def test_several_served_each_are_told_together(chat: Path, tiny_llama: Path, tmp_path: Path) -> None:
    sql = gentle(tmp_path / "sql", tiny_llama, seed=3)
    pack(sql, base=tiny_llama, probes=True)
    both = {"chat": chat, "sql": sql}
    mixed = locked(tmp_path / "mixed", tiny_llama, both)
    each = locked(tmp_path / "each", tiny_llama, both, '[targets.vllm]\nserve = "each"')
    with loopback("vllm", tiny_llama, {key_of(chat): chat, key_of(sql): sql}) as url:
        assert len(probe(url, lock=each).adapters) == 2
        assert refused("HK-PROBES-MISSING", probe, url, lock=mixed).status == 3
    with loopback("vllm", tiny_llama, {key_of(chat): sql, key_of(sql): scaled(sql, tmp_path / "n", 0.0)}) as url:
        error = refused("HK-PROBE-ADAPTER", probe, url, lock=each)
        assert any(line.startswith("sql: HK-NOOP") for line in error.have)


def test_probes_are_found_in_the_store_and_in_deployments_by_their_digest(
    chat: Path, tiny_llama: Path, tmp_path: Path, registry: str
) -> None:
    push(chat, "ana/chat")
    file = locked(tmp_path / "project", tiny_llama, {"chat": "ana/chat"})
    with loopback("vllm", tiny_llama, {key_of(chat): chat}) as url:
        refused("HK-PROBES-MISSING", probe, url, lock=file)
        beside = tmp_path / "project" / "adapters" / key_of(chat).replace("@", "-")
        beside.mkdir(parents=True)
        (beside / "probes.json").write_bytes((chat / "probes.json").read_bytes())
        probe(url, lock=file)
        (beside / "probes.json").write_bytes(b"{}")  # of another digest: passed over
        refused("HK-PROBES-MISSING", probe, url, lock=file)
        pull("ana/chat")
        probe(url, lock=file)


def test_a_lock_without_probes_or_whose_probes_are_not_here(
    adapter: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = locked(tmp_path / "bare", tiny_llama, {"chat": adapter})
    assert refused("HK-PROBES-MISSING", probe, "http://127.0.0.1:9", lock=bare).status == 3
    pack(adapter, base=tiny_llama, probes=True)
    file = locked(tmp_path / "lost", tiny_llama, {"chat": adapter})
    (adapter / "probes.json").write_bytes(b"{}")
    error = refused("HK-PROBES-MISSING", probe, "http://127.0.0.1:9", lock=file)
    assert any(str(adapter) in line for line in error.have)
    refused("HK-MISSING", probe, "http://127.0.0.1:9", lock=tmp_path / "nothing")


def test_the_guides_lines_run(
    chat: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lines for a running server and for a renamed base, with a server and a base of this machine."""
    text = (Path(__file__).parents[2] / "docs" / "probes.md").read_text("utf-8")
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    assert len(lines) == 3
    restaurant = gentle(tmp_path / "restaurant", tiny_llama)
    pack(restaurant, base=tiny_llama, probes=True)
    locked(tmp_path, tiny_llama, {"restaurant": "./restaurant"})
    (tmp_path / "base-under-new-names").symlink_to(tiny_llama)
    shutil.rmtree(chat)
    aged(restaurant, chat, {r"model\.layers\.": "language_model.model.layers."})
    for name in ("hubkit.json", "tensors.json", "probes.json"):
        (chat / name).unlink()
    monkeypatch.chdir(tmp_path)
    with loopback("vllm", tiny_llama, {key_of(restaurant): restaurant}) as url:
        for line in lines:
            said = say(capsys, *shlex.split(line.replace("http://127.0.0.1:8000", url))[1:])
            assert said.status == 0, said.err
    assert (tmp_path / "chat-renamed" / "hubkit.json").is_file()


def test_the_guides_bounds_are_those_used() -> None:
    """What the table of the guide says of dtypes is what is used."""
    text = (Path(__file__).parents[2] / "docs" / "probes.md").read_text("utf-8")
    said = dict(re.findall(r"`(f32|f16|bf16|q8_0)`\s+(0\.\d+)", text))
    assert {dtype: float(bound) for dtype, bound in said.items()} == dict(BOUNDS)
