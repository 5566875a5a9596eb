"""pack: an adapter's folder made complete and bound to its base; a folder that PEFT wrote is adopted."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from making import make_adapter
from variants import OTHERS, other_weights, refused, resharded, rows_file, say, small_disk, tree

from hubkit.artifact.folder import open_adapter
from hubkit.documents.manifest import Manifest
from hubkit.documents.schema import canonical
from hubkit.verbs.export import export
from hubkit.verbs.merge import merge
from hubkit.verbs.pack import pack

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def foreign(adapter: Path, tmp_path: Path) -> Path:
    """A folder as PEFT writes it, named chat."""
    place = tmp_path / "foreign" / "chat"
    export(str(adapter), place)
    return place


def test_a_foreign_folder_becomes_an_adapter_in_place(foreign: Path, tiny_llama: Path) -> None:
    done = pack(foreign, base=str(tiny_llama), version="1.0.0", license="mit")
    opened = open_adapter(foreign)
    assert (done.adopted, done.changed, done.left_out) == (True, True, ())
    assert opened.manifest.digest == done.digest
    assert (opened.manifest.name, opened.manifest.version, opened.manifest.license) == ("chat", "1.0.0", "mit")
    assert opened.base_tensors()
    again = pack(foreign, version="1.0.0")
    assert (again.adopted, again.changed, again.digest) == (False, False, done.digest)


ALL = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import hubkit
base, rows, foreign, own, out = sys.argv[1:]
out = Path(out)
hubkit.train(base, rows, out / "t" / "chat", steps=3, save_every=2, validation=0.2, dtype="float32")
hubkit.pack(foreign, base=base, out=out / "p" / "chat", version="1.0.0")
hubkit.pack(own, out=out / "o" / "chat", license="mit")
hubkit.compose(f"{own} - 0.5*{foreign}-packed", out / "c" / "chat")
hubkit.merge(base, f"{own} - 0.5*{foreign}-packed", out / "m" / "chat")
"""


@pytest.mark.slow
def test_every_process_and_folder_gives_the_same_bytes(
    foreign: Path, adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """Under another PYTHONHASHSEED, umask, clock and token; and nothing of those is in any file."""
    pack(foreign, base=str(tiny_llama), out=f"{foreign}-packed")
    rows = rows_file(tmp_path / "rows.jsonl")
    canary = "hf_" + "Canary1" * 5
    runs = []
    for seed, place in ((1, tmp_path / "one"), (77, tmp_path / "deeper" / "two")):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": str(seed),
            "HF_TOKEN": canary,
            "HUBKIT_HOME": str(tmp_path / f"home{seed}"),
            "TZ": f"UTC+{seed % 12}",
        }
        line: list[str | Path] = [sys.executable, "-c", ALL, tiny_llama, rows, foreign, adapter, place]
        runs.append(subprocess.Popen(line, env=environment, umask=0o77 if seed == 1 else 0o22))
    assert [run.wait() for run in runs] == [0, 0]
    one, two = tree(tmp_path / "one"), tree(tmp_path / "deeper" / "two")
    assert one == two
    assert {name.split("/")[0] for name in one} == {"t", "p", "o", "c", "m"}
    host = os.uname().nodename
    for name, data in one.items():
        for private in (str(tmp_path), canary, "/tmp/", host if len(host) > 5 else canary, os.sep + "home" + os.sep):
            assert private.encode() not in data, f"{private} in {name}"
        if name.endswith(".json"):
            assert not [key for key in ("seconds", "time", "date") if f'"{key}"'.encode() in data], name


