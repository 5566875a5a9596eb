"""``hubkit sync``."""

from __future__ import annotations

from pathlib import Path

import click

from hubkit.cli.group import declare
from hubkit.cli.lock import described
from hubkit.cli.output import emit, json_option, registry_option, short, table
from hubkit.cli.progress import ProgressBar
from hubkit.documents.arguments import size
from hubkit.verbs.sync import Synced, sync


@declare("sync")
@click.argument("project", type=click.Path(path_type=Path), default=".")
@click.option("--locked", is_flag=True, help="Refuse where the lock is older than the recipe.")
@click.option("--frozen", is_flag=True, help="Go by the lock alone; do not look at the recipe.")
@click.option("--offline", is_flag=True, help="Fetch nothing: everything has to be here.")
@click.option("--from", "bundle", type=click.Path(path_type=Path), metavar="FILE", help="Read this bundle first.")
@click.option("--allow-base-mismatch", is_flag=True, help="Lock adapters of another base; the lock says so.")
@registry_option
@json_option
def command(
    project: Path,
    locked: bool,
    frozen: bool,
    offline: bool,
    bundle: Path | None,
    allow_base_mismatch: bool,
    registry: str | None,
) -> None:
    """Bring everything that the lock names here, and prove it.

    PROJECT is the folder of hubkit.toml and hubkit.lock. The lock is made anew first where the recipe asks for more;
    then base and adapters are fetched that are not in the store, and every file is compared with its digest. What is
    found by its digest is not fetched, wherever it came from; mirrors are named by $HUBKIT_MIRRORS.

    Example:
      hubkit sync
      hubkit sync --frozen --offline
    """
    with ProgressBar("sync") as work:
        result = sync(
            project,
            locked=locked,
            frozen=frozen,
            bundle=bundle,
            allow_base_mismatch=allow_base_mismatch,
            registry=registry,
            offline=offline,
            progress=work.reach,
        )
    emit(result, _render)


def _render(done: Synced) -> str:
    rows = [(one.name, short(one.digest), size(one.size), _from(one.place, one.fetched)) for one in done.entries]
    how = f"{size(done.fetched)} fetched" if done.fetched else "nothing to fetch"
    lines = [described(done.locked)] if done.locked is not None and done.locked.changed else []
    lines.append(f"{done.path}  synced, {how}")
    lines.append(table(rows, head=("NAME", "DIGEST", "SIZE", "FROM")))
    return "\n".join(lines)


def _from(place: str, fetched: int) -> str:
    return f"{place}, {size(fetched)} fetched" if fetched and place not in ("folder", "store") else place
