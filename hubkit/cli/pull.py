"""``hubkit pull``."""

from __future__ import annotations

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option
from hubkit.cli.progress import ProgressBar
from hubkit.documents.arguments import size
from hubkit.verbs.pull import Pulled, pull


@declare("pull")
@click.argument("reference")
@click.option("--base", is_flag=True, help="Pull a base model: REFERENCE, or the one that adapter was made on.")
@click.option("--offline", is_flag=True, help="Use only what was pulled before; ask nobody.")
@click.option("--allow-moved", is_flag=True, help="Take a tag that meant another commit when it was last pulled.")
@registry_option
@json_option
def command(reference: str, base: bool, offline: bool, allow_moved: bool, registry: str | None) -> None:
    """Fetch an adapter, or a base, into the local store.

    REFERENCE is org/name, org/name@v1.2.0, org/name@^1.2, org/name@<commit>, org/name@rev:folder,
    hf://org/name@rev, https://host/org/name@rev or file:///dir/org/name@rev. A mix comes with its members.

    Every file is checked against its digest before it appears in the store ($HUBKIT_HOME, else ~/.cache/hubkit),
    which is read-only. What is stored already is not downloaded again. Nothing that is pulled is ever executed.

    Example:
      hubkit pull ana/chat@^1.2
      hubkit pull --base HuggingFaceTB/SmolLM2-135M-Instruct
    """
    with ProgressBar(f"pull {reference}") as work:
        options = {"base": base, "offline": offline, "allow_moved": allow_moved}
        result = pull(reference, registry=registry, progress=work.reach, **options)
    emit(result, _render)


def _render(done: Pulled) -> str:
    how = f"{size(done.fetched)} fetched" if done.fetched else "nothing to fetch"
    return "\n".join(
        [
            f"pulled  {done.reference} ({size(done.size)}, {how})",
            *(f"member  {one}" for one in done.members),
            f"path    {done.path}",
            f"commit  {done.commit}",
            f"digest  {done.digest}",
        ]
    )
