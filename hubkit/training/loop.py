"""The training loop: the same seed, rows, options and machine give the same bytes, killed and resumed or not.

What a step computes depends on the parameters, the optimizer's moments and the step's number only: the rows of a
step and its dropout are drawn from seeds derived from the run's seed and that number.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.tensors.device import computing, described, used
from hubkit.training import checkpoint as checkpoints
from hubkit.training.attention import short_attention
from hubkit.training.checkpoint import Checkpoint, RunProgress
from hubkit.training.events import Event, Finished, Metrics, Saved, Started, Stepped, Stopped, Validated
from hubkit.training.guards import Interrupt, require_usable, run_folder, training_state
from hubkit.training.history import History, write_result
from hubkit.training.loss import chunked_loss
from hubkit.training.options import WITHOUT_INFLUENCE, TrainOptions
from hubkit.training.packing import packable, require_packing
from hubkit.training.ranks.world import world
from hubkit.training.rows.batching import collate, derive_seed, fewest, plan_epoch, plan_evaluation, steps_per_epoch
from hubkit.training.rows.encode import Row, rows_digest
from hubkit.training.schedule import rate_factor
from hubkit.training.stepper import Scores, Stepper, TrainStep

SMOOTHED = 50
"""Steps over which the reported training loss is the mean."""
TIMED = 20
"""Steps over which speed is measured."""


def fit(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    train_step: TrainStep,
    train_rows: Sequence[Row],
    validation_rows: Sequence[Row],
    options: TrainOptions,
    *,
    run_dir: Path,
    report: Callable[[Event], None] = lambda event: None,
    identity: Mapping[str, object] | None = None,
    resume: bool = False,
    rates: Mapping[str, float] | None = None,
    kept: Mapping[str, Tensor] | None = None,
    scores: Scores | None = None,
) -> Metrics:
    """Trains `params` in place and returns the metrics; model modes and random generators are restored.

    With `options.patience` the state of the best evaluation is kept, else the last. `run_dir` receives checkpoints,
    `metrics.jsonl` and `metrics.json`; its checkpoint stays until `checkpoint.discard`, so that a run killed after
    its last step is resumed without computing.

    Args:
        model: what `train_step` calls.
        params: the trainable parameters by name, float32, all on one device.
        train_step: the mean loss over the targets of a batch (input_ids, attention_mask, labels), with grad.
        train_rows, validation_rows: encoded rows; validation rows may be none.
        report: called after each event, between steps.
        identity: further facts a resumed run must share (base, method, configuration), as JSON values.
        resume: go on from the checkpoint in `run_dir`, if there is one.
        rates: parameter name -> what multiplies the learning rate for it, where it is not 1.
        kept: tensors beside `params` that training reads and does not change; a checkpoint holds them, too.
        scores: figures of the validation rows beside their loss, at each evaluation and before the first step.

    Raises:
        HubkitError: HK-FROZEN without parameters to train, or none that the loss reaches; HK-NO-ROWS;
            HK-NO-TARGETS; HK-OPTIONS; HK-NAN when loss or gradient is not finite (parameters stay as they were);
            HK-EXISTS when `run_dir` holds a checkpoint and `resume` is not asked; HK-RESUME when that is of another
            run; HK-BUSY when another process trains there; HK-PLUGIN when `train_step` returns no scalar.
        KeyboardInterrupt: on Ctrl-C, once the state is consistent and saved.
    """
    begun = time.perf_counter()
    report = report if world().first else (lambda event: None)
    trained = {name: params[name] for name in sorted(params) if params[name].requires_grad}
    require_usable(trained, params, train_rows, validation_rows, options)
    stepper = Stepper(
        model,
        trained,
        train_step,
        weight_decay=options.weight_decay,
        clip=options.clip,
        optimizer=options.optimizer,
        packing=options.packing,
        rates=rates,
        kept=kept,
    )
    if rates:
        identity = {**(identity or {}), "rates": Counter(map(str, sorted(rates.values())))}
    longest = collate([max(train_rows, key=lambda row: len(row.ids))], stepper.device)
    with run_folder(run_dir), training_state(model, stepper.device, checkpointing=options.checkpointing):
        run = _Run(stepper, train_rows, validation_rows, options, run_dir, report, identity or {}, scores)
        changes = run.restore(resume)
        with (
            closing(History(run_dir, run.progress.step, run.progress.evaluated, writes=world().first)) as run.history,
            computing(stepper.device, "training", run._smaller()),  # the first pass tries the head
            short_attention(model, options.short_attention),
            chunked_loss(model, longest, options.chunked_loss) as chunked,
            Interrupt() as interrupt,
        ):
            if options.packing:
                require_packing(model, train_step, packable(train_rows))
            run.start(chunked, changes)
            run.train(lambda: interrupt.asked)
        metrics = run.finish(time.perf_counter() - begun)
    report(Finished(metrics))
    return metrics


class _Run:
    """One run: the state between two steps, and the order in which it moves on."""

    history: History

    def __init__(
        self,
        stepper: Stepper,
        rows: Sequence[Row],
        held: Sequence[Row],
        options: TrainOptions,
        run_dir: Path,
        report: Callable[[Event], None],
        identity: Mapping[str, object],
        scores: Scores | None,
    ) -> None:
        self.stepper, self.rows, self.held = stepper, rows, held
        self.options, self.run_dir, self.report, self.scores = options, run_dir, report, scores
        self.per_epoch = steps_per_epoch(len(rows), options.batch_size, options.accumulate, fewest(rows))
        self.total = options.total_steps(self.per_epoch)
        self.progress = RunProgress()
        self.best: dict[str, Tensor] = {}
        self.saved: tuple[int, int] | None = None
        self.pace: deque[tuple[float, int]] = deque(maxlen=TIMED)
        self.epoch_plan: tuple[int, list[list[list[int]]]] = (-1, [])
        facts = {k: v for k, v in options.to_document().items() if k not in WITHOUT_INFLUENCE}
        digests = {"rows": rows_digest(rows), "validation_rows": rows_digest(held)}
        self.identity = {**facts, **digests, "parameters": checkpoints.layout(stepper.params), **identity}

    def restore(self, resume: bool) -> tuple[str, ...]:
        """Takes over the folder's checkpoint, if there is one; returns what of the machine changed since."""
        stored = checkpoints.load(self.run_dir)
        world().require_same("the run's folder", "no checkpoint" if stored is None else f"step {stored.progress.step}")
        if stored is None:
            world().alike(self.stepper.tensors().values())
            return ()
        if not resume:
            fix = "--resume to go on with it, or another folder; to begin anew, remove this one"
            where = str(self.run_dir / checkpoints.CHECKPOINT)
            raise HubkitError("HK-EXISTS", "the run's folder holds a checkpoint", where=where, fix=fix)
        checkpoints.require_same_run(stored.identity, self.identity, self.run_dir)
        self.progress = stored.progress
        self.saved = (self.progress.step, self.progress.evaluated)
        self.stepper.adopt(stored.tensors)
        best = {key.removeprefix("best/"): t for key, t in stored.tensors.items() if key.startswith("best/")}
        self.best = {name: tensor.to(self.stepper.device) for name, tensor in best.items()}
        return checkpoints.changes(stored.machine, checkpoints.machine(self.stepper.device))

    def save(self) -> None:
        """Writes the checkpoint of the present state, unless it is on disk already."""
        now = (self.progress.step, self.progress.evaluated)
        if self.saved == now:
            return
        world().once(self._write)
        self.saved = now
        self.report(Saved(self.progress.step))

    def _write(self) -> None:
        tensors = self.stepper.tensors() | {f"best/{name}": value for name, value in self.best.items()}
        machine = checkpoints.machine(self.stepper.device)
        checkpoints.save(self.run_dir, Checkpoint(self.identity, machine, self.progress, tensors))

    def start(self, chunked: bool, changes: tuple[str, ...]) -> None:
        """Reports what will be done."""
        self.report(
            Started(
                step=self.progress.step,
                steps=self.total,
                steps_per_epoch=self.per_epoch,
                rows=len(self.rows),
                validation_rows=len(self.held),
                targets=sum(row.targets() for row in self.rows),
                parameters=sum(param.numel() for param in self.stepper.params.values()),
                device=described(self.stepper.device),
                chunked_loss=chunked,
                machine_changes=changes,
            )
        )

    def train(self, cancelled: Callable[[], bool]) -> None:
        """Steps, evaluations and checkpoints until the run is done, stopped or cancelled (KeyboardInterrupt)."""
        every, progress = self.options.save_every, self.progress
        if self.held and progress.untrained_loss is None and not progress.step:
            progress.untrained_loss = self._measure(cancelled)
            progress.untrained_scores = dict(sorted(self._scored().items()))  # as a checkpoint gives them back
        while True:
            # evaluated before it is saved; only Ctrl-C saves in between, and then the evaluation is made up for
            complete = not self._evaluation_due() or self._evaluate(cancelled)
            finished = complete and (progress.early or progress.step >= self.total)
            if finished or (complete and every and progress.step and progress.step % every == 0):
                self.save()
            if world().any(cancelled()) or not (finished or self._advance(cancelled)):
                self.save()
                self.report(Stopped(progress.step, "interrupt"))
                raise KeyboardInterrupt
            if finished:
                break
        if progress.early:
            self.report(Stopped(progress.step, "patience"))

    def _advance(self, cancelled: Callable[[], bool]) -> bool:
        """One step; False when it was cancelled, which leaves everything as it was."""
        begun, progress, o = time.perf_counter(), self.progress, self.options
        batches = [[self.rows[index] for index in batch] for batch in self._plan(progress.step)]
        rate = o.learning_rate * rate_factor(o.schedule, progress.step, self.total, o.warmup)
        seed = derive_seed(o.seed, "dropout", progress.step)
        try:
            with computing(self.stepper.device, f"step {progress.step + 1}", self._smaller()):
                done = self.stepper.step(batches, rate, cancelled, seed)
        except HubkitError as error:
            rows = ", ".join(row.where for batch in batches[:8] for row in batch[:8])
            error.where = error.where or f"step {progress.step + 1}" + (f" ({rows})" if rows else "")
            raise
        if done is None:
            return False
        loss, norm = done
        tokens = sum(len(row.ids) for batch in batches for row in batch)
        targets = sum(row.targets() for batch in batches for row in batch)
        progress.step += 1
        progress.tokens += tokens
        progress.targets += targets
        progress.recent = [*progress.recent, (loss, targets)][-SMOOTHED:]
        self.pace.append((time.perf_counter() - begun, tokens))
        self._report_step(loss, rate, norm, tokens, targets)
        return True

    def _smaller(self) -> str:
        """What to change where memory is short."""
        able = not (self.options.checkpointing or self.options.compile)
        kept = f"; --resume{' --checkpointing' * able} goes on from step {self.saved[0]}" if self.saved else ""
        return (
            f"{'--checkpointing, ' * able}a smaller --batch-size with more --accumulate, a shorter --max-length,"
            f" a lower rank, a --method that quantizes the base (hubkit methods){kept}"
        )

    def _plan(self, step: int) -> list[list[int]]:
        epoch, position = divmod(step, self.per_epoch)
        if self.epoch_plan[0] != epoch:
            lengths, o = [len(row.ids) for row in self.rows], self.options
            least = fewest(self.rows)
            self.epoch_plan = (epoch, plan_epoch(lengths, o.batch_size, o.accumulate, o.seed, epoch, least))
        return self.epoch_plan[1][position]

    def _report_step(self, loss: float, rate: float, norm: float, tokens: int, targets: int) -> None:
        step = self.progress.step
        entry = {"step": step, "epoch": step / self.per_epoch, "loss": loss, "learning_rate": rate}
        self.history.add({**entry, "gradient_norm": norm, "tokens": tokens, "targets": targets})
        spent = sum(seconds for seconds, _ in self.pace)
        self.report(
            Stepped(
                step=step,
                steps=self.total,
                epoch=step / self.per_epoch,
                loss=loss,
                learning_rate=rate,
                gradient_norm=norm,
                tokens=tokens,
                tokens_per_second=sum(count for _, count in self.pace) / max(spent, 1e-9),
                seconds_left=spent / len(self.pace) * (self.total - step),
                memory=used(self.stepper.device),
            )
        )

    def _evaluation_due(self) -> bool:
        step = self.progress.step
        fresh = self.progress.evaluated != step > 0
        return (
            bool(self.held)
            and fresh
            and (step % (self.options.eval_every or self.per_epoch) == 0 or step >= self.total)
        )

    def _measure(self, cancelled: Callable[[], bool]) -> float | None:
        lengths = [len(row.ids) for row in self.held]
        batches = plan_evaluation(lengths, self.options.batch_size, fewest(self.held))
        with computing(self.stepper.device, "the validation rows", self._smaller()):
            return self.stepper.evaluate([[self.held[index] for index in batch] for batch in batches], cancelled)

    def _scored(self) -> dict[str, float]:
        """Figures of the validation rows beside their loss."""
        with computing(self.stepper.device, "the validation rows", self._smaller()):
            return {} if self.scores is None else self.stepper.scores(self.scores, self.held)

    def _evaluate(self, cancelled: Callable[[], bool]) -> bool:
        """The validation loss and what follows from it; False when it was cancelled."""
        progress, patience = self.progress, self.options.patience
        loss = self._measure(cancelled)
        if loss is None:
            return False
        scores = self._scored()
        better = progress.best_loss is None or loss < progress.best_loss
        progress.evaluated, progress.validation_loss = progress.step, loss
        progress.stale = 0 if better else progress.stale + 1
        if better:
            progress.best_step, progress.best_loss = progress.step, loss
            if patience is not None:
                self.best = {name: param.detach().clone() for name, param in self.stepper.params.items()}
        progress.early = patience is not None and progress.stale >= patience
        self.history.add({"step": progress.step, "validation_loss": loss, "best": better, **scores})
        self.report(Validated(progress.step, loss, better, scores))
        return True

    def finish(self, seconds: float) -> Metrics:
        """Puts the state that is kept into the parameters and writes the result."""
        progress = self.progress
        self.stepper.adopt({f"param/{name}": value for name, value in self.best.items()})
        weights = sum(targets for _, targets in progress.recent)
        metrics = Metrics(
            steps=progress.step,
            epochs=progress.step / self.per_epoch,
            rows=len(self.rows),
            validation_rows=len(self.held),
            tokens=progress.tokens,
            targets=progress.targets,
            loss=sum(loss * targets for loss, targets in progress.recent) / weights,
            validation_loss=progress.best_loss if self.best else progress.validation_loss,
            untrained_loss=progress.untrained_loss,
            best_step=progress.best_step or None,
            kept_step=progress.best_step if self.best else progress.step,
            early=progress.early,
            seconds=seconds,
            untrained_scores=progress.untrained_scores or None,
        )
        world().once(lambda: write_result(self.run_dir, metrics.to_document()))
        return metrics
