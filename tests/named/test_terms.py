"""Terms of a sum as people type them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from making import make_adapter
from variants import refused, say

from hubkit.named.terms import open_terms, parse_terms
from hubkit.registry.opening import Where
from hubkit.verbs.merge import merge


@pytest.mark.parametrize(
    ("typed", "want"),
    [
        ("./a", [("./a", 1.0)]),
        ("./a + ./b", [("./a", 1.0), ("./b", 1.0)]),
        ("./a ./b", [("./a", 1.0), ("./b", 1.0)]),
        ("1.0*./a + -0.5*./b", [("./a", 1.0), ("./b", -0.5)]),
        ("1.0 * ./a - 0.5 * ./b", [("./a", 1.0), ("./b", -0.5)]),
        ("./a - ./b", [("./a", 1.0), ("./b", -1.0)]),
        ("- ./a + 2e-3*org/b@v1.0.0", [("./a", -1.0), ("org/b@v1.0.0", 0.002)]),
        ("-.5*./a +3.*./b", [("./a", -0.5), ("./b", 3.0)]),
        ("org/a@^1.2:sub + hf://org/b", [("org/a@^1.2:sub", 1.0), ("hf://org/b", 1.0)]),
        (("./a", "+", "-0.5*./b"), [("./a", 1.0), ("./b", -0.5)]),
        (("./a", "-", "0.5*./b"), [("./a", 1.0), ("./b", -0.5)]),
        (("1.0*./a + -0.5*./b",), [("./a", 1.0), ("./b", -0.5)]),
        ({"./a b": 1, "org/c": -0.5}, [("./a b", 1.0), ("org/c", -0.5)]),
    ],
)
def test_what_people_type(typed: Any, want: list[tuple[str, float]]) -> None:
    assert parse_terms(typed) == want


@pytest.mark.parametrize(
    "typed",
    [
        "",
        " ",
        "+",
        "-",
        "./a +",
        "./a + -",
        "0.5*",
        "1e999*./a",
        "./a - -0.5*./b",
        (),
        {},
        {"./a": float("nan")},
        {"./a": "much"},
        {"./a": None},
    ],
)
def test_what_is_no_sum(typed: Any) -> None:
    assert refused("HK-TERMS", parse_terms, typed).status == 2


def test_a_folder_with_a_space_in_its_name(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_adapter(tmp_path / "chat", tiny_llama).rename(tmp_path / "my chat")
    monkeypatch.chdir(tmp_path)
    assert parse_terms(["0.5*./my chat", "+", "./b"]) == [("./my chat", 0.5), ("./b", 1.0)]
    assert [term.weight for term in open_terms(["-2*./my chat"], Where())] == [-2.0]


def test_the_same_adapter_twice_has_two_names(adapter: Path) -> None:
    members = open_terms([str(adapter), str(adapter)], Where())
    assert [member.name for member in members] == ["chat", "chat-2"]


def test_a_merged_checkpoint_is_no_adapter(
    adapter: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(str(tiny_llama), str(adapter), tmp_path / "merged")
    for line in (
        ("merge", tmp_path / "merged", "--base", tiny_llama, "-o", tmp_path / "x"),
        ("compose", tmp_path / "merged", "-o", tmp_path / "x"),
        ("generate", "hi", "--adapter", tmp_path / "merged", "--base", tiny_llama),
        ("export", tmp_path / "merged", "-o", tmp_path / "x"),
        ("pack", tmp_path / "merged", "--base", tiny_llama),
    ):
        assert say(capsys, *line).refusal() == "HK-NOT-ADAPTER"
    assert not (tmp_path / "x").exists()
