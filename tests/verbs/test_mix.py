"""mix: a tree of adapters as an artifact, proven, published, pulled, attached, merged; or refused, and nothing left."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from installing import offer
from making import make_adapter
from variants import logits, names, other_weights, refused, say, tree
from zoo import near

import hubkit
from hubkit.artifact.folder import open_adapter
from hubkit.documents.manifest import Manifest
from hubkit.documents.schema import canonical
from hubkit.methods.host import host
from hubkit.methods.reading import read_adapter
from hubkit.registry.opening import open_registry
from hubkit.tensors.base.base import Base
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.mix import mix
from hubkit.verbs.push import push

MOLORA = Path(__file__).parent.parent.parent / "examples" / "hubkit-molora" / "hubkit_molora.py"
NESTED = "stack(./a, 0.5*sum(./b, -1*./c))"


@pytest.fixture
def here(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with adapters a, b and c; b reads the weight below it."""
    work = tmp_path / "work"
    work.mkdir()
    make_adapter(work / "a", tiny_llama, seed=1, alpha=2)
    make_adapter(work / "b", tiny_llama, seed=2, method=host().load("dora"), rank=3, alpha=2)
    make_adapter(work / "c", tiny_llama, seed=3, alpha=2, targets=["q_proj", "lm_head"])
    monkeypatch.chdir(work)
    return work


def rewrite(folder: Path, change: Callable[[Any], None]) -> None:
    """Edits a manifest as somebody would who keeps it canonical."""
    path = folder / "hubkit.json"
    document = json.loads(path.read_bytes())
    change(document)
    path.write_bytes(canonical(document))


def test_a_folder_of_two_documents(here: Path) -> None:
    done = mix(NESTED, "m", license="apache-2.0")
    assert names(here / "m") == {"hubkit.json", "README.md"}
    manifest = Manifest.read(here / "m")
    assert (manifest.kind, manifest.digest, manifest.license) == ("mix", done.digest, "apache-2.0")
    assert manifest.base == Manifest.read(here / "a").base
    assert {name: one.digest for name, one in manifest.mixed().members.items()} == {
        name: Manifest.read(here / name).digest for name in "abc"
    }
    assert [parent.weight for parent in manifest.parents] == [1.0, 0.5, -0.5]
    assert str(manifest.mixed().tree) == "stack(a, 0.5*sum(b, -1*c))"
    assert "stack(a, 0.5*sum(b, -1*c))" in (here / "m" / "README.md").read_text()
    first = tree(here / "m")
    mix(
        hubkit.Stack([("./a", 1.0), (hubkit.Sum({"./b": 1.0, "./c": -1.0}), 0.5)]),
        "m",
        license="apache-2.0",
        replace=True,
    )
    assert tree(here / "m") == first, "same input, same bytes"


def test_it_computes_what_its_tree_says(here: Path, tiny_llama: Path) -> None:
    """Attached, weighed, inside another mix, merged: always what the same tree of its adapters computes."""
    from transformers import AutoModelForCausalLM

    mix(NESTED, "m")
    mix("2*./m + ./a", "outer")
    attached = attach(load_base(tiny_llama), "./a + ./b + ./c")
    inner = hubkit.Stack([("a", 1.0), (hubkit.Sum({"b": 1.0, "c": -1.0}), 0.5)])
    base = logits(load_base(tiny_llama))
    for terms, wanted in (
        ("./m", inner),
        ("-0.5*./m", hubkit.Sum([(inner, -0.5)])),
        ("./outer", hubkit.Sum([(inner, 2.0), ("a", 1.0)])),
        ("./outer - 2*./m", hubkit.Sum({"a": 1.0})),
    ):
        attached.set_mix(wanted)
        want = logits(attached)
        have = attach(load_base(tiny_llama), terms)
        near(logits(have), want)
        assert (want - base).abs().max() > 1e-2
        if terms != "./outer - 2*./m":
            assert set(have.adapters) == {"a", "b", "c"}, "what occurs in several places is attached once"
        hubkit.merge(str(tiny_llama), terms, "merged", replace=True)
        near(logits(AutoModelForCausalLM.from_pretrained("merged").eval()), want)
    manifest = Manifest.read(here / "merged")
    assert [parent.reference for parent in manifest.parents] == ["./outer", "./m"]


