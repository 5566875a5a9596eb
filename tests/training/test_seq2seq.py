"""Rows of a text to read and one to write, and how near an answer is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pairs
import pytest
import torch

from hubkit.errors import HubkitError
from hubkit.training.rows.batching import collate
from hubkit.training.rows.data import Columns, Record
from hubkit.training.tasks.answers import answer_scores
from hubkit.training.tasks.kinds import KINDS
from hubkit.training.tasks.names import CAUSAL_LM, TASKS
from hubkit.training.tasks.pairs import PAIRS, Encoding, Limits, pair_columns
from hubkit.training.tasks.seq2seq import limits_of

ROW = {"prompt": "w1 x1", "completion": "v1"}


def encoded(*rows: dict[str, Any], longest: int = 16, truncate: bool = False, limits: Limits | None = None) -> Any:
    records = [Record(row, f"rows:{n}") for n, row in enumerate(rows, 1)]
    made = Encoding(pairs.whole_words(), limits or Limits(None, None), pairs.PAD, pairs.EOS)
    return made.rows(records, pair_columns(records, None), longest, truncate)


def ids(text: str) -> list[int]:
    return [pairs.WORDS.index(word) for word in text.split()]


def test_the_names_are_those_of_the_kinds() -> None:
    assert {*TASKS} == {CAUSAL_LM, *KINDS}


def test_both_sides_end_once() -> None:
    (row,) = encoded(ROW)
    assert list(row.ids) == ids("w1 x1 </s>")
    assert list(row.labels) == [-100, *ids("v1 </s>")]
    assert row.targets() == 2
    (row,) = encoded({"instruction": "w1", "input": "x2", "output": "v1 </s>"})
    assert list(row.ids) == ids("w1 x2 </s>")
    assert list(row.labels)[1:] == ids("v1 </s> </s>")  # the row spells one out, and the tokenizer adds its own


def test_a_batch_is_padded_on_both_sides() -> None:
    batch = collate(encoded(ROW, {"prompt": "w1", "completion": "v1 v2 v3"}))
    assert batch["input_ids"].tolist() == [ids("w1 x1 </s>"), ids("w1 </s> <pad>")]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[*ids("v1 </s>"), -100, -100], ids("v1 v2 v3 </s>")]


def test_each_side_has_its_limit() -> None:
    row = {"prompt": "w1 x1 x2 x3", "completion": "v1 v2 v3"}
    assert encoded(row, longest=5)
    for limits in (Limits(4, None), Limits(None, 3)):
        with pytest.raises(HubkitError, match="HK-ROW-TOO-LONG"):
            encoded(row, limits=limits)
    (cut,) = encoded(row, limits=Limits(3, 2), truncate=True)
    assert list(cut.ids) == ids("w1 x1 </s>")  # what ends a text to read stays
    assert list(cut.labels)[1:] == ids("v1 v2")  # what is cut off does not end
    assert cut.cut == 4


@pytest.mark.parametrize("names", PAIRS)
def test_pairs_of_columns_are_known(names: tuple[str, str]) -> None:
    records = [Record(dict(zip(names, ("w1", "v1"), strict=True)), "rows:1")]
    found = pair_columns(records, None)
    assert (*found.prompt, found.completion) == names
    asked = Columns(prompt=(names[1],), completion=names[0])
    assert pair_columns(records, asked) == asked


def test_the_limits_are_those_of_the_positions(tmp_path: Path) -> None:
    """T5 has none, whatever its configuration says of the length that it was trained with."""
    t5 = pairs.saved("T5ForConditionalGeneration", tmp_path / "t5")
    config = json.loads((t5 / "config.json").read_text())
    (t5 / "config.json").write_text(json.dumps({**config, "n_positions": 8}))
    assert limits_of(t5) == Limits(None, None)
    assert limits_of(pairs.saved("BartForConditionalGeneration", tmp_path / "bart")) == Limits(16, 16)
    led = {"model_type": "led", "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 32}
    (tmp_path / "led").mkdir()
    (tmp_path / "led" / "config.json").write_text(json.dumps(led))
    assert limits_of(tmp_path / "led") == Limits(64, 32)


def test_answers_are_compared_but_for_white_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    assert answer_scores(["a b", "c\n d"], ["a c", " c d"]) == {"exact_match": 0.5}
    for wanted in ([], ["a", "b"]):
        with pytest.raises(ValueError, match="texts"):
            answer_scores(wanted, ["a"] if wanted else [])


def test_rouge_is_that_of_rouge_score() -> None:
    """By hand: 2 of 3 words and 2 of 4, one of 2 and of 3 pairs, a b in this order."""
    pytest.importorskip("rouge_score")
    found = answer_scores(["a b c"], ["x a b y"])
    assert found["exact_match"] == 0
    assert found["rouge1"] == pytest.approx(4 / 7)
    assert found["rouge2"] == pytest.approx(2 / 5)
    assert found["rougeL"] == pytest.approx(4 / 7)


def test_losses_are_those_of_the_model(tmp_path: Path) -> None:
    """What the task takes for the sum over targets is what transformers' mean times their number is."""
    from hubkit.tensors.live.loading import load_base
    from hubkit.training.tasks.seq2seq import _losses

    model: Any = load_base(pairs.saved("T5ForConditionalGeneration", tmp_path / "t5"))
    rows = encoded(ROW, {"prompt": "w2 x1 x1", "completion": "v2 v2"}, {"prompt": "w3", "completion": "v3"})
    with torch.no_grad():
        want = [float(model(**collate([row])).loss) * row.targets() for row in rows]
    assert sum(_losses(model, rows, 2)) == pytest.approx(sum(want), rel=1e-5)
