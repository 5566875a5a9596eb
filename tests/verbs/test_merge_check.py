"""merge --check: what the merged model says is what the adapted base says, or nothing is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from making import make_adapter
from variants import logits, names, refused, rows_file, say

from hubkit.documents.manifest import Manifest
from hubkit.tensors.live.loading import load_base
from hubkit.training.drift import ANSWER, MOST, PROMPTS, Said, drift
from hubkit.verbs.attach import attach
from hubkit.verbs.merge import merge
from hubkit.verbs.train import train


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
def test_the_same_words(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    base: Path = request.getfixturevalue(kind)
    adapter = make_adapter(tmp_path / "a", base, alpha=2)
    done = merge(str(base), str(adapter), tmp_path / "merged", check=True)
    assert done.check is not None
    assert done.check["kl"] < 1e-6
    assert done.check["top1"] == 1.0
    assert len(PROMPTS) * ANSWER / 2 < done.check["tokens"] <= MOST
    manifest = Manifest.read(tmp_path / "merged")
    assert (manifest.composition or {})["check"] == done.check
    assert "`check.kl`" in (tmp_path / "merged" / "README.md").read_text()
    assert merge(str(base), str(adapter), tmp_path / "unchecked").check is None


def test_figures_are_those_of_the_two_models(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Against the formulas written out, on rows that are whole texts: merged into bf16, which loses something."""
    rows = rows_file(tmp_path / "rows.jsonl", 4)
    merge(str(tiny_llama), str(adapter), tmp_path / "merged", dtype="bfloat16")
    pair = attach(load_base(tiny_llama), str(adapter), base=tiny_llama), load_base(tmp_path / "merged", "float32")
    want, have = (Said([], list(logits(model))) for model in pair)
    p, q = torch.cat(list(want.logits)).double(), torch.cat(list(have.logits)).double()
    found = drift(want, have)
    reference = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none")
    assert found.kl == pytest.approx(float(reference.sum(-1).mean()), rel=1e-9)
    assert found.top1 == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert found.largest == pytest.approx(float((p - q).abs().max()), rel=1e-6)
    assert found.kl > 1e-7
    budget: dict[str, Any] = {"check_kl": 1.0, "check_top1": 0.5, "check_prompts": rows}
    done = merge(str(tiny_llama), str(adapter), tmp_path / "rows", dtype="bfloat16", **budget)
    assert done.check is not None
    assert 0 < done.check["kl"] < 1


def test_beyond_the_budget_nothing_is_kept(
    adapter: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo two\n")
    before = names(tmp_path)
    line = ("merge", adapter, "-b", tiny_llama, "-o", tmp_path / "merged", "--dtype", "bfloat16")
    said = say(capsys, *line, "--check-prompts", prompts, "--check-kl", 0, "--check-top1", 1)
    assert said.refusal() == "HK-MERGE-DRIFT"
    assert "at most 0 nats a token, at least 100.0%" in said.err
    assert names(tmp_path) == before
    said = say(capsys, *line, "--check-prompts", prompts, "--check-kl", 5, "--check-top1", 0)
    assert (said.status, "nats a token" in said.out) == (0, True)


def test_into_other_weights_than_those_trained_beside(tiny_llama: Path, tmp_path: Path) -> None:
    """The fault that it is for: the original weights instead of the decoded ones."""
    rows = rows_file(tmp_path / "rows.jsonl")
    train(str(tiny_llama), rows, tmp_path / "a", method="qlora", steps=2, learning_rate=0.02)
    kept = merge(str(tiny_llama), str(tmp_path / "a"), tmp_path / "trained", check=True)
    assert kept.check is not None
    assert kept.check["kl"] < 1e-6
    refused("HK-MERGE-DRIFT", merge, str(tiny_llama), str(tmp_path / "a"), tmp_path / "o", into="original", check=True)
    assert not (tmp_path / "o").exists()


def test_what_cannot_be_checked_is_said_first(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    before = names(tmp_path)
    faults: list[tuple[str, dict[str, Any]]] = [
        ("HK-OPTIONS", {"check_kl": -1.0}),
        ("HK-OPTIONS", {"check_top1": 1.5}),
        ("HK-MISSING", {"check_prompts": tmp_path / "nowhere.txt"}),
        ("HK-MISSING", {"check_prompts": tmp_path / "bytes.txt"}),
        ("HK-NO-ROWS", {"check_prompts": tmp_path / "none.txt"}),
        ("HK-MISSING", {"check_prompts": tmp_path / "nowhere.jsonl"}),
    ]
    for code, options in faults:
        refused(code, merge, str(tiny_llama), str(adapter), tmp_path / "m", check=True, dry_run=True, **options)
    assert names(tmp_path) == before
