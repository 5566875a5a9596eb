"""Losses of a model in float16 are scaled: small gradients arrive, an overflow costs a second pass and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import Adapted, llama, rows, train_step
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.training import checkpoint as checkpoints
from hubkit.training.loop import fit
from hubkit.training.options import TrainOptions
from hubkit.training.scaling import FIRST, PATIENCE, LossScale

OPTIONS = TrainOptions(steps=6, batch_size=2, learning_rate=0.02, seed=1)


def trained(folder: Path, dtype: torch.dtype, options: TrainOptions = OPTIONS, size: float = 1.0) -> Tensor:
    """The parameters after training with a loss of `size` times its own."""

    def step(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return train_step(model, batch) * size

    model = Adapted(llama(dtype), dropout=0.1)
    fit(model, model.params(), step, rows(10), (), options, run_dir=folder)
    return torch.cat([p.detach().flatten() for p in model.params().values()])


@pytest.mark.parametrize("chunked", [True, False])
def test_a_gradient_that_float16_cannot_hold_is_still_followed(chunked: bool, tmp_path: Path) -> None:
    """At a ten-thousandth of the loss most of the gradient is below 6e-8; AdamW sees its direction all the same."""
    options = replace(OPTIONS, chunked_loss=chunked, clip=0.0)
    start = torch.cat([p.detach().flatten() for p in Adapted(llama()).params().values()])
    want = trained(tmp_path / "wide", torch.float32, options, 1e-4) - start
    have = trained(tmp_path / "half", torch.float16, options, 1e-4) - start
    assert torch.nn.functional.cosine_similarity(have, want, dim=0) > 0.99


def test_an_overflow_halves_the_factor_and_computes_the_step_again(tmp_path: Path) -> None:
    """At a thousand times the loss the first factor overflows; the steps are then those of the loss itself."""
    options = replace(OPTIONS, steps=2, save_every=1)
    model = Adapted(llama(torch.float16))
    seen: list[Tensor] = []

    def step(own: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        seen.append(batch["input_ids"])
        return train_step(own, batch) * 1e3

    fit(model, model.params(), step, rows(10), (), options, run_dir=tmp_path)
    stored = checkpoints.load(tmp_path)
    assert stored is not None
    factor, calm = stored.tensors["scale/loss"].tolist()
    assert factor < FIRST
    assert calm == 2
    again = int(torch.log2(torch.tensor(FIRST / factor)))
    assert len(seen) == 2 + again


def test_a_resumed_run_goes_on_with_its_factor(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    count = 0

    def dying(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        nonlocal count
        count += 1
        if count > 14:
            raise Killed
        return train_step(model, batch) * 1e3

    want = trained(tmp_path / "whole", torch.float16, replace(OPTIONS, save_every=1), 1e3)
    model = Adapted(llama(torch.float16), dropout=0.1)
    options = replace(OPTIONS, save_every=1)
    with pytest.raises(Killed):
        fit(model, model.params(), dying, rows(10), (), options, run_dir=tmp_path / "killed")
    model, count = Adapted(llama(torch.float16), dropout=0.1), -1000
    metrics = fit(model, model.params(), dying, rows(10), (), options, run_dir=tmp_path / "killed", resume=True)
    assert metrics.steps == options.steps
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.params().values()]), want)


def test_a_gradient_that_is_not_finite_at_any_factor_is_refused(tmp_path: Path) -> None:
    model = Adapted(llama(torch.float16))
    before = [p.detach().clone() for p in model.params().values()]

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad * float("nan")

    def step(own: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = Broken.apply(train_step(own, batch))  # type: ignore[no-untyped-call]
        return loss

    with pytest.raises(HubkitError, match="HK-NAN"):
        fit(model, model.params(), step, rows(10), (), OPTIONS, run_dir=tmp_path)
    assert all(torch.equal(p, old) for p, old in zip(model.params().values(), before, strict=True))


def test_other_models_are_not_scaled_and_the_factor_grows_again() -> None:
    assert LossScale(llama(torch.bfloat16)).factor == LossScale(llama()).factor == 1.0
    assert LossScale(llama()).state() == {}
    scale = LossScale(llama(torch.float16))
    assert scale.overflowed()
    for _ in range(PATIENCE):
        scale.held()
    assert scale.factor == FIRST
    while scale.overflowed():
        assert scale.factor >= 1.0
    assert scale.factor == 1.0


@pytest.mark.parametrize("size", [1.0, 6.0, 40.0])
def test_the_head_may_be_large_and_the_targets_few(size: float, tmp_path: Path) -> None:
    """The loop's own loss lifts its gradient before it is scaled: not so far that it overflows by itself."""
    found = []
    for chunked in (True, False):
        base = llama(torch.float16)
        with torch.no_grad():
            base.lm_head.weight.mul_(size / base.lm_head.weight.abs().max())
        model = Adapted(base)
        options = replace(OPTIONS, steps=2, batch_size=1, chunked_loss=chunked)
        metrics = fit(model, model.params(), train_step, rows(2), (), options, run_dir=tmp_path / str(chunked))
        found.append(metrics.loss)
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_step_computed_again_drops_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the factor was halved at first, the run is the one that began with the smaller one."""
    from hubkit.training import scaling

    want = trained(tmp_path / "halved", torch.float16, size=1e3)
    stepped = []
    for first in (scaling.FIRST, 2.0**4):
        monkeypatch.setattr(scaling, "FIRST", first)
        model = Adapted(llama(torch.float16), dropout=0.3)
        fit(
            model,
            model.params(),
            lambda m, b: train_step(m, b) * 1e3,
            rows(10),
            (),
            replace(OPTIONS, steps=1),
            run_dir=tmp_path / str(first),
        )
        stepped.append(torch.cat([p.detach().flatten() for p in model.params().values()]))
    assert torch.nn.functional.cosine_similarity(stepped[0], stepped[1], dim=0) > 0.999
    assert want.isfinite().all()