def test_attached_beside_others(here: Path, tiny_llama: Path) -> None:
    mix(NESTED, "m")
    attached = attach(load_base(tiny_llama), "./a")
    attach(attached, "./m")
    assert set(attached.adapters) == {"a", "a-2", "b", "c"}
    assert attached.mix == hubkit.Stack([("a-2", 1.0), (hubkit.Sum({"b": 1.0, "c": -1.0}), 0.5)])
    (here / "b" / "tensors.json").write_text("{}")
    before = logits(attached)
    assert refused("HK-MIX-MEMBER", attach, attached, "./m").have[0].startswith("HK-FILES")
    assert set(attached.adapters) == {"a", "a-2", "b", "c"}
    assert torch.equal(logits(attached), before)


def test_generate_answers_as_the_merged_model_does(here: Path, tiny_llama: Path) -> None:
    mix("./a + 0.5*./c", "m")
    hubkit.merge(str(tiny_llama), "./m", "merged")
    live = hubkit.generate("hello", base=str(tiny_llama), terms="./m", max_new_tokens=6)
    assert live.text == hubkit.generate("hello", base="./merged", max_new_tokens=6).text
    assert live.text != hubkit.generate("hello", base=str(tiny_llama), max_new_tokens=6).text
    assert live.adapters == (("./m", 1.0),)


def test_a_sum_is_composed_and_a_stack_is_not(here: Path, tiny_llama: Path) -> None:
    mix("./a + 0.5*./c", "m")
    mix("2*./m - ./a", "outer")
    hubkit.compose("./outer", "whole")
    near(logits(attach(load_base(tiny_llama), "./whole")), logits(attach(load_base(tiny_llama), "./a + ./c")))
    assert "not linear" in refused("HK-COMPOSE", hubkit.compose, "./m + ./c", "x", method="ties", density=0.5).what
    mix(NESTED, "stacked")
    refused("HK-COMPOSE", hubkit.compose, "./stacked", "x")
    assert not (here / "x").exists()


@pytest.fixture
def published(here: Path, registry: str, published_base: str) -> Path:
    """a and c as repositories, and the mix m of them, published."""
    for name in "ac":
        push(name, f"ana/{name}")
    mix("stack(ana/a, -0.5*ana/c)", "m")
    push("m", "ana/m")
    return here


