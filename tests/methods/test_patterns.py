"""Patterns of ranks and scales mean what PEFT means by them, and cannot hang."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from hubkit.errors import HubkitError
from hubkit.methods.patterns import pattern_value
from hubkit.tensors.base.expressions import expression

NAMES = ["q_proj", "model.layers.1.self_attn.q_proj", "model.layers.11.mlp.up_proj", "lm_head", "a.b"]
PATTERNS = [
    "q_proj",
    "proj",
    r"layers\.1\.self_attn\.q_proj",
    r"layers\.\d+\.mlp\..*",
    "^lm_head",
    "a.b",
    "model.*",
    "b$",
]


@given(st.lists(st.sampled_from(PATTERNS), unique=True), st.sampled_from(NAMES))
def test_the_first_match_wins_as_in_peft(patterns: list[str], name: str) -> None:
    table = {pattern: number for number, pattern in enumerate(patterns)}
    assert pattern_value(table, name, -1) == table.get(get_pattern_key(patterns, name), -1)


@pytest.mark.parametrize(
    "pattern",
    ["(", "a{2,1}", r"(a+)+", r"((a+))*", r"(a|a)*", r"(\w+\.?)+!", r"(a?){40}", "x" * 201, ".*" * 7, r"\w*)(", "*"],
)
def test_what_could_hang_or_is_no_expression_is_refused(pattern: str) -> None:
    start = time.monotonic()
    with pytest.raises(HubkitError) as caught:
        pattern_value({pattern: 1}, "a" * 60 + "!", 0)
    assert caught.value.code == "HK-PATTERN"
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    "text",
    [
        "q_proj",
        r".*\.(q|v)_proj",
        r"layers\.\d{1,2}\.mlp",
        r"model\.layers\.([0-9]|1[0-5])\..*_proj",
        r"(?:\w+\.)?wte",
        r"(?:.*?(?:language|text).*?(?:attn|mlp).*?(?:q_proj|up).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:(?:up)))",
    ],
)
def test_expressions_in_use_are_accepted(text: str) -> None:
    start = time.monotonic()
    expression(text).fullmatch("model." * 10 + "x")
    assert time.monotonic() - start < 1
