"""File names and kinds of files from strangers."""

from __future__ import annotations

import pickle
import posixpath
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from hubkit.documents.names import check_allowed, check_name, check_names
from hubkit.errors import HubkitError

segments = st.text(st.characters(categories=["L", "N"], max_codepoint=0x2FF), min_size=1, max_size=8).map(
    lambda s: unicodedata.normalize("NFC", "x" + s)
)
paths = st.lists(segments, min_size=1, max_size=4).map("/".join)


def _faults(*names: str) -> list[str]:
    with pytest.raises(HubkitError) as caught:
        check_names(names, "org/name@main") if len(names) > 1 else check_name(names[0], "org/name@main")
    assert caught.value.code == "HK-NAME"
    assert caught.value.where == "org/name@main"
    return list(caught.value.have)


@given(paths)
def test_plain_names_pass_and_stay_inside(path: str) -> None:
    check_name(path, "x")
    assert posixpath.normpath(posixpath.join("/root", path)).startswith("/root/")


@given(paths, st.sampled_from(["..", ".", "", "\\", "C:", "a:b", "\0", "\x1b", "\u202e", "\u200b", "a.", "a ", "?"]))
def test_no_bad_segment_passes_anywhere(path: str, bad: str) -> None:
    for name in (f"{bad}/{path}", f"{path}/{bad}", f"{path}/{bad}/{path}"):
        _faults(name)


@given(st.text(max_size=30))
def test_whatever_passes_is_one_file_inside_the_folder(path: str) -> None:
    try:
        check_name(path, "x")
    except HubkitError:
        return
    assert not path.startswith("/")
    assert "\\" not in path
    assert posixpath.normpath(path) == path
    assert ".." not in path.split("/")
    assert unicodedata.normalize("NFC", path) == path
    assert all(0 < len(part.encode()) <= 255 and part.strip(". \t") for part in path.split("/"))


@pytest.mark.parametrize("name", ["%2e%2e", "%2e%2e/x", "a%2fb", "..a", "...a", "a..b", "con1", "console", "com10.txt"])
def test_names_are_literal(name: str) -> None:
    check_name(name, "x")


@pytest.mark.parametrize(
    "name",
    [
        "CON",
        "con.txt",
        "nul",
        "x/AUX.json",
        "com1",
        "LPT9.safetensors",
        "COM¹.md",
        "prn .txt",
        "conin$",
        "Nul. ",
        ".git/config",
        "x/.GIT/hooks",
        "git~1/x",
        ".cache/huggingface/x",
        ".git ",
        "..",
        "/etc/passwd",
        "C:/x",
        "\\\\host",
        "a\ud800",
        "e\u0301.json",
        "x" * 256,
        "é" * 128,
        "a/" * 600 + "b",
        "",
        "a//b",
        "a/",
        "a\u2028b",
        "a\uff0fb",
        "℀",
    ],
)
def test_reserved_and_foreign_names(name: str) -> None:
    assert _faults(name)


def test_all_faults_are_listed() -> None:
    faults = _faults("../a\\b", "ok.json", "con")
    text = "\n".join(faults)
    assert "backslash" in text
    assert "'..'" in text
    assert "device name" in text
    assert "ok.json" not in text


@pytest.mark.parametrize(
    ("first", "second"),
    [("README.md", "readme.md"), ("STRASSE", "straße"), ("é.json", "É.json"), ("ſ", "S"), ("a/x", "A/y"), ("a", "a")],
)
def test_twins(first: str, second: str) -> None:
    assert len(_faults(first, "z", second)) == 1


def test_a_file_and_a_folder_of_one_name() -> None:
    assert "folder" in _faults("adapter_config.json", "adapter_config.json/x")[0]
    assert "folder" in _faults("a/b/c", "A/B")[0]
    check_names(["a/b", "a/c", "ab", "a.b/c"], "x")


@given(st.lists(paths, unique=True, max_size=6))
def test_twins_by_brute_force(names: list[str]) -> None:
    def fold(name: str) -> str:
        return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())

    everything = {"/".join(n.split("/")[: i + 1]) for n in names for i in range(n.count("/") + 1)}
    clash = len({fold(n) for n in everything}) < len(everything)
    clash |= any(n.startswith(m + "/") for n in names for m in names)
    try:
        check_names(names, "x")
    except HubkitError:
        assert clash
    else:
        assert not clash


GOOD = [
    "adapter_model.safetensors",
    "hubkit.json",
    "README.md",
    "merges.txt",
    "chat_template.jinja",
    "tokenizer.model",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    ".gitattributes",
    "x/y.JSON",
]


@pytest.mark.parametrize("name", GOOD)
def test_kinds_of_an_artifact(name: str) -> None:
    check_allowed(name, b"", "x")
    check_allowed(name, b'{"a": 1}', "x")


def _code(name: str, head: bytes) -> str:
    with pytest.raises(HubkitError) as caught:
        check_allowed(name, head, "org/name")
    assert name in caught.value.where
    return caught.value.code


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", GOOD)
def test_a_pickle_under_any_name(name: str, protocol: int) -> None:
    for value in ({"a": 1}, list(range(1000)), "x" * 640, (), None):
        assert _code(name, pickle.dumps(value, protocol)[:512]) == "HK-PICKLE"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "a.ckpt", "a.pkl", "a.npz", "A.PTH"])
def test_pickle_suffixes(name: str) -> None:
    assert _code(name, b"") == "HK-PICKLE"


@pytest.mark.parametrize(
    "name", ["setup.py", "a.so", "a.gguf", "Makefile", "a.json.exe", "model.h5", ".env", "a.tar.gz"]
)
def test_other_kinds(name: str) -> None:
    assert _code(name, b"x") == "HK-FORBIDDEN-FILE"


@pytest.mark.parametrize(
    "head", [b"\x7fELF\2", b"MZ\x90", b"#!/bin/sh", b"\x1f\x8b\x08", b"BZh9", b"a" * 257 + b"ustar"]
)
def test_programs_and_archives_under_a_good_name(head: bytes) -> None:
    assert _code("config.json", head) == "HK-FORBIDDEN-FILE"


def test_a_safetensors_file_whose_length_looks_like_a_pickle() -> None:
    seen = set()
    for size in range(200, 1500, 8):
        data = save({"a": np.zeros(1)}, metadata={"x": "y" * size})
        seen.add(data[:2])
        check_allowed("a.safetensors", data[:512], "x")
    assert b"\x80\x02" in seen
