"""Recipes edited as people would: one adapter comes, changes or goes, and everything else stays to the byte."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubkit.documents.recipe import RecipeAdapter, parse_recipe
from hubkit.errors import HubkitError
from hubkit.locking.editing import new_recipe, with_adapter, without_adapters

TABLES = """\
# top
mix = "sum"   # ours

[base]
source = "b"  # the base

# chat does chatting
[adapters.chat]
source = "ana/chat@^1.2"  # keep

# the sql one: ask Ana
[adapters.sql]
source = "./sql"
weight = -0.5

# engines below
[targets.vllm]
max_loras = 4
"""
INLINE = 'adapters = {a = {source = "x/a"}, b = {source = "x/b"}}  # c\n[base]\nsource="b"\n'
DOTTED = '[base]\nsource="b"\n[adapters]\na.source="x/a"\nb={source="x/b"}   # c\n[targets.x]\ny=1\n'
APART = '[adapters.a]\nsource="x/a"\n[base]\nsource="b"\n[adapters.b]\nsource="x/b"\n# hm\n[targets.x]\ny=[\n [1],\n]'
ALL = {"tables": TABLES, "inline": INLINE, "dotted": DOTTED, "apart": APART}


def lines(text: str) -> list[str]:
    return text.splitlines()


def test_a_table_comes_behind_the_last_one_and_nothing_else_changes() -> None:
    made = with_adapter(TABLES.encode(), "x", "new", "x/y@^1", 0.25).decode()
    added = ["", "[adapters.new]", 'source = "x/y@^1"', "weight = 0.25"]
    at = lines(TABLES).index("weight = -0.5") + 1
    assert lines(made) == lines(TABLES)[:at] + added + lines(TABLES)[at:]


def test_a_table_goes_and_every_comment_stays() -> None:
    made = without_adapters(TABLES.encode(), "x", ("chat",)).decode()
    gone = ["[adapters.chat]", 'source = "ana/chat@^1.2"  # keep']
    assert [line for line in lines(TABLES) if line not in gone] == lines(made)
    left = without_adapters(TABLES.encode(), "x", ("sql", "chat")).decode()
    assert {line for line in lines(TABLES) if line.startswith("#")} <= set(lines(left))
    assert parse_recipe(left.encode(), "x").adapters == ()


def test_a_value_changes_in_its_place() -> None:
    made = with_adapter(TABLES.encode(), "x", "chat", "ana/chat@^2", None).decode()
    assert made == TABLES.replace("^1.2", "^2")
    made = with_adapter(TABLES.encode(), "x", "sql", "./sql", 2).decode()
    assert made == TABLES.replace("-0.5", "2")
    made = with_adapter(TABLES.encode(), "x", "chat", "ana/chat@^1.2", -1).decode()
    assert made == TABLES.replace("# keep\n", "# keep\nweight = -1\n")


@pytest.mark.parametrize("text", ALL.values(), ids=ALL)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_way_to_write_a_recipe(text: str, newline: str) -> None:
    """Tables, inline tables, dotted keys, tables in several places: what is meant comes out, line ends stay."""
    data = text.replace("\n", newline).encode()
    before = parse_recipe(data, "x").adapters
    first, last = before[0].name, before[-1].name
    added = with_adapter(data, "x", "a.new", "x/y", 3)
    assert parse_recipe(added, "x").adapters == (*before, RecipeAdapter("a.new", "x/y", 3.0))
    changed = with_adapter(data, "x", last, "z/z", None)
    assert parse_recipe(changed, "x").adapters[-1] == RecipeAdapter(last, "z/z", before[-1].weight)
    assert parse_recipe(without_adapters(data, "x", (first,)), "x").adapters == before[1:]
    for made in (added, changed):
        assert made.count(b"\r\n") == (made.count(b"\n") if newline == "\r\n" else 0)
        assert parse_recipe(made, "x").targets == parse_recipe(data, "x").targets


def test_what_is_added_and_removed_again_leaves_the_recipe_as_it_was() -> None:
    made = with_adapter(TABLES.encode(), "x", "new", "x/y", 0.1)
    assert without_adapters(made, "x", ("new",)).decode() == TABLES


def test_a_recipe_of_nothing_but_a_base() -> None:
    assert tomllib.loads(new_recipe('a"b\\c').decode()) == {"base": {"source": 'a"b\\c'}}
    made = with_adapter(b'[base]\nsource="b"', "x", "q", "./q", None)
    assert made == b'[base]\nsource="b"\n\n[adapters.q]\nsource = "./q"\n'
    assert without_adapters(made, "x", ("q",)) == b'[base]\nsource="b"\n'


def test_a_name_that_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(HubkitError) as caught:
        without_adapters(TABLES.encode(), "x", ("sq",))
    assert (caught.value.code, caught.value.fix, caught.value.status) == ("HK-UNKNOWN-ADAPTER", "hubkit remove sql", 2)


def test_what_would_come_to_mean_something_else_is_refused() -> None:
    """A header inside a text is no header; rather than guess, nothing is written."""
    text = '[base]\nsource = "b"\n[adapters.a]\nsource = """x\n[adapters.b]\ny"""\n[adapters.b]\nsource = "x/b"\n'
    with pytest.raises(HubkitError) as caught:
        without_adapters(text.encode(), "x", ("b",))
    assert caught.value.code == "HK-RECIPE"
    assert "cannot be edited" in caught.value.what


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True)


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(ALL)),
    NAMES,
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12),
    st.none() | st.floats(-1e6, 1e6),
)
def test_any_name_source_and_weight(kind: str, name: str, source: str, weight: float | None) -> None:
    data = ALL[kind].encode()
    known = {one.name: one for one in parse_recipe(data, "x").adapters}
    made = parse_recipe(with_adapter(data, "x", name, source, weight), "x")
    kept = known[name].weight if name in known else 1.0
    expected = RecipeAdapter(name, source, kept if weight is None else weight)
    assert made.adapters == tuple({**known, name: expected}.values())
