"""``hubkit config``."""

from __future__ import annotations

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, table
from hubkit.verbs.config import ACTIONS, Setting, config


@declare("config")
@click.argument("action", metavar="[set KEY VALUE | unset KEY]", type=click.Choice(ACTIONS), default="show")
@click.argument("key", required=False, metavar="")
@click.argument("value", required=False, metavar="")
@json_option
def command(action: str, key: str | None, value: str | None) -> None:
    """Show every setting with where it comes from, or change the settings file.

    The file is $HUBKIT_CONFIG, else $XDG_CONFIG_HOME/hubkit/config.toml, else ~/.config/hubkit/config.toml. Keys:
    `registry` for references that name none, `namespaces.OWNER` for one owner's repositories, `tokens.ADDRESS` for
    the environment variable that holds the token of a server. No token stands in it.

    Which registry a reference is in: its own address; else --registry; else namespaces.OWNER; else $HUBKIT_REGISTRY;
    else `registry`; else the Hugging Face Hub. HUBKIT_TOKEN is sent to the default registry alone.

    Example:
      hubkit config
      hubkit config set registry ./registry
      hubkit config set namespaces.HuggingFaceTB hf
      hubkit config set tokens.https://hub.acme.example ACME_TOKEN
      hubkit config unset namespaces.HuggingFaceTB
    """
    emit(config(action, key, value), _render)


def _render(rows: tuple[Setting, ...]) -> str:
    return table([(one.name, one.value, one.source) for one in rows], head=("SETTING", "VALUE", "FROM"))
