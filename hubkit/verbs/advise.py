"""`advise`: which method and options fit a base and its rows, what that takes, and whether to train at all."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.documents.arguments import checked
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where
from hubkit.verbs.plan import MethodPlan, config_source, plan_of, rows_of, run_of, settled

if TYPE_CHECKING:
    from torch import nn

    from hubkit.training.advice.choosing import Choice, Reason
    from hubkit.training.advice.memory import Run
    from hubkit.training.advice.timing import Took
    from hubkit.training.rows.encode import Row

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
VALIDATION = 0.05
"""Share of the rows that the command holds out."""


@dataclass(frozen=True, repr=False)
class Advised(Shown):
    """Advice for one base and its rows.

    Args:
        fine_tune: False where a prompt with examples is the better first try.
        method: what to train.
        options: option of the method that training will choose -> value, and the learning rate.
        command: the `hubkit train` command, as it can be run.
        memory: bytes that one process takes.
        limit: bytes that it has.
        rows, targets, longest: of the data: how many, target tokens of all, tokens of the longest.
        reasons: why, line by line, with sources.
        operations: of the products of matrices in the whole training, two for each multiply and add.
        seconds: how long it takes at least and at most; None for another machine than this one, and for layers that
            are too large to be tried here.
        speed: operations per second on this machine, from layers that were tried; None as above.
    """

    fine_tune: bool
    method: str
    options: dict[str, object]
    command: str
    memory: int
    limit: int
    rows: int
    targets: int
    longest: int
    reasons: tuple[Reason, ...]
    operations: float
    seconds: tuple[float, float] | None
    speed: float | None


@checked
def advise(
    base: Path | str,
    data: Path | str,
    *,
    memory: str | None = None,
    gpus: int | None = None,
    revision: str | None = None,
    registry: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Advised:
    """Says how to train a base on rows, from sizes and counts: no weight is read, nothing is trained.

    How long it takes follows from two layers of the base's width, which are trained on this machine for a second.

    Args:
        base: folder or repository of the base.
        data: rows.
        memory: of one GPU, ``24GB`` or ``24GiB``; by default that of this machine's device, or its main memory.
        gpus: how many there are.

    Raises:
        HubkitError: ``HK-OPTIONS`` for a memory or number of GPUs that cannot be read; ``HK-MEMORY`` where nothing
            fits; ``HK-BASE-*``, ``HK-DATA`` and what rows are refused for.
    """
    from hubkit.tensors.base.agreement import outline
    from hubkit.training.advice.choosing import candidates, chosen, kinds, reasons
    from hubkit.training.advice.fitting import FEW_ROWS
    from hubkit.training.advice.timing import runs_here

    given = _bytes(memory) if memory is not None else None
    source = config_source(base, revision, Where(registry, offline, progress))
    rows = rows_of(data, source.path, None, offline)
    longest, targets = max(len(row.ids) for row in rows), sum(row.targets() for row in rows)
    model = outline(source.path)
    kind = "cuda" if given is not None or gpus else None
    run = run_of(model, 1, longest, gpus, "adamw", False, None, kind)
    limit = given if given is not None else _own_memory(run.device)
    found, plans = kinds(), dict[tuple[str, int, bool, bool], MethodPlan]()

    def total(method: str, size: int, checkpointing: bool, shard: bool) -> int:
        key = (method, size, checkpointing, shard)
        if key not in plans:
            one = replace(run, rows=size, checkpointing=checkpointing, processes=run.processes if shard else 1)
            plans[key] = plan_of(method, None, model, targets, one)
        return plans[key].total

    tried = candidates(len(rows), targets, _most(found, model), found)
    way, smallest = chosen(tried, total, limit, run.processes)
    if way is None:
        _, other = chosen(list(found.values()), total, 0, run.processes)
        raise _falls_short(min(smallest, other, key=lambda one: one.total), model, targets, run, limit, source.path)
    plan = plans[way.method, way.batch_size, way.checkpointing, way.shard]
    here = memory is None and runs_here(run.device, run.processes)
    work = _work(way, model, rows, run, source.path, here)
    return Advised(
        fine_tune=len(rows) >= FEW_ROWS,
        method=way.method,
        options=_options(way.method, source.path, plan),
        command=_command(base, data, way, gpus, len(rows), revision),
        memory=way.total,
        limit=limit,
        rows=len(rows),
        targets=targets,
        longest=longest,
        reasons=tuple(reasons(len(rows), targets, way, found, _gb(limit))),
        operations=work.operations,
        seconds=(work.least, work.most) if work.speed else None,
        speed=work.speed or None,
    )


def _falls_short(smallest: Choice, model: nn.Module, targets: int, run: Run, limit: int, base: Path) -> HubkitError:
    """The refusal where nothing fits: the smallest way, and what would make it fit."""
    from hubkit.methods.host import host
    from hubkit.training.advice.falling_short import changes, described

    def needs(way: Choice, tokens: int, processes: int) -> int:
        shared = way.shard or processes > run.processes
        one = replace(run, rows=way.batch_size, checkpointing=way.checkpointing, tokens=tokens)
        return plan_of(way.method, None, model, targets, replace(one, processes=processes if shared else 1)).total

    divides = run.device != "cpu" and "prompt" not in host().load(smallest.method).info.traits
    return HubkitError(
        "HK-MEMORY",
        "no method fits into the memory",
        where=str(base),
        want=f"{_gb(smallest.total)}, the least there is: {described(smallest)}",
        have=_gb(limit),
        fix=", or ".join(changes(smallest, needs, limit, run.tokens, run.processes, divides)),
    )


def _work(way: Choice, model: nn.Module, rows: list[Row], run: Run, base: Path, here: bool) -> Took:
    """What the training computes, and how long that takes here."""
    import torch

    from hubkit.tensors.base.base import Base
    from hubkit.training.advice.activations import Pass
    from hubkit.training.advice.fitting import facts_of
    from hubkit.training.advice.timing import Training, epoch_of, took

    method, settings = settled(way.method, None, model, sum(row.targets() for row in rows))
    recipe, _ = method.recipe_for(facts_of(base), settings)
    share = VALIDATION if len(rows) * VALIDATION >= 1 else 0.0
    one = Pass(way.batch_size, run.tokens, run.dtype, run.device)
    training = Training(one, epoch_of(rows, way.batch_size, way.accumulate, share), way.checkpointing, run.processes)
    return took(
        method, settings, Base.from_model(model), model, training, torch.device(run.device) if here else None,
        float(recipe.get("epochs") or 1.0),
    )  # fmt: skip


def _options(method: str, base: Path, plan: MethodPlan) -> dict[str, object]:
    from hubkit.methods.host import host
    from hubkit.training.advice.fitting import facts_of

    loaded = host().load(method)
    recipe, _ = loaded.recipe_for(facts_of(base), loaded.info.config())
    return {**plan.chosen, "learning_rate": recipe.get("learning_rate"), "parameters": plan.parameters}


def _most(found: dict[tuple[str, ...], str], model: nn.Module) -> int:
    """Numbers in the low-rank adapter at its largest."""
    from hubkit.methods.host import host
    from hubkit.tensors.base.base import Base
    from hubkit.training.advice.fitting import grown_config, parameters_on

    if ("low-rank",) not in found:
        return 0
    method, base = host().load(found["low-rank",]), Base.from_model(model)
    return parameters_on(method, grown_config(method, method.info.config(), (), base, 1 << 62), base)


def _command(base: Path | str, data: Path | str, way: Choice, gpus: int | None, rows: int, revision: str | None) -> str:
    out = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{Path(data).stem}-{way.method}").lstrip("._-")  # the adapter's name, too
    words = ["torchrun", "--nproc-per-node", str(gpus), "-m"] if gpus and gpus > 1 else []
    words += ["hubkit", "train", str(base), str(data), "--out", out, "--method", way.method]
    words += ["--batch-size", str(way.batch_size), "--accumulate", str(way.accumulate)]
    words += ["--shard"] if way.shard else []
    words += ["--checkpointing"] if way.checkpointing else []
    words += ["--validation", str(VALIDATION)] if rows * VALIDATION >= 1 else []
    words += ["--revision", revision] if revision else []
    return shlex.join(words)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise HubkitError(
            "HK-OPTIONS", "the memory cannot be read", where="--memory", want="24GB or 24GiB", have=text, status=USAGE
        )
    return size


def _own_memory(device: str) -> int:
    """Bytes of this machine's GPU, or of its main memory."""
    import os

    import torch

    if device == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
