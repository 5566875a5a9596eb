"""A method's configuration: JSON values and typed text mean the same, and everything else is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubkit.errors import HubkitError
from hubkit.methods.config import config_document, parse_config
from hubkit.methods.host import host


@dataclass(frozen=True)
class Options:
    targets: str | tuple[str, ...] = "all-linear"
    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    seed: int | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    init: Literal["kaiming", "gaussian"] = "kaiming"
    names: tuple[str, ...] = ()


WORDS = st.text("abcdefghij_.0123456789", min_size=1, max_size=8).map(str.strip).filter(bool)
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "targets": WORDS | st.lists(WORDS, min_size=2, max_size=3),
        "rank": st.integers(-(10**9), 10**9),
        "alpha": st.floats(allow_nan=False, allow_infinity=False),
        "rslora": st.booleans(),
        "seed": st.none() | st.integers(0, 10**6),
        "ranks": st.dictionaries(WORDS, st.integers(0, 99), max_size=3),
        "init": st.sampled_from(["kaiming", "gaussian"]),
        "names": st.lists(WORDS, max_size=3),
    },
)


def typed(value: Any) -> Any:
    """A JSON value as one types it after ``--set name=``."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(value)
    if isinstance(value, dict):
        return ",".join(f"{key}={item}" for key, item in value.items())
    return value if value is None else str(value)


def refused(values: Mapping[str, Any]) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        parse_config(Options, values, "--set")
    assert caught.value.code == "HK-CONFIG"
    return caught.value


@given(VALUES)
def test_a_document_gives_the_configuration_back(values: dict[str, Any]) -> None:
    config = parse_config(Options, values, "x")
    document = config_document(config)
    assert parse_config(Options, document, "x") == config
    assert config_document(parse_config(Options, document, "x")) == document
    assert list(document) == list(Options.__dataclass_fields__)
    assert list(document["ranks"]) == sorted(document["ranks"])


@given(VALUES)
def test_text_and_json_agree(values: dict[str, Any]) -> None:
    assert parse_config(Options, {k: typed(v) for k, v in values.items()}, "x") == parse_config(Options, values, "x")


@given(st.text("abcdefghij", min_size=1).filter(lambda name: name not in Options.__dataclass_fields__))
def test_an_unknown_option_is_named(name: str) -> None:
    assert refused({name: 1, "rank": 2}).have == [name]


def test_an_unknown_option_names_the_nearest() -> None:
    assert refused({"rnak": 8, "tarets": "q"}).fix == "near: rank, targets"
    assert refused({"rnak": 8}).want[0].startswith("targets, rank, alpha")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", True),
        ("rank", 1.5),
        ("rank", "1.5"),
        ("rank", "eight"),
        ("rank", None),
        ("rank", [8]),
        ("rank", {}),
        ("alpha", False),
        ("alpha", "nan"),
        ("alpha", float("inf")),
        ("alpha", "-inf"),
        ("alpha", []),
        ("rslora", 1),
        ("rslora", "maybe"),
        ("rslora", None),
        ("init", "zeros"),
        ("init", None),
        ("init", []),
        ("ranks", "q"),
        ("ranks", "q=x"),
        ("ranks", ["q"]),
        ("ranks", {"q": True}),
        ("ranks", 3),
        ("targets", 3),
        ("targets", None),
        ("targets", [3]),
        ("targets", {"q": 1}),
        ("names", 3),
        ("seed", "x"),
        ("seed", True),
        ("rank", "9" * 5000),
        ("rank", float("inf")),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: Any) -> None:
    assert refused({name: value}).where == f"--set#/{name}"


@pytest.mark.parametrize(("text", "value"), [("true", True), ("Yes", True), ("false", False), ("NO", False)])
def test_words_for_booleans(text: str, value: bool) -> None:
    assert parse_config(Options, {"rslora": text}, "x").rslora is value


def test_whole_floats_are_integers_and_empty_text_is_an_empty_list() -> None:
    assert parse_config(Options, {"rank": 8.0, "alpha": 4}, "x") == Options(rank=8, alpha=4.0)
    assert isinstance(parse_config(Options, {"alpha": 4}, "x").alpha, float)
    assert parse_config(Options, {"targets": "", "names": ""}, "x") == Options(targets=(), names=())
    assert parse_config(Options, {"targets": "q_proj, v_proj"}, "x").targets == ("q_proj", "v_proj")
    assert parse_config(Options, {"targets": r".*\.(q|v)_proj"}, "x").targets == r".*\.(q|v)_proj"


@pytest.mark.parametrize(
    "values", [{"rank": 0}, {"rank": -1}, {"dropout": 1.0}, {"dropout": -0.1}, {"rank_pattern": {"q_proj": 0}}]
)
def test_ranges_are_the_methods_own(values: dict[str, Any]) -> None:
    config = host().load("lora").info.config
    with pytest.raises(HubkitError, match="HK-CONFIG"):
        parse_config(config, values, "x")
