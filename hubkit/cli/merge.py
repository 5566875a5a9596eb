"""``hubkit merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hubkit.cli.group import TermsCommand, declare
from hubkit.cli.output import dry_run_option, emit, json_option, registry_option
from hubkit.cli.progress import ProgressBar
from hubkit.cli.terms import mismatch_option, mix_option, offline_option, terms_argument
from hubkit.documents.arguments import size
from hubkit.verbs.merge import Merged, merge

if TYPE_CHECKING:
    from hubkit.tensors.weights.estimate import MergeEstimate


@declare("merge", TermsCommand)
@terms_argument
@click.option("--base", "-b", required=True, metavar="DIR|ORG/NAME", help="The base they were trained on.")
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Folder of the new checkpoint.")
@mix_option
@click.option(
    "--into",
    type=click.Choice(["trained", "original", "4bit"]),
    default="trained",
    show_default=True,
    help="Of an adapter trained in 4 bits: the weights it was trained beside, or those before quantizing. 4bit: the "
    "result is packed into 4 bits again.",
)
@click.option("--dtype", help="float32, bfloat16 or float16.  [default: the base's own]")
@click.option("--check", is_flag=True, help="Keep it only if it says what the adapted base says, in fp32.")
@click.option(
    "--check-prompts",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="What to check it on: prompts, one a line, or rows as for train. Default: several languages and code.",
)
@click.option("--check-kl", type=float, default=0.01, show_default=True, help="Nats a token that it may be off.")
@click.option("--check-top1", type=float, default=0.97, show_default=True, help="Part of equal first choices it needs.")
@click.option("--name", help="Its name.  [default: the folder's]")
@click.option("--license", metavar="SPDX", help="Licence, e.g. apache-2.0.")
@click.option("--revision", metavar="REV", help="Of the base.")
@click.option("--max-shard-size", metavar="SIZE", help="Of one weight file, e.g. 5GB.  [default: the base's own files]")
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
    check: bool,
    check_prompts: Path | None,
    check_kl: float,
    check_top1: float,
    name: str | None,
    license: str | None,
    revision: str | None,
    max_shard_size: str | None,
    replace: bool,
    allow_base_mismatch: bool,
    offline: bool,
    registry: str | None,
    dry_run: bool,
) -> None:
    """Fold adapters into their base and write a new checkpoint.

    In tiles from file to file: a few hundred megabytes of memory, whatever the size of the base. Sums are accumulated
    in fp32 and cast once. The result is an ordinary model folder; its manifest names base and adapters. Before it gets
    its name, every tensor is read back and held against what was computed, or against the base; hubkit verify makes
    the whole merge again. --dry-run says what it needs; a merge that was killed goes on from its finished files when
    it is run again.

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
            check=check,
            check_prompts=check_prompts,
            check_kl=check_kl,
            check_top1=check_top1,
            name=name,
            license=license,
            revision=revision,
            registry=registry,
            offline=offline,
            allow_base_mismatch=allow_base_mismatch,
            replace=replace,
            max_shard_size=max_shard_size,
            dry_run=dry_run,
            progress=work.reach,
        )
    emit(result, _render)


def _quantized(done: Merged) -> str:
    if done.into != "original":
        return f"into the weights that the adapter was trained beside: the base in {done.codec}, decoded"
    return f"into the original weights: {done.shift:.1%} from those that the adapter was trained beside ({done.codec})"


def _needs(plan: MergeEstimate) -> list[str]:
    lines = [
        f"memory  {size(plan.memory)} beside the program itself",
        f"disk    {size(plan.disk)} in {len(plan.shards)} weight files; {size(plan.free)} free",
        f"time    about {plan.seconds:.0f} s, where the disk keeps up",
    ]
    if plan.whole:
        lines.append(f"{len(plan.whole)} weights are changed as a whole, in memory: {plan.whole[0]}, ...")
    if plan.pull:
        lines.append(f"the base was not pulled: {size(plan.pull)} are, before anything is written")
    elif plan.unread:
        lines.append(f"the base is known by its headers: {size(plan.unread)} are compared before anything is written")
    return lines


def _render(done: Merged) -> str:
    verb = "would merge" if done.dry_run else "merged"
    lines = [f"{verb}  {done.path} ({done.changed} of {done.tensors} tensors changed, {size(done.size)})"]
    if done.unties:
        lines.append("the output head is no longer tied to the embeddings: only one of them changed")
    if done.codec is not None:
        lines.append(_quantized(done))
    if done.lost is not None:
        lines.append(f"packed again: {done.shift:.1%} from the merged weights, {done.lost:.2g} times what was changed")
    if done.rounding is not None:
        lines.append(
            "rounded off: {weights:.2%} of the weights, {change:.2%} of what was added to them; {vanished:.1%} of the "
            "added values vanish (by a few layers)".format(**done.rounding)
        )
    if done.untold:
        lines.append(f"not known whether trained in 4 bits (hubkit pack --codec): {', '.join(done.untold)}")
    if not done.dry_run:
        made = done.tensors - done.kept
        lines.append(
            f"read back: {made} tensors as computed, {done.kept} the base's own, bit for bit; no other is there"
        )
    if done.check is not None:
        lines.append(
            "says the same: {kl:.2g} nats a token, {top1:.1%} equal first choices, logits {largest:.2g} apart at most, "
            "on {tokens:.0f} tokens".format(**done.check)
        )
    if done.decoded:
        kinds = ", ".join(sorted(set(done.decoded.values())))
        lines.append(f"{len(done.decoded)} weights that the base stores as codes are decoded, to {kinds}")
    lines += [f"override: {name}" for name in done.overrides]
    lines += [] if done.plan is None else _needs(done.plan)
    return "\n".join(lines + ([f"digest  {done.digest}"] if done.digest else []))
