"""``hubkit compose``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import TermsCommand, declare
from hubkit.cli.output import emit, json_option, registry_option
from hubkit.cli.progress import ProgressBar
from hubkit.cli.terms import mismatch_option, offline_option, terms_argument
from hubkit.verbs.compose import Composed, compose


@declare("compose", TermsCommand)
@terms_argument
@click.option("--out", "-o", type=click.Path(path_type=Path), help="The new adapter's folder.")
@click.option("--method", default="sum", show_default=True, help="sum, average, ties, dare, dare-ties or magnitude.")
@click.option("--density", type=float, help="Part of the entries that the last four keep, e.g. 0.2.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn at random.")
@click.option("--rank", type=int, help="Write the best approximation of this rank.")
@click.option(
    "--energy", type=float, help="Take the smallest rank with which every site keeps this part of its energy."
)
@click.option(
    "--report", type=click.Path(path_type=Path), metavar="FILE.html", help="How they get in each other's way."
)
@click.option("--base", "-b", metavar="DIR|ORG/NAME", help="The base, where a method reads its weights.")
@click.option("--revision", metavar="REV", help="Of the base.")
@click.option("--name", help="Its name.  [default: the folder's]")
@click.option("--license", metavar="SPDX", help="Licence, e.g. apache-2.0.")
@click.option("--replace", is_flag=True, help="Replace the adapter and the report that are there.")
@mismatch_option
@offline_option
@registry_option
@json_option
def command(terms: tuple[str, ...], out: Path | None, **options: Any) -> None:
    """Write several adapters as one: their exact weighted sum.

    Any methods, ranks, scales, signs and patterns; the change of each weight is the sum of the members' changes, in
    fp32. Other methods prune and join the changes entry by entry; --rank and --energy write the best smaller
    approximation. A change that is not low-rank makes the sum one of whole tensors, unless a rank is given; one that
    depends on the base's weights needs --base. The result is an ordinary adapter; its manifest names its parents and
    how they became one.

    --report writes a page that shows, site by site, where the members read and write the same directions and where
    their signs differ, and whether a sum, TIES or keeping them separate is advised. It needs no --out.

    Example:
      hubkit compose 1.0*./chat + -0.5*./terse --out ./mixed
      hubkit compose ./chat + ./sql --method ties --density 0.2 --rank 16 --report ./clash.html --out ./both
    """
    with ProgressBar("pull") as work:
        result = compose(terms, out, progress=work.reach, **options)
    emit(result, _render)


def _render(done: Composed) -> str:
    lines: list[str] = []
    if done.path is not None:
        form = f"rank {done.rank}" if done.rank else "whole tensors"
        lines.append(f"composed {done.path} ({form} at {done.sites} sites)")
    lines += [f"  {parent.weight:+g} * {parent.reference}" for parent in done.parents]
    if "least_energy" in done.composition:
        kept, least = done.composition["energy"], done.composition["least_energy"]
        lines.append(f"energy  {kept:.4f} kept ({least:.4f} at {done.composition['least_energy_site']})")
    lines += [f"override: {name}" for name in done.overrides]
    if done.interference is not None:
        lines += [f"report  {done.report}", f"advice  {done.interference.advice}: {done.interference.reason}"]
    return "\n".join(lines + ([f"digest  {done.digest}"] if done.digest else []))
