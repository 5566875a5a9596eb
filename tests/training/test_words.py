"""Words of a text and their tokens, rows of words as they are read, and figures by words."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from words import tokenizer

from hubkit.errors import HubkitError
from hubkit.training.rows.data import Record
from hubkit.training.rows.words import joined_words, placed, placed_within, words_in
from hubkit.training.tasks.kinds import KINDS
from hubkit.training.tasks.metrics import is_bio, spans_of, word_scores
from hubkit.training.tasks.names import CAUSAL_LM, TASKS
from hubkit.training.tasks.tagged import Shape, label_set, tags_of
from hubkit.training.tasks.task import Asked

SCORES = Path(__file__).parent.parent / "golden" / "scores" / "scores.json"
"""Made by make_scores.py beside it."""


def texts(text: str, places: Any) -> list[str]:
    return [text[start:end] for start, end in places]


def test_tasks_are_listed_without_torch() -> None:
    assert (CAUSAL_LM, *KINDS) == TASKS


@pytest.mark.parametrize("case", json.loads(SCORES.read_text()))
def test_figures_are_those_of_scikit_learn_and_seqeval(case: dict[str, Any]) -> None:
    number = {label: n for n, label in enumerate(case["labels"])}
    truth, guessed = ([[number[label] for label in row] for row in case[side]] for side in ("truth", "guessed"))
    assert word_scores(truth, guessed, case["labels"]) == pytest.approx(case["scores"], abs=1e-12)


def test_nothing_but_outside_has_no_f1() -> None:
    assert word_scores([[0, 0]], [[0, 0]], ["O", "B-x"]) == {
        "accuracy": 1, "f1_macro": 0, "f1_micro": 0, "exact_match": 1, "span_f1": 0
    }  # fmt: skip


def test_spans_begin_with_b_and_with_an_i_that_follows_no_word_of_its_name() -> None:
    labels = ["I-a", "I-a", "I-b", "O", "I-b", "B-b", "I-b", "B-a"]
    assert spans_of(labels) == [("a", 0, 2), ("b", 2, 3), ("b", 4, 5), ("b", 5, 7), ("a", 7, 8)]
    assert is_bio(["O", "B-a", "I-a"])
    assert not is_bio(["O"])
    assert not is_bio(["O", "noun"])
    assert not is_bio(["B-a", "I-a"])


def test_every_sign_but_blanks_is_in_one_word() -> None:
    text = " The Mill's (near £20)\u2009don't. 東京です हिन्दी 😀"
    found = words_in(text)
    assert "".join(texts(text, found)) == "".join(text.split())
    assert all(one[1] <= other[0] for one, other in pairwise(found))
    assert texts(text, found)[:5] == ["The", "Mill", "'", "s", "("]
    assert texts(text, found)[-6:] == ["東", "京", "で", "す", "हिन्दी", "😀"]


def test_the_tokens_of_listed_words_are_those_that_transformers_gives_them() -> None:
    """`word_ids` of the same words, each behind a blank as a tokenizer of that kind wants them."""
    made, words = tokenizer(), ["The", "quick", "München", "😀", "(", "fox's", ")"]
    text, places = joined_words(words)
    found = placed(made, text, places)
    theirs = made([" " * bool(n) + word for n, word in enumerate(words)], is_split_into_words=True)
    assert list(found.ids) == theirs["input_ids"]
    said = list(zip(theirs.word_ids(), theirs["input_ids"], strict=True))  # a blank can be a token of its own
    assert list(found.firsts) == [
        next(at for at, (word, token) in enumerate(said) if word == n and made.decode([token]).strip())
        for n in range(len(words))
    ]
    assert texts(text, found.words) == words


def test_words_that_share_a_token_are_one() -> None:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.WordLevel({"?": 0, "a": 1, "),": 2, "b": 3}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made, text = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?"), "a ), b"
    found = placed(made, text, words_in(text))
    assert texts(text, found.words) == ["a", "),", "b"]
    assert (found.ids, found.firsts, found.shared) == ((1, 2, 3), (0, 1, 2), (2,))


@pytest.mark.parametrize("longest", range(1, 16))
def test_what_is_cut_off_are_whole_words_at_the_end(longest: int) -> None:
    made, text = tokenizer(), "The quick brown 😀 restaurants."
    whole = placed(made, text, words_in(text))
    found = placed_within(made, text, words_in(text), longest)
    assert len(found.ids) <= longest
    assert found.ids == whole.ids[: len(found.ids)]
    assert found.words == whole.words[: len(found.words)]
    assert found.cut == len(whole.ids) - len(found.ids)
    left = [*whole.firsts[len(found.words) :], len(whole.ids)]  # a blank can be a token before its word
    assert not found.words or left[0] - len(found.ids) in (0, 1)
    assert not found.cut or left[1] > longest


def record(**values: object) -> Record:
    return Record(values, "rows.jsonl:1")


LISTED = {"tokens": ["The", "Mill"], "tags": ["O", "B-name"]}
SPANNED: dict[str, Any] = {"text": "The Mill, a pub", "spans": [{"start": 4, "end": 8, "label": "name"}]}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tags": ["O"]}, "2 words, 1 labels"),
        ({"tokens": ["The", " "]}, "' ' is no word"),
        ({"tokens": ["The", 3]}, "3 is no word"),
        ({"tokens": []}, "nothing is no word"),
        ({"tags": "O O"}, "'tags' is a text"),
        ({"tags": ["O", None]}, "None is no label"),
        ({"tags": ["O", True]}, "True is no label"),
        ({"tokens": "The Mill"}, "the first row has a list of words"),
    ],
)
def test_a_row_of_words_that_cannot_be_read_is_named(values: dict[str, object], said: str) -> None:
    rows = [record(**LISTED), record(**(LISTED | values))]
    with pytest.raises(HubkitError) as caught:
        Shape.of(rows, Asked()).read(rows)
    assert caught.value.code == "HK-DATA"
    assert said in caught.value.have[0]


def span(start: object, end: object, label: object = "name") -> dict[str, object]:
    return {"start": start, "end": end, "label": label}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"spans": [span(4, 8), span(0, 8, "x")]}, "spans overlap: 'The Mill' (x) and 'Mill' (name)"),
        ({"spans": [span(0, 8), span(4, 15)]}, "spans overlap"),
        ({"spans": [span(4, 7)]}, "cuts the word 'Mill'"),
        ({"spans": [span(4, 16)]}, "in a text of 15 characters"),
        ({"spans": [span(4, 4)]}, "a span from 4 to 4"),
        ({"spans": [span(3, 4)]}, "a span of blanks"),
        ({"spans": [span(4.0, 8)]}, "whole numbers"),
        ({"spans": [{"start": 4, "end": 8}]}, "is no span"),
        ({"spans": [span(4, 8, None)]}, "None is no label"),
        ({"spans": None}, "'spans' is not there"),
        ({"text": " "}, "no word"),
        ({"text": ["The"]}, "the first row has a text"),
    ],
)
def test_a_row_of_spans_that_cannot_be_read_is_named(values: dict[str, object], said: str) -> None:
    rows = [record(**SPANNED), record(**(SPANNED | values))]
    with pytest.raises(HubkitError) as caught:
        Shape.of(rows, Asked()).read(rows)
    assert caught.value.code == "HK-DATA"
    assert said in caught.value.have[0]


def test_spans_become_labels_of_words() -> None:
    row = record(text="The Old Mill, a pub", spans=[span(15, 19, "kind"), span(3, 12)])
    shape = Shape.of([row], Asked())
    (read,) = shape.read([row])
    assert tags_of(read, read.words) == ["O", "B-name", "I-name", "O", "O", "B-kind"]
    assert label_set([read], (), False)[0] == ("O", "B-kind", "I-kind", "B-name", "I-name")
    assert label_set([read], ("name", "kind"), False)[0] == ("O", "B-name", "I-name", "B-kind", "I-kind")
    assert tags_of(read, read.words[:2]) == ["O", "B-name"]  # the rest was cut off
    joined = (read.words[0], (read.words[1][0], read.words[3][1]), *read.words[4:])  # one token for "Old Mill,"
    assert tags_of(read, joined) == ["O", "B-name", "O", "B-kind"]
    with pytest.raises(ValueError, match="Old Mill"):
        tags_of(read, ((0, 12), *read.words[3:]))


def test_numbers_count_into_labels_that_are_given() -> None:
    row = record(tokens=["The", "Mill", "!"], ner_tags=[0, 1, "2"])
    shape = Shape.of([row], Asked())
    assert shape.read([row], ("O", "B-x", "I-x"))[0].tags == ("O", "B-x", "I-x")
    assert shape.read([row], ("2", "1", "0"))[0].tags == ("0", "1", "2")
    assert shape.read([row])[0].tags == ("0", "1", "2")