@pytest.mark.parametrize("what", OTHERS)
def test_another_base(
    what: str, adapter: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, said = OTHERS[what]
    other, before = make(tiny_llama, tmp_path / "other"), tree(adapter)
    for more in ((), ("--dry-run",), ("--out", tmp_path / "new")):
        done = say(capsys, "pack", adapter, "--base", other, *more)
        assert done.refusal() == "HK-BASE-MISMATCH"
        assert said in done.err
    assert tree(adapter) == before
    assert not (tmp_path / "new").exists()
    pack(adapter, base=str(other), out=tmp_path / "new", allow_base_mismatch=True)
    assert Manifest.read(tmp_path / "new").overrides == ("allow-base-mismatch",)
    assert pack(tmp_path / "new", version="2.0.0").manifest.overrides == ("allow-base-mismatch",), "kept for good"


def test_the_same_base_in_other_files(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    done = pack(adapter, base=str(resharded(tiny_llama, tmp_path / "other")))
    assert done.manifest.overrides == ()
    assert done.manifest.base is not None
    assert set(done.manifest.base.files) == {"part-0.safetensors", "part-1.safetensors", "part-2.safetensors"}


@pytest.mark.parametrize("named", ["", None, "absent"])
def test_a_foreign_folder_that_names_no_base(foreign: Path, tiny_llama: Path, named: str | None) -> None:
    document = json.loads((foreign / CONFIG).read_text())
    document.pop("base_model_name_or_path")
    if named != "absent":
        document["base_model_name_or_path"] = named
    (foreign / CONFIG).write_text(json.dumps(document))
    before = tree(foreign)
    assert refused("HK-BASE-NEEDED", pack, foreign).fix == "--base BASE"
    assert tree(foreign) == before
    pack(foreign, base=str(tiny_llama))


def test_what_is_not_of_an_adapter_is_left_where_it_is(foreign: Path, tiny_llama: Path, tmp_path: Path) -> None:
    (foreign / "optimizer.pt").write_bytes(pickle.dumps({"step": 1}))
    (foreign / "notes.txt").write_bytes(pickle.dumps("a pickle under any name"))
    (foreign / "LICENSE").write_text("free")
    (foreign / "secret.md").symlink_to("/etc/hostname")
    before = tree(foreign)
    error = refused("HK-EXTRA-FILES", pack, foreign, base=str(tiny_llama))
    assert error.have == ["notes.txt", "optimizer.pt", "secret.md"]
    assert tree(foreign) == before
    done = pack(foreign, base=str(tiny_llama), out=tmp_path / "new")
    assert done.left_out == ("notes.txt", "optimizer.pt", "secret.md")
    assert set(tree(tmp_path / "new")) == {*before, "tensors.json", "hubkit.json", "README.md"} - {*done.left_out}


def test_hand_written_words_survive(foreign: Path, tiny_llama: Path) -> None:
    (foreign / "README.md").write_text(
        f"---\nbase_model: {tiny_llama}\ntags: [mine]\n---\n# Mine\n\nWritten by hand.\n"
    )
    pack(foreign, base=str(tiny_llama))
    card = (foreign / "README.md").read_text()
    assert "Written by hand." in card
    assert str(tiny_llama) not in card
    (foreign / "README.md").write_text(card.replace("# Mine", "# Ours"))
    pack(foreign, version="2.0.0")
    assert "# Ours" in (foreign / "README.md").read_text()


def test_a_merged_checkpoint_gets_a_version_too(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    merge(str(tiny_llama), str(adapter), tmp_path / "merged")
    weights = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert pack(tmp_path / "merged", version="2.0.0").manifest.kind == "model"
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == weights
    assert open_adapter(tmp_path / "merged").manifest.version == "2.0.0"


def _config(**changes: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        document = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**document, **changes}))

    return spoil


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def _as_bin(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"a": torch.ones(2)}, folder / "adapter_model.bin")


