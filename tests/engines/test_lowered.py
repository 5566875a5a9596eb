"""Lowering: whatever acts, one plain LoRA changes every weight by the same; what cannot be said so is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from making import make_adapter

from hubkit.artifact.folder import open_adapter
from hubkit.engines.lowered import EXACT, Lowered, lower
from hubkit.errors import HubkitError
from hubkit.methods.host import host
from hubkit.methods.reading import read_adapter
from hubkit.tensors.base.base import Base
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Mix, Stack, Sum, delta
from hubkit.tensors.parts.part import LowRank


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> Base:
    return Base.from_folder(tiny_llama)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, base: Base) -> dict[str, Adapter]:
    """Adapters of every kind that changes weights."""
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "plain": ("lora", {"rank": 2}),
        "stable": ("lora", {"rank": 3, "rslora": True, "targets": ["q_proj", "v_proj"]}),
        "patterns": ("lora", {"rank": 2, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"up_proj": 3.0}}),
        "dora": ("dora", {"rank": 2}),
        "full": ("full", {"targets": ["model.layers.0.mlp.down_proj"]}),
        "prefix": ("prefix", {"init": "gaussian"}),
        "norms": ("selective", {"biases": ()}),
    }
    out: dict[str, Adapter] = {}
    for seed, (name, (method, config)) in enumerate(kinds.items()):
        folder = tmp_path_factory.mktemp("made") / name
        make_adapter(folder, tiny_llama, method=host().load(method), seed=seed, **config)
        out[name] = read_adapter(open_adapter(folder), base, name=name, dtype="master")
    return out


def same_changes(lowered: Lowered, mix: Mix, made: dict[str, Adapter], base: Base, tolerance: float) -> None:
    """Read by alpha / r alone, as an engine does, the result changes every weight as the mix does."""
    for site in base.sites.values():
        change = delta(mix, site, lambda name, site: made[name].delta(site))
        part = lowered.adapter.parts.get(site.name)
        if change is None:
            assert part is None
            continue
        assert isinstance(part, LowRank)
        assert (part.scale, part.A.shape[0]) == (1.0, lowered.rank)
        want = change.matrix()
        assert want is not None
        gap = torch.linalg.norm((part.B.double() @ part.A.double()) - want) / torch.linalg.norm(want)
        assert gap <= tolerance, site.name


MIXES: list[Mix] = [
    "plain",
    "stable",
    "patterns",
    Sum({"plain": 1.0, "stable": -0.5, "patterns": 0.25}),
    Stack([("stable", 2.0), "plain"]),
    Sum([("plain", 1.0), (Sum({"stable": 0.5, "patterns": 1.0}), -1.0)]),
]


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_low_rank_changes_are_exact(mix: Mix, made: dict[str, Adapter], base: Base) -> None:
    lowered = lower("one", mix, made, base)
    assert lowered.errors == {}
    same_changes(lowered, mix, made, base, 1e-6)


def test_what_was_done_is_said(made: dict[str, Adapter], base: Base) -> None:
    lowered = lower("one", Sum({"plain": 1.0, "stable": -0.5}), made, base)
    assert lowered.said == (
        "2 adapters are one: 1·plain + -0.5·stable",
        "plain: scale 16 is in B",
        "plain: rank 2 is 5 everywhere, padded with zeros",
        "stable: scale 18.4752 is in B",
        "stable: rank 3 is 5 everywhere, padded with zeros",
    )


@pytest.mark.parametrize("name", ["dora", "full"])
def test_a_dense_change_needs_a_budget_and_keeps_within_it(name: str, made: dict[str, Adapter], base: Base) -> None:
    """Without a budget nothing may be left out; what a budget leaves out is told, site by site, and true."""
    exact = lower("one", name, made, base)
    same_changes(exact, name, made, base, 2 * EXACT)
    with pytest.raises(HubkitError) as refusal:
        lower("one", name, made, base, rank=2)
    assert refusal.value.code == "HK-LOWER"
    assert len(refusal.value.have) == len(made[name].parts)
    cut = lower("one", name, made, base, budget=0.5)
    assert cut.rank < exact.rank
    assert cut.errors
    assert max(cut.errors.values()) <= 0.5
    for site, error in cut.errors.items():
        part, change = cut.adapter.parts[site], made[name].delta(base.site(site))
        assert isinstance(part, LowRank)
        assert change is not None
        want = change.matrix()
        assert want is not None
        gap = torch.linalg.norm(part.B.double() @ part.A.double() - want.double()) / torch.linalg.norm(want.double())
        assert float(gap) == pytest.approx(error, rel=1e-3)


def test_a_rank_that_is_too_small_is_refused_unless_nothing_is_lost(made: dict[str, Adapter], base: Base) -> None:
    twice = Sum([("plain", 1.0), ("plain", 1.0)])  # rank 4 as written, 2 in truth
    lowered = lower("one", twice, made, base, rank=2)
    assert (lowered.rank, lowered.errors) == (2, {})
    same_changes(lowered, twice, made, base, 2 * EXACT)
    with pytest.raises(HubkitError) as refusal:
        lower("one", Sum({"plain": 1.0, "stable": 1.0}), made, base, rank=2)
    assert refusal.value.code == "HK-LOWER"


@pytest.mark.parametrize(
    ("name", "word"), [("prefix", "prefix"), ("norms", "the change of a")], ids=["virtual tokens", "biases and norms"]
)
def test_what_no_lora_can_say_is_refused_by_name(name: str, word: str, made: dict[str, Adapter], base: Base) -> None:
    with pytest.raises(HubkitError) as refusal:
        lower("one", name, made, base, budget=0.9)
    assert refusal.value.code == "HK-LOWER"
    assert word in " ".join(refusal.value.have)


@pytest.mark.parametrize(("options", "code"), [({"rank": 0}, "HK-RANK"), ({"budget": 1.0}, "HK-ENERGY")])
def test_options_out_of_range(options: Any, code: str, made: dict[str, Adapter], base: Base) -> None:
    with pytest.raises(HubkitError) as refusal:
        lower("one", "plain", made, base, **options)
    assert refusal.value.code == code
