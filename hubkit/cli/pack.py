"""``hubkit pack``."""

from __future__ import annotations

from pathlib import Path

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
@click.option("--revision", metavar="REV", help="Of the base.")
@click.option("--replace", "replace_out", is_flag=True, help="Replace the adapter that is at --out.")
@mismatch_option
@click.option("--allow-partial", is_flag=True, help="Adopt fewer modules than PEFT's configuration names; recorded.")
@offline_option
@registry_option
@dry_run_option
@json_option
def command(
    folder: Path,
    base: str | None,
    out: Path | None,
    version: str | None,
    name: str | None,
    license: str | None,
    revision: str | None,
    replace_out: bool,
    allow_base_mismatch: bool,
    allow_partial: bool,
    offline: bool,
    registry: str | None,
    dry_run: bool,
) -> None:
    """Make an adapter folder complete, checked and ready to share.

    A folder that PEFT wrote is adopted: every option and every tensor is accounted for, or refused by name. Packing
    the same content twice gives the same bytes.

    Example:
      hubkit pack ./chat --version 1.0.0 --license apache-2.0
      hubkit pack ./peft-adapter --base ./SmolLM2-135M-Instruct
    """
    with ProgressBar(f"pull {base}") as work:
        result = pack(
            folder,
            base=base,
            out=out,
            version=version,
            name=name,
            license=license,
            revision=revision,
            registry=registry,
            offline=offline,
            allow_base_mismatch=allow_base_mismatch,
            allow_partial=allow_partial,
            replace_out=replace_out,
            dry_run=dry_run,
            progress=work.reach,
        )
    emit(result, _render)


def _render(done: Packed) -> str:
    manifest = done.manifest
    verb = "would pack" if done.dry_run else "packed" if done.changed else "unchanged"
    how = ", adopted" if done.adopted else ""
    lines = [f"{verb}  {done.path} ({manifest.name} {manifest.version}, {manifest.method or manifest.kind}{how})"]
    lines += [f"renamed: {line}" for line in done.renamed]
    lines += [f"left out: {path}" for path in done.left_out]
    lines += [f"override: {name}" for name in manifest.overrides]
    return "\n".join(lines + ([f"digest  {done.digest}"] if done.digest else []))
