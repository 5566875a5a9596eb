"""The loop's laws: accumulation, determinism, resuming, early stopping, and what it refuses."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import killed_run
import pytest
import torch
from tiny import Adapted, llama, rows, train_step
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.training import checkpoint as checkpoints
from hubkit.training.events import Event, Finished, Metrics, Saved, Started, Stepped, Stopped, Validated
from hubkit.training.loop import fit
from hubkit.training.options import TrainOptions
from hubkit.training.rows.encode import Row
from hubkit.training.stepper import TrainStep

OPTIONS = TrainOptions(steps=8, batch_size=2, learning_rate=0.02, save_every=3, seed=1)
ROWS, HELD = rows(10), rows(4, seed=9)
HERE = Path(__file__).parent


def train(
    folder: Path,
    options: TrainOptions = OPTIONS,
    held: Sequence[Row] = (),
    model: Adapted | None = None,
    step: TrainStep = train_step,
    **more: Any,
) -> tuple[Metrics, Tensor, list[Event]]:
    """The metrics, the trained parameters as one vector, and the events."""
    model = model or Adapted(llama(), dropout=0.2)
    events: list[Event] = []
    metrics = fit(model, model.params(), step, ROWS, held, options, run_dir=folder, report=events.append, **more)
    return metrics, vector(model), events


def vector(model: Adapted) -> Tensor:
    return torch.cat([param.detach().flatten().clone() for param in model.params().values()])


def refused(code: str, call: Callable[..., object], *args: object, **kwargs: object) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        call(*args, **kwargs)
    assert caught.value.code == code
    return caught.value


def test_the_loss_falls(tmp_path: Path) -> None:
    metrics, _, events = train(tmp_path, replace(OPTIONS, steps=60, learning_rate=0.05), held=HELD)
    losses = [event.loss for event in events if isinstance(event, Stepped)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert metrics.steps == 60
    assert metrics.epochs == 12


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("other", [(1, 4), (2, 2), (3, 2)])
def test_accumulated_micro_batches_are_one_batch(tmp_path: Path, other: tuple[int, int], chunked: bool) -> None:
    # micro-batches of different numbers of targets, weighted by these: the same mean up to float32 rounding
    width = other[0] * other[1]
    whole = replace(OPTIONS, steps=3, batch_size=width, chunked_loss=chunked)
    parts = replace(OPTIONS, steps=3, batch_size=other[0], accumulate=other[1], chunked_loss=chunked)
    start = vector(Adapted(llama()))
    _, one, events = train(tmp_path / "a", whole, model=Adapted(llama()))
    _, two, others = train(tmp_path / "b", parts, model=Adapted(llama()))
    assert (one - two).norm() <= 1e-4 * (one - start).norm()
    for left, right in zip(events, others, strict=True):
        if isinstance(left, Stepped):
            assert isinstance(right, Stepped)
            assert (left.step, left.tokens) == (right.step, right.tokens)
            assert right.loss == pytest.approx(left.loss, rel=1e-5)
            assert right.gradient_norm == pytest.approx(left.gradient_norm, rel=1e-4)


def test_one_step_is_that_of_plain_torch(tmp_path: Path) -> None:
    """Outside oracle: torch's own AdamW (not fused) and gradient clipping on the stock loss."""
    from hubkit.training.rows.batching import collate

    options = TrainOptions(steps=1, batch_size=10, learning_rate=0.01, warmup=0, weight_decay=0.1, clip=0.05)
    _, found, events = train(tmp_path, options, model=Adapted(llama()))
    model = Adapted(llama())
    optimizer = torch.optim.AdamW(model.params().values(), lr=0.01, weight_decay=0.1, foreach=False)
    model(**collate(ROWS)).loss.backward()
    norm = nn.utils.clip_grad_norm_(model.params().values(), 0.05)
    optimizer.step()
    torch.testing.assert_close(found, vector(model), rtol=1e-3, atol=1e-5)
    assert next(e for e in events if isinstance(e, Stepped)).gradient_norm == pytest.approx(float(norm), rel=1e-5)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_run_writes_the_same_bytes(tmp_path: Path) -> None:
    results = []
    for name in ("a", "b"):
        torch.manual_seed(random.randrange(1000))  # what the caller's generators hold has no influence
        results.append(train(tmp_path / name, held=HELD)[1])
    assert torch.equal(*results)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert set(contents(tmp_path / "a")) == {"checkpoint.safetensors", "metrics.json", "metrics.jsonl"}
    assert not torch.equal(results[0], train(tmp_path / "c", replace(OPTIONS, seed=2))[1])


