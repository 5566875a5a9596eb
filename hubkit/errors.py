"""Every refusal of hubkit is one `HubkitError`: what failed, where, what was wanted, what was found, what to do.

Raised once, where the fault is known; printed once, by the command line. No other module formats errors.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Sequence


class Notice(UserWarning):
    """Something that a user should know although all goes on: a yanked version, a name like another one.

    Given by ``warnings.warn``: in Python it is a warning like any other; the command line prints it as one line.
    """


REFUSED = 1
USAGE = 2
UNDECIDED = 3


class HubkitError(Exception):
    """A refusal or failure that a user can understand and mend.

    Args:
        code: stable name, ``HK-`` followed by capitals, e.g. ``HK-BASE-MISMATCH``.
        what: one sentence in the user's words, no full stop.
        where: file and JSON pointer, reference, site or flag concerned.
        want: what was expected.
        have: what was found; several differences are given as a sequence and all are shown.
        fix: the command or change that mends it.
        status: exit status: 1 refused or failed, 2 wrong usage, 3 could not be decided.
    """

    def __init__(
        self,
        code: str,
        what: str,
        *,
        where: str = "",
        want: str | Sequence[str] = "",
        have: str | Sequence[str] = "",
        fix: str = "",
        status: int = REFUSED,
    ) -> None:
        super().__init__(code, what)
        self.code = code
        self.what = what
        self.where = where
        self.want = _lines(want)
        self.have = _lines(have)
        self.fix = fix
        self.status = status

    def __str__(self) -> str:
        return self.render()

    def render(self, most: int | None = None, colour: bool = False) -> str:
        """The text of DESIGN's error form; control characters of foreign text are escaped.

        Args:
            most: lines of one field that are shown; None: all.
            colour: code and fix stand out, on a terminal.
        """
        red, green, plain = ("\x1b[1;31m", "\x1b[32m", "\x1b[0m") if colour else ("", "", "")
        out = [f"{red}error[{self.code}]{plain}: {escape(self.what)}"]
        fields = (("where", self.where), ("want", self.want), ("have", self.have), ("fix", self.fix))
        for label, value in fields:
            lines = value.splitlines() if isinstance(value, str) else list(value)
            if most is not None and len(lines) > most:
                lines = [*lines[:most], f"and {len(lines) - most} more: --json shows them"]
            if label == "fix":
                lines = [f"{green}{escape(line)}{plain}" for line in lines]
            for number, line in enumerate(lines):
                head = f"{label}:".ljust(7) if number == 0 else " " * 7
                out.append(f"  {head}{line if label == 'fix' else escape(line)}")
        return "\n".join(out)

    def as_json(self) -> dict[str, object]:
        """The same fields as one JSON object (for ``--json``); empty fields are left out."""
        fields = {"code": self.code, "what": self.what, "where": self.where, "want": self.want, "have": self.have}
        return {"error": {k: v for k, v in {**fields, "fix": self.fix}.items() if v}}


def set_told(error: BaseException) -> None:
    """Marks an exception that another process of the same run tells the user of."""
    error.__dict__["hubkit_told"] = True


def is_told(error: BaseException) -> bool:
    """Whether another process tells the user of it: only the exit status is left to give."""
    return bool(getattr(error, "hubkit_told", False))


def _lines(value: str | Sequence[str]) -> list[str]:
    return value.splitlines() if isinstance(value, str) else [str(line) for line in value]


def escape(text: str) -> str:
    """`text` with control, format and bidirectional characters shown as escapes: it may come from a stranger."""
    if text.isprintable():
        return text
    hidden = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    return "".join(c.encode("unicode_escape").decode("ascii") if unicodedata.category(c) in hidden else c for c in text)


def nearest(name: str, known: Iterable[str], count: int = 3, cutoff: float = 0.4) -> list[str]:
    """The `count` names of `known` that are most like `name`, best first: for the fix line of an unknown name.

    Args:
        cutoff: how like, 0 to 1.
    """
    return difflib.get_close_matches(name, sorted(set(known)), n=count, cutoff=cutoff)
