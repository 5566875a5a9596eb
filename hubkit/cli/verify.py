"""``hubkit verify``."""

from __future__ import annotations

from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option, table
from hubkit.cli.progress import ProgressBar
from hubkit.cli.runtime import runtime_options
from hubkit.verbs.verify import Verified, verify


@declare("verify")
@click.argument("reference")
@click.option("--base", metavar="DIR|ORG/NAME", help="The base to compare with. Default: the one the manifest names.")
@click.option(
    "--parent",
    "parents",
    multiple=True,
    metavar="DIR|ORG/NAME",
    help="Where an adapter is that was merged, if not where the manifest says. May be given several times.",
)
@click.option("--probes", is_flag=True, help="Load the base and compute the adapter's probes again.")
@runtime_options
@click.option("--runtime", metavar="URL", help="A running server: vLLM, llama.cpp, MLX-LM or SGLang.")
@click.option("--model", metavar="NAME", help="What the server calls the adapter. Default: found by name and digest.")
@click.option("--offline", is_flag=True, help="Use only what was pulled before; ask nobody.")
@click.option("--allow-base-mismatch", is_flag=True, help="Go on with another base; the result says so.")
@registry_option
@json_option
def command(
    reference: str,
    base: str | None,
    parents: tuple[str, ...],
    **options: Any,
) -> None:
    """Prove that an adapter is whole and belongs to its base.

    REFERENCE is a folder or a repository. All bytes are hashed again; the tensors are held against the method and
    the base's shapes; the base is held against the digests taken when the adapter was made. A base on the Hub is
    compared by its listing, without downloading its weights. A merged checkpoint is made again from its base and its
    adapters, tensor by tensor, without a model in memory. With --probes or --runtime, what base or server answer with
    the adapter is held against what it was packed with. Exit status 3 says that something could not be decided.

    Example:
      hubkit verify ./chat --base ./SmolLM2-135M-Instruct --probes
      hubkit verify ./chat --runtime http://127.0.0.1:8000 --dtype bf16
    """
    with ProgressBar(f"pull {reference}") as work:
        result = verify(
            reference,
            base=base,
            parents=parents,
            progress=work.reach,
            **options,
        )
    emit(result, _render)


def _render(done: Verified) -> str:
    rows = [("ok", check.name, check.detail) for check in done.checks]
    lines = [f"verified {done.reference}", table(rows), f"base    {done.base}", f"digest  {done.digest}"]
    lines += [f"not vouched for: {path}" for path in done.unlisted]
    lines += [f"note: {line}" for line in done.notes]
    return "\n".join(lines + [f"override: {name}" for name in done.overrides])
