"""Front matter edited in place: the asked keys change, every other byte stays."""

from __future__ import annotations

import pytest

from hubkit.artifact.frontmatter import merge, split


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("", ""),
        ("text\n---\na: b\n---\n", ""),
        ("---\na: b\n", ""),
        ("---\n---\n", "---\n---\n"),
        ("---\na: b\n---\ntext\n---\n", "---\na: b\n---\n"),
        ("---  \r\na: b\r\n--- \r\ntext", "---  \r\na: b\r\n--- \r\n"),
        ("---\na: b\n---", "---\na: b\n---"),
        ("----\na: b\n---\n", ""),
    ],
)
def test_split_finds_the_fences(text: str, head: str) -> None:
    assert split(text) == (head, text[len(head) :])


@pytest.mark.parametrize(
    ("yaml", "want"),
    [
        ("", "k: v\ntags:\n- t\n"),
        ("k: v\ntags: [t]\n", "k: v\ntags: [t]\n"),
        ("k: 'v'   # ours already\ntags: [t, u]\n", "k: 'v'   # ours already\ntags: [t, u]\n"),
        ("k: old\n# about x\nx: 1\ntags: t\n", "k: v\n# about x\nx: 1\ntags: t\n"),
        ("k:\n- a\n-   b\n\n# about x\nx: 1\ntags: [t]\n", "k: v\n\n# about x\nx: 1\ntags: [t]\n"),
        ("k: >\n  long\n  text\nx: !!int 1\ntags:\n  - u # u\n", "k: v\nx: !!int 1\ntags:\n- u\n- t\n"),
        ("tags: [\n  u,\n  w\n]\nk: v\n", "tags:\n- u\n- w\n- t\nk: v\n"),
        ("tags:\nk: v\n", "tags:\n- t\nk: v\n"),
        ("x: {k: other, tags: []}\n# end", "x: {k: other, tags: []}\n# end\nk: v\ntags:\n- t\n"),
        ("k: a\nk: b\ntags: [t]\n", "k: v\nk: v\ntags: [t]\n"),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_only_the_asked_keys_change(yaml: str, want: str, newline: str) -> None:
    head = f"---\n{yaml}" + ("" if yaml.endswith("\n") or not yaml else "\n") + "---\n"
    made = merge(head.replace("\n", newline), {"k": "v"}, {}, ["t"], newline)
    assert made == f"---\n{want}---\n".replace("\n", newline)


def test_absent_keys_are_filled_and_present_ones_kept() -> None:
    assert merge("---\na: 1\n---\n", {}, {"a": "x", "b": "y"}, [], "\n") == "---\na: 1\nb: y\n---\n"
    assert merge("", {}, {"a": "x"}, [], "\n") == "---\na: x\n---\n"


def test_values_that_look_like_other_types_stay_text() -> None:
    assert merge("", {"a": "1.0", "b": "no", "c": "x: y"}, {}, [], "\n") == "---\na: '1.0'\nb: 'no'\nc: 'x: y'\n---\n"
