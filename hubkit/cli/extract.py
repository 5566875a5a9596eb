"""``hubkit extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option
from hubkit.cli.progress import ProgressBar
from hubkit.cli.terms import offline_option
from hubkit.verbs.extract import Extraction, extract

LISTED = 10


@declare("extract")
@click.option("--base", "-b", required=True, metavar="DIR|ORG/NAME", help="The checkpoint it began from.")
@click.option("--tuned", "-t", required=True, metavar="DIR|ORG/NAME", help="The one that came of it.")
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="The adapter's folder.")
@click.option("--rank", type=int, help="Largest rank of the factors.")
@click.option("--energy", type=float, help="Part of the energy above the rounding floor that every layer keeps.")
@click.option("--exact", is_flag=True, help="Hold every changed module whole: merged, it is the tuned one bit for bit.")
@click.option("--partial", is_flag=True, help="Leave out what it cannot hold; without --exact, all but linear layers.")
@click.option("--dtype", help="Of the factors.  [default: float32]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn at random.")
@click.option("--name", help="Its name.  [default: the folder's]")
@click.option("--license", metavar="SPDX", help="Licence, e.g. apache-2.0.")
@click.option("--revision", metavar="REV", help="Of the base.")
@click.option("--replace", is_flag=True, help="Replace the adapter that is there.")
@offline_option
@registry_option
@json_option
def command(base: str, tuned: str, out: Path, **options: Any) -> None:
    """Make an adapter of what a checkpoint changed in its base.

    The difference of each linear layer becomes low-rank factors; norms and embeddings that changed are held whole
    beside them. What is no more than rounding is not kept, and energy is of what lies above it: a merged adapter comes
    back with its own rank. What an adapter cannot hold is refused, or left out by name (--partial).

    Example:
      hubkit extract --base ./SmolLM2-135M-Instruct --tuned ./merged --rank 16 --out ./taken
    """
    with ProgressBar("pull") as work:
        result = extract(base, tuned, out, progress=work.reach, **options)
    emit(result, _render)


def _render(done: Extraction) -> str:
    kept = sorted((site for site in done.sites if site.rank), key=lambda site: site.energy)
    form = [f"rank {done.rank} at {len(kept)} layers"] if kept else []
    form += [f"{len(done.whole)} modules whole"] if done.whole else []
    lines = [f"extracted  {done.path} ({', '.join(form)})"]
    more = [site for site in kept if site.more]
    if kept:
        least = f"{kept[0].energy:.4f} to {kept[-1].energy:.4f} of it is kept" if more else "all of it is kept"
        lines.append(f"energy  above the rounding floor: {least}")
        lines += [f"  {one.site}  rank {one.rank}  energy {one.energy:.4f}" for one in more[:LISTED]]
        lines += [f"  {len(more)} of {len(done.sites)} layers changed by more than their factors hold"] if more else []
    lines += [f"left out: {line}" for line in done.left_out[:LISTED]]
    rest = len(done.left_out) - LISTED
    lines += [f"left out: {rest} more, see --json"] if rest > 0 else []
    lines += [f"note: {line}" for line in done.notes]
    lines += [f"override: {name}" for name in done.overrides]
    return "\n".join([*lines, f"digest  {done.digest}"])
