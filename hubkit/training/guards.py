"""What a run needs, and what it changes outside itself and puts back: modes, generators, Ctrl-C, the folder."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from hubkit.compat.torch import hook_numbers
from hubkit.documents.drafts import held
from hubkit.documents.files import refusing
from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.device import forked_rng
from hubkit.training.options import TrainOptions
from hubkit.training.ranks.world import world
from hubkit.training.rows.batching import fewest
from hubkit.training.rows.encode import Row, require_targets


def require_usable(
    trained: Mapping[str, nn.Parameter],
    params: Mapping[str, nn.Parameter],
    rows: Sequence[Row],
    held: Sequence[Row],
    options: TrainOptions,
) -> None:
    """Refuses what no run can start from: HK-FROZEN, HK-NO-ROWS, HK-NO-TARGETS, HK-OPTIONS."""
    world().require_work(options.batch_size, options.accumulate, options.shard)
    if not trained:
        have = f"{len(params)} parameters, none of which requires grad"
        raise HubkitError("HK-FROZEN", "there is nothing to train", want="a trainable parameter", have=have)
    if not rows:
        raise HubkitError("HK-NO-ROWS", "there are no rows to train on", want="at least one row")
    require_targets(rows)
    require_targets(held)
    for name, some in (("train", rows), ("validate", held)):
        if 0 < len(some) < fewest(some):
            want = f"at least {fewest(some)} rows: a row is told from the others"
            raise HubkitError("HK-NO-ROWS", f"too few rows to {name} on", want=want, have=str(len(some)))
    if options.patience is not None and not held:
        fix = "--validation 0.1, or no --patience"
        what = "early stopping needs validation rows"
        raise HubkitError("HK-OPTIONS", what, want="validation rows", have="none", fix=fix, status=USAGE)


@contextmanager
def training_state(model: nn.Module, device: torch.device, *, checkpointing: bool) -> Iterator[None]:
    """The model in training mode without a cache, and torch's global generators for this run's use; all restored.

    Raises:
        HubkitError: HK-OPTIONS when `checkpointing` is asked of a model that has none.
    """
    with ExitStack() as stack:
        stack.enter_context(forked_rng(device))
        modes = [(module, module.training) for module in model.modules()]
        stack.callback(_restore_modes, modes)
        for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
            if hasattr(config, "use_cache"):
                stack.callback(setattr, config, "use_cache", config.use_cache)
                config.use_cache = False
        if checkpointing:
            stack.callback(_start_checkpointing(model))
        model.train()
        yield


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module.training = mode


def _start_checkpointing(model: nn.Module) -> Callable[[], object]:
    """Switches checkpointing on, non-reentrant; returns what switches it off again (nothing, if it was on before)."""
    owner, word = _checkpointing_owner(model)
    if getattr(owner, f"is_{word}_checkpointing", False):
        return lambda: None
    table = owner.get_input_embeddings() if hasattr(owner, "get_input_embeddings") else None  # type: ignore[operator]
    before = hook_numbers(table) if table is not None else set()
    getattr(owner, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})

    def stop() -> None:
        getattr(owner, f"{word}_checkpointing_disable")()
        if table is not None and not hook_numbers(table) <= before:
            owner.disable_input_require_grads()  # type: ignore[operator]  # transformers leaves its hook behind

    return stop


def _checkpointing_owner(model: nn.Module) -> tuple[nn.Module, str]:
    """The outermost module that offers checkpointing, and the word for it: transformers renames it in version 6."""
    for module in model.modules():
        for word in ("activation", "gradient"):
            able = getattr(module, "supports_gradient_checkpointing", True)
            if able and hasattr(module, f"{word}_checkpointing_enable"):
                return module, word
    raise HubkitError(
        "HK-OPTIONS",
        "this base has no gradient checkpointing",
        where=type(model).__name__,
        fix="train without --checkpointing, with a smaller --batch-size",
        status=USAGE,
    )


class Interrupt:
    """Ctrl-C, held back until the run is at a place where it can stop: the first one asks, the second one raises.

    Installed in the main thread only, and not where the signal is ignored (nohup).
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        ours = threading.current_thread() is threading.main_thread()
        if ours and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None


@contextmanager
def run_folder(path: Path) -> Iterator[None]:
    """Makes the run's folder and holds it, so that two runs never train in one; of a run's processes the first does.

    Raises:
        HubkitError: HK-BUSY when another process holds it; HK-DISK and HK-IO when it cannot be made, or written to.
    """
    what, fix = "another process trains in this folder", "wait for it, or use another folder"
    with ExitStack() as stack:

        def hold() -> None:
            stack.enter_context(refusing(path))
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(path / ".lock", HubkitError("HK-BUSY", what, where=str(path), fix=fix)))

        world().once(hold)
        yield
