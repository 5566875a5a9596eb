"""What a training run may be told: one frozen record, checked as a whole before anything is read or computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypedDict

from hubkit.errors import USAGE, HubkitError, nearest

SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("bfloat16", "float16", "float32")
OPTIMIZERS = ("adamw", "paged_adamw_32bit", "paged_adamw_8bit")
"""By the names that transformers gives them; the paged ones keep their moments where a full GPU can move them out."""

WITHOUT_INFLUENCE = frozenset({"save_every", "checkpointing", "shard"})
"""Options that change cost but no computed bit: a resumed run may change them."""

LATER = frozenset({"compile", "packing", "shard"})


class TrainGiven(TypedDict, total=False):
    """Options of one run as they are given: any of the fields of `TrainOptions`; None is as good as not given."""

    steps: int | None
    epochs: float | None
    batch_size: int | None
    accumulate: int | None
    optimizer: str | None
    learning_rate: float | None
    warmup: float | None
    schedule: str | None
    weight_decay: float | None
    clip: float | None
    max_length: int | None
    truncate: bool | None
    seed: int | None
    dtype: str | None
    checkpointing: bool | None
    compile: bool | None
    packing: bool | None
    shard: bool | None
    validation: float | None
    patience: int | None
    eval_every: int | None
    save_every: int | None
    chunked_loss: bool | None
    short_attention: bool | None


@dataclass(frozen=True)
class TrainOptions:
    """Options of one run.

    Args:
        steps: optimizer steps; None: as many as `epochs` takes.
        epochs: passes over the training rows, may be a fraction; None: 1.0. Not together with `steps`.
        batch_size: rows per forward pass.
        accumulate: forward passes per optimizer step, weighted by their number of targets.
        optimizer: "adamw"; "paged_adamw_32bit" or "paged_adamw_8bit": bitsandbytes', on a CUDA device.
        learning_rate: the highest learning rate (AdamW).
        warmup: share of all steps over which the rate rises from 0, in [0, 1).
        schedule: what follows: "cosine" or "linear" (both towards 0) or "constant".
        weight_decay: AdamW's decoupled decay.
        clip: largest global norm of the gradient; 0 clips nothing.
        max_length: tokens per row; None: the base's context.
        truncate: cut longer rows at their end instead of refusing them.
        seed: of the order of the rows, the validation split and dropout.
        dtype: in which the base is loaded and computes; None: as stored. Adapter masters are float32 always; in
            float16 the loss is scaled, so that small gradients are not lost.
        checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        compile: train through torch.compile: faster steps after a first one that may take a minute.
        packing: put the rows of a forward pass one after the other, without padding; each sees itself alone.
        shard: divide the base among the processes of the run (FSDP2), for one that does not fit on a device.
        validation: share of the rows held out, in [0, 1).
        patience: evaluations without improvement after which training stops and the best state is kept; None: never.
        eval_every: steps between evaluations; None: once per epoch. The last step is always evaluated.
        save_every: steps between checkpoints; 0: only at the end and on Ctrl-C.
        chunked_loss: compute the loss in chunks (see `hubkit.training.loss`) where the model allows it.
        short_attention: on a CPU in half precision, an attention of our own for short rows
            (see `hubkit.training.attention`).

    Raises:
        HubkitError: HK-OPTIONS with every fault at once.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 4
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 2e-4
    warmup: float = 0.03
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    max_length: int | None = None
    truncate: bool = False
    seed: int = 0
    dtype: str | None = None
    checkpointing: bool = False
    compile: bool = False
    packing: bool = False
    shard: bool = False
    validation: float = 0.0
    patience: int | None = None
    eval_every: int | None = None
    save_every: int = 100
    chunked_loss: bool = True
    short_attention: bool = True

    @classmethod
    def of(cls, given: TrainGiven, recipe: Mapping[str, Any]) -> TrainOptions:
        """What was asked, then the recipe of a method, then the defaults.

        Raises:
            HubkitError: ``HK-OPTIONS``.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(given.keys() - known)
        if unknown:
            near = [n for u in unknown for n in nearest(u, known, 1)]
            raise HubkitError(
                "HK-OPTIONS",
                f"unknown training option {', '.join(unknown)}",
                want=", ".join(sorted(known)),
                fix=f"near: {', '.join(near)}" if near else "",
                status=USAGE,
            )
        asked = {key: value for key, value in given.items() if value is not None}
        without = known - {"epochs"} if "steps" in asked else known
        return cls(**{key: value for key, value in recipe.items() if key in without} | asked)

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise HubkitError(
                "HK-OPTIONS",
                "training options are not usable",
                have=faults,
                fix="see hubkit train --help",
                status=USAGE,
            )

    def _faults(self) -> Iterator[str]:
        for name, least in (("batch_size", 1), ("accumulate", 1), ("save_every", 0)):
            if not _is_int(getattr(self, name), least):
                yield f"{name} is {getattr(self, name)!r}, want a whole number >= {least}"
        for name, least in (("steps", 1), ("max_length", 2), ("patience", 1), ("eval_every", 1)):
            if getattr(self, name) is not None and not _is_int(getattr(self, name), least):
                yield f"{name} is {getattr(self, name)!r}, want a whole number >= {least} or nothing"
        if not _is_int(self.seed, 0):
            yield f"seed is {self.seed!r}, want a whole number >= 0"
        if not _is_number(self.learning_rate) or self.learning_rate <= 0:
            yield f"learning_rate is {self.learning_rate!r}, want a number above 0"
        if self.epochs is not None and (not _is_number(self.epochs) or self.epochs <= 0):
            yield f"epochs is {self.epochs!r}, want a number above 0"
        for name in ("weight_decay", "clip"):
            if not _is_number(getattr(self, name)) or getattr(self, name) < 0:
                yield f"{name} is {getattr(self, name)!r}, want a number >= 0"
        for name in ("warmup", "validation"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)!r}, want a share >= 0 and < 1"
        if self.schedule not in SCHEDULES:
            yield f"schedule is {self.schedule!r}, want one of {', '.join(SCHEDULES)}"
        if self.optimizer not in OPTIMIZERS:
            yield f"optimizer is {self.optimizer!r}, want one of {', '.join(OPTIMIZERS)}"
        if self.dtype is not None and self.dtype not in DTYPES:
            yield f"dtype is {self.dtype!r}, want one of {', '.join(DTYPES)}"
        if self.compile and self.checkpointing:
            yield "compile and checkpointing are both given, want one of them"
        if self.compile and self.shard:
            yield "compile and shard are both given, want one of them"
        if self.steps is not None and self.epochs is not None:
            yield "steps and epochs are both given, want one of them"

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run, for an epoch of `steps_per_epoch` steps; at least 1."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((1.0 if self.epochs is None else self.epochs) * steps_per_epoch))

    def to_document(self) -> dict[str, object]:
        """Every option by name, as JSON values: for the manifest and for the identity of a checkpoint.

        What came later (`LATER`) is left out where it is off: what was written before there was one reads the same.
        """
        return {name: value for name, value in asdict(self).items() if name not in LATER or value}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
