"""compose with operators, a rank or a report: what is written, what is recorded, what is refused."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from example_method import ia3
from making import make_adapter
from torch import Tensor
from variants import names, refused, say, small_disk, tree

from hubkit.artifact.folder import open_adapter
from hubkit.documents.manifest import Manifest
from hubkit.methods.host import host
from hubkit.methods.reading import read_adapter
from hubkit.tensors.base.base import Base
from hubkit.verbs.compose import compose
from hubkit.verbs.pack import pack

EXACT = 1e-5
"""Relative error of fp32 factors of a best approximation."""


@pytest.fixture
def three(tiny_llama: Path, tmp_path: Path) -> list[Path]:
    """Ranks 2, 3 and 4; the last acts at some sites only."""
    targets = {0: "all-linear", 1: "all-linear", 2: ["q_proj", "up_proj"]}
    return [make_adapter(tmp_path / n, tiny_llama, seed=i, rank=2 + i, targets=targets[i]) for i, n in enumerate("abc")]


def deltas(adapter: Path, base: Path) -> dict[str, Tensor]:
    """Site -> the dense delta of an adapter on disk."""
    read = read_adapter(open_adapter(adapter), Base.from_folder(base), dtype="master")
    found: dict[str, Tensor] = {}
    for name, site in read.sites.items():
        delta = read.delta(site)
        matrix = None if delta is None else delta.matrix()
        assert matrix is not None
        found[name] = matrix
    return found


def near(have: Tensor, want: Tensor, error: float = EXACT) -> None:
    assert torch.linalg.norm(have - want) <= error * torch.linalg.norm(want)


def best(matrix: Tensor, rank: int) -> Tensor:
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    made: Tensor = (u[:, :rank] * values[:rank]) @ vt[:rank]
    return made


@pytest.mark.parametrize("method", ["ties", "magnitude"])
def test_operators_on_disk_are_pefts_on_full_deltas(
    method: str, three: list[Path], tiny_llama: Path, tmp_path: Path
) -> None:
    """PEFT's operator and a dense SVD of its result, at every site; of few rows nothing is left to chance."""
    from peft.utils import merge_utils

    weights = dict(zip(map(str, three), (1.0, 0.5, 2.0), strict=True))
    compose(weights, tmp_path / "out", method=method, density=0.4, rank=5)
    have, parts = deltas(tmp_path / "out", tiny_llama), [deltas(path, tiny_llama) for path in three]
    theirs = {"ties": merge_utils.ties, "magnitude": merge_utils.magnitude_prune}[method]
    assert set(have) == set(parts[0])
    for site, delta in have.items():
        present = [(part[site], weight) for part, weight in zip(parts, weights.values(), strict=True) if site in part]
        full = theirs([d for d, _ in present], torch.tensor([w for _, w in present]), 0.4)
        near(delta, best(full, 5))


def test_a_rank_is_the_best_approximation_of_the_sum(three: list[Path], tiny_llama: Path, tmp_path: Path) -> None:
    terms = f"{three[0]} + -0.5*{three[1]} + {three[2]}"
    exact = compose(terms, tmp_path / "exact")
    cut = compose(terms, tmp_path / "cut", rank=3)
    full, have = deltas(tmp_path / "exact", tiny_llama), deltas(tmp_path / "cut", tiny_llama)
    kept = {site: float(best(matrix, 3).norm() ** 2 / matrix.norm() ** 2) for site, matrix in full.items()}
    for site, matrix in full.items():
        near(have[site], best(matrix, 3))
    assert (exact.rank, cut.rank) == (9, 3)
    total = sum(float(m.norm() ** 2) for m in full.values())
    assert cut.composition["energy"] == pytest.approx(
        sum(kept[s] * float(m.norm() ** 2) for s, m in full.items()) / total, abs=2e-6
    )
    assert cut.composition["least_energy"] == pytest.approx(min(kept.values()), abs=2e-6)
    assert cut.composition["least_energy_site"] == min(kept, key=kept.__getitem__)
    assert Manifest.read(tmp_path / "exact").composition == {"operator": "sum", "rank": 9, "energy": 1}
    same = compose(terms, tmp_path / "same", rank=9)
    assert all(
        torch.equal(a, b) for a, b in zip(full.values(), deltas(same.path or Path(), tiny_llama).values(), strict=True)
    )


def test_an_energy_is_kept_at_every_site(three: list[Path], tiny_llama: Path, tmp_path: Path) -> None:
    terms = f"{three[0]} + {three[1]}"
    compose(terms, tmp_path / "exact")
    full = deltas(tmp_path / "exact", tiny_llama)
    for energy in (0.5, 0.9):
        done = compose(terms, tmp_path / f"e{energy}", energy=energy)
        shares = [torch.linalg.svdvals(m).square().cumsum(0) / m.norm() ** 2 for m in full.values()]
        assert done.rank == max(int((share >= energy).to(torch.int).argmax()) + 1 for share in shares)
        assert done.composition["least_energy"] >= energy
        assert done.composition["energy_wanted"] == energy
    assert compose(terms, tmp_path / "capped", energy=0.9999, rank=2).rank == 2


