"""Every cell of the table architecture × method is ok, or refused before the first step for a reason that is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bases.architectures import ARCHITECTURES, known
from bases.cells import METHODS, Cell
from bases.table import REFUSALS, expected, faults, markdown, marks, run, written

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "bases.md"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_row_is_ok_or_refused_for_a_known_reason(kind: str) -> None:
    if kind not in known():
        pytest.skip("this release of transformers has no such architecture")
    cells = list(run([kind], workers=1))
    assert not faults(cells)
    have = {cell.method: cell.code for cell in cells}
    assert have == {method: expected().get((kind, method), "") for method in METHODS}


def test_each_known_refusal_is_of_one_cell_and_has_a_reason() -> None:
    groups = json.loads(REFUSALS.read_text())
    cells = [(kind, method) for group in groups for kind in group["architectures"] for method in group["methods"]]
    assert len(cells) == len(set(cells))
    assert {kind for kind, _ in cells} <= ARCHITECTURES.keys()
    assert {method for _, method in cells} <= METHODS.keys()
    assert all(group["reason"] for group in groups)


@pytest.mark.slow
def test_the_document_shows_what_is_expected() -> None:
    """What `scripts/bases --write` wrote is what the slow tests hold."""
    begin, end = marks()
    have = DOCUMENT.read_text("utf-8").partition(begin)[2].partition(end)[0].strip().splitlines()
    cells = [Cell(kind, method, expected().get((kind, method), "")) for kind in known() for method in METHODS]
    want = markdown(cells).splitlines()
    assert [row for row in want if row not in have] == []
    assert len(have) == len(want)


def test_a_fault_is_no_answer() -> None:
    """What the slow tests rest on: each kind of fault is seen, the worst one shows, and none passes for a refusal."""
    cell = Cell("llama", "lora")
    assert (cell.verdict, faults([cell])) == ("ok", "")
    cell.blame("name", "attach")
    cell.blame("wrong", "live and merged differ")
    cell.blame("wrong", "live and PEFT differ")
    assert cell.verdict == "wrong"
    assert faults([cell]).splitlines() == [
        "llama lora: name: attach",
        "llama lora: wrong: live and merged differ; live and PEFT differ",
    ]
    assert Cell("llama", "prefix", "HK-ARCH").verdict == "refused HK-ARCH"


def test_a_table_is_written_between_its_marks_only() -> None:
    begin, end = marks()
    assert written(f"a\n{begin}\nold\n{end}\nb", "new\n") == f"a\n{begin}\nnew\n{end}\nb"
    with pytest.raises(ValueError, match="there is no"):
        written(f"{end}{begin}", "new\n")
