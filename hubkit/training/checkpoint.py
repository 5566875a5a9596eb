"""The state of a run on disk: one safetensors file, replaced in one rename, so there is never half of one.

Tensors: "param/<name>" (masters), "adamw.<quantity>/<name>" (moments and counts), "kept/<name>" (what is read and not
trained), "best/<name>" (the best state so far), "scale/loss" (see `hubkit.training.scaling`). They are on no device: a
run goes on wherever its parameters are. Everything else is one JSON text in the file's metadata
under "hubkit". Random generators are not stored: every step seeds them from the run's seed and its own number, the
order of the rows comes from seed and epoch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubkit.documents.files import refusing, sync_file, sync_folder
from hubkit.errors import HubkitError
from hubkit.tensors.device import described

CHECKPOINT = "checkpoint.safetensors"
PARTIAL = "checkpoint.partial"
FORMAT = "hubkit/checkpoint/1"


@dataclass
class RunProgress:
    """How far a run has come.

    Args:
        step: optimizer steps done.
        tokens: tokens seen, padding not counted.
        targets: targets seen.
        evaluated: step of the latest evaluation, 0: none.
        untrained_loss: validation loss before the first step.
        untrained_scores: of the validation rows before the first step, where a task has scores.
        validation_loss: of the latest evaluation.
        best_step, best_loss: of the best evaluation.
        stale: evaluations since the best one.
        recent: (loss, targets) of the latest steps, for a smoothed loss.
        early: stopped for lack of improvement.
    """

    step: int = 0
    tokens: int = 0
    targets: int = 0
    evaluated: int = 0
    untrained_loss: float | None = None
    validation_loss: float | None = None
    best_step: int = 0
    best_loss: float | None = None
    stale: int = 0
    recent: list[tuple[float, int]] = field(default_factory=list)
    early: bool = False
    untrained_scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A stored state: what the run was (`identity`), where it computed (`machine`), how far it came, its tensors."""

    identity: Mapping[str, Any]
    machine: Mapping[str, Any]
    progress: RunProgress
    tensors: Mapping[str, Tensor]


def machine(device: torch.device) -> dict[str, object]:
    """What same bytes depend on besides the identity: the torch build, the number of threads, the device."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": described(device)}


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """What of the machine differs from when a checkpoint was made: no reason to refuse, but to say."""
    common = sorted(now.keys() & then.keys())
    return tuple(f"{name}: then {then[name]}, now {now[name]}" for name in common if then[name] != now[name])


def layout(params: Mapping[str, Tensor]) -> str:
    """Names, dtypes and shapes of the trained parameters, as a count and a digest."""
    lines = "".join(f"{name} {param.dtype} {tuple(param.shape)}\n" for name, param in sorted(params.items()))
    return f"{len(params)} tensors, sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def save(run_dir: Path, checkpoint: Checkpoint) -> None:
    """Writes `checkpoint` beside the one there, flushes it to disk, then takes its place.

    Raises:
        HubkitError: HK-DISK when the disk is full, HK-IO; the checkpoint there stays as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    document = {
        "format": FORMAT,
        "identity": dict(checkpoint.identity),
        "machine": dict(checkpoint.machine),
        "progress": {k: v for k, v in asdict(checkpoint.progress).items() if v or k != "untrained_scores"},
    }
    # clones: a shared storage (tied parameters) cannot be stored twice otherwise
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in checkpoint.tensors.items()}
    partial = run_dir / PARTIAL
    try:
        with refusing(partial):
            try:
                save_file(tensors, partial, metadata={"hubkit": json.dumps(document, sort_keys=True)})
            except SafetensorError as error:
                raise _system_error(error, partial) from None
            sync_file(partial)
            os.replace(partial, run_dir / CHECKPOINT)
            sync_folder(run_dir)
    except HubkitError:
        partial.unlink(missing_ok=True)
        raise


def _system_error(error: Exception, path: Path) -> OSError:
    """What the operating system said to safetensors, which passes it on as text: "(os error 28)", "Os { code: 28,"."""
    match = re.search(r"\bos (?:error|\{ code:) (\d+)", str(error), re.IGNORECASE)
    number = int(match[1]) if match else errno.EIO
    return OSError(number, os.strerror(number), str(path))


def load(run_dir: Path) -> Checkpoint | None:
    """The checkpoint of `run_dir`, or None when there is none yet.

    Raises:
        HubkitError: HK-RESUME when the file is no checkpoint of this format.
    """
    from safetensors import SafetensorError, safe_open

    path = run_dir / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {})["hubkit"])
            if document["format"] != FORMAT:
                raise KeyError(document["format"])
            progress = RunProgress(**document["progress"])
            progress.recent = [(float(loss), int(targets)) for loss, targets in progress.recent]
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        return Checkpoint(document["identity"], document["machine"], progress, tensors)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        have = f"{type(error).__name__}: {error}"
        fix = "remove the folder, or train into another one"
        raise HubkitError(
            "HK-RESUME", "the checkpoint cannot be read", where=str(path), want=FORMAT, have=have, fix=fix
        ) from None


def require_same_run(stored: Mapping[str, Any], now: Mapping[str, Any], run_dir: Path) -> None:
    """Refuses to go on with a run of another identity: HK-RESUME with every difference."""
    now = json.loads(json.dumps(now))
    names = [name for name in sorted({*stored, *now}) if stored.get(name) != now.get(name)]
    if names:
        raise HubkitError(
            "HK-RESUME",
            "the checkpoint is of another run",
            where=str(run_dir / CHECKPOINT),
            want="the options, rows, parameters and base it was made with",
            have=[f"{name}: then {stored.get(name)!r}, now {now.get(name)!r}" for name in names],
            fix="use these again, or train into another folder",
        )


def discard(run_dir: Path) -> None:
    """Removes the run's checkpoint and what a kill left of one; its metrics stay."""
    for name in (CHECKPOINT, PARTIAL):
        (run_dir / name).unlink(missing_ok=True)
