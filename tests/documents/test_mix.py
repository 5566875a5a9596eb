"""The tree of a mix in a manifest: what is written is read back, what is damaged is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import refused

from hubkit.documents.manifest import Manifest
from hubkit.documents.mix import DEEPEST, MOST, MixDocument, MixMember, Tree, leaves, replaced, weights
from hubkit.documents.schema import canonical, sha256

DIGEST = sha256(b"")
NAMES = ("chat", "sql", "terse")
WEIGHTS = st.floats(-1e9, 1e9)


def _node(inner: Any) -> Any:
    members = st.lists(st.tuples(inner, WEIGHTS), min_size=1, max_size=3).map(tuple)
    return st.builds(Tree, st.sampled_from(["sum", "stack"]), members)


TREES = _node(st.recursive(st.sampled_from(NAMES), _node, max_leaves=8))


def document(tree: Any, members: Any = NAMES, **changes: Any) -> dict[str, Any]:
    """A manifest of kind mix, as JSON."""
    mix = {"tree": tree, "members": {name: {"reference": f"./{name}", "digest": DIGEST} for name in members}}
    found = {"schema": "hubkit/manifest/1", "kind": "mix", "name": "m", "version": "0.1.0", "base": {"layout": DIGEST}}
    return {**found, "mix": mix, **changes}


def nested(levels: int) -> dict[str, Any]:
    node: dict[str, Any] = {"adapter": "chat"}
    for _ in range(levels):
        node = {"stack": [node]}
    return node


@settings(max_examples=30, deadline=None)
@given(TREES)
def test_a_tree_survives_reading_and_writing(tree: Tree) -> None:
    members = {name: MixMember(f"org/{name}@v1", DIGEST) for name, _ in leaves(tree)}
    made = document({}, mix=MixDocument(members, tree).to_document())
    data = canonical(made)
    read = Manifest.from_bytes(data)
    assert read.to_bytes() == data
    assert read.mixed() == MixDocument(members, tree)


@settings(max_examples=30, deadline=None)
@given(TREES, st.dictionaries(st.sampled_from(NAMES), st.floats(-2, 2), min_size=3))
def test_weights_are_what_a_linear_tree_computes(tree: Tree, values: dict[str, float]) -> None:
    """With numbers for adapters, the weights times the numbers are the value of the tree."""

    def value(node: Tree | str) -> float:
        return values[node] if isinstance(node, str) else sum(w * value(member) for member, w in node.members)

    scale = sum(abs(weight) for _, weight in leaves(tree)) or 1.0
    assert sum(w * values[name] for name, w in weights(tree).items()) == pytest.approx(value(tree), abs=1e-9 * scale)


def test_as_people_read_it() -> None:
    tree = Tree("stack", (("chat", 1.0), (Tree("sum", (("sql", 1.0), ("terse", -1.0))), 0.5)))
    assert str(tree) == "stack(chat, 0.5*sum(sql, -1*terse))"
    assert str(replaced(tree, {"chat": "a", "sql": "b", "terse": tree})).count("stack") == 2
    assert tree.kinds() == {"sum", "stack"}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"sum": []}, "#/mix/tree/sum"),
        ({}, "#/mix/tree: nothing, not one of"),
        ({"adapter": "chat"}, "#/mix/tree: adapter, not one of"),
        ({"sum": [{"adapter": "chat"}], "stack": [{"adapter": "chat"}]}, "sum and stack, not one of"),
        ({"sum": [{"adapter": "chat"}, {"adapter": "chta"}]}, "'chta' is no member"),
        ({"sum": [{"adapter": "chat", "weight": "1"}]}, "#/mix/tree/sum/0/weight"),
        ({"sum": [{"adapter": "chat", "weight": 10**400}]}, "#/mix/tree/sum/0/weight: beyond"),
        ({"sum": ["chat"]}, "#/mix/tree/sum/0"),
        ({"route": [{"adapter": "chat"}]}, "nothing, not one of"),
        ([], "#/mix/tree"),
    ],
)
def test_a_damaged_tree(tree: Any, said: str) -> None:
    error = refused("HK-SCHEMA", Manifest.from_document, document(tree, ["chat"]))
    assert any(said in line for line in error.have), error.have


def test_a_member_without_a_place() -> None:
    error = refused("HK-SCHEMA", Manifest.from_document, document({"sum": [{"adapter": "chat"}]}))
    assert error.have == [f"#/mix/members/{name}: it has no place in the tree" for name in ("sql", "terse")]


@pytest.mark.parametrize("broken", ["members", "tree", "digest", "reference", "base"])
def test_a_field_is_missing(broken: str) -> None:
    made = document({"sum": [{"adapter": "chat"}]}, ["chat"])
    for place in (made, made["mix"], made["mix"]["members"]["chat"]):
        place.pop(broken, None)
    assert broken in refused("HK-SCHEMA", Manifest.from_document, made).have[0]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_weight_that_is_no_number(number: str) -> None:
    data = json.dumps(document({"sum": [{"adapter": "chat", "weight": 7}]}, ["chat"])).replace("7", number)
    refused("HK-JSON", Manifest.from_bytes, data.encode())


@pytest.mark.parametrize("levels", [DEEPEST + 1, 25])
def test_too_deep(levels: int) -> None:
    assert Manifest.from_document(document(nested(DEEPEST), ["chat"]))
    assert "16" in refused("HK-MIX", Manifest.from_document, document(nested(levels), ["chat"])).want[0]


def test_a_thousand_levels() -> None:
    deep = '{"stack":[' * 1000 + '{"adapter":"chat"}' + "]}" * 1000
    data = json.dumps(document("deep", ["chat"])).replace('"deep"', deep)
    refused("HK-JSON", Manifest.from_bytes, data.encode())


def test_too_many() -> None:
    half = {"sum": [{"adapter": "chat"}] * (MOST // 2)}
    assert Manifest.from_document(document({"stack": [half, half]}, ["chat"]))
    more = {"stack": [half, half, {"adapter": "chat"}]}
    assert "256 members" in refused("HK-MIX", Manifest.from_document, document(more, ["chat"])).have[0]
    refused("HK-MIX", Manifest.from_document, document({"sum": [{"adapter": "chat"}] * 100_000}, ["chat"]))
    names = [f"m{number}" for number in range(100_000)]
    refused("HK-MIX", Manifest.from_document, document({"sum": [{"adapter": "m0"}]}, names))


def test_another_kind_is_no_mix() -> None:
    refused("HK-NOT-MIX", Manifest(kind="model", name="m").mixed)
