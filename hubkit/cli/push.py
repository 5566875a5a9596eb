"""``hubkit push``."""

from __future__ import annotations

from pathlib import Path

import click

from hubkit.cli.group import declare
from hubkit.cli.output import dry_run_option, emit, json_option, registry_option, short
from hubkit.verbs.push import Pushed, push


@declare("push")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="If the repository is made now, make it private.")
@click.option("--message", "-m", metavar="TEXT", help="Message of the commit. Default: name and version.")
@registry_option
@dry_run_option
@json_option
def command(folder: Path, repo: str, private: bool, message: str | None, registry: str | None, dry_run: bool) -> None:
    """Publish an adapter folder as one commit and one version.

    Everything is checked before the first byte is sent: names, kinds of files, digests, values. The version is the
    manifest's (`hubkit pack --version` sets it) and becomes the tag v<version>; a version that is published with
    other content is refused. Pushing the same bytes again changes nothing.

    The token comes from HF_TOKEN or from `hf auth login`, never from an argument.

    Example:
      hubkit push ./chat ana/chat
    """
    result = push(folder, repo, private=private, message=message, registry=registry, dry_run=dry_run)
    emit(result, _render)


def _render(done: Pushed) -> str:
    lines = []
    if done.unchanged:
        lines.append(f"{done.repo} {done.version} is already published, with the same bytes")
    else:
        verb = "would push" if done.dry_run else "pushed"
        made = f" to a new repository on {done.registry}" if done.created else f" to {done.registry}"
        lines.append(f"{verb} {done.repo} {done.version}{made}")
        lines += [f"  + {path}" for path in done.uploaded] + [f"  - {path}" for path in done.removed]
    lines += [f"  not pushed, because the manifest does not list it: {path}" for path in done.left_out]
    if done.commit:
        lines.append(f"commit  {done.commit}")
    return "\n".join([*lines, f"digest  {done.digest}", *_next(done)])


def _next(done: Pushed) -> list[str]:
    return [] if done.dry_run else [f"use it: hubkit pull {done.repo}@v{done.version}   ({short(done.commit)})"]