@pytest.mark.parametrize("method", ["dare", "dare-ties"])
def test_the_seed_is_all_that_matters(method: str, three: list[Path], tmp_path: Path) -> None:
    def run(name: str, seed: int) -> dict[str, bytes]:
        compose([f"{three[0]}", "+", f"-0.5*{three[1]}"], tmp_path / name / "x", method=method, density=0.5, seed=seed)
        return tree(tmp_path / name / "x")

    for name in ("one", "two", "other"):
        (tmp_path / name).mkdir()
    one = run("one", 7)
    assert one == run("two", 7)
    assert one != run("other", 8)
    manifest = open_adapter(tmp_path / "one" / "x").manifest
    recorded = manifest.composition or {}
    assert {key: recorded[key] for key in ("operator", "density", "seed", "rank")} == {
        "operator": method,
        "density": 0.5,
        "seed": 7,
        "rank": 3,
    }
    assert [parent.weight for parent in manifest.parents] == [1.0, -0.5]
    assert f"`{method}`" in (tmp_path / "one" / "x" / "README.md").read_text()
    pack(tmp_path / "one" / "x", version="1.0.0")
    assert open_adapter(tmp_path / "one" / "x").manifest.composition == recorded


def test_peft_reads_the_result(three: list[Path], tiny_llama: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    compose(f"{three[0]} + {three[1]}", tmp_path / "out", method="ties", density=0.3)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "out")
    modules = dict(model.base_model.model.named_modules())
    for site, delta in deltas(tmp_path / "out", tiny_llama).items():
        near(modules[site].get_delta_weight("default").detach(), delta, 1e-6)


