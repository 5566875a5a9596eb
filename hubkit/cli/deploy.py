"""``hubkit deploy``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import dry_run_option, emit, json_option, registry_option
from hubkit.cli.progress import ProgressBar
from hubkit.documents.arguments import size
from hubkit.verbs.deploy import Deployed, deploy


@declare("deploy")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--engine", metavar="NAME", help="What runs it: peft, merged, vllm, sglang, llamacpp, mlx, ollama, ...")
@click.option("--lock", type=click.Path(path_type=Path), default="hubkit.lock", show_default=True)
@click.option("--check", is_flag=True, help="Write nothing: refuse when one byte in DIR is not what was written.")
@click.option("--digest", metavar="SHA256", help="With --check and --rollback: the deployment of this digest.")
@click.option("--diff", metavar="OLD", type=click.Path(path_type=Path), help="Write nothing: what DIR runs otherwise.")
@click.option("--rollback", is_flag=True, help="Put back what DIR held before, and keep what it holds now.")
@click.option("--replace", is_flag=True, help="Exchange a deployment that is there; it is kept in DIR.earlier.")
@click.option("--keep", metavar="N", type=click.IntRange(0), default=1, show_default=True, help="Earlier ones to keep.")
@click.option("--offline", is_flag=True, help="Use only what was pulled before; ask nobody.")
@registry_option
@dry_run_option
@json_option
def command(folder: Path, **options: Any) -> None:
    """Make a lock runnable for one engine, check that it stayed so, compare, go back.

    DIR gets everything: the base and adapters exactly as locked, what that engine reads, deployment.json with the
    digest of every file, and deployment.sha256 with the digest of that. An engine that cannot run the lock exactly
    refuses, with the reasons. Its settings stand in the recipe, [targets.NAME].

    Example:
      hubkit deploy ./deployment --engine peft
      hubkit deploy ./deployment --check
      hubkit deploy ./deployment --engine peft --replace
      hubkit deploy ./deployment --rollback
    """
    with ProgressBar("pull") as work:
        result = deploy(folder, progress=work.reach, **options)
    emit(result, _render)


def _render(done: Deployed) -> str:
    if done.dry_run:
        return "\n".join([f"{done.engine} can run this lock; {done.path} would be written", *done.said])
    state = "is what was deployed" if done.checked else "written"
    lines = [f"{done.path} {state}: engine {done.engine}, {done.files} files, {size(done.size)}"]
    lines += [f"note    {line}" for line in done.said]
    if done.unproven:
        lines.append("note    unproven: nobody has run hubkit's deployments for this engine; try it first")
    if done.changed is not None:
        lines += [f"changed {line}" for line in done.changed or ("nothing",)]
    asks = done.command[-1:] == ("run.py",)
    return "\n".join(
        [
            *lines,
            f"digest  {done.digest}",
            f"lock    {done.lock}",
            f"run     cd {shlex.quote(str(done.path))} && {shlex.join(done.command)}{' PROMPT' if asks else ''}",
        ]
    )
