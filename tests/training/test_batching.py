"""Which rows make up which step."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import rows

from hubkit.errors import HubkitError
from hubkit.training.rows.batching import collate, derive_seed, plan_epoch, plan_evaluation, split, steps_per_epoch

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=90)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.integers(0, 2))
def test_every_row_is_in_exactly_one_step(
    lengths: list[int], size: int, accumulate: int, seed: int, epoch: int
) -> None:
    plan = plan_epoch(lengths, size, accumulate, seed, epoch)
    assert sorted(row for step in plan for batch in step for row in batch) == list(range(len(lengths)))
    assert len(plan) == steps_per_epoch(len(lengths), size, accumulate)
    assert all(1 <= len(step) <= accumulate and all(1 <= len(batch) <= size for batch in step) for step in plan)
    assert plan == plan_epoch(lengths, size, accumulate, seed, epoch)


@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(0, 3))
def test_accumulated_steps_hold_the_same_rows(lengths: list[int], seed: int) -> None:
    at_once = [step[0] for step in plan_epoch(lengths, 4, 1, seed, 0)]
    one_by_one = [[row for batch in step for row in batch] for step in plan_epoch(lengths, 1, 4, seed, 0)]
    assert at_once == one_by_one


def test_grouping_by_length_saves_most_of_the_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 500, (2000,), generator=generator).tolist()
    batches = [batch for step in plan_epoch(lengths, 8, 1, 0, 0) for batch in step]
    padded = sum(max(lengths[row] for row in batch) * len(batch) for batch in batches)
    assert padded < 1.15 * sum(lengths)  # in random order it is 1.8


def test_epochs_and_seeds_differ() -> None:
    plans = [plan_epoch([5] * 40, 4, 1, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert plans[0] != plans[1] != plans[2] != plans[0]


def test_the_plan_does_not_depend_on_the_process() -> None:
    code = (
        "from hubkit.training.rows.batching import plan_epoch, split\n"
        "print(plan_epoch(list(range(1, 30)), 4, 2, 5, 1), split(range(20), 0.2, 5))"
    )
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": "123"}, capture_output=True, check=True)
    assert run.stdout.decode().strip() == f"{plan_epoch(list(range(1, 30)), 4, 2, 5, 1)} {split(range(20), 0.2, 5)}"


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.floats(0, 0.99), st.integers(0, 3))
def test_split_parts_the_rows(count: int, share: float, seed: int) -> None:
    train, held = split(range(count), share, seed)
    assert sorted([*train, *held]) == list(range(count))
    assert train == sorted(train)
    assert held == sorted(held)
    assert bool(held) == (share > 0)
    assert train


def test_split_refuses() -> None:
    for share in (-0.1, 1.0):
        with pytest.raises(HubkitError, match="HK-OPTIONS"):
            split([1, 2], share, 0)
    with pytest.raises(HubkitError, match="HK-NO-ROWS"):
        split([1], 0.5, 0)


def test_evaluation_takes_every_row_once() -> None:
    assert list(plan_evaluation([3, 9, 4, 9, 1], 2)) == [[1, 3], [2, 0], [4]]


def test_padding_is_masked_and_no_target() -> None:
    few = rows(3)
    batch = collate(few)
    longest = max(len(row.ids) for row in few)
    for number, row in enumerate(few):
        fill = longest - len(row.ids)
        assert batch["input_ids"][number].tolist() == [*row.ids, *[0] * fill]
        assert batch["attention_mask"][number].tolist() == [1] * len(row.ids) + [0] * fill
        assert batch["labels"][number].tolist() == [*row.labels, *[-100] * fill]


def test_seeds_of_purposes_differ() -> None:
    assert len({derive_seed(0, "a"), derive_seed(0, "b"), derive_seed(1, "a"), derive_seed(0, "a", 1)}) == 4