@pytest.fixture
def rescaling(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter of a method that reads the base's weights and whose delta is dense."""
    method = ia3()
    monkeypatch.setitem(host()._loaded, method.name, method)
    return make_adapter(tmp_path / "r", tiny_llama, method=method, targets=["k_proj"], feedforward=["down_proj"])


def test_a_dense_member(rescaling: Path, three: list[Path], tiny_llama: Path, tmp_path: Path) -> None:
    """It needs the base's weights; then it is one member among others, with a rank or without."""
    terms = f"{three[0]} + 0.5*{rescaling}"
    refused("HK-BASE-NEEDED", compose, terms, tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()
    compose(terms, tmp_path / "out", base=str(tiny_llama), rank=4)
    whole = compose(terms, tmp_path / "whole", base=str(tiny_llama))
    have, low = deltas(tmp_path / "out", tiny_llama), deltas(three[0], tiny_llama)
    site = "model.layers.0.mlp.down_proj"
    read = read_adapter(open_adapter(rescaling), Base.from_folder(tiny_llama))
    dense = read.delta(read.base.sites[site])
    assert dense is not None
    assert dense.dense is not None
    near(have[site], best(low[site] + 0.5 * dense.dense, 4))
    near(deltas(tmp_path / "whole", tiny_llama)[site], low[site] + 0.5 * dense.dense, 1e-6)
    assert (whole.rank, dict(whole.composition)) == (0, {"operator": "sum", "energy": 1})
    done = compose(terms, None, base=str(tiny_llama), report=tmp_path / "r.html")
    assert done.interference is not None
    assert {at.site for at in done.interference.pairs[0].sites} == {
        s for s in low if s.endswith(("k_proj", "down_proj"))
    }


@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties", "magnitude"])
def test_whole_tensors_are_pruned_as_they_are(method: str, rescaling: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """A density of 1 keeps all; a smaller one keeps entries of the member, each as the operator says."""
    base = str(tiny_llama)
    compose(str(rescaling), tmp_path / "all", density=1.0, base=base, method=method)
    done = compose(str(rescaling), tmp_path / "some", density=0.5, seed=3, base=base, method=method)
    assert (done.rank, done.composition["density"]) == (0, 0.5)
    full, read = deltas(tmp_path / "all", tiny_llama), deltas(tmp_path / "some", tiny_llama)
    for site, matrix in deltas(rescaling, tiny_llama).items():
        near(full[site], matrix, 1e-6)
        kept = read[site] != 0
        assert 0.3 <= float(kept.double().mean()) <= 0.7
        near(read[site][kept], matrix[kept] / (0.5 if "dare" in method else 1.0), 1e-6)


def test_a_bias_and_a_method_that_cannot_merge(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Path
) -> None:
    method = ia3()
    monkeypatch.setitem(host()._loaded, method.name, method)
    biased = make_adapter(tmp_path / "r", tiny_gpt2, method=method, targets=["c_attn"], feedforward=["mlp.c_proj"])
    error = refused("HK-COMPOSE", compose, str(biased), tmp_path / "out", base=str(tiny_gpt2), rank=4)
    assert "bias" in error.what
    from dataclasses import replace

    default = host().load(host().default())
    monkeypatch.setattr(default, "info", replace(default.info, unmergeable="it says so"))
    error = refused("HK-COMPOSE", compose, str(adapter), tmp_path / "out")
    assert error.have == ["chat: it says so"]
    assert not (tmp_path / "out").exists()


class Page(HTMLParser):
    """Tags and attributes of a page; every one that could fetch something is a failure."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert tag not in ("script", "link", "img", "iframe", "object", "use", "image", "a", "base", "form")
        assert not {name for name, _ in attrs} & {"src", "href", "xlink:href", "onload", "action"}
        given = [value or "" for name, value in attrs if name == "style"]
        assert all(re.fullmatch(r"background: rgb\([0-9 ]+ / [0-9.]+\)", value) for value in given)


def test_a_report(three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "clash.html"
    done = say(capsys, "compose", three[0], "+", three[0], "+", three[2], "--report", page, "--json")
    assert done.status == 0, done.err
    document: dict[str, Any] = json.loads(done.out)
    assert (document["path"], document["interference"]["advice"]) == (None, "ties")
    same, *_ = document["interference"]["pairs"]
    assert same["members"] == ["a", "a-2"]
    assert all(at["columns"] == pytest.approx(1, abs=1e-6) for at in same["sites"])
    assert len(same["sites"]) == 14
    text = page.read_text("utf-8")
    assert text.count("<td style=") == 5 * (14 + 4 + 4) + 3 * 9, "every site of every pair, means and chance"
    assert not re.search(r"https?:|//|@import|url[(]", text)
    assert say(capsys, "compose", three[0], "+", three[1], "--report", page).refusal() == "HK-EXISTS"
    assert page.read_text("utf-8") == text
    both = say(capsys, "compose", three[0], "+", three[1], "--report", page, "--replace", "-o", tmp_path / "o")
    assert "composed" in both.out
    assert "advice  sum" in both.out
    assert (tmp_path / "o").is_dir()


def test_text_of_strangers_in_a_page(tmp_path: Path) -> None:
    from hubkit.tensors.weights.interference import Interference, Pair, PairAt
    from hubkit.verbs.interference import write_page

    evil = '</title><script>alert("x")</script>\u202e&"'
    figures: dict[str, Any] = {"columns": 1e300, "rows": None, "chance": None, "cosine": 0.5, "conflict": None}
    at = PairAt(site=evil, norms=(0.0, 1e300), **figures)
    pair = Pair(members=(evil, evil), ratio=None, advice=evil, reason=evil, sites=(at, at), **figures)
    write_page(tmp_path / "r.html", Interference(((evil, 0.5),), evil, evil, (pair,)))
    text = (tmp_path / "r.html").read_text("utf-8")
    assert "script" not in Page(text).tags
    assert "\u202e" not in text
    assert Page(text).tags.count("tr") == 1 + 5 + 3


def test_refusals_write_nothing(three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(tmp_path)
    both, out = (three[0], "+", three[1]), tmp_path / "out"
    for line, status, code in (
        ((*both, "-o", out, "--method", "soup"), 2, "HK-OPERATOR"),
        ((*both, "-o", out, "--method", "ties"), 2, "HK-DENSITY"),
        ((*both, "-o", out, "--method", "ties", "--density", "0"), 2, "HK-DENSITY"),
        ((*both, "-o", out, "--method", "dare", "--density", "nan"), 2, "HK-DENSITY"),
        ((*both, "-o", out, "--density", "0.5"), 2, "HK-DENSITY"),
        ((*both, "-o", out, "--rank", "0"), 2, "HK-RANK"),
        ((*both, "-o", out, "--energy", "1.5"), 2, "HK-ENERGY"),
        ((*both, "-o", out, "--energy", "nan"), 2, "HK-ENERGY"),
        ((*both, "-o", out, "--seed", "x"), 2, "HK-USAGE"),
        ((three[0], "-", three[1], "-o", out, "--method", "average"), 2, "HK-OPERATOR"),
        ((f"1e39*{three[0]}", "+", three[1], "-o", out), 1, "HK-NAN"),
        ((f"1e39*{three[0]}", "+", three[1], "-o", out, "--rank", "3"), 1, "HK-NAN"),
        ((f"1e39*{three[0]}", "+", three[1], "-o", out, "--method", "ties", "--density", "0.5"), 1, "HK-NAN"),
        ((f"nan*{three[0]}", "+", three[1], "-o", out), 2, "HK-REFERENCE"),
        (both, 2, "HK-USAGE"),
        ((three[0], "--report", tmp_path / "r.html"), 1, "HK-REPORT"),
        ((*both, "--report", tmp_path / "nowhere" / "r.html"), 1, "HK-IO"),
        ((*both, "--report", tmp_path), 1, "HK-IO"),
        ((*both, "-o", out, "--base", tmp_path / "nowhere"), 1, "HK-BASE-MISSING"),
    ):
        assert say(capsys, "compose", *line).refusal(status) == code, line
        assert tree(tmp_path) == before, line
    refused("HK-TERMS", compose, {str(three[0]): float("nan")}, out)
    with small_disk(1000):
        refused("HK-DISK", compose, " + ".join(map(str, three)), out, method="ties", density=0.5)
        refused("HK-DISK", compose, " + ".join(map(str, three)), None, report=tmp_path / "r.html")
    assert tree(tmp_path) == before
    assert names(tmp_path) == {"a", "b", "c"}
