"""What a word on the command line could become: asked by the scripts of `hubkit completion` at every press of Tab.

It answers from what lies here, asks no registry, imports no model library, and says nothing on stderr: what goes wrong
is no completion.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import click
from click.shell_completion import CompletionItem, ShellComplete, split_arg_string

from hubkit.cli.group import LazyGroup
from hubkit.cli.table import COMMANDS

Source = Callable[[str], Iterable[str]]
"""The words that an incomplete one could become."""
MOST = 200
_PLAIN = re.compile(r"[\w+@-][\w.+@-]*")
"""Names that need no quotes in any shell; others are left to the shell itself."""


def complete(group: click.Group, line: str) -> int:
    """Print what the last word of a line could become, a line each: kind, value, help, with tabs between.

    Args:
        line: as typed, up to the cursor.
    """
    with suppress(Exception), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        words = split_arg_string(line)
        incomplete = words.pop() if words and not line[-1:].isspace() else ""
        name, equals, _ = incomplete.partition("=")
        prefix = name + equals if name.startswith("--") and equals else ""
        asked = ShellComplete(_Answering("hubkit", params=group.params), {}, "hubkit", "_HUBKIT_COMPLETE")
        found = asked.get_completions(words[1:], incomplete)
        lines = (f"{item.type}\t{prefix}{item.value}\t{item.help or ''}\n" for item in found[:MOST])
        sys.stdout.write("".join(line for line in lines if line.isprintable() or line.count("\n") == 1))
        sys.stdout.flush()
    return 0


class _Answering(LazyGroup):
    """The group, whose parameters know what they could be."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands by the table: click would import each of them for its help."""
        found = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        return found or super(click.Group, self).shell_complete(ctx, incomplete)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        for param in command.params if command is not None else ():
            source = _source(cmd_name, param)
            if source is not None:
                param.shell_complete = _asking(source)  # type: ignore[assignment, method-assign]
        return command


def _asking(source: Source) -> Callable[[click.Context, str], list[CompletionItem]]:
    def ask(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if incomplete.startswith((".", "/", "~")):
            return [CompletionItem(incomplete, type="file")]
        found = sorted({word for word in source(incomplete) if word.startswith(incomplete)})
        return [CompletionItem(word) for word in found] or [CompletionItem(incomplete, type="file")]

    return ask


def _source(command: str, param: click.Parameter) -> Source | None:
    """Where the words of a parameter come from; None for what click knows, or nobody."""
    known: Mapping[tuple[str, str], Source] = {
        ("train", "method"): _methods,
        ("methods", "name"): _methods,
        ("export", "to"): _forms,
        ("config", "key"): _keys,
        ("copy", "to"): _places,
        ("push", "repo"): _repositories,
        ("list", "prefix"): _repositories,
    }
    common: Mapping[str, Source] = {
        "reference": _references,
        "terms": _references,
        "adapter": _references,
        "base": _references,
        "tuned": _references,
        "onto": _references,
        "registry": _places,
        "engine": _engines,
    }
    return known.get((command, param.name or "")) or common.get(param.name or "")


def _methods(incomplete: str) -> Iterable[str]:
    from importlib.metadata import entry_points

    return (one.name for one in entry_points(group="hubkit.methods"))


def _engines(incomplete: str) -> Iterable[str]:
    from hubkit.engines import ENGINES

    return ENGINES


def _forms(incomplete: str) -> Iterable[str]:
    from hubkit.engines import FORMS
    from hubkit.verbs.export import FORMS as OTHERS

    return (*FORMS, *OTHERS)


def _keys(incomplete: str) -> Iterable[str]:
    return "registry", "namespaces.", "tokens.https://"


def _places(incomplete: str) -> Iterable[str]:
    return ("hf", *_folders(incomplete))


def _repositories(incomplete: str) -> Iterable[str]:
    return {reference.partition("@")[0] for reference in _references(incomplete)}


def _references(incomplete: str) -> Iterator[str]:
    """Repositories of the store; behind an ``@`` the names that were pulled of one; folders here."""
    from hubkit.artifact.identity.digest_cache import home
    from hubkit.registry.store.index import Index

    place = home()
    named = "@" in incomplete
    for repo, revision in Index(place / "index").known() if place else ():
        yield f"{repo}@{revision}" if named else repo
    yield from _folders(incomplete)


def _folders(incomplete: str) -> Iterator[str]:
    above, _, _ = incomplete.rpartition("/")
    with suppress(OSError), os.scandir(Path(above or ".")) as entries:
        for entry in entries:
            if _PLAIN.fullmatch(entry.name) and entry.is_dir():
                yield f"{above}/{entry.name}" if above else f"./{entry.name}"
