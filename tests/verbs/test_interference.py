"""The page of `compose --report`: figures worked out by hand, names of Llama and BERT, nothing fetched."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from variants import refused

from hubkit.tensors.base.delta import Delta
from hubkit.tensors.base.site import Site
from hubkit.tensors.weights import interference as rules
from hubkit.tensors.weights.interference import Interference, interference
from hubkit.verbs.interference import require_page, write_page

LLAMA = [f"model.layers.{n}.{m}" for n in (0, 1, 11) for m in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")]
NAME = "model.layers.0.mlp.up_proj"
ROW = r"<tr><th>([^<]*)</th>(<td.*)</tr>"
BERT = [
    f"bert.encoder.layer.{n}.{m}"
    for n in (0, 1)
    for m in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
]


def compared(names: list[str], a: Tensor, b: Tensor, weights: tuple[float, float] = (1.0, 1.0)) -> Interference:
    """The same two deltas, (out, in), at every site, as factors: Δ = Δ · 1."""
    sites = [Site(name, "linear", (a.shape[0], a.shape[1]), torch.float32, False, name, None) for name in names]
    deltas = {"a": Delta.low_rank(a, torch.eye(a.shape[1])), "b": Delta.low_rank(b, torch.eye(b.shape[1]))}
    return interference(sites, list(zip(deltas, weights, strict=True)), lambda member, _: deltas[member])


def shown(page: str) -> Mapping[str, list[str]]:
    """Row -> what its cells say, of the table of one pair."""
    (table,) = [part for part in page.split("<table>") if "sites where both act" in part]
    return {row[0]: re.findall(r"<td[^>]*>([^<]*)</td>", row[1]) for row in re.findall(ROW, table)}


def test_two_small_matrices_by_hand(tmp_path: Path) -> None:
    """Δa = [[3, 0], [0, 0]] and 2 Δb = [[2, 0], [-2, 0]]: rank one each.

    Column spaces: (1, 0) and (1, -1)/√2, cosine of the angle 1/√2, squared 1/2. Row spaces: both (1, 0): 1.
    ⟨Δa, 2Δb⟩ = 6, norms 3 and √8. Large in both is the upper left entry alone, positive in both: no conflict.
    """
    a, b = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    found = compared([NAME], a, b, (1.0, 2.0))
    (pair,) = found.pairs
    assert pair.columns == pytest.approx(0.5, abs=1e-6)
    assert pair.rows == pytest.approx(1.0, abs=1e-6)
    assert pair.chance == (0.5, 0.5)
    assert pair.cosine == pytest.approx(6 / (3 * math.sqrt(8)), abs=1e-6)
    assert pair.conflict == 0.0
    assert pair.ratio == pytest.approx(math.sqrt(8) / 3)
    assert compared(["x"], a, b, (1.0, -2.0)).pairs[0].conflict == 1.0
    write_page(tmp_path / "r.html", found)
    rows = shown((tmp_path / "r.html").read_text("utf-8"))
    want = ["0.500", "1.000", "0.707", "0.000", f"{math.log10(math.sqrt(8) / 3):.3f}"]
    assert rows == {"mean": want, "chance": ["0.500", "0.500", "0.000", "0.500", "none"], NAME: want}


@pytest.mark.parametrize("names", [LLAMA, BERT])
def test_a_row_for_every_site(names: list[str], tmp_path: Path) -> None:
    """In the base's order, five figures in each; no address, nothing to run."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 3, generator=generator) for _ in range(2))
    write_page(tmp_path / "r.html", compared(names, a, b))
    page = (tmp_path / "r.html").read_text("utf-8")
    assert not re.search(r"https?:|//|@import|url[(]|<script|<link|<img|src=|href=", page)
    rows = shown(page)
    assert list(rows) == ["mean", "chance", *names]
    assert {len(cells) for cells in rows.values()} == {5}
    assert "rules of thumb" in page


def test_opposites_are_blue_and_copies_red(tmp_path: Path) -> None:
    one = torch.ones(3, 2)
    for sign, colour in ((1.0, "194 65 12"), (-1.0, "29 78 216")):
        write_page(tmp_path / "r.html", compared([NAME], one, one, (1.0, sign)))
        page = (tmp_path / "r.html").read_text("utf-8")
        assert f'rgb({colour} / 1.00)">{sign:.3f}</td>' in page.rpartition(NAME)[2]


def test_the_rules_are_said_where_they_are_applied() -> None:
    text = rules.__doc__ or ""
    assert "rules of thumb" in text
    for name in ("OPPOSED", "REPEATED", "SHARED", "ABOVE_CHANCE", "CONFLICT"):
        assert name in text
        assert isinstance(getattr(rules, name), float)


def test_where_no_page_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "there.html").write_text("mine")
    refused("HK-EXISTS", require_page, tmp_path / "there.html", False)
    refused("HK-IO", require_page, tmp_path, True)
    refused("HK-IO", require_page, tmp_path / "no" / "r.html", False)
    assert require_page(tmp_path / "there.html", True) == tmp_path / "there.html"