def test_published_it_brings_its_members(published: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("HUBKIT_HOME", str(published / "empty"))
    assert refused("HK-OFFLINE", hubkit.pull, "ana/m", offline=True)
    done = hubkit.pull("ana/m@^0.1")
    assert [one.partition("@")[0] for one in done.members] == ["ana/a", "ana/c"]
    assert done.fetched > 0
    assert hubkit.pull("ana/m").fetched == 0
    monkeypatch.setenv("HUBKIT_REGISTRY", str(published / "registry-that-is-gone"))
    shutil.move(published.parent / "registry", published.parent / "gone")
    at = f"file://{published.parent}/registry/ana/m"
    again = hubkit.pull(at, offline=True)
    assert (again.digest, again.fetched) == (done.digest, 0)
    assert hubkit.verify(done.path.as_posix(), base=str(_base(published))).digest == done.digest
    kinds = {one.kind for one in hubkit.list("ana/")}
    assert kinds == {"adapter", "mix: stack(a, -0.5*c)"}


def _base(published: Path) -> Path:
    """The base as pulled from the registry, which may be gone by now."""
    from hubkit.registry.directory.directory import DirectoryRegistry

    place = DirectoryRegistry(published.parent / "gone")
    out = published / "base"
    out.mkdir(exist_ok=True)
    commit = place.resolve("ana/base")
    for file in place.files("ana/base", commit):
        (out / file.path).write_bytes(place.read("ana/base", commit, file.path))
    return out


def test_members_are_in_the_registry_of_the_mix(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named by its address, whatever the default registry is."""
    monkeypatch.setenv("HUBKIT_HOME", str(published / "empty"))
    monkeypatch.setenv("HUBKIT_REGISTRY", str(published / "other"))
    done = hubkit.pull(f"file://{published.parent}/registry/ana/m")
    assert all(one.startswith("file://") for one in done.members)


def test_verified_with_every_member(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = hubkit.verify("ana/m")
    assert [check.name for check in done.checks] == ["files", "members", "base", "a", "c"]
    assert say(capsys, "verify", "./m").out.startswith("verified ./m\nok  files ")
    text = say(capsys, "inspect", "ana/m").out
    assert "stack\n├─ a\n└─ -0.5 * c\n" in text
    assert json.loads(say(capsys, "inspect", "./m", "--json").out)["manifest"]["mix"]["tree"]["stack"]


def test_a_folder_cannot_be_published(here: Path, registry: str) -> None:
    push("a", "ana/a")
    mix("ana/a + ./c", "m")
    assert refused("HK-MIX-MEMBER", push, "m", "ana/m").have == ["c: a folder of this machine"]
    mix("ana/a", "m", replace=True)
    refusal = refused("HK-MIX-MEMBER", push, "m", "ana/m", registry=str(here / "elsewhere"))
    assert refusal.have[0].startswith("a: not in the registry")
    assert not (here / "elsewhere").exists()
    assert list(open_registry(None, registry).repos()) == ["ana/a"]


def test_a_folder_in_a_published_mix_is_not_looked_for(published: Path) -> None:
    """A stranger's mix names a folder of whoever pulls it."""
    place = open_registry(None, str(published.parent / "registry"))
    for number, reference in enumerate(("../a", str(published / "a"), f"file://{published.parent}/registry/ana/a")):
        document = json.loads((published / "m" / "hubkit.json").read_bytes())
        document["mix"]["members"]["a"] = {
            **document["mix"]["members"]["a"],
            "reference": reference,
            "digest": "sha256:" + "0" * 64,
        }
        repo = f"eve/m{number}"
        place.create(repo)
        place.commit(repo, {"hubkit.json": canonical(document)}, [], message="m", parent=None)
        assert refused("HK-MIX-MEMBER", hubkit.pull, repo).have[0].startswith("HK-REFERENCE")


def test_moved_by_pack(here: Path, tiny_llama: Path) -> None:
    mix("./a + ./c", "m")
    packed = hubkit.pack("m", out="far/away/m", version="1.0.0")
    assert packed.manifest.version == "1.0.0"
    assert hubkit.verify("far/away/m", base=str(tiny_llama)).checks[1].detail.startswith("2 adapters in sum(a, c)")
    shutil.move(here, here.parent / "moved")
    os.chdir(here.parent / "moved")
    assert hubkit.verify("./m", base=str(tiny_llama)).digest == Manifest.read(Path("m")).digest


def _tree(change: Callable[[Any], None]) -> Callable[[Path], None]:
    return lambda work: rewrite(work / "m", lambda document: change(document["mix"]["tree"]))


def _bytes(old: bytes, new: bytes) -> Callable[[Path], object]:
    return lambda work: (work / "m/hubkit.json").write_bytes((work / "m/hubkit.json").read_bytes().replace(old, new))


SPOILS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "gone": (lambda w: shutil.rmtree(w / "a"), "HK-MIX-MEMBER", "cannot be had"),
    "changed": (lambda w: make_adapter(w / "a", w.parent / "base", seed=9), "HK-MIX-MEMBER", "not the one"),
    "bytes": (lambda w: (w / "a" / "tensors.json").write_text("{}"), "HK-MIX-MEMBER", "cannot be had"),
    "model": (lambda w: _member(w, w / "merged"), "HK-MIX-MEMBER", "neither an adapter nor a mix"),
    "itself": (lambda w: _member(w, w / "m"), "HK-MIX-MEMBER", "not the one"),
    "unknown": (_tree(lambda tree: tree["stack"][0].update(adapter="x")), "HK-SCHEMA", "'x' is no member"),
    "empty": (_tree(lambda tree: tree.update(stack=[])), "HK-SCHEMA", "stack"),
    "edited": (_bytes(b"}", b"} "), "HK-NOT-CANONICAL", ""),
    "nan": (_bytes(b"0.5", b"NaN"), "HK-JSON", "NaN"),
}


def _member(work: Path, folder: Path) -> None:
    """The mix names another artifact as its member, with the right digest as far as there is one."""
    named = {"reference": os.path.relpath(folder, work / "m"), "digest": Manifest.read(folder).digest}
    named["reference"] = named["reference"] if named["reference"].startswith(".") else f"./{named['reference']}"
    rewrite(work / "m", lambda document: document["mix"]["members"].update(a=named))


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_broken_mix_is_one_refusal_everywhere(
    spoil: str, here: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mix("stack(./a, 0.5*./c)", "m")
    (here.parent / "base").symlink_to(tiny_llama)
    hubkit.merge(str(tiny_llama), "./c", "merged")
    change, code, said = SPOILS[spoil]
    change(here)
    before = names(here)
    for line in (
        ("verify", "./m", "--base", tiny_llama),
        ("generate", "hi", "--adapter", "0.5*./m", "--base", tiny_llama),
        ("merge", "./m", "--base", tiny_llama, "-o", "out"),
        ("compose", "./m", "-o", "out"),
        ("mix", "./m", "+", "./c", "-o", "out"),
    ):
        done = say(capsys, *line)
        assert done.refusal() == code, (line, done.err)
        assert said in done.err
    refused(code, attach, load_base(tiny_llama), "./m")
    assert names(here) == before


def test_nothing_is_written_when_it_is_refused(here: Path, tiny_llama: Path, tmp_path: Path) -> None:
    make_adapter(here / "other", other_weights(tiny_llama, tmp_path / "other"), seed=5)
    make_adapter(here / "virtual", tiny_llama, method=host().load("prompt"), num_virtual_tokens=2)
    hubkit.merge(str(tiny_llama), "./a", "merged")
    before = names(here)
    assert "model.layers.1" in "\n".join(refused("HK-BASE-MISMATCH", mix, "./a + ./other", "m").have)
    assert refused("HK-MIX", mix, "./a + 0.5*./virtual", "m").have == ["0.5*virtual"]
    assert refused("HK-MIX", mix, "./a + 0.5*stack(./virtual, ./a)", "m").have == ["0.5*virtual"]
    refused("HK-NOT-ADAPTER", mix, "./a + ./merged", "m")
    refused("HK-NOT-ADAPTER", mix, "./a + ./nothing", "m")
    refused("HK-TERMS", mix, "stack(./a", "m")
    refused("HK-MIX", mix, "./a", "m", mix="heap")
    refused("HK-NAME", mix, "./a", "m", name="no name")
    refused("HK-EXISTS", mix, "./a", "c")
    assert "in the place of its member" in refused("HK-EXISTS", mix, "./a", "a", replace=True).what
    assert "in the place of its member" in refused("HK-EXISTS", mix, "./a", "a/m").what
    assert mix("./a + ./virtual", "m", dry_run=True).digest == ""
    assert names(here) == before
    assert mix("./a + ./other", "m", allow_base_mismatch=True).overrides == ("allow-base-mismatch",)
    assert Manifest.read(here / "m").overrides == ("allow-base-mismatch",)


def test_a_weight_that_nothing_stands_for_is_not_read(here: Path, tiny_llama: Path, packages: Path) -> None:
    """b reads the weight below it: what cannot be merged may be above it or beside it, not below."""
    offer(packages, "hubkit-molora", {"molora": MOLORA})
    make_adapter(here / "routed", tiny_llama, method=host().load("molora"))
    error = refused("HK-NOT-MERGEABLE", mix, "stack(./routed, ./a, ./b)", "m")
    assert [line.partition(" at ")[0] for line in error.have] == ["b on routed"]
    refused("HK-NOT-MERGEABLE", mix, "./a + stack(./routed, 0.5*sum(./a, ./b))", "m")
    assert not (here / "m").exists()
    mix("stack(./b, ./routed) + ./routed", "m")


def test_different_tokens_are_refused(here: Path) -> None:
    for name, tokens in (("a", {"<x>": 320}), ("c", {"<y>": 320})):
        rewrite(here / name, partial(dict.update, vocabulary=tokens))
    assert refused("HK-VOCABULARY", mix, "./a + ./c", "m").have == ["./a", "./c"]
    mix("./a + ./b", "m")
    assert Manifest.read(here / "m").vocabulary == {"<x>": 320}
    assert refused("HK-VOCABULARY", mix, "./m + ./c", "n").have == ["./m", "./c"]


def test_one_adapter_under_two_names_is_one_member(here: Path) -> None:
    shutil.copytree(here / "a", here / "copy")
    done = mix("./a - 0.5*./copy + ./a", "m")
    assert done.tree == "sum(a, -0.5*a, a)"
    assert list(done.members) == ["a"]


def test_mixes_inside_mixes_have_an_end(here: Path) -> None:
    mix("./a + ./c", "m0")
    for number in range(1, 8):
        mix(f"./m{number - 1} + -1*./m{number - 1}", f"m{number}")
    refused("HK-MIX", mix, "./m7 + ./m7", "m8")  # 512 places
    mix("./a", "d0")
    for number in range(1, 16):
        mix(f"./d{number - 1}", f"d{number}")
    refused("HK-MIX", mix, "./d15", "d16")
    assert not (here / "d16").exists()
    shutil.copytree(here / "d15", here / "d16")
    member = {"d14": {"digest": Manifest.read(here / "d15").digest, "reference": "../d15"}}
    rewrite(here / "d16", lambda document: document["mix"].update(members=member))
    assert refused("HK-MIX", mix, "./d16", "d17").have == ["more than 16 mixes inside each other"]
    assert not (here / "m8").exists()


def test_where_an_adapter_is_needed(here: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mix("./a + ./c", "m")
    before = names(here)
    for line in (("export", "./m", "-o", "x"), ("pack", "./m", "--base", tiny_llama)):
        assert say(capsys, *line).refusal() == "HK-NOT-ADAPTER"
    assert names(here) == before
    refused("HK-NOT-ADAPTER", read_adapter, open_adapter(here / "m"), Base.from_folder(tiny_llama))


def test_locked_and_deployed(here: Path, tiny_llama: Path) -> None:
    """The merged engine folds the tree in, beside other adapters; PEFT gets one adapter; a changed member is found."""
    from transformers import AutoModelForCausalLM

    mix(NESTED, "m")
    (here / "base").symlink_to(tiny_llama)
    adapters = '[adapters.m]\nsource = "./m"\nweight = 0.5\n[adapters.a]\nsource = "./a"\n'
    (here / "hubkit.toml").write_text(f'[base]\nsource = "./base"\n{adapters}')
    locked = hubkit.lock().lock
    assert locked.adapters[0].digest == Manifest.read(here / "m").digest
    hubkit.deploy("run", engine="merged")
    want = logits(attach(load_base(tiny_llama), "0.5*./m + ./a"))
    near(logits(AutoModelForCausalLM.from_pretrained("run/model").eval()), want)
    hubkit.deploy("beside", engine="peft")
    program = here / "beside" / "run.py"
    run: dict[str, Any] = {"__file__": str(program), "__name__": "run"}
    exec(compile(program.read_text(), "run.py", "exec"), run)
    near(logits(run["load"]("cpu")[0]), want)
    make_adapter(here / "c", tiny_llama, seed=9)
    refused("HK-MIX-MEMBER", hubkit.deploy, "x", engine="merged")
    assert not (here / "x").exists()


def test_the_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = say(capsys, "mix", "-0.5*./a", "+", "./c", "--mix", "stack", "--out", "m")
    assert said.out.startswith("mixed   m: stack(-0.5*a, c)\n  a = ../a\n  c = ../c\ndigest  sha256:")
    said = say(capsys, "mix", NESTED, "-o", "n", "--dry-run", "--json")
    assert json.loads(said.out)["tree"] == "stack(a, 0.5*sum(b, -1*c))"
    assert not (here / "n").exists()
