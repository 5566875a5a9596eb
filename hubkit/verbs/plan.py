"""`plan`: how much memory training takes, method by method, before anything is loaded.

Needs a base's ``config.json`` and nothing of its weights: sizes come from a model on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.documents.arguments import checked
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.sources import Source, base_reference, base_source, base_with_record
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from torch import nn

    from hubkit.methods.host import Method
    from hubkit.training.advice.memory import Run
    from hubkit.training.rows.encode import Row

TOKENS = 512
"""Of a row, where neither rows nor --max-length say it."""
ALL = "all"


@dataclass(frozen=True)
class MethodPlan:
    """What one method takes, on one process.

    Args:
        method: its name.
        parameters: numbers that are trained.
        chosen: options that were chosen for the rows: the rank.
        memory: part -> bytes: weights, parameters, gradients, moments, activations, head, gathered, process.
        total: their sum, bytes.
    """

    method: str
    parameters: int
    chosen: Mapping[str, Any]
    memory: Mapping[str, int]
    total: int


@dataclass(frozen=True, repr=False)
class TrainingPlan(Shown):
    """What trainings on one base take.

    Args:
        base: its folder.
        parameters: numbers in the base.
        rows: of one forward pass, on one process.
        tokens: of a row.
        targets: target tokens of the given rows; None without any.
        processes: over which the base is divided (``--shard``).
        dtype, device: in which, and on what kind of device it computes.
        methods: the plans.
        left_out: method -> why it cannot be planned on this base.
        textbook: rule of thumb -> bytes.
    """

    base: Path
    parameters: int
    rows: int
    tokens: int
    targets: int | None
    processes: int
    dtype: str
    device: str
    methods: tuple[MethodPlan, ...]
    left_out: Mapping[str, str]
    textbook: Mapping[str, int]


@checked
def plan(
    base: Path | str,
    data: Path | str | None = None,
    *,
    method: str | None = None,
    config: Mapping[str, Any] | None = None,
    batch_size: int = 4,
    max_length: int | None = None,
    gpus: int | None = None,
    optimizer: str = "adamw",
    checkpointing: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    registry: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> TrainingPlan:
    """Plans the memory of trainings; nothing is loaded, weights need not be there.

    Args:
        base: folder or repository of the base; a folder may hold ``config.json`` alone.
        data: rows, for their lengths and for a rank that holds them; they need the base's tokenizer.
        method: one method, or ``all``; hubkit's default, and those that differ from it in kind, when None.
        config: options of the method.
        batch_size: rows per forward pass, on one process.
        max_length: tokens of a row; by default those of the longest in `data`, else 512.
        gpus: processes over which the base is divided (``--shard``); None: one, that holds it whole.
        optimizer: as in training.
        checkpointing: activations are computed again.
        dtype: in which the base computes; None: as its configuration says.
        device: ``cpu`` or ``cuda``; by default ``cuda`` where `gpus` are given, else what this machine has.

    Raises:
        HubkitError: ``HK-OPTIONS``, ``HK-METHOD-UNKNOWN``, ``HK-CONFIG``, ``HK-BASE-*``, ``HK-TARGET``, ``HK-DATA``
            and what rows are refused for.
    """
    from hubkit.tensors.base.agreement import outline
    from hubkit.training.advice.memory import textbook

    _require(batch_size, max_length, gpus, device)
    names = _names(method)
    if config and len(names) > 1:
        what, fix = "options of a method say nothing of several methods", "--method NAME beside --set"
        raise HubkitError("HK-OPTIONS", what, want="one method", have=", ".join(names), fix=fix, status=USAGE)
    source = config_source(base, revision, Where(registry, offline, progress))
    model = outline(source.path)
    rows = rows_of(data, source.path, max_length, offline) if data is not None else []
    targets = sum(row.targets() for row in rows) if data is not None else None
    longest = max((len(row.ids) for row in rows), default=max_length or TOKENS)
    run = run_of(model, batch_size, longest, gpus, optimizer, checkpointing, dtype, device)
    plans, left = [], {}
    for name in names:
        try:
            plans.append(plan_of(name, config, model, targets, run))
        except HubkitError as error:
            if len(names) == 1:
                raise
            left[name] = f"{error.code}: {error.what}"
    count = sum({id(p): p.numel() for p in model.parameters()}.values())
    kind = str(run.dtype).removeprefix("torch.")
    return TrainingPlan(
        source.path, count, batch_size, longest, targets, run.processes, kind, run.device, tuple(plans), left,
        textbook(count),
    )  # fmt: skip


def config_source(base: Path | str, revision: str | None, where: Where) -> Source:
    """The folder of the base, of which no weight is read: one in a repository is outlined, not pulled.

    Raises:
        HubkitError: ``HK-REFERENCE``, ``HK-BASE-MISSING``, what pulling raises.
    """
    if base_reference(base, revision).path is None:
        return base_with_record(base, revision, where, at_most=0)[0]
    source = base_source(base, revision, where)
    if not (source.path / "config.json").is_file():
        raise HubkitError(
            "HK-BASE-MISSING",
            "the folder does not hold a base model",
            where=str(source.path),
            want="config.json",
            fix="hubkit pull --base ORG/NAME",
        )
    return source


def rows_of(data: Path | str, base: Path, max_length: int | None, offline: bool) -> list[Row]:
    """The rows of `data` as training would see them, longer ones cut.

    Raises:
        HubkitError: what rows are refused for.
    """
    from hubkit.tensors.base.decoder import context_of_folder
    from hubkit.tensors.base.tokenizer import load_tokenizer
    from hubkit.training.options import TrainOptions
    from hubkit.training.rows.data import read_data
    from hubkit.training.rows.preparing import prepared_rows

    records, _ = read_data(data, offline)
    options = TrainOptions(max_length=max_length, truncate=True)
    context = context_of_folder(base)
    return prepared_rows(records, None, load_tokenizer(base), None, options, context=context, front=0, raw=False)[0]


def plan_of(name: str, given: Mapping[str, Any] | None, model: nn.Module, targets: int | None, run: Run) -> MethodPlan:
    """The plan of one method.

    Args:
        given: options of the method.
        targets: target tokens, for which the method's rank is chosen as in training.
    """
    from hubkit.methods.config import config_document, parse_config
    from hubkit.tensors.base.base import Base
    from hubkit.training.advice.memory import planned_memory

    method, settings = settled(name, given, model, targets)
    before = config_document(parse_config(method.info.config, given or {}, "--set"))
    memory, count = planned_memory(method, settings, Base.from_model(model), model, run)
    chosen = {key: value for key, value in config_document(settings).items() if value != before[key]}
    return MethodPlan(name, count, chosen, asdict(memory), memory.total)


def settled(name: str, given: Mapping[str, Any] | None, model: nn.Module, targets: int | None) -> tuple[Method, Any]:
    """A method and its configuration as training would have it; see `plan_of`."""
    from hubkit.methods.config import parse_config
    from hubkit.methods.host import host
    from hubkit.tensors.base.base import Base
    from hubkit.training.advice.fitting import grown_config

    method: Method = host().load(name)
    settings = parse_config(method.info.config, given or {}, "--set")
    if targets is not None:
        settings = grown_config(method, settings, given or {}, Base.from_model(model), targets)
    return method, settings


def _names(method: str | None) -> list[str]:
    """The methods to plan: one, all, or without a word hubkit's default and the first of each other kind."""
    from hubkit.training.advice.choosing import kinds, ordered

    if method is not None and method != ALL:
        return [method]
    return ordered() if method == ALL else list(kinds().values())


