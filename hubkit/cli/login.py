"""``hubkit login``."""

from __future__ import annotations

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option, table
from hubkit.verbs.login import Login, login


@declare("login")
@registry_option
@json_option
def command(registry: str | None) -> None:
    """Say who you are to the registry, and what your token may do.

    Nothing is stored or sent anywhere else. For the Hugging Face Hub `hf auth login` stores a token, or HF_TOKEN holds
    it; for the default registry, where that is another server, HUBKIT_TOKEN; for further servers the variable that
    `hubkit config set tokens.ADDRESS VARIABLE` names. Exit status 1 says that no token is accepted.

    Example:
      hubkit login
      hubkit login --registry hf
    """
    emit(login(registry=registry), _render)


def _render(done: Login) -> str:
    rows = [("registry", f"{done.registry}  (by {done.chosen})" if done.chosen != "default" else done.registry)]
    if done.user is not None:
        rows.append(("user", done.user))
        rows += [("member of", ", ".join(done.organizations))] if done.organizations else []
        kind = f" ({done.role})" if done.role else ""
        rows.append(("token", (f"from {done.source}" if done.source else "none") + kind))
    return table([*rows, *(("may", line) for line in done.may)])
