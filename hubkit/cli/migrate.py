"""``hubkit migrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import dry_run_option, emit, json_option, registry_option, table
from hubkit.cli.progress import ProgressBar
from hubkit.cli.terms import offline_option
from hubkit.verbs.migrate import Migrated, migrate


@declare("migrate")
@click.argument("adapter", metavar="REFERENCE")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--base", metavar="DIR|ORG/NAME", required=True, help="The base with the names that it has now.")
@click.option(
    "--rename",
    multiple=True,
    metavar="OLD=NEW",
    help="Beginnings of names, before anything is proposed. Several times.",
)
@click.option("--revision", metavar="REV", help="Of the base.")
@click.option("--name", help="The adapter's name.")
@click.option("--replace", is_flag=True, help="Replace the adapter that is at OUT.")
@offline_option
@registry_option
@dry_run_option
@json_option
def command(adapter: str, out: Path, base: str, **options: Any) -> None:
    """Rename an adapter's modules to those that its base has now, and prove it.

    For adapters whose tensors find no home: modules are called otherwise between releases of a library, and between
    libraries. Each kind of module gets the one place that can be it, held against shapes, against the base's digests
    where the adapter lists those of its own, and against its probes where it has some. What is not certain is refused.

    Example:
      hubkit migrate ./chat ./chat-renamed --base ./SmolLM2-135M-Instruct
      hubkit migrate ./chat ./chat-renamed --base ./SmolLM2-135M-Instruct --rename language_model.model=model
    """
    with ProgressBar(f"pull {adapter}") as work:
        result = migrate(adapter, out, base=base, progress=work.reach, **options)
    emit(result, _render)


def _render(done: Migrated) -> str:
    verb = "would migrate" if done.dry_run else "migrated"
    rows = [(one.old, "->", one.new, f"{one.modules} modules: {one.why}") for one in done.renamed]
    proven = f"proven by {', '.join(done.proven)}"
    lines = [f"{verb} {done.path}, {proven}", table(rows)]
    return "\n".join(lines + ([f"digest  {done.digest}"] if done.digest else []))
