"""``hubkit merge``."""

from __future__ import annotations

from pathlib import Path

import click

from hubkit.cli.group import TermsCommand, declare
from hubkit.cli.output import dry_run_option, emit, json_option, registry_option, size
from hubkit.cli.progress import ProgressBar
from hubkit.cli.terms import mismatch_option, mix_option, offline_option, terms_argument
from hubkit.verbs.merge import Merged, merge


@declare("merge", TermsCommand)
@terms_argument
@click.option("--base", "-b", required=True, metavar="DIR|ORG/NAME", help="The base they were trained on.")
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Folder of the new checkpoint.")
@mix_option
@click.option(
    "--into",
    type=click.Choice(["trained", "original"]),
    default="trained",
    show_default=True,
    help="Of an adapter trained in 4 bits: the weights it was trained beside, or those before quantizing.",
)
@click.option("--dtype", help="float32, bfloat16 or float16.  [default: the base's own]")
@click.option("--name", help="Its name.  [default: the folder's]")
@click.option("--license", metavar="SPDX", help="Licence, e.g. apache-2.0.")
@click.option("--revision", metavar="REV", help="Of the base.")
@click.option("--replace", is_flag=True, help="Replace the merged checkpoint that is there.")
@mismatch_option
@offline_option
@registry_option
@dry_run_option
@json_option
def command(
    terms: tuple[str, ...],
    base: str,
    out: Path,
    mix: str,
    into: str,
    dtype: str | None,
    name: str | None,
    license: str | None,
    revision: str | None,
    replace: bool,
    allow_base_mismatch: bool,
    offline: bool,
    registry: str | None,
    dry_run: bool,
) -> None:
    """Fold adapters into their base and write a new checkpoint.

    Shard by shard: memory for one tensor, whatever the size of the base. Sums are accumulated in fp32 and cast once.
    The result is an ordinary model folder; its manifest names base and adapters.

    Example:
      hubkit merge ./chat + -0.5*./terse --base ./SmolLM2-135M-Instruct --out ./merged
    """
    with ProgressBar("pull") as work:
        result = merge(
            base,
            terms,
            out,
            mix=mix,
            into=into,
            dtype=dtype,
            name=name,
            license=license,
            revision=revision,
            registry=registry,
            offline=offline,
            allow_base_mismatch=allow_base_mismatch,
            replace=replace,
            dry_run=dry_run,
            progress=work.reach,
        )
    emit(result, _render)


def _quantized(done: Merged) -> str:
    if done.into == "trained":
        return f"into the weights that the adapter was trained beside: the base in {done.codec}, decoded"
    return f"into the original weights: {done.shift:.1%} from those that the adapter was trained beside ({done.codec})"


def _render(done: Merged) -> str:
    verb = "would merge" if done.dry_run else "merged"
    lines = [f"{verb}  {done.path} ({done.changed} of {done.tensors} tensors changed, {size(done.size)})"]
    if done.unties:
        lines.append("the output head is no longer tied to the embeddings: only one of them changed")
    if done.codec is not None:
        lines.append(_quantized(done))
    lines += [f"override: {name}" for name in done.overrides]
    return "\n".join(lines + ([f"digest  {done.digest}"] if done.digest else []))
