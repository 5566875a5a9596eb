"""``hubkit compose``."""

from __future__ import annotations

from pathlib import Path

import click

from hubkit.cli.group import TermsCommand, declare
from hubkit.cli.output import emit, json_option, registry_option
from hubkit.cli.progress import Progress
from hubkit.cli.terms import mismatch_option, offline_option, terms_argument
from hubkit.verbs.compose import Composed, compose


@declare("compose", TermsCommand)
@terms_argument
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="The new adapter's folder.")
@click.option("--name", help="Its name.  [default: the folder's]")
@click.option("--license", metavar="SPDX", help="Licence, e.g. apache-2.0.")
@click.option("--replace", is_flag=True, help="Replace the adapter that is there.")
@mismatch_option
@offline_option
@registry_option
@json_option
def command(
    terms: tuple[str, ...],
    out: Path,
    name: str | None,
    license: str | None,
    replace: bool,
    allow_base_mismatch: bool,
    offline: bool,
    registry: str | None,
) -> None:
    """Write several adapters as one: their exact weighted sum.

    Any ranks, scales, signs and patterns; the change of each weight is the sum of the members' changes, in fp32. The
    result is an ordinary adapter; its manifest names its parents.

    Example:
      hubkit compose 1.0*./chat + -0.5*./terse --out ./mixed
    """
    with Progress("pull") as work:
        result = compose(
            terms,
            out,
            name=name,
            license=license,
            registry=registry,
            offline=offline,
            allow_base_mismatch=allow_base_mismatch,
            replace=replace,
            progress=work.reach,
        )
    emit(result, _render)


def _render(done: Composed) -> str:
    lines = [f"composed {done.path} (rank {done.rank} at {done.sites} sites)"]
    lines += [f"  {parent.weight:+g} * {parent.reference}" for parent in done.parents]
    lines += [f"override: {name}" for name in done.overrides]
    return "\n".join([*lines, f"digest  {done.digest}"])