def _as_empty_bin(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").touch()


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), "HK-SAFETENSORS"),
    "truncated weights": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "HK-SAFETENSORS"),
    "text as weights": (lambda f: (f / WEIGHTS).write_text("no tensors in here, sorry"), "HK-SAFETENSORS"),
    "pickle as weights": (lambda f: (f / WEIGHTS).write_bytes(pickle.dumps({})), "HK-SAFETENSORS"),
    "torch file as weights": (lambda f: torch.save({}, f / WEIGHTS), "HK-SAFETENSORS"),
    "only a pickle": (_as_bin, "HK-PICKLE"),
    "an empty pickle": (_as_empty_bin, "HK-PICKLE"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "HK-MISSING"),
    "no config": (lambda f: (f / CONFIG).unlink(), "HK-NOT-ADAPTER"),
    "NaN": (_tensors(lambda t: t[min(t)].view(-1)[:1].fill_(float("nan"))), "HK-NAN"),
    "infinity": (_tensors(lambda t: t[max(t)].view(-1)[-1:].fill_(float("-inf"))), "HK-NAN"),
    "tensor missing": (_tensors(lambda t: t.pop(min(t))), "HK-KEYS"),
    "tensor of no module": (_tensors(lambda t: t.update(junk=torch.ones(1))), "HK-KEYS"),
    "tensor of another module": (
        _tensors(lambda t: t.update({f"base_model.model.nope.lora_{x}.weight": torch.ones(2, 2) for x in "AB"})),
        "HK-KEYS",
    ),
    "no tensor": (_tensors(lambda t: t.clear()), "HK-KEYS"),
    "another rank": (_config(r=5), "HK-SHAPE"),
    "rank of no number": (_config(r="many"), "HK-CONFIG"),
    "rank below one": (_config(r=0), "HK-CONFIG"),
    "patterns in a list": (_config(rank_pattern=[1]), "HK-CONFIG"),
    "explosive pattern": (_config(alpha_pattern={"(a+)+b": 3}), "HK-PATTERN"),
    "unknown active option": (_config(use_shiny_new_thing=True), "HK-OPTION"),
    "unknown type": (_config(peft_type="SHINY"), "HK-METHOD-UNKNOWN"),
    "config of no object": (lambda f: (f / CONFIG).write_text("[]"), "HK-JSON"),
    "broken config": (lambda f: (f / CONFIG).write_text('{"r": 4,'), "HK-JSON"),
    "config twice": (lambda f: (f / CONFIG).write_text('{"r": 4, "r": 5}'), "HK-JSON"),
    "damaged card": (lambda f: (f / "README.md").write_text("<!-- hubkit:begin -->\n"), "HK-CARD"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_foreign_folder(
    fault: str, foreign: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, code = FAULTS[fault]
    spoil(foreign)
    before = tree(tmp_path)
    for more in ((), ("--dry-run",), ("-o", tmp_path / "new")):
        assert say(capsys, "pack", foreign, "--base", tiny_llama, *more).refusal() == code
    assert tree(tmp_path) == before


def _manifest(**changes: Any) -> Callable[[Path], object]:
    """The manifest with other values, in canonical bytes."""

    def spoil(folder: Path) -> None:
        document = json.loads((folder / "hubkit.json").read_text())
        (folder / "hubkit.json").write_bytes(canonical({**document, **changes}))

    return spoil


def _list(path: str) -> Callable[[Path], object]:
    """The manifest lists one more file."""

    def spoil(folder: Path) -> None:
        document = json.loads((folder / "hubkit.json").read_text())
        document["files"].append({**document["files"][0], "path": path})
        document["files"].sort(key=lambda entry: entry["path"])
        (folder / "hubkit.json").write_bytes(canonical(document))

    return spoil


def _as_folder(folder: Path) -> None:
    (folder / "hubkit.json").unlink()
    (folder / "hubkit.json").mkdir()


BROKEN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "newer major": (_manifest(schema="hubkit/manifest/2"), "HK-NEWER", "HK-NEWER"),
    "no manifest of ours": (_manifest(schema="theirs/1"), "HK-SCHEMA", "HK-SCHEMA"),
    "path upwards": (_list("../x"), "HK-NAME", "HK-NAME"),
    "absolute path": (_list("/etc/hostname"), "HK-NAME", "HK-NAME"),
    "file not there": (_list("more.json"), "HK-FILES", "HK-FILES"),
    "weights changed": (_tensors(lambda t: t[min(t)].add_(1)), "HK-FILES", ""),
    "weights gone": (lambda f: (f / WEIGHTS).unlink(), "HK-FILES", "HK-FILES"),
    "weights cut": (lambda f: os.truncate(f / WEIGHTS, 900), "HK-FILES", "HK-SAFETENSORS"),
    "weights a pickle": (lambda f: (f / WEIGHTS).write_bytes(pickle.dumps(1)), "HK-FILES", "HK-SAFETENSORS"),
    "base's tensors changed": (lambda f: (f / "tensors.json").write_text("{}"), "HK-FILES", "HK-SCHEMA"),
    "unknown option": (_manifest(config={"rank": 2, "shiny": True}), "HK-CONFIG", "HK-CONFIG"),
    "unknown method": (_manifest(method="shiny"), "HK-METHOD-UNKNOWN", "HK-METHOD-UNKNOWN"),
    "no target": (_manifest(config={"rank": 2, "targets": ["q_proj", "nope"]}), "HK-TARGET", "HK-TARGET"),
    "not JSON": (lambda f: (f / "hubkit.json").write_text('{"name":'), "HK-JSON", "HK-JSON"),
    "not UTF-8": (lambda f: (f / "hubkit.json").write_bytes(b'{"a":"\xff"}'), "HK-JSON", "HK-JSON"),
    "a folder": (_as_folder, "HK-IO", "HK-NOT-ADAPTER"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_adapter(
    fault: str, adapter: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command that reads it refuses, and writes nothing; `pack` takes it where it can be made whole."""
    spoil, code, packing = BROKEN[fault]
    spoil(adapter)
    if fault == "a folder":
        (adapter / CONFIG).unlink()
    before = tree(tmp_path)
    new = tmp_path / "new"
    for line in (
        ("merge", adapter, "--base", tiny_llama, "-o", new),
        ("compose", adapter, "-o", new),
        ("generate", "hi", "--base", tiny_llama, "--adapter", adapter),
        ("export", adapter, "-o", new),
    ):
        assert say(capsys, *line).refusal() == code, line
    if packing:
        assert say(capsys, "pack", adapter).refusal() == packing
        assert tree(tmp_path) == before
    else:
        pack(adapter)
        open_adapter(adapter)


def test_usage_and_bases_that_are_none(
    adapter: Path, foreign: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hollow = tmp_path / "hollow"
    shutil.copytree(tiny_llama, hollow)
    (hollow / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes()[:5000])
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    before = tree(tmp_path)
    for line, status, code in (
        ((tmp_path / "nope",), 1, "HK-NOT-ADAPTER"),
        ((tmp_path / "work",), 1, "HK-NOT-ADAPTER"),
        ((adapter, "--version", "1.2"), 2, "HK-VERSION"),
        ((adapter, "--name", "a/b"), 2, "HK-NAME"),
        ((foreign,), 1, "HK-OFFLINE"),
        ((foreign, "--base", "nope"), 2, "HK-REFERENCE"),
        ((foreign, "--base", tmp_path / "nope"), 1, "HK-BASE-MISSING"),
        ((foreign, "--base", tmp_path / "work"), 1, "HK-BASE-FILES"),
        ((foreign, "--base", hollow), 1, "HK-SAFETENSORS"),
        ((foreign, "--base", tiny_llama, "-o", adapter), 1, "HK-EXISTS"),
        ((foreign, "--base", tiny_llama, "-o", adapter, "--dry-run"), 1, "HK-EXISTS"),
        ((foreign, "--base", tiny_llama, "-o", tmp_path / "work", "--replace"), 1, "HK-EXISTS"),
        ((foreign, "--base", tiny_llama, "--license", "hf_" + "A1" * 17), 1, "HK-SECRET"),
    ):
        if code == "HK-OFFLINE":
            line = (*line, "--registry", "http://127.0.0.1:9")
        assert say(capsys, "pack", *line).refusal(status) == code, line
    assert tree(tmp_path) == before


def test_a_full_disk_leaves_the_folder_as_it_was(
    adapter: Path, foreign: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    before = tree(tmp_path)
    for size in (0, 500, 3000, 6000):
        with small_disk(size):
            refused("HK-DISK", pack, adapter, version="2.0.0")
            refused("HK-DISK", pack, foreign, base=str(tiny_llama), out=tmp_path / "new")
    assert tree(tmp_path) == before


def test_a_wrong_base_for_a_foreign_folder_of_other_modules(foreign: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    error = refused("HK-KEYS", pack, foreign, base=str(tiny_gpt2))
    assert "model.layers.0.mlp.down_proj" in error.have
    assert set(tree(foreign)) == {CONFIG, WEIGHTS}


def test_an_override_that_was_not_needed_is_not_recorded(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    assert pack(adapter, base=str(tiny_llama), allow_base_mismatch=True).manifest.overrides == ()
    other = other_weights(tiny_llama, tmp_path / "other")
    assert pack(adapter, base=str(other), allow_base_mismatch=True).manifest.overrides == ("allow-base-mismatch",)
    manifest = Manifest.read(adapter)
    assert replace(manifest, overrides=()).digest != manifest.digest


def test_unknown_fields_of_a_later_minor_are_kept(adapter: Path) -> None:
    _manifest(shiny={"later": True})(adapter)
    pack(adapter, version="1.0.0")
    assert json.loads((adapter / "hubkit.json").read_text())["shiny"] == {"later": True}


def test_making_is_canonical(tiny_llama: Path, tmp_path: Path) -> None:
    """What the helpers of these tests write is what pack would write."""
    made = make_adapter(tmp_path / "chat", tiny_llama)
    before = tree(made)
    pack(made)
    after = tree(made)
    assert {n: d for n, d in after.items() if n != "README.md"} == {n: d for n, d in before.items() if n != "README.md"}
