"""Layers by number: which sites they leave, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from hubkit.errors import HubkitError
from hubkit.methods.suite import tiny_model
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.layers import layer_numbers, layer_of


@pytest.fixture(scope="module")
def base() -> Base:
    return Base.from_model(tiny_model("llama"))


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [("0-3", {0, 1, 2, 3}), ("0-1, 8", {0, 1, 8}), ("5", {5}), ((0, 2), {0, 2}), ("11-11", {11})],
)
def test_numbers(layers: Any, numbers: set[int]) -> None:
    assert layer_numbers(layers) == numbers


@pytest.mark.parametrize("layers", ["", "a", "1-", "-1", "3-1", "0,,1", "0..3", "1" * 9, [-1]])
def test_what_is_no_number_is_refused(layers: Any) -> None:
    with pytest.raises(HubkitError, match="HK-CONFIG"):
        layer_numbers(layers)


def test_the_layer_is_the_first_number_in_the_path() -> None:
    assert layer_of("model.layers.3.mlp.experts.5.w1") == 3
    assert layer_of("model.embed_tokens") is None


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.mlp\..*"])
def test_targets_are_taken_in_these_layers_only(base: Base, targets: Any) -> None:
    first = base.match(targets, layers="0")
    assert first == [site for site in base.match(targets) if ".layers.0." in site.name]
    assert base.match(targets, layers=[0, 1]) == base.match(targets)


@pytest.mark.parametrize(
    ("targets", "layers", "have"),
    [
        ("all-linear", "1-3", ["2, 3"]),
        (["q_proj", "embed_tokens"], "0", ["model.embed_tokens"]),
        (["layers.1.self_attn.q_proj"], [0], ["model.layers.1.self_attn.q_proj"]),
    ],
)
def test_layers_that_are_not_there_are_refused(base: Base, targets: Any, layers: Any, have: list[str]) -> None:
    with pytest.raises(HubkitError, match="HK-TARGET") as caught:
        base.match(targets, layers=layers)
    assert caught.value.have == have
