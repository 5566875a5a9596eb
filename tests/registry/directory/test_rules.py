"""Large or regular, ignored or not: against git itself."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hubkit.registry.directory import rules

PATHS = ["a.bin", "x/a.bin", "x/y/a.bin", "a.txt", "x/a.txt", "x/y/z/a.txt", "xa.bin", "x/b", "b/x/c", "x.y/a.bin"]
PIECES = st.sampled_from(["a", "x", "y", "*", "?", "**", "*.bin", "a.*", "b", "x.y", "[ax]*", "[!x]", "x**a*"])
PATTERNS = st.builds(
    lambda anchor, pieces, end: anchor + "/".join(pieces) + end,
    st.sampled_from(["", "/"]),
    st.lists(PIECES, min_size=1, max_size=3),
    st.sampled_from(["", "", "/"]),
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is the oracle here")
    folder = tmp_path_factory.mktemp("git")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    for path in PATHS:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


def git(repository: Path, *words: str) -> list[str]:
    told = subprocess.run(["git", "-C", str(repository), *words], capture_output=True, text=True)
    return told.stdout.splitlines()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(patterns=st.lists(PATTERNS, min_size=1, max_size=2))
def test_patterns_match_what_they_match_for_git(repository: Path, patterns: list[str]) -> None:
    ignores = "\n".join(patterns) + "\n"
    attributes = "".join(f"{pattern} filter=lfs\n" for pattern in patterns)
    (repository / ".gitignore").write_text(ignores)
    (repository / ".gitattributes").write_text(attributes)
    read = rules.read_ignores(ignores)
    assert [p for p in PATHS if rules.ignored(read, p)] == git(repository, "check-ignore", "--no-index", *PATHS)
    read = rules.read_attributes(attributes)
    large = [f"{p}: filter: lfs" for p in PATHS if rules.decide(read, p)]
    assert large == [line for line in git(repository, "check-attr", "filter", *PATHS) if line.endswith(": lfs")]


@pytest.mark.parametrize(
    ("pattern", "path"),
    [("**/" * 12 + "z", "a/" * 30 + "a"), ("**/a*/" * 12 + "z", "aa/" * 60 + "a"), ("*a" * 120 + "z", "a" * 4000)],
)
def test_no_pattern_takes_long(pattern: str, path: str) -> None:
    read, start = rules.read_ignores(pattern), time.perf_counter()
    assert not rules.ignored(read, path)
    assert time.perf_counter() - start < 1, "twelve ** and thirty folders took minutes"


def test_attributes_decide_like_git_lfs_would() -> None:
    read = rules.read_attributes("*.txt filter=lfs diff=lfs -text\nkeep.txt -filter\n# *.md filter=lfs\n")
    assert rules.is_large("a.txt", 10, b"text", read)
    assert not rules.is_large("keep.txt", 10, b"text", read)
    assert not rules.is_large("a.md", 10, b"text", read)
    assert not rules.is_large("a.txt", 0, b"", read), "an empty file is never a large object"


@pytest.mark.parametrize(
    ("head", "binary"),
    [
        (b"", False),
        (b"plain", False),
        (("ä" * 10).encode()[:-1], False),
        ("€".encode()[:2], False),
        (b"a\0b", True),
        (b"\x80\x04\x95", True),
        (b"ok \xff\xfe no", True),
    ],
)
def test_binary_is_nul_or_not_utf8(head: bytes, binary: bool) -> None:
    assert rules.is_binary(head) is binary


def test_size_alone_makes_large() -> None:
    assert rules.is_large("a.json", rules.LARGE_BYTES, b"{}")
    assert not rules.is_large("a.json", rules.LARGE_BYTES - 1, b"{}")
    assert rules.is_large("adapter_model.safetensors", 9, b"textlike")
