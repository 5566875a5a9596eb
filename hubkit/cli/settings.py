"""``--set NAME=VALUE`` of commands that configure a method."""

from __future__ import annotations

from collections.abc import Iterable

from hubkit.errors import USAGE, HubkitError


def settings(pairs: Iterable[str]) -> dict[str, str]:
    """``("rank=8", "targets=q_proj,v_proj")`` as a mapping.

    Raises:
        HubkitError: ``HK-CONFIG`` for a pair without ``=``, or a name that is given twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name or name in found:
            what = "an option is given twice" if name in found else "an option needs a name and a value"
            raise HubkitError("HK-CONFIG", what, where="--set", want="NAME=VALUE", have=pair, status=USAGE)
        found[name] = value
    return found
