"""Rows told from one another: how they meet, what counts as wrong, the loss, how what is found is scored."""

from __future__ import annotations

import math
import random
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubkit.errors import HubkitError
from hubkit.training.guards import require_usable
from hubkit.training.options import TrainOptions
from hubkit.training.rows.batching import fewest, plan_epoch, plan_evaluation, steps_per_epoch
from hubkit.training.rows.contrast import Texts, stacked
from hubkit.training.rows.encode import rows_digest
from hubkit.training.tasks.embedding import _ranks
from hubkit.training.tasks.kinds import KINDS
from hubkit.training.tasks.metrics import retrieval
from hubkit.training.tasks.names import CAUSAL_LM, TASKS
from hubkit.training.tasks.pooling import contrast

COUNTS = st.integers(2, 60)


def test_the_command_line_knows_every_task() -> None:
    assert set(TASKS) == {CAUSAL_LM, *KINDS}


@settings(deadline=None)
@given(COUNTS, st.integers(2, 5), st.integers(1, 3), st.integers(0, 3))
def test_no_row_is_alone(count: int, batch: int, accumulate: int, epoch: int) -> None:
    """Each row is in one micro-batch of two rows or more, and there are as many steps as were promised."""
    plan = plan_epoch(list(range(count)), batch, accumulate, 0, epoch, 2)
    assert sorted(chain(*chain(*plan))) == list(range(count))
    assert all(2 <= len(rows) <= batch + 1 for step in plan for rows in step)
    assert len(plan) == steps_per_epoch(count, batch, accumulate, 2)
    assert all(2 <= len(rows) <= batch + 1 for rows in plan_evaluation(list(range(count)), batch, 2))


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 3))
def test_rows_that_may_be_alone_meet_as_ever(count: int, batch: int, accumulate: int) -> None:
    width = batch * accumulate
    plan = plan_epoch(list(range(count)), batch, accumulate, 3, 1)
    assert len(plan) == steps_per_epoch(count, batch, accumulate) == -(-count // width)
    assert sorted(map(len, chain(*plan)))[-1] <= batch


def row(*texts: list[int]) -> Texts:
    return Texts.of(texts, 0, "")


def test_texts_come_back_and_digests_tell_them_apart() -> None:
    assert row([5, 6], [7], [8, 9]).texts() == [(5, 6), (7,), (8, 9)]
    assert row([5, 6], [7]).targets() == 1
    assert len({rows_digest([one]) for one in (row([5, 6], [7]), row([5], [6, 7]), row([5, 6, 7], [7]))}) == 3


def test_what_belongs_to_an_equal_anchor_is_not_wrong() -> None:
    rows = [row([1], [10, 11], [20]), row([1], [12]), row([2], [10, 11], [12]), row([3], [13])]
    batch = Texts.collated(rows, "cpu")
    assert batch["input_ids"].shape == (4 + 4 + 2, 2)
    assert batch["labels"].tolist() == [0, 1, 2, 3]
    # candidates: [10, 11], [12], [10, 11], [13], then the negatives [20], [12]
    assert batch["wrong"].long().tolist() == [
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 1, 0, 1, 1, 1],
        [1, 1, 1, 0, 1, 1],
    ]
    assert fewest(rows) == 2


def test_the_loss_is_that_of_a_softmax_over_what_is_wrong() -> None:
    generator = torch.Generator().manual_seed(0)
    found = torch.nn.functional.normalize(torch.randn(7, 6, generator=generator, dtype=torch.float64), dim=-1)
    wrong = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1]], dtype=torch.bool)
    want = []
    for n in range(3):
        scores = [20 * float(found[n] @ found[3 + c]) for c in range(4)]
        counted = [scores[c] for c in range(4) if c == n or wrong[n, c]]
        want.append(math.log(sum(math.exp(one - scores[n]) for one in counted)))
    have = contrast(found, torch.arange(3), wrong, 20.0)
    assert float(have) == pytest.approx(sum(want) / 3, rel=1e-12)


def test_an_anchor_with_nothing_to_tell_it_from_has_no_loss_and_no_gradient() -> None:
    raw = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = contrast(torch.nn.functional.normalize(raw, dim=-1), torch.tensor([0]), torch.tensor([[False]]), 20.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert raw.grad is not None
    assert not raw.grad.any()


def by_hand(scores: list[float], right: set[int]) -> dict[str, float]:
    """The figures of one search: all candidates sorted, wrong ones first where scores are equal."""
    order = sorted(range(len(scores)), key=lambda c: (-scores[c], c in right))
    hits = [n for n, c in enumerate(order[:10]) if c in right]
    gain = sum(1 / math.log2(n + 2) for n in hits)
    ideal = sum(1 / math.log2(n + 2) for n in range(min(10, len(right))))
    first = 1 / (hits[0] + 1) if hits else 0.0
    return {"accuracy_at_1": float(hits[:1] == [0]), "mrr_at_10": first, "ndcg_at_10": gain / ideal}


def test_ranks_and_figures_are_those_of_sorting_everything() -> None:
    draw = random.Random(0)
    for _ in range(60):
        size = draw.randrange(1, 40)
        scores = [draw.randrange(8) / 8 for _ in range(size)]  # many are equal
        right = set(draw.sample(range(size), draw.randrange(1, min(size, 13) + 1)))
        assert retrieval([_ranks(torch.tensor(scores), right)]) == pytest.approx(by_hand(scores, right), abs=1e-12)


def test_vectors_that_are_all_the_same_find_nothing() -> None:
    assert retrieval([_ranks(torch.ones(20), {3})])["mrr_at_10"] == 0
    assert retrieval([[1], [2], [11]]) == pytest.approx(
        {"accuracy_at_1": 1 / 3, "mrr_at_10": 0.5, "ndcg_at_10": (1 + 1 / math.log2(3)) / 3}
    )
    with pytest.raises(ValueError, match="without"):
        retrieval([])


def test_a_single_row_is_refused() -> None:
    one, two = [row([1], [2])], [row([1], [2]), row([3], [4])]
    params = {"p": torch.nn.Parameter(torch.zeros(1))}
    require_usable(params, params, two, [], TrainOptions())
    for rows, held in ((one, []), (two, one)):
        with pytest.raises(HubkitError, match="too few rows"):
            require_usable(params, params, rows, held, TrainOptions())


def test_padding_is_masked() -> None:
    batch = stacked([(5, 6, 7), (8,)], 9, "cpu")
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
