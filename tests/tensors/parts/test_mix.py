"""Mixes are trees: what they add is their arithmetic, and no other tree is accepted."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubkit.errors import HubkitError
from hubkit.tensors.base.delta import Delta
from hubkit.tensors.base.site import Site
from hubkit.tensors.parts.mix import Mix, Route, Stack, Sum, delta, leaves, make_mix, names, require_known, to_document

NAMES = ["a", "b", "c"]
WEIGHT = st.floats(-2, 2).map(lambda w: round(w, 2))
TREES: st.SearchStrategy[Mix] = st.recursive(
    st.sampled_from(NAMES),
    lambda inner: st.tuples(
        st.sampled_from([Sum, Stack]), st.lists(st.tuples(inner, WEIGHT), min_size=1, max_size=3)
    ).map(lambda pair: pair[0](pair[1])),
    max_leaves=6,
)
STORED = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FACTORS = {"a": 0.5, "b": -0.25, "c": 0.125}
SITE = Site("x", "linear", (4, 5), torch.float64, False, "x.weight", None, read=lambda name, number=None: STORED)


def relative(name: str, site: Site) -> Delta:
    """An adapter that adds a share of the weight it sees: order and nesting show."""
    return Delta.full(site.weight() * FACTORS[name])


def factor(mix: Mix, weight: float = 1.0) -> float:
    """By hand: what the tree makes of a weight of 1, when it sees `weight`."""
    if isinstance(mix, str):
        return FACTORS[mix] * weight
    assert not isinstance(mix, Route)
    total, seen = 0.0, weight
    for member, w in mix.members:
        change = w * factor(member, seen)
        total += change
        if isinstance(mix, Stack):
            seen += change
    return total


@given(TREES)
@settings(deadline=None)
def test_a_tree_adds_what_its_arithmetic_says(mix: Mix) -> None:
    made = delta(mix, SITE, relative)
    assert made is not None
    matrix = made.matrix()
    assert matrix is not None
    assert torch.allclose(matrix, STORED * factor(mix), atol=1e-9)


@given(TREES)
@settings(deadline=None)
def test_independent_members_add_up_to_their_leaves(mix: Mix) -> None:
    made = delta(mix, SITE, lambda name, site: Delta.full(STORED * FACTORS[name]))
    assert made is not None
    assert made.dense is not None
    assert torch.allclose(made.dense, STORED * sum(FACTORS[n] * w for n, w in leaves(mix)), atol=1e-9)
    assert names(mix) == list(dict.fromkeys(n for n, _ in leaves(mix)))


@given(TREES)
def test_a_tree_is_json(mix: Mix) -> None:
    def read(document: dict[str, Any]) -> Mix:
        if "adapter" in document:
            return str(document["adapter"])
        kind = "sum" if "sum" in document else "stack"
        return (Sum if kind == "sum" else Stack)([(read(one), one["weight"]) for one in document[kind]])

    assert read(json.loads(json.dumps(to_document(mix)))) == mix


def test_members_that_do_not_act_at_a_site_add_nothing() -> None:
    assert delta(Sum(["a", Stack(["b"])]), SITE, lambda name, site: None) is None
    only = delta(Stack(["a", "b"]), SITE, lambda name, site: relative(name, site) if name == "b" else None)
    assert only is not None
    assert only.dense is not None
    assert torch.equal(only.dense, STORED * FACTORS["b"])


def test_order_matters_in_a_stack_that_reads_and_not_in_a_sum() -> None:
    def last(name: str, site: Site) -> Delta:
        return Delta.full(site.weight() * 0.5) if name == "a" else Delta.full(torch.ones(4, 5, dtype=torch.float64))

    made = {
        str(mix): delta(mix, SITE, last)
        for mix in (Stack(["a", "b"]), Stack(["b", "a"]), Sum(["a", "b"]), Sum(["b", "a"]))
    }
    first, second, third, fourth = (d.dense for d in made.values() if d is not None and d.dense is not None)
    assert not torch.allclose(first, second)
    assert torch.equal(third, fourth)
    assert torch.allclose(first, third)


def test_a_route_adds_nothing_to_a_weight() -> None:
    for mix in (Route(["a", None]), Route([Sum(["a", "b"])])):
        with pytest.raises(HubkitError, match="HK-MIX"):
            delta(mix, SITE, relative)


@pytest.mark.parametrize("members", [[], {}, [("a", float("nan"))], {"a": float("inf")}, [("a", -float("inf")), "b"]])
@pytest.mark.parametrize("kind", [Sum, Stack])
def test_what_is_no_mix_is_refused(kind: Any, members: Any) -> None:
    with pytest.raises(HubkitError, match="HK-MIX"):
        kind(members)


def test_flat_mixes_by_word() -> None:
    assert make_mix("sum", {"a": 1, "b": -0.5}) == Sum([("a", 1.0), ("b", -0.5)])
    assert make_mix("stack", [("a", 0.5)]) == Stack([("a", 0.5)])
    with pytest.raises(HubkitError, match="HK-MIX"):
        make_mix("route", {"a": 1})


def test_unknown_members_are_named() -> None:
    require_known(Sum(["a", Stack(["b"])]), NAMES)
    with pytest.raises(HubkitError) as caught:
        require_known(Sum(["a", Stack(["chap"])]), ["a", "chat"])
    assert (caught.value.code, caught.value.have, caught.value.fix) == ("HK-UNKNOWN-ADAPTER", ["chap"], "near: chat, a")
