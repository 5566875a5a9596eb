"""Every cell of the table architecture × method is ok, or refused before the first step for a reason that is known."""

from __future__ import annotations

from pathlib import Path

import pytest
from bases.architectures import ARCHITECTURES, known, save
from bases.cells import METHODS, Cell, run_cell
from bases.linear import rows, within
from bases.table import expected, faults, groups, markdown, marks, release, run, written

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


@pytest.mark.slow
@pytest.mark.skipif(release() < 5, reason="there the experts of some are computed in another way")
@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "selective", "full"])
@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text", "granitemoe", "granitemoehybrid", "jetmoe"])
def test_experts_that_lie_in_one_tensor_are_ok_where_they_are_named(kind: str, method: str, tmp_path: Path) -> None:
    """No default target of the table's cells takes them."""
    save(kind, tmp_path / "base")
    experts = r".*\.experts\..*"
    chosen = {"weights": experts} if method == "selective" else {"targets": experts + r"|.*(q|kv)_proj"}
    cell = run_cell(kind, method, tmp_path / "base", tmp_path / "work", **chosen)
    assert not faults([cell])
    assert cell.code == ""


@pytest.mark.parametrize("of", [4, 5])
def test_each_known_refusal_is_of_one_cell_and_has_a_reason(of: int) -> None:
    listed = groups(of)
    cells = [(kind, method) for group in listed for kind in group["architectures"] for method in group["methods"]]
    assert len(cells) == len(set(cells))
    assert {kind for kind, _ in cells} <= ARCHITECTURES.keys()
    assert {method for _, method in cells} <= METHODS.keys()
    assert all(group["reason"] for group in listed)


@pytest.mark.slow
def test_the_document_shows_what_is_expected() -> None:
    """What `scripts/bases --write` wrote is what the slow tests hold."""
    begin, end = marks()
    have = DOCUMENT.read_text("utf-8").partition(begin)[2].partition(end)[0].strip().splitlines()
    cells = [Cell(kind, method, expected().get((kind, method), "")) for kind in known() for method in METHODS]
    want = markdown(cells).splitlines()
    assert [row for row in want if row not in have] == []
    assert len(have) == len(want)


@pytest.mark.slow
@pytest.mark.skipif(release() < 5, reason="the table is of transformers 5")
def test_the_document_shows_where_all_linear_is_another() -> None:
    document = DOCUMENT.read_text("utf-8")
    assert within(document, rows()) == document


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
