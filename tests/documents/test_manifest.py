"""``hubkit.json``: what is read is what is written, byte for byte, known or not."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubkit.documents.manifest import BaseFingerprint, FileEntry, Manifest, Parent, Plugin, shareable
from hubkit.documents.schema import canonical, sha256
from hubkit.errors import HubkitError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(-1e30, 1e30) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
)
DOCUMENTS = st.dictionaries(TEXT, VALUES, max_size=5)
DIGESTS = st.binary(max_size=4).map(sha256)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
FREE = st.dictionaries(TEXT, VALUES, min_size=1, max_size=3)
UNKNOWN = st.dictionaries(TEXT.map("x-".__add__), VALUES, max_size=2)


def _with_unknown(known: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(known, UNKNOWN).map(lambda pair: {**pair[1], **pair[0]})


FILES = st.lists(
    _with_unknown(
        st.fixed_dictionaries({"path": TEXT.filter(bool), "size": st.integers(0, 2**53 - 1), "sha256": DIGESTS})
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda entry: entry["path"],
).map(lambda entries: sorted(entries, key=lambda entry: str(entry["path"])))
BASES = _with_unknown(
    st.fixed_dictionaries(
        {"layout": DIGESTS},
        optional={
            "source": TEXT.filter(bool),
            "revision": st.just("0" * 40),
            "weights": DIGESTS,
            "files": st.dictionaries(TEXT, DIGESTS, min_size=1, max_size=2),
            "config": FREE,
            "tokenizer": DIGESTS,
            "template": DIGESTS,
            "codec": st.just("nf4/64/double"),
        },
    )
)
PARENTS = _with_unknown(
    st.fixed_dictionaries(
        {"reference": TEXT.filter(bool), "digest": DIGESTS, "weight": st.floats(-9, 9) | st.integers(-9, 9)}
    )
)
MANIFESTS = _with_unknown(
    st.fixed_dictionaries(
        {
            "schema": st.just("hubkit/manifest/1"),
            "kind": st.sampled_from(["adapter", "model"]),
            "name": NAMES,
            "version": st.just("1.0.0-rc.1+b"),
            "method": TEXT.filter(bool),
            "base": BASES,
            "mix": FREE,
        },
        optional={
            "plugin": _with_unknown(st.just({"distribution": "d", "version": "1"})),
            "config": FREE,
            "files": FILES,
            "vocabulary": FREE,
            "training": FREE,
            "probes": FREE,
            "parents": st.lists(PARENTS, min_size=1, max_size=2),
            "license": TEXT.filter(bool),
            "overrides": st.lists(TEXT.filter(bool), min_size=1, max_size=2, unique=True),
        },
    )
)
DIGEST = sha256(b"")
BASE = BaseFingerprint("org/base", "a" * 40, DIGEST, DIGEST, {"model.safetensors": DIGEST}, {"layers": 2}, DIGEST, None)


def example(**changes: Any) -> Manifest:
    """A small valid manifest."""
    made = Manifest(kind="adapter", name="chat", method="m", plugin=Plugin("d", "1"), config={"rank": 8}, base=BASE)
    return dataclasses.replace(made, **changes)


@settings(max_examples=40, deadline=None)
@given(MANIFESTS)
def test_a_document_survives_reading_and_writing(document: dict[str, Any]) -> None:
    made = Manifest.from_document(document)
    assert made.to_document() == document
    data = canonical(document)
    again = Manifest.from_bytes(data)
    assert again == made
    assert again.to_bytes() == data
    assert again.digest == sha256(data)


@settings(max_examples=40, deadline=None)
@given(MANIFESTS, DOCUMENTS)
def test_a_damaged_document_is_read_or_refused(document: dict[str, Any], damage: dict[str, Any]) -> None:
    for part in ({**document, **dict(zip(document, damage.values(), strict=False))}, {**document, "base": damage}):
        with suppress(HubkitError):
            assert Manifest.from_document(part).to_document() == part


def test_the_identity_never_changes() -> None:
    """A golden digest: another one means that every adapter published so far would get a new identity."""
    made = example(files=(FileEntry("a", 1, DIGEST),), parents=(Parent("ana/x@1", DIGEST, 0.5),), license="mit")
    assert made.digest == "sha256:3e201788506699c5970dc5c19bca75f7811bc65b2b8705bdcc8c9d8135b4fb9d"


def test_none_and_empty_fields_are_left_out() -> None:
    made = Manifest(kind="model", name="m")
    assert made.to_document() == {"schema": "hubkit/manifest/1", "kind": "model", "name": "m", "version": "0.1.0"}
    assert Manifest.from_bytes(made.to_bytes()) == made


@pytest.mark.parametrize("change", [lambda b: b + b"\n", lambda b: b.replace(b":", b": ", 1), lambda b: b" " + b])
def test_bytes_that_are_not_canonical_have_no_identity(change: Any) -> None:
    with pytest.raises(HubkitError) as caught:
        Manifest.from_bytes(change(example().to_bytes()))
    assert caught.value.code == "HK-NOT-CANONICAL"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("license", None),
        ("files", []),
        ("config", {}),
        ("overrides", ["a", "a"]),
        ("version", "v1.0.0"),
        ("base", None),
        ("kind", "lora"),
        ("name", "../x"),
        ("name", "a\n"),
        ("parents", [{"reference": "x"}]),
    ],
)
def test_wrong_values_are_refused(field: str, value: object) -> None:
    document = {**example().to_document(), field: value}
    with pytest.raises(HubkitError) as caught:
        Manifest.from_document(document, "somewhere")
    assert caught.value.code == "HK-SCHEMA"
    assert caught.value.where == "somewhere"
    assert caught.value.have[0].startswith(f"#/{field}")


@pytest.mark.parametrize("missing", ["method", "base"])
def test_an_adapter_has_a_method_and_a_base(missing: str) -> None:
    with pytest.raises(HubkitError, match=f"'{missing}' is a required property"):
        Manifest.from_document({k: v for k, v in example().to_document().items() if k != missing})


def test_files_come_sorted_and_once() -> None:
    entry = FileEntry("b", 1, DIGEST)
    for files in ((entry, FileEntry("a", 1, DIGEST)), (entry, entry)):
        with pytest.raises(HubkitError, match="HK-SCHEMA"):
            Manifest.from_bytes(example(files=files).to_bytes())


def test_a_token_is_never_written() -> None:
    with pytest.raises(HubkitError, match="HK-SECRET"):
        example(training={"command": "HF_TOKEN=hf_" + "a" * 34}).to_bytes()


def test_read_tells_what_is_missing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(HubkitError) as caught:
            Manifest.read(folder)
        assert caught.value.code == "HK-NOT-ADAPTER"
    assert "hubkit pack" not in caught.value.fix
    (tmp_path / "hubkit.json").write_bytes(example().to_bytes())
    assert Manifest.read(tmp_path) == example()


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("org/name@v1", "org/name@v1"),
        ("./base", "./base"),
        ("https://host/org/name@v1", "https://host/org/name@v1"),
        ("hf://org/name", "hf://org/name"),
        ("/home/ana/models/base/", "base"),
        ("~/models/base", "base"),
        ("../base", "base"),
        ("file:///srv/hub/org/name@v1", "name@v1"),
        ("C:\\models\\base", "base"),
        ("\\\\server\\share\\base", "base"),
        ("/", "folder"),
        ("..", "folder"),
    ],
)
def test_only_the_own_name_of_a_folder_is_shared(source: str, want: str) -> None:
    assert shareable(source) == want
    base = dataclasses.replace(BASE, source=source)
    made = example(base=base, parents=(Parent(source, DIGEST, 1.0),)).shareable()
    assert made.base is not None
    assert (made.base.source, made.parents[0].reference) == (want, want)