def run_of(
    model: nn.Module, rows: int, tokens: int, gpus: int | None, optimizer: str, checkpointing: bool,
    dtype: str | None, device: str | None,
) -> Run:  # fmt: skip
    """What is planned; see `hubkit.training.advice.memory.Run`."""
    import torch

    from hubkit.tensors.device import device_named
    from hubkit.tensors.files.dtypes import dtype_named
    from hubkit.training.advice.memory import Run

    stated = getattr(getattr(model, "config", None), "dtype", None)
    stated = getattr(torch, stated, None) if isinstance(stated, str) else stated
    chosen = dtype_named(dtype) or (stated if isinstance(stated, torch.dtype) else torch.bfloat16)
    kind = device or ("cuda" if gpus else device_named("auto").type)
    return Run(rows, tokens, optimizer, checkpointing, gpus or 1, chosen, kind)


def _require(batch_size: int, max_length: int | None, gpus: int | None, device: str | None) -> None:
    numbers = {"batch_size": (batch_size, 1), "max_length": (max_length, 2), "gpus": (gpus, 1)}
    have = [f"{name} {n}, want at least {least}" for name, (n, least) in numbers.items() if n is not None and n < least]
    have += [f"device {device}, want cpu or cuda"] if device not in (None, "cpu", "cuda") else []
    if have:
        raise HubkitError("HK-OPTIONS", "no training can be planned so", have=have, status=USAGE)
