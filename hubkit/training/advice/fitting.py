"""A method's recipe, fitted: to the base by its width, to the rows by how much they hold.

`fitted_options` needs the base's configuration alone, `fitted_config` the encoded rows. What a user names stays as it
is; what looks wrong there is said as a `Notice`, with figures, and done.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.identity.base_files import local, read_config
from hubkit.errors import Notice
from hubkit.methods.recipes import BaseFacts
from hubkit.training.events import Event, Fitted
from hubkit.training.options import TrainGiven, TrainOptions

if TYPE_CHECKING:
    from hubkit.methods.host import Method
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.base.site import Site
    from hubkit.tensors.parts.part import Part
    from hubkit.training.rows.encode import Row

LARGE_BATCH = 32
"""Rows of a step from which LoRA Without Regret finds low rank to lose, at any rank."""
HIGH_RATE = 3.0
"""Times the recipe's rate above which a given one is doubted."""
FEW_ROWS = 100
"""Below which a prompt with examples is the better first try."""


def facts_of(base: Path, parameters: int = 0) -> BaseFacts:
    """The facts of the base in folder `base` that recipes depend on."""
    return BaseFacts.of(read_config(local(base)), parameters)


def fitted_options(given: TrainGiven, method: Method, config: Any, base: Path) -> TrainOptions:
    """What was asked, then the method's recipe for this base, then the defaults.

    A rate three times that of the recipe, and a large batch of a low-rank method, are a `Notice` each.

    Raises:
        HubkitError: ``HK-OPTIONS``; ``HK-PLUGIN``.
    """
    facts = facts_of(base)
    recipe, fits = method.recipe_for(facts, config)
    options = TrainOptions.of(given, recipe)
    usual, rate = recipe.get("learning_rate"), options.learning_rate
    if fits and isinstance(usual, float) and rate > HIGH_RATE * usual:
        at = f" at {facts.hidden} hidden units" if facts.hidden else ""
        _notice(f"a learning rate of {rate:g} is {rate / usual:.1f} times that of the recipe{at}, {usual:g}")
    batch = options.batch_size * options.accumulate
    if batch >= LARGE_BATCH and "low-rank" in method.info.traits:
        _notice(
            f"{batch} rows a step: from {LARGE_BATCH} on a change of low rank learns less than training all weights, at"
            f" any rank; 8 to 16 and more steps learn more (hubkit methods {method.name} names the source)"
        )
    return options


def fitted_config(
    method: Method,
    config: Any,
    given: Collection[str],
    base: Path,
    rows: Sequence[Row],
    report: Callable[[Event], None] = lambda event: None,
) -> Any:
    """`config`, grown until the adapter has as many parameters as the rows have target tokens, or may grow no more.

    Nothing is loaded: parts are made on the meta device. Fewer rows than `FEW_ROWS` are a `Notice`.

    Args:
        given: names of the options that the user gave: they stay.
        base: its folder.
        rows: those that are trained on.
        report: told what was chosen, once, where the method can grow.

    Raises:
        HubkitError: what the method's `inject` raises.
    """
    from hubkit.tensors.base.base import Base

    if len(rows) < FEW_ROWS:
        _notice(
            f"{len(rows)} rows to learn from: below {FEW_ROWS}, try them as examples in the prompt first, or learn a"
            " prompt (hubkit advise says more)"
        )
    return grown_config(method, config, given, Base.from_folder(base), sum(row.targets() for row in rows), report)


def grown_config(
    method: Method,
    config: Any,
    given: Collection[str],
    base: Base,
    targets: int,
    report: Callable[[Event], None] = lambda event: None,
) -> Any:
    """As `fitted_config`, for a base whose sites are known and a number of target tokens."""
    from hubkit.methods.config import config_document

    asked = frozenset(given)
    parts, sites = _made(method, config, base)
    larger = method.grown(config, asked, sites)
    if larger is None:
        return config
    before, after = config_document(config), config_document(larger)
    names = [name for name, value in after.items() if value != before[name]]
    while larger is not None and parameters_of(parts) < targets:
        config = larger
        parts, sites = _made(method, config, base)
        larger = method.grown(config, asked, sites)
    now = config_document(config)
    report(Fitted({name: now[name] for name in names}, parameters_of(parts), targets))
    return config


def parameters_of(parts: Mapping[str, Part]) -> int:
    """Numbers in parts, those that several share once."""
    return sum({id(p): p.numel() for part in parts.values() for p in part.parameters()}.values())


def parameters_on(method: Method, config: Any, base: Base) -> int:
    """Numbers in an adapter of this configuration on this base."""
    return parameters_of(_made(method, config, base)[0])


def _made(method: Method, config: Any, base: Base) -> tuple[Mapping[str, Part], Mapping[str, Site]]:
    import torch

    with torch.device("meta"):
        parts = method.inject(base, config)
    return parts, {name: base.site(name) for name in parts}


def _notice(text: str) -> None:
    warnings.warn(text, Notice, stacklevel=3)
