"""``hubkit pack``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import dry_run_option, emit, json_option, registry_option
from hubkit.cli.progress import ProgressBar
from hubkit.cli.terms import mismatch_option, offline_option
from hubkit.verbs.pack import Packed, pack


@declare("pack")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--base", metavar="DIR|ORG/NAME", help="The base it belongs to; proven and recorded.")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Write here instead of in place.")
@click.option("--version", metavar="X.Y.Z", help="Version to publish it under.")
@click.option("--name", help="The adapter's name.")
@click.option("--license", metavar="SPDX", help="Licence, e.g. apache-2.0.")
@click.option(
    "--codec",
    metavar="nf4[:DTYPE]",
    help="Another tool trained it on a base in 4 bits, decoded to DTYPE.  [default dtype: its files']",
)
@click.option("--labels", metavar="A,B,C", help="Of another tool's adapter: what its head chooses, in order.")
@click.option("--without-head", is_flag=True, help="Leave out the head that AdapterHub keeps beside an adapter.")
@click.option("--probes", is_flag=True, help="Record what base and adapter say to a few prompts; loads the base.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Prompts for --probes, one a line.  [default: 8 in several languages, and code]",
)
@click.option("--revision", metavar="REV", help="Of the base.")
@click.option("--replace", "replace_out", is_flag=True, help="Replace the adapter that is at --out.")
@mismatch_option
@click.option("--allow-partial", is_flag=True, help="Adopt fewer modules than PEFT's configuration names; recorded.")
@offline_option
@registry_option
@dry_run_option
@json_option
def command(folder: Path, base: str | None, labels: str | None, **options: Any) -> None:
    """Make an adapter folder complete, checked and ready to share.

    A folder that PEFT wrote is adopted: every option and every tensor is accounted for, or refused by name. Packing
    the same content twice gives the same bytes.

    Example:
      hubkit pack ./chat --version 1.0.0 --license apache-2.0
      hubkit pack ./peft-adapter --base ./SmolLM2-135M-Instruct --probes
      hubkit pack ./peft-classifier --base ./all-MiniLM-L6-v2 --labels bad,good
    """
    with ProgressBar(f"pull {base}") as work:
        named = None if labels is None else [one.strip() for one in labels.split(",")]
        result = pack(folder, base=base, labels=named, progress=work.reach, **options)
    emit(result, _render)


def _render(done: Packed) -> str:
    manifest = done.manifest
    verb = "would pack" if done.dry_run else "packed" if done.changed else "unchanged"
    how = ", adopted" if done.adopted else ""
    lines = [f"{verb}  {done.path} ({manifest.name} {manifest.version}, {manifest.method or manifest.kind}{how})"]
    lines += [f"renamed: {line}" for line in done.renamed]
    lines += [f"left out: {path}" for path in done.left_out]
    if done.untold:
        lines.append("the adapter does not say whether it was trained in 4 bits; where it was: --codec nf4[:DTYPE]")
    if done.effect is not None:
        lines.append(f"probes  the adapter moves the answers by {done.effect:.3f} nats")
    if done.unseen:
        lines.append(f"too little for servers in {', '.join(done.unseen)}: --prompts with texts of its own kind")
    if done.stale:
        lines.append("left out: its probes, which were of other tensors; --probes makes new ones")
    lines += [f"override: {name}" for name in manifest.overrides] + [f"note: {line}" for line in done.notes]
    return "\n".join(lines + ([f"digest  {done.digest}"] if done.digest else []))
