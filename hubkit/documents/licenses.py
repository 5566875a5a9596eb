"""Licences: SPDX expressions, held against the published list of identifiers (``licenses.json``)."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.resources import files

from hubkit.documents.schema import is_secret
from hubkit.errors import USAGE, HubkitError, nearest

_WORD = re.compile(r"[()]|[^\s()]+")
_OWN = re.compile(r"(?:DocumentRef-[A-Za-z0-9.-]+:)?LicenseRef-[A-Za-z0-9.-]+")
SPDX = "https://spdx.org/licenses"


def require_license(text: str | None) -> None:
    """Refuses what is given as a licence and is no SPDX expression; capitals do not matter.

    Raises:
        HubkitError: ``HK-LICENSE`` (status 2), with the identifiers that are most like it.
    """
    if text is None or is_secret(text):  # a token is refused where the manifest is written, and not repeated
        return
    wrong = _wrong(text)
    if wrong is not None:
        near = nearest(wrong.lower(), _known()[0], 3)
        raise HubkitError(
            "HK-LICENSE",
            "this is no SPDX licence",
            want=f"an identifier of {SPDX}, several joined by AND or OR, or LicenseRef-NAME for one of your own",
            have=text[:200],
            fix="    or    ".join(f"--license {name}" for name in near) or "--license LicenseRef-NAME",
            status=USAGE,
        )


def _wrong(text: str) -> str | None:
    """The first word of an expression that is in a wrong place or unknown; None when it is sound."""
    licenses, exceptions = _known()
    depth, want = 0, "license"
    words: list[str] = _WORD.findall(text)
    for word in words:
        plain = word.lower()
        named = plain.removesuffix("+") in licenses or _OWN.fullmatch(word) is not None
        if want == "license" and word == "(":
            depth += 1
        elif want == "operator" and word == ")" and depth:
            depth -= 1
        elif want == "operator" and plain in ("and", "or", "with"):
            want = "exception" if plain == "with" else "license"
        elif named if want == "license" else want == "exception" and plain in exceptions:
            want = "operator"
        else:
            return word
    return None if want == "operator" and not depth else text or "nothing"


@cache
def _known() -> tuple[frozenset[str], frozenset[str]]:
    data = json.loads((files("hubkit.documents") / "licenses.json").read_text("utf-8"))
    return frozenset(map(str.lower, data["licenses"])), frozenset(map(str.lower, data["exceptions"]))
