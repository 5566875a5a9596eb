"""``hubkit mix``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import TermsCommand, declare
from hubkit.cli.output import dry_run_option, emit, json_option, registry_option
from hubkit.cli.progress import ProgressBar
from hubkit.cli.terms import mismatch_option, mix_option, offline_option, terms_argument
from hubkit.verbs.mix import Mixed, mix


@declare("mix", TermsCommand)
@terms_argument
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Folder of the mix.")
@mix_option
@click.option("--name", help="Its name.  [default: the folder's]")
@click.option("--license", metavar="SPDX", help="Licence, e.g. apache-2.0.")
@click.option("--replace", is_flag=True, help="Replace the mix that is there.")
@mismatch_option
@offline_option
@registry_option
@dry_run_option
@json_option
def command(terms: tuple[str, ...], out: Path, **options: Any) -> None:
    """Write down how several adapters act together, to share and run.

    A mix holds no tensors: a tree of sums and stacks, and of each member its reference and digest. It is used like an
    adapter: verify, push, pull, generate, merge, weighted in another mix. A repository is pinned to its commit; a
    folder is named relative to the mix, which can then not be pushed. sum(...) and stack(...) nest, in quotes.

    Example:
      hubkit mix ana/chat@^1.0 + -0.5*ana/terse --out ./polite
      hubkit mix "stack(ana/domain, 0.5*sum(ana/chat, ana/sql))" --out ./assistant
    """
    with ProgressBar("pull") as work:
        result = mix(terms, out, progress=work.reach, **options)
    emit(result, _render)


def _render(done: Mixed) -> str:
    verb = "would mix" if done.dry_run else "mixed  "
    lines = [f"{verb} {done.path}: {done.tree}"]
    lines += [f"  {name} = {member.reference}" for name, member in done.members.items()]
    lines += [f"override: {name}" for name in done.overrides]
    return "\n".join(lines + ([f"digest  {done.digest}"] if done.digest else []))
