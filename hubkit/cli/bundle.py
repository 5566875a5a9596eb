"""``hubkit bundle``."""

from __future__ import annotations

from pathlib import Path

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option, table
from hubkit.cli.progress import ProgressBar
from hubkit.documents.arguments import size
from hubkit.verbs.bundle import Bundled, bundle


@declare("bundle")
@click.argument("lock", type=click.Path(path_type=Path), default="hubkit.lock")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The archive.")
@click.option("--base", is_flag=True, help="Put the base in, too.")
@click.option("--replace", is_flag=True, help="Overwrite a file that is there.")
@click.option("--offline", is_flag=True, help="Fetch nothing: everything has to be here.")
@registry_option
@json_option
def command(lock: Path, out: Path, base: bool, replace: bool, offline: bool, registry: str | None) -> None:
    """Write everything that a lock names into one file.

    An uncompressed tar archive: bundle.json with every file's digest, hubkit.lock, and a folder for each adapter and
    mix with its tokenizer files and licence. The same lock gives the same bytes. `hubkit sync --from FILE` reads it
    where there is no network.

    Example:
      hubkit bundle hubkit.lock -o chat.tar
      hubkit bundle -o all.tar --base
    """
    with ProgressBar("bundle") as work:
        result = bundle(
            lock, out=out, base=base, replace=replace, offline=offline, registry=registry, progress=work.reach
        )
    emit(result, _render)


def _render(done: Bundled) -> str:
    rows = [(folder, done.licenses.get(folder, "no licence named")) for folder in done.artifacts]
    return "\n".join(
        [
            f"bundled {done.path} ({size(done.size)})",
            table(rows, head=("FOLDER", "LICENCE")),
            f"lock    {done.lock}",
            f"digest  {done.digest}",
        ]
    )
