"""``hubkit push``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import dry_run_option, emit, json_option, registry_option, short
from hubkit.verbs.push import Pushed, push


@declare("push")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="If the repository is made now, make it private.")
@click.option("--message", "-m", metavar="TEXT", help="Message of the commit. Default: name and version.")
@click.option("--require", metavar="GATES", help='Publish only if, e.g. "heldout.loss<1.3, forgetting<0.05".')
@click.option(
    "--evaluation", type=click.Path(path_type=Path), help="Figures that `hubkit eval --out` wrote, not the manifest's."
)
@registry_option
@dry_run_option
@json_option
def command(folder: Path, repo: str, **options: Any) -> None:
    """Publish an adapter folder as one commit and one version.

    A folder with a whole model (config.json, safetensors, tokenizer) is published as a base, which has no version:
    `hubkit tag` gives it one. So a directory as registry holds all that its adapters need.

    Everything is checked before the first byte is sent: names, kinds of files, digests, values. The version is the
    manifest's (`hubkit pack --version` sets it) and becomes the tag v<version>; a version that is published with
    other content is refused. Pushing the same bytes again changes nothing.

    The token comes from HF_TOKEN or from `hf auth login`, never from an argument.

    Example:
      hubkit push ./chat ana/chat
      hubkit push ./SmolLM2-135M-Instruct HuggingFaceTB/SmolLM2-135M-Instruct --registry ./registry
    """
    result = push(folder, repo, **options)
    emit(result, _render)


def _render(done: Pushed) -> str:
    lines, name = [], done.repo if done.version is None else f"{done.repo} {done.version}"
    if done.unchanged:
        lines.append(f"{name} is already published, with the same bytes")
    else:
        verb = "would push" if done.dry_run else "pushed"
        made = f" to a new repository on {done.registry}" if done.created else f" to {done.registry}"
        lines.append(f"{verb} {name}{made}")
        lines += [f"  + {path}" for path in done.uploaded] + [f"  - {path}" for path in done.removed]
    why = "no base consists of it" if done.version is None else "the manifest does not list it"
    lines += [f"  not pushed, because {why}: {path}" for path in done.left_out]
    lines += [f"note: {line}" for line in done.notes]
    if done.commit:
        lines.append(f"commit  {done.commit}")
    return "\n".join([*lines, f"digest  {done.digest}", *_next(done)])


def _next(done: Pushed) -> list[str]:
    if done.dry_run:
        return []
    what = f"--base {done.repo}" if done.version is None else f"{done.repo}@v{done.version}"
    return [f"use it: hubkit pull {what}   ({short(done.commit)})"]
