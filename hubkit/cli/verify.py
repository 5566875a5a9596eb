"""``hubkit verify``."""

from __future__ import annotations

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option, table
from hubkit.cli.progress import ProgressBar
from hubkit.verbs.verify import Verified, verify


@declare("verify")
@click.argument("reference")
@click.option("--base", metavar="DIR|ORG/NAME", help="The base to compare with. Default: the one the manifest names.")
@click.option("--offline", is_flag=True, help="Use only what was pulled before; ask nobody.")
@click.option("--allow-base-mismatch", is_flag=True, help="Go on with another base; the result says so.")
@registry_option
@json_option
def command(reference: str, base: str | None, offline: bool, allow_base_mismatch: bool, registry: str | None) -> None:
    """Prove that an adapter is whole and belongs to its base.

    REFERENCE is a folder or a repository. All bytes are hashed again; the tensors are held against the method and
    the base's shapes; the base is held against the digests taken when the adapter was made. A base on the Hub is
    compared by its listing, without downloading its weights. Exit status 3 says that something could not be decided.

    Example:
      hubkit verify ./chat --base ./SmolLM2-135M-Instruct
    """
    with ProgressBar(f"pull {reference}") as work:
        result = verify(
            reference,
            base=base,
            registry=registry,
            offline=offline,
            allow_base_mismatch=allow_base_mismatch,
            progress=work.reach,
        )
    emit(result, _render)


def _render(done: Verified) -> str:
    rows = [("ok", check.name, check.detail) for check in done.checks]
    lines = [f"verified {done.reference}", table(rows), f"base    {done.base}", f"digest  {done.digest}"]
    lines += [f"not vouched for: {path}" for path in done.unlisted]
    return "\n".join(lines + [f"override: {name}" for name in done.overrides])
