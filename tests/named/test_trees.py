"""Trees of sums and stacks as people type them."""

from __future__ import annotations

from typing import Any

import pytest
from variants import refused

from hubkit.documents.mix import MOST, Tree, leaves
from hubkit.named.trees import parse_tree
from hubkit.tensors.parts.mix import Stack, Sum


@pytest.mark.parametrize(
    ("typed", "want"),
    [
        ("./a", "sum(./a)"),
        ("0.5*./a", "sum(0.5*./a)"),
        ("./a + -0.5*./b", "sum(./a, -0.5*./b)"),
        ("stack(./a, ./b)", "stack(./a, ./b)"),
        ("stack(./a,0.5*./b)", "stack(./a, 0.5*./b)"),
        ("0.5 * stack( ./a , ./b )", "sum(0.5*stack(./a, ./b))"),
        ("stack(./a, ./b) - 2*(./c + ./d)", "sum(stack(./a, ./b), -2*sum(./c, ./d))"),
        ("stack(./a + ./b, sum(./c, -./d))", "stack(sum(./a, ./b), sum(./c, -1*./d))"),
        ("sum(sum(./a, ./b))", "sum(./a, ./b)"),
        ("-stack(./a, sum(0.5*stack(./b, ./c)))", "sum(-1*stack(./a, 0.5*stack(./b, ./c)))"),
        (("stack(org/a@^1.2:x,", "./b)", "+", "./c"), "sum(stack(org/a@^1.2:x, ./b), ./c)"),
        ({"./a (1)": 2.0}, "sum(2*./a (1))"),
        (Stack([("./a", 1.0), (Sum({"./b": 0.5, "./c": -1.0}), 2.0)]), "stack(./a, 2*sum(0.5*./b, -1*./c))"),
    ],
)
def test_what_people_type(typed: Any, want: str) -> None:
    assert str(parse_tree(typed, "sum")) == want


def test_the_kind_is_that_of_the_outermost_terms() -> None:
    assert str(parse_tree("./a + 0.5*(./b + ./c)", "stack")) == "stack(./a, 0.5*sum(./b, ./c))"
    assert str(parse_tree("sum(./a, ./b)", "stack")) == "sum(./a, ./b)"
    assert str(parse_tree("./a", "stack")) == "stack(./a)"


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "stack()",
        "stack(./a",
        "./a)",
        "stack(./a,)",
        "stack(,./a)",
        "./a + sum()",
        "0.5*",
        "./x(./a)",
        "a(b)c",
        "1e999*stack(./a)",
        "stack(./a))",
        "()",
        ")(",
        "sum(./a, + )",
    ],
)
def test_what_is_no_tree(typed: str) -> None:
    assert refused("HK-TERMS", parse_tree, typed, "sum").status == 2


@pytest.mark.parametrize("levels", [17, 1000])
def test_too_deep(levels: int) -> None:
    refused("HK-MIX", parse_tree, "stack(./b, " * levels + "./a" + ")" * levels, "sum")


def test_too_deep_in_python() -> None:
    mix: Any = "./a"
    for _ in range(5000):
        mix = Stack([mix])
    refused("HK-MIX", parse_tree, mix, "sum")


def test_too_many() -> None:
    tree = parse_tree(" + ".join(["./a"] * MOST), "sum")
    assert len(list(leaves(tree))) == MOST
    refused("HK-MIX", parse_tree, " + ".join(["./a"] * 5_000), "sum")


def test_what_depends_on_the_batch_is_not_written() -> None:
    assert refused("HK-MIX", parse_tree, object(), "sum").have == ["object"]
    assert isinstance(parse_tree("./a", "sum"), Tree)
