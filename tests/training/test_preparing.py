"""Rows of a run: equal ones, what is held out, and the figures of all."""

from __future__ import annotations

import random
from statistics import median_low
from typing import Any

import pytest
from tiny import tokenizer

from hubkit.errors import HubkitError
from hubkit.training.options import TrainOptions
from hubkit.training.rows.batching import split
from hubkit.training.rows.data import Record
from hubkit.training.rows.encode import Row
from hubkit.training.rows.marked import marked
from hubkit.training.rows.preparing import prepared_rows, split_apart
from hubkit.training.rows.summary import Prepared, lengths_of, padding_of

WORDS = ("one", "two", "three", "four", "five", "six")


def records(*texts: str) -> list[Record]:
    return [Record({"text": text}, f"r:{number}") for number, text in enumerate(texts, 1)]


def prepared(
    texts: list[Record], held: list[Record] | None = None, *, context: int | None = 64, raw: bool = False, **more: Any
) -> tuple[list[str], list[str], Prepared]:
    """Where the rows of both sides came from, and the figures."""
    found: list[Prepared] = []
    equal = {name: more.pop(name) for name in ("duplicates", "overlap") if name in more}
    options = TrainOptions(**more)
    rows, validation = prepared_rows(
        texts, held, tokenizer(), None, options, context=context, front=0, raw=raw, report=found.append, **equal
    )
    (figures,) = found
    return [row.where for row in rows], [row.where for row in validation], figures


def refused(code: str, *arguments: Any, **options: Any) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        prepared(*arguments, **options)
    assert caught.value.code == code
    return caught.value


def test_duplicates_are_counted_kept_dropped_or_refused() -> None:
    texts = records("one", "two", "one", "one", "three")
    rows, _, figures = prepared(texts)
    assert (rows, figures.duplicates, figures.dropped) == ([f"r:{n}" for n in range(1, 6)], 2, 0)
    rows, _, figures = prepared(texts, duplicates="drop")
    assert (rows, figures.duplicates, figures.dropped) == (["r:1", "r:2", "r:5"], 2, 2)
    assert refused("HK-DATA", texts, duplicates="refuse").have == ["r:3 equals r:1", "r:4 equals r:1"]
    refused("HK-OPTIONS", texts, duplicates="often")


def test_the_same_text_learnt_otherwise_is_no_duplicate() -> None:
    talk = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    weighed = [*talk, talk[0], {**talk[1], "weight": 0}]
    chats = [Record({"messages": m}, "r") for m in ([*talk, *talk], weighed)]
    found: list[Prepared] = []
    options = TrainOptions()
    prepared_rows(chats, None, tokenizer(), None, options, context=None, front=0, raw=False, report=found.append)
    assert found[0].duplicates == 0


def test_rows_that_are_validated_on_are_refused_or_dropped() -> None:
    texts, held = records("one", "two", "three"), [Record({"text": "two"}, "v:1")]
    assert refused("HK-DATA", texts, held).have == ["r:2 is v:1"]
    rows, validation, figures = prepared(texts, held, overlap="drop")
    assert (rows, validation, figures.overlapping, figures.dropped) == (["r:1", "r:3"], ["v:1"], 1, 1)
    refused("HK-NO-ROWS", held, held, overlap="drop")
    refused("HK-OPTIONS", texts, held, overlap="keep")


def row(number: int) -> Row:
    from array import array

    return Row(array("i", [1, number]), array("i", [-100, number]), str(number))


def test_no_row_is_on_both_sides_and_none_is_lost() -> None:
    rng = random.Random(3)
    for seed in range(40):
        rows = [row(rng.randrange(12)) for _ in range(rng.randrange(12, 40))]
        kept, held = split_apart(rows, 0.2, seed)
        assert held
        assert kept
        assert not {r.where for r in kept} & {r.where for r in held}
        assert sorted(r.where for r in [*kept, *held]) == sorted(r.where for r in rows)


def test_without_equal_rows_the_split_is_what_it_was() -> None:
    rows = [row(number) for number in range(50)]
    for seed in range(5):
        assert split_apart(rows, 0.1, seed) == split(rows, 0.1, seed)
    with pytest.raises(HubkitError, match="HK-NO-ROWS"):
        split_apart([row(1)] * 9, 0.5, 0)


def test_the_figures() -> None:
    rng = random.Random(5)
    texts = records(*(" ".join(rng.choices(WORDS, k=rng.randrange(1, 30))) for _ in range(101)))
    lengths = [len(str(one.values["text"]).split()) + 1 for one in texts]  # and the end
    _, _, figures = prepared(texts, max_length=20, truncate=True, batch_size=3)
    cut = sorted(min(length, 20) for length in lengths)
    tokens = figures.tokens
    assert (tokens.least, tokens.median, tokens.most, tokens.total) == (cut[0], median_low(cut), cut[-1], sum(cut))
    assert sum(length <= tokens.p95 for length in cut) >= 0.95 * len(cut) > sum(length < tokens.p95 for length in cut)
    assert figures.truncated == sum(length > 20 for length in lengths)
    assert figures.targets == sum(cut) - len(cut)
    assert (figures.rows, figures.validation_rows, dict(figures.columns)) == (101, 0, {"text": ("text",)})
    assert prepared(texts, packing=True)[2].padding == 0
    assert all(str(number) in "\n".join(figures.lines()) for number in (tokens.median, tokens.p95, figures.truncated))


def test_the_padding_is_that_of_the_batches() -> None:
    from array import array

    rows = [Row(array("i", [1] * length), array("i", [1] * length)) for length in (1, 3)]
    assert padding_of(rows, 2, 1, 0) == 1 - 4 / 6
    assert padding_of(rows, 1, 2, 0) == 0
    assert lengths_of([5]).p95 == 5


def test_a_row_in_pieces_is_the_whole_row() -> None:
    tok = tokenizer()
    talk = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}] * 2
    found: list[Row]
    found, _ = prepared_rows(
        [Record({"messages": talk}, "r:1")], None, tok, None, TrainOptions(), context=None, front=0, raw=False
    )
    shown = marked(found[0], tok)
    assert shown.text("", "") == tok.decode(list(found[0].ids), clean_up_tokenization_spaces=False)
    assert [piece.learnt for piece in shown.pieces] == [False, True, False, True]
    assert [piece.text.split() for piece in shown.pieces if piece.learnt] == [["two", "three", "<|end|>"]] * 2
    assert (shown.tokens, shown.targets) == (sum(p.tokens for p in shown.pieces), found[0].targets())
