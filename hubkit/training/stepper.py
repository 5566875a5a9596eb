"""One optimizer step and one evaluation: what is computed, and the tensors that are its state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.compat.torch import scale_
from hubkit.errors import HubkitError
from hubkit.training.attention import rows_of
from hubkit.training.loss import counted
from hubkit.training.optimizers import adopt_moment, make_optimizer, moments
from hubkit.training.ranks.gradients import summed
from hubkit.training.ranks.world import world
from hubkit.training.rows.batching import collate, derive_seed, packed
from hubkit.training.rows.encode import Row
from hubkit.training.scaling import LossScale

TrainStep = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
Scores = Callable[[nn.Module, Sequence[Row]], Mapping[str, float]]
"""Figures that a model has on rows, by name."""


class Stepper:
    """Model, parameters and AdamW.

    Args:
        params: trained parameters by name, all on one device.
        clip: largest global norm of the gradient; 0 clips nothing.
        optimizer: one of `hubkit.training.options.OPTIMIZERS`.
        rates: parameter name -> what multiplies the learning rate for it; 1 for those left out.
        packing: the rows of a micro-batch are one row, see `hubkit.training.packing`.
        kept: tensors that `train_step` reads and no step changes: part of the state, so that a resumed run has them.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, nn.Parameter],
        train_step: TrainStep,
        *,
        weight_decay: float,
        clip: float,
        optimizer: str = "adamw",
        packing: bool = False,
        rates: Mapping[str, float] | None = None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.params, self.clip = model, params, clip
        self.packing = packing
        self.kept = kept or {}
        self.train_step = train_step
        self.device = next(iter(params.values())).device
        self.scale = LossScale(model)
        self.optimizer = make_optimizer(optimizer, rate_groups(params, rates or {}), weight_decay, self.device)

    def step(
        self, batches: Sequence[Sequence[Row]], rate: float, cancelled: Callable[[], bool], seed: int | None = None
    ) -> tuple[float, float] | None:
        """One optimizer step over `batches`, each weighted by its share of the targets; processes share them.

        Args:
            rate: the learning rate.
            cancelled: asked before each micro-batch.
            seed: of the step's dropout: of the first micro-batch as it is, of each other one derived, so that it does
                not matter which process has it; a step that is computed again, at a smaller loss scale, drops the same.

        Returns:
            the mean loss over all targets and the gradient's norm before clipping; None when `cancelled` before the
            parameters changed.

        Raises:
            HubkitError: HK-NAN, HK-FROZEN, HK-PLUGIN; parameters and moments are untouched then.
        """
        while True:
            try:
                total = self._backward(batches, cancelled, seed)
                if total is None:
                    return None
                loss, norm = self._measured(total)
                if math.isfinite(loss) and not math.isfinite(norm) and self.scale.overflowed():
                    continue
                self._clip(loss, norm)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * group["factor"]
                self.optimizer.step()
                self.scale.held()
                return loss, norm
            finally:
                self.optimizer.zero_grad()

    def _backward(
        self, batches: Sequence[Sequence[Row]], cancelled: Callable[[], bool], seed: int | None
    ) -> Tensor | None:
        """Leaves the gradients, times the loss scale, in the parameters and returns the loss; a process on its own
        does not wait for the device."""
        counts = [sum(row.targets() for row in batch) for batch in batches]
        losses: dict[int, Tensor] = {}

        def work(number: int | None) -> None:
            batch = batches[number or 0]
            share = 0.0 if number is None else counts[number] / sum(counts)
            if seed is not None:
                torch.manual_seed(derive_seed(seed, "micro-batch", number) if number else seed)
            with self._rows_of(batch):
                loss: Any = self._loss(batch) * share
                (loss if self.scale.factor == 1.0 else loss * self.scale.factor).backward()
            if number is not None:
                losses[number] = loss.detach()

        if not world().rounds(len(batches), cancelled, work):
            return None
        return summed(world(), list(self.params.values()), losses, len(batches), self.device)

    def _rows_of(self, batch: Sequence[Row]) -> AbstractContextManager[None]:
        """What attention may know of a packed batch, in forward and backward."""
        return rows_of([len(row.ids) for row in batch] if self.packing else ())

    def _measured(self, total: Tensor) -> tuple[float, float]:
        """The loss and the norm of the gradient: the one time in a step that the host waits for the device."""
        grads = self._gradients()
        if not grads:
            raise self._frozen()
        norm = torch.nn.utils.get_total_norm(grads)
        loss, scaled = torch.stack([total, norm.to(total)]).tolist()
        return loss, scaled / self.scale.factor

    def _gradients(self) -> list[Tensor]:
        return [param.grad for param in self.params.values() if param.grad is not None]

    def evaluate(self, batches: Sequence[Sequence[Row]], cancelled: Callable[[], bool]) -> float | None:
        """The mean loss over all targets of `batches`, dropout off; None when `cancelled`.

        Raises:
            HubkitError: HK-NAN, HK-PLUGIN.
        """
        counts = [sum(row.targets() for row in batch) for batch in batches]
        found: list[tuple[int, float]] = []

        def work(number: int | None) -> None:
            batch = batches[number or 0]
            with self._rows_of(batch):
                loss = float(self._loss(batch))
            if number is not None:
                found.append((number, loss * counts[number]))

        self.model.eval()
        try:
            with torch.no_grad():
                if not world().rounds(len(batches), cancelled, work):
                    return None
        finally:
            self.model.train()
        total = 0.0
        for value in world().gathered(found, len(batches)):  # not `sum`: it rounds in another way since Python 3.12
            total += value
        if not math.isfinite(total):
            raise _not_finite(f"validation loss {total}")
        return total / sum(counts)

    def scores(self, measure: Scores, rows: Sequence[Row]) -> dict[str, float]:
        """What `measure` says of `rows`, dropout off: the first process for all, unless the base is divided."""
        self.model.eval()
        try:
            if world().sharded:
                return dict(measure(self.model, rows))
            return world().once(lambda: dict(measure(self.model, rows)))
        finally:
            self.model.train()

    def _loss(self, batch: Sequence[Row]) -> Tensor:
        inputs = (packed if self.packing else collate)(batch, self.device)
        with counted(inputs["labels"], sum(row.targets() for row in batch)):
            loss = self.train_step(self.model, inputs)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            have = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise HubkitError("HK-PLUGIN", "train_step returned no loss", want="a tensor without dimensions", have=have)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise self._frozen()
        return loss if loss.dtype == torch.float64 else loss.float()

    def _frozen(self) -> HubkitError:
        what = "the loss does not depend on any trainable parameter"
        have = f"{len(self.params)} trainable parameters out of its reach"
        return HubkitError("HK-FROZEN", what, want="a trainable parameter that the base's output passes", have=have)

    def _clip(self, loss: float, norm: float) -> None:
        """Checks loss and gradient; takes the loss scale out of the latter, and clips it."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _not_finite(f"loss {loss}, gradient norm {norm}")
        factor = (self.clip / norm if self.clip and norm > self.clip else 1.0) / self.scale.factor
        if factor != 1.0:
            scale_(self._gradients(), factor)

    def tensors(self) -> dict[str, Tensor]:
        """The state: "param/<name>", AdamW's "adamw.<quantity>/<name>", "kept/<name>", and "scale/loss"."""
        found: dict[str, Tensor] = {f"kept/{name}": value for name, value in self.kept.items()} | self.scale.state()
        for name, param in self.params.items():
            found[f"param/{name}"] = param
            found |= {f"adamw.{key}/{name}": value for key, value in moments(self.optimizer, param).items()}
        return found

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over a state made by `tensors`; foreign keys are not looked at."""
        with torch.no_grad():
            for key, tensor in tensors.items():
                kind, _, name = key.partition("/")
                if kind == "param":
                    self.params[name].copy_(tensor)
                elif kind == "scale":
                    self.scale.adopt(tensor)
                elif kind == "kept":
                    self.kept[name].copy_(tensor)
                elif kind.startswith("adamw."):
                    adopt_moment(self.optimizer, self.params[name], kind.removeprefix("adamw."), tensor)


def rate_groups(params: Mapping[str, nn.Parameter], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """The groups of an optimizer: parameters of one multiple ("factor") of the learning rate together, smallest first.

    Args:
        rates: parameter name -> multiple; 1 for those left out.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, param in params.items():
        groups.setdefault(float(rates.get(name, 1.0)), []).append(param)
    return [{"params": groups[factor], "factor": factor} for factor in sorted(groups)]


def _not_finite(have: str) -> HubkitError:
    return HubkitError(
        "HK-NAN",
        "training broke down: loss or gradient is not finite",
        want="finite numbers",
        have=have,
        fix="a lower --learning-rate, a longer --warmup, or --dtype float32; the last checkpoint is untouched",
    )
