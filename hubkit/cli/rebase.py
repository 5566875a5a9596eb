"""``hubkit rebase``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option
from hubkit.cli.progress import ProgressBar
from hubkit.cli.terms import offline_option
from hubkit.verbs.rebase import MAX_DRIFT, Rebased, rebase

LISTED = 10


@declare("rebase")
@click.argument("adapter")
@click.option("--onto", required=True, metavar="DIR|ORG/NAME", help="The new base.")
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Folder of the carried adapter.")
@click.option("--base", "-b", metavar="DIR|ORG/NAME", help="The old base.  [default: the one its manifest names]")
@click.option("--revision", metavar="REV", help="Of the new base.")
@click.option("--max-drift", type=float, default=MAX_DRIFT, show_default=True, help="Largest KL, nats a token.")
@click.option("--prompts", type=click.Path(path_type=Path), metavar="FILE", help="What to measure it on, one a line.")
@click.option("--data", type=click.Path(path_type=Path), metavar="FILE", help="Rows whose loss is measured, too.")
@click.option("--unmeasured", is_flag=True, help="Go on without the old base; recorded.")
@click.option("--name", help="Its name.  [default: the folder's]")
@click.option("--replace", is_flag=True, help="Replace the adapter that is there.")
@offline_option
@registry_option
@json_option
def command(adapter: str, onto: str, out: Path, **options: Any) -> None:
    """Carry an adapter over to another state of its base, and measure its drift.

    For a new revision, another dtype or quantization, continued pretraining: a base with the same modules. What changed
    between the two is listed by module; how far the adapted model now is from what it was, and how far the bare bases
    are, is measured and recorded. Above --max-drift nothing is written.

    Example:
      hubkit rebase ./chat --onto ./base-v2 --base ./base-v1 --out ./chat-v2
    """
    with ProgressBar("pull") as work:
        result = rebase(adapter, onto, out, progress=work.reach, **options)
    emit(result, _render)


def _render(done: Rebased) -> str:
    adapted = sum(one.adapted for one in done.changed)
    lines = [f"rebased  {done.path} ({len(done.changed)} modules of the base changed, {adapted} of them adapted)"]
    for one in done.changed[:LISTED]:
        size = "by an unknown amount" if one.change is None else f"{one.change:.2%}"
        lines.append(f"  {one.site}  {size}{'  adapted' if one.adapted else ''}")
    rest = len(done.changed) - LISTED
    lines += [f"  and {rest} more, see --json"] if rest > 0 else []
    lines += [f"  {name}: at no module" for name in done.others]
    lines += [f"carried  {name}: held whole, the same change of the new values" for name in done.carried]
    for what, found in (("adapted", done.drift), ("bare", done.base_drift)):
        if found is not None:
            lines.append(f"drift  {what}: {found.kl:.4f} nats a token, {found.top1:.1%} equal first choices")
    if done.loss is not None:
        lines.append(f"held-out loss  {done.loss[0]:.4f}, now {done.loss[1]:.4f}")
    lines += [f"note: {line}" for line in done.notes]
    lines += [f"override: {name}" for name in done.overrides]
    return "\n".join([*lines, f"digest  {done.digest}"])
