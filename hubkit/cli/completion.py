"""``hubkit completion``, and the answers to the scripts that it prints."""

from __future__ import annotations

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option
from hubkit.verbs.completion import SCRIPTS, completion


@declare("completion")
@click.argument("shell", type=click.Choice(list(SCRIPTS)))
@json_option
def command(shell: str) -> None:
    """Print the script that makes a shell complete commands, options and references.

    Nothing else is installed for it. In ~/.bashrc: eval "$(hubkit completion bash)"; in ~/.zshrc, after compinit:
    eval "$(hubkit completion zsh)"; for fish: hubkit completion fish > ~/.config/fish/completions/hubkit.fish.
    References are completed from the local store; no registry is asked.

    Example:
      hubkit completion bash
    """
    emit(completion(shell), lambda done: done.script.rstrip("\n"))