def test_checkpointing_and_saving_change_no_bit(tmp_path: Path) -> None:
    _, expected, _ = train(tmp_path / "a")
    changed = replace(OPTIONS, checkpointing=True), replace(OPTIONS, save_every=0), replace(OPTIONS, save_every=1)
    for number, options in enumerate(changed):
        assert torch.equal(train(tmp_path / str(number), options)[1], expected)


class Killed(Exception):
    """Raised out of `report`, where nothing of the run can catch it."""


@pytest.mark.parametrize("stop", [1, 3, 4, 7, 8])
def test_a_broken_off_run_is_resumed_to_the_same_bytes(tmp_path: Path, stop: int) -> None:
    options = replace(OPTIONS, patience=2, eval_every=2)
    metrics, expected, _ = train(tmp_path / "whole", options, held=HELD)
    model = Adapted(llama(), dropout=0.2)

    def report(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == stop:
            raise Killed

    with pytest.raises(Killed):
        fit(model, model.params(), train_step, ROWS, HELD, options, run_dir=tmp_path / "cut", report=report)
    found, resumed, events = train(tmp_path / "cut", options, held=HELD, resume=True)
    assert torch.equal(resumed, expected)
    assert replace(found, seconds=0) == replace(metrics, seconds=0)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert isinstance(events[0], Started)
    assert events[0].step == (stop - 1) // 3 * 3  # the step it broke off at was not saved yet


def test_a_finished_run_is_resumed_without_a_step(tmp_path: Path) -> None:
    metrics, expected, _ = train(tmp_path, replace(OPTIONS, patience=1, eval_every=1), held=HELD)
    again, found, events = train(tmp_path, replace(OPTIONS, patience=1, eval_every=1), held=HELD, resume=True)
    assert torch.equal(found, expected)
    assert replace(again, seconds=0) == replace(metrics, seconds=0)
    assert not any(isinstance(event, Stepped) for event in events)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(folder: Path, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "killed_run.py"), str(folder), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def until(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= step:
            return


@pytest.mark.slow
def test_a_run_killed_at_random_steps_is_resumed_to_the_same_bytes(tmp_path: Path, one_thread: None) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    killed_run.main(whole)
    choose = random.Random(int(time.time()))
    for step in (choose.randint(1, 18), choose.randint(19, 38)):
        process = start(cut, pause=0.01)
        until(process, step)
        time.sleep(choose.uniform(0, 0.03))
        process.kill()
        process.wait()
    assert not (cut / "done").exists()
    killed_run.main(cut)
    assert contents(cut) == contents(whole)


def test_ctrl_c_saves_and_raises_and_the_run_goes_on(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _, expected, _ = train(whole, held=HELD)
    model, before = Adapted(llama(), dropout=0.2).eval(), signal.getsignal(signal.SIGINT)
    events: list[Event] = []
    calls = []

    def interrupted(inner: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        calls.append(1)
        if len(calls) == 6:  # in the middle of a step
            signal.raise_signal(signal.SIGINT)
        return train_step(inner, batch)

    with pytest.raises(KeyboardInterrupt):
        fit(model, model.params(), interrupted, ROWS, HELD, OPTIONS, run_dir=cut, report=events.append)
    assert signal.getsignal(signal.SIGINT) is before
    assert not model.training
    assert isinstance(events[-2], Saved)
    assert events[-1] == Stopped(events[-2].step, "interrupt")
    assert torch.equal(train(cut, held=HELD, resume=True)[1], expected)
    assert contents(cut) == contents(whole)


@pytest.mark.parametrize("micro", range(8, 24, 3))
def test_ctrl_c_anywhere_leads_to_the_same_bytes(tmp_path: Path, micro: int) -> None:
    options = replace(OPTIONS, batch_size=1, accumulate=2, eval_every=2, patience=3)
    _, expected, _ = train(tmp_path / "whole", options, held=HELD)
    calls = []

    def interrupted(inner: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        calls.append(1)
        if len(calls) == micro:  # in steps and in evaluations
            signal.raise_signal(signal.SIGINT)
        return train_step(inner, batch)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", options, held=HELD, step=interrupted)
    assert torch.equal(train(tmp_path / "cut", options, held=HELD, resume=True)[1], expected)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_it_runs_outside_the_main_thread(tmp_path: Path) -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(train(tmp_path / "a")[1]))
    thread.start()
    thread.join()
    assert torch.equal(found[0], train(tmp_path / "b")[1])


def test_early_stopping_keeps_the_best_state(tmp_path: Path) -> None:
    model = Adapted(llama())
    options = replace(OPTIONS, steps=60, learning_rate=0.3, warmup=0.0, eval_every=1, patience=3)
    states: dict[int, Tensor] = {}
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        if isinstance(event, Validated):
            states[event.step] = vector(model)

    metrics = fit(model, model.params(), train_step, ROWS, HELD, options, run_dir=tmp_path, report=report)
    losses = {event.step: event.loss for event in events if isinstance(event, Validated)}
    assert metrics.early
    assert metrics.steps < 60
    assert metrics.kept_step == metrics.best_step == min(losses, key=losses.__getitem__)
    assert metrics.steps == metrics.best_step + 3
    assert torch.equal(vector(model), states[metrics.best_step])
    assert metrics.validation_loss == losses[metrics.best_step]
    assert Stopped(metrics.steps, "patience") in events
    # and that state does have that loss
    again = Adapted(llama())
    fit(again, again.params(), train_step, ROWS, HELD, options, run_dir=tmp_path, resume=True)
    assert torch.equal(vector(again), vector(model))


def test_evaluation_is_the_mean_over_targets_and_changes_nothing(tmp_path: Path) -> None:
    from hubkit.training.rows.batching import collate

    with_held, without = (train(tmp_path / name, held=held)[1] for name, held in (("a", HELD), ("b", ())))
    assert torch.equal(with_held, without)
    model = Adapted(llama())
    metrics, _, _ = train(tmp_path / "c", held=HELD, model=model)
    with torch.no_grad():
        assert metrics.validation_loss == pytest.approx(float(model(**collate(HELD)).loss), rel=1e-5)


def test_events_and_files_tell_the_same(tmp_path: Path) -> None:
    metrics, _, events = train(tmp_path, held=HELD)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    stepped = [event for event in events if isinstance(event, Stepped)]
    assert [line["loss"] for line in lines if "loss" in line] == [event.loss for event in stepped]
    assert [(e.step, e.loss) for e in events if isinstance(e, Validated)] == [
        (line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line
    ]
    assert [event.step for event in events if isinstance(event, Saved)] == [3, 6, 8]
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics.to_document()
    assert isinstance(events[0], Started)
    assert events[-1] == Finished(metrics)
    assert stepped[-1].seconds_left == 0
    assert all(event.tokens_per_second > 0 for event in stepped)
    assert metrics.tokens == sum(event.tokens for event in stepped)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = Adapted(llama())
    model.base.model.layers[0].train()
    model.base.config.use_cache = True
    modes = [module.training for module in model.modules()]
    state, generator = {k: v.clone() for k, v in model.base.state_dict().items()}, torch.get_rng_state()
    train(tmp_path, replace(OPTIONS, checkpointing=True), model=model)
    assert [module.training for module in model.modules()] == modes
    assert model.base.config.use_cache
    assert not model.base.is_gradient_checkpointing
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[key]) for key, value in model.base.state_dict().items())
    assert all(param.grad is None for param in model.parameters())


def test_nothing_to_train_is_refused(tmp_path: Path) -> None:
    model = Adapted(llama())
    refused("HK-FROZEN", fit, model, {}, train_step, ROWS, [], OPTIONS, run_dir=tmp_path)
    loose = {"w": nn.Parameter(torch.zeros(3))}
    refused("HK-FROZEN", fit, model, loose, train_step, ROWS, [], OPTIONS, run_dir=tmp_path)
    refused("HK-FROZEN", fit, llama(), loose, train_step, ROWS, [], OPTIONS, run_dir=tmp_path)
    model.requires_grad_(False)
    refused("HK-FROZEN", train, tmp_path, model=model)


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    def poisoned(inner: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        calls.append(1)
        return train_step(inner, batch) * (float("nan") if len(calls) == 6 else 1.0)

    def report(event: Event) -> None:
        seen.append(vector(model))

    model = Adapted(llama())
    calls: list[int] = []
    seen: list[Tensor] = []
    error = refused("HK-NAN", fit, model, model.params(), poisoned, ROWS, [], OPTIONS, run_dir=tmp_path, report=report)
    assert error.where.startswith("step 6 (rows:")
    assert "nan" in error.have[0]
    assert torch.equal(vector(model), seen[-1])
    stored = checkpoints.load(tmp_path)
    assert stored is not None
    assert stored.progress.step == 3
    assert all(torch.isfinite(tensor).all() for tensor in stored.tensors.values())
    # the fault gone, the run goes on from there
    calls[:] = [1] * 10
    assert fit(model, model.params(), poisoned, ROWS, [], OPTIONS, run_dir=tmp_path, resume=True).steps == 8


def test_a_validation_loss_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    def poisoned(inner: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return train_step(inner, batch) * (1.0 if inner.training else float("inf"))

    error = refused("HK-NAN", train, tmp_path, held=HELD, step=poisoned)
    assert any("validation loss" in line for line in error.have)


def test_a_step_that_returns_no_loss_is_refused(tmp_path: Path) -> None:
    for number, wrong in enumerate((lambda m, b: m(**b), lambda m, b: m(**b).logits)):
        refused("HK-PLUGIN", train, tmp_path / str(number), step=wrong)


def test_a_folder_with_a_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    train(tmp_path)
    before = contents(tmp_path)
    refused("HK-EXISTS", train, tmp_path)
    assert contents(tmp_path) == before
    checkpoints.discard(tmp_path)
    train(tmp_path)
    assert contents(tmp_path) == before


def test_another_run_is_not_resumed_and_all_differences_are_named(tmp_path: Path) -> None:
    train(tmp_path, identity={"base": "sha256:1"})
    before = contents(tmp_path)
    other = replace(OPTIONS, seed=7, learning_rate=1.0, save_every=1, checkpointing=True)
    model = Adapted(llama(), rank=3)
    error = refused("HK-RESUME", train, tmp_path, other, HELD, model, resume=True, identity={"base": "sha256:2"})
    names = [line.split(":")[0] for line in error.have]
    assert names == ["base", "learning_rate", "parameters", "seed", "validation_rows"]
    assert contents(tmp_path) == before


def test_a_machine_that_computes_otherwise_is_told(tmp_path: Path) -> None:
    train(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        events = train(tmp_path, resume=True)[2]
    finally:
        torch.set_num_threads(threads)
    assert isinstance(events[0], Started)
    assert events[0].machine_changes == (f"threads: then {threads}, now {threads + 1}",)


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    process = start(tmp_path, pause=0.5)
    try:
        until(process, 1)
        refused("HK-BUSY", train, tmp_path, resume=True)
    finally:
        process.kill()
        process.wait()


def test_other_refusals(tmp_path: Path) -> None:
    refused("HK-OPTIONS", train, tmp_path, replace(OPTIONS, patience=1))
    model = Adapted(llama())
    refused("HK-NO-ROWS", fit, model, model.params(), train_step, [], [], OPTIONS, run_dir=tmp_path)
    empty = [replace(ROWS[0], labels=[-100] * len(ROWS[0].ids))]
    refused("HK-NO-TARGETS", fit, model, model.params(), train_step, empty, [], OPTIONS, run_dir=tmp_path)
    plain = nn.Linear(2, 2)
    options = replace(OPTIONS, checkpointing=True)
    refused("HK-OPTIONS", fit, plain, dict(plain.named_parameters()), train_step, ROWS, [], options, run_dir=tmp_path)


def test_a_full_memory_in_a_step_is_refused_and_the_checkpoint_kept(tmp_path: Path) -> None:
    options = replace(OPTIONS, save_every=2)
    _, want, _ = train(tmp_path / "whole", options)
    count = 0

    def hungry(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        nonlocal count
        count += 1
        if count == 4:
            torch.empty(1 << 50)
        return train_step(model, batch)

    error = refused("HK-MEMORY", train, tmp_path / "full", options, step=hungry)
    assert "step 4" in error.what
    assert "GiB more" in str(error.want)
    assert "--resume --checkpointing goes on from step 2" in error.fix
    _, have, _ = train(tmp_path / "full", options, resume=True)
    assert torch.equal(have, want)
