"""Options and the schedule."""

from __future__ import annotations

import math

import pytest
import torch

from hubkit.errors import HubkitError
from hubkit.training.options import TrainOptions
from hubkit.training.schedule import rate_factor


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(HubkitError) as caught:
        TrainOptions(
            steps=0,
            epochs=-1,
            batch_size=0,
            accumulate=1.5,  # type: ignore[arg-type]
            learning_rate=math.nan,
            warmup=1,
            schedule="cos",
            weight_decay=-1,
            clip=math.inf,
            max_length=1,
            seed=-1,
            dtype="int8",
            validation=1.0,
            patience=0,
            eval_every=0,
            save_every=-1,
            optimizer="sgd",
        )
    assert caught.value.code == "HK-OPTIONS"
    assert caught.value.status == 2
    assert len(caught.value.have) == 18


def test_steps_and_epochs() -> None:
    assert TrainOptions().total_steps(10) == 10
    assert TrainOptions(epochs=2.25).total_steps(10) == 23
    assert TrainOptions(epochs=0.001).total_steps(10) == 1
    assert TrainOptions(steps=7).total_steps(10) == 7


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0.0), (1, 0.5), (10, 0.3), (100, 0.03), (7, 0.99)])
def test_the_rate_rises_to_its_highest_and_falls(schedule: str, total: int, warmup: float) -> None:
    factors = [rate_factor(schedule, step, total, warmup) for step in range(total)]
    rising = math.ceil(warmup * total)
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1
    assert factors[:rising] == sorted(factors[:rising])
    assert factors[rising:] == sorted(factors[rising:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_after_the_warm_up_the_rate_is_that_of_transformers(schedule: str) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    peer = get_scheduler(schedule, optimizer, num_warmup_steps=5, num_training_steps=50)
    for step in range(50):
        if step >= 5:  # in the warm-up the peer's first step has a rate of 0 and learns nothing
            assert rate_factor(schedule, step, 50, 0.1) == pytest.approx(peer.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        peer.step()
