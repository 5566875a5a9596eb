"""``hubkit deploy``."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from hubkit.cli.group import declare
from hubkit.cli.output import dry_run_option, emit, json_option, registry_option, size
from hubkit.cli.progress import ProgressBar
from hubkit.verbs.deploy import Deployed, deploy


@declare("deploy")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--engine", metavar="NAME", help="What runs it: peft (adapters beside their base) or merged.")
@click.option("--lock", "lock_path", type=click.Path(path_type=Path), default="hubkit.lock", show_default=True)
@click.option("--check", is_flag=True, help="Write nothing: refuse when one byte in DIR is not what was written.")
@click.option("--digest", metavar="SHA256", help="With --check: DIR must be the deployment of this digest.")
@click.option("--replace", is_flag=True, help="Exchange a deployment that is there.")
@click.option("--offline", is_flag=True, help="Use only what was pulled before; ask nobody.")
@registry_option
@dry_run_option
@json_option
def command(
    folder: Path,
    engine: str | None,
    lock_path: Path,
    check: bool,
    digest: str | None,
    replace: bool,
    offline: bool,
    registry: str | None,
    dry_run: bool,
) -> None:
    """Make a lock runnable for one engine, and check that it stayed so.

    DIR gets everything: the base and adapters exactly as locked, a program that answers prompts, deployment.json
    with the digest of every file, and deployment.sha256 with the digest of that. An engine that cannot run the lock
    exactly refuses, with the reasons.

    Example:
      hubkit deploy ./deployment --engine peft
      hubkit deploy ./deployment --check
    """
    with ProgressBar("pull") as work:
        result = deploy(
            folder,
            engine=engine,
            lock=lock_path,
            check=check,
            digest=digest,
            replace=replace,
            offline=offline,
            registry=registry,
            dry_run=dry_run,
            progress=work.reach,
        )
    emit(result, _render)


def _render(done: Deployed) -> str:
    if done.dry_run:
        return f"{done.engine} can run this lock; {done.path} would be written"
    state = "is what was deployed" if done.checked else "written"
    return "\n".join(
        [
            f"{done.path} {state}: engine {done.engine}, {done.files} files, {size(done.size)}",
            f"digest  {done.digest}",
            f"lock    {done.lock}",
            f"run     cd {shlex.quote(str(done.path))} && {shlex.join(done.command)} PROMPT",
        ]
    )
