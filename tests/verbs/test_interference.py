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


def shown(page: str, title: str) -> Mapping[str, str]:
    """Site -> what the cells of one map say."""
    figure = next(part for part in page.split("<figure>") if f"<b>{title}</b>" in part)
    return dict(re.findall(r"<rect [^>]*><title>([^:<]+): ([^<]+)</title></rect>", figure))


def test_two_small_matrices_by_hand(tmp_path: Path) -> None:
    """Δa = [[3, 0], [0, 0]] and 2 Δb = [[2, 0], [-2, 0]]: rank one each.

    Column spaces: (1, 0) and (1, -1)/√2, cosine of the angle 1/√2, squared 1/2. Row spaces: both (1, 0): 1.
    ⟨Δa, 2Δb⟩ = 6, norms 3 and √8. Large in both is the upper left entry alone, positive in both: no conflict.
    """
    a, b = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    found = compared(["model.layers.0.mlp.up_proj"], a, b, (1.0, 2.0))
    (pair,) = found.pairs
    assert pair.columns == pytest.approx(0.5, abs=1e-6)
    assert pair.rows == pytest.approx(1.0, abs=1e-6)
    assert pair.chance == (0.5, 0.5)
    assert pair.cosine == pytest.approx(6 / (3 * math.sqrt(8)), abs=1e-6)
    assert pair.conflict == 0.0
    assert pair.ratio == pytest.approx(math.sqrt(8) / 3)
    assert compared(["x"], a, b, (1.0, -2.0)).pairs[0].conflict == 1.0
    write_page(tmp_path / "r.html", found)
    page = (tmp_path / "r.html").read_text("utf-8")
    want = {"Overlap of columns": "0.500", "Overlap of rows": "1.000", "Cosine": "0.707", "Sign conflict": "0.000"}
    for title, figure in want.items():
        assert shown(page, title) == {"model.layers.0.mlp.up_proj": figure}
    assert shown(page, "Relative norm") == {"model.layers.0.mlp.up_proj": f"{math.log10(math.sqrt(8) / 3):.3f}"}


@pytest.mark.parametrize(("names", "layers", "columns"), [(LLAMA, [0, 1, 11], 3), (BERT, [0, 1], 4)])
def test_a_grid_of_layers_and_modules(names: list[str], layers: list[int], columns: int, tmp_path: Path) -> None:
    """One row per layer, one column per module, a cell for each site, nowhere two in one place; and no address."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 3, generator=generator) for _ in range(2))
    write_page(tmp_path / "r.html", compared(names, a, b))
    page = (tmp_path / "r.html").read_text("utf-8")
    assert not re.search(r"https?:|//|@import|url[(]|<script|<link|<img|src=|href=", page)
    for title in ("Overlap of columns", "Overlap of rows", "Cosine", "Sign conflict", "Relative norm"):
        assert list(shown(page, title)) == names
    figure = page.split("<figure>")[1]
    places = re.findall(r'<rect x="(\d+)" y="(\d+)"', figure)
    assert len(set(places)) == len(names) == len(layers) * columns
    assert (len({x for x, _ in places}), len({y for _, y in places})) == (columns, len(layers))
    assert re.findall(r'text-anchor="end">(\d+)</text>', figure) == [str(n) for n in layers]
    assert len(re.findall(r"rotate", figure)) == columns
    assert "rules of thumb" in page


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
