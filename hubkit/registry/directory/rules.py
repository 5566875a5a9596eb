"""Which files a repository stores as large objects, and which an ignore file leaves out: git's patterns as data.

The Hub decides by `.gitattributes`, size and a look at the first bytes; so does this module, for the directory
registry and its server alike. Pattern syntax: https://git-scm.com/docs/gitignore.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from hubkit.errors import HubkitError

Piece = tuple[frozenset[int], ...]
"""A pattern between two slashes: for each place the bytes that may stand there."""
STAR: frozenset[int] = frozenset()
"""In a piece: any number of bytes."""
DEEP: Piece = (STAR, STAR)
BUDGET = 3_000_000
"""Characters that one request may compare: about a second."""
_ANY = frozenset(range(256))
_CLASSES = {
    name: frozenset(letters.encode())
    for name, letters in {
        b"alnum": string.ascii_letters + string.digits,
        b"alpha": string.ascii_letters,
        b"blank": " \t",
        b"cntrl": "".join(map(chr, (*range(32), 127))),
        b"digit": string.digits,
        b"graph": "".join(map(chr, range(33, 127))),
        b"lower": string.ascii_lowercase,
        b"print": "".join(map(chr, range(32, 127))),
        b"punct": string.punctuation,
        b"space": string.whitespace,
        b"upper": string.ascii_uppercase,
        b"xdigit": string.hexdigits,
    }.items()
}

LARGE_BYTES = 10_000_000
"""A file of this many bytes or more is a large object whatever its name, as on the Hub."""

LARGE_NAMES = (
    *("*.safetensors", "*.bin", "*.gguf", "*.h5", "*.model", "*.msgpack", "*.onnx", "*.ot", "*.pb", "*.tflite"),
    *("*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.mlmodel", "*.npy", "*.npz", "*.ftz"),
    *("*.7z", "*.bz2", "*.gz", "*.rar", "*.tar", "*.tar.*", "*.tgz", "*.xz", "*.zip", "*.zst"),
    *("*.arrow", "*.parquet", "*.wasm", "saved_model/**/*", "*tfevents*"),
)


class Work:
    """How much matching one request may cost; counted in characters that were compared."""

    def __init__(self, left: int = BUDGET) -> None:
        self.left = left

    def spend(self, count: int) -> None:
        """Count what was done.

        Raises:
            HubkitError: ``HK-LIMIT`` when it is too much.
        """
        self.left -= count
        if self.left < 0:
            raise HubkitError("HK-LIMIT", "matching these patterns takes too long", fix="fewer or simpler patterns")


@dataclass(frozen=True)
class Rule:
    """One pattern line, and what a match means.

    Args:
        pieces: the pattern between its slashes; ``DEEP`` stands for any number of folders.
        keep: what is said of a path that matches.
        folder: it matches folders only.
    """

    pieces: tuple[Piece, ...]
    keep: bool
    folder: bool = False

    def ends(self, steps: Sequence[bytes], work: Work) -> list[int]:
        """How many first steps of a path it matches: the file itself for all of them, folders that it is in for fewer.

        Which steps each piece can end behind is all that is kept, and within a step a ``*`` is widened and never
        narrowed, so that no pattern takes longer than its length times that of the path.
        """
        found = [0]
        for number, piece in enumerate(self.pieces, 1):
            if piece == DEEP:  # at the end it is what is in a folder, not the folder
                found = [*range(found[0] + (number == len(self.pieces)), len(steps) + 1)]
            else:
                found = [end + 1 for end in found if end < len(steps) and _fits(piece, steps[end], work)]
            work.spend(len(found) + 1)
            if not found:
                break
        return found


def _fits(piece: Piece, step: bytes, work: Work) -> bool:
    """Whether a piece of a pattern matches one whole step: git's ``wildmatch`` without its going back."""
    if not step or (piece and piece[-1] != STAR and step[-1] not in piece[-1]):
        return not step and all(token == STAR for token in piece)  # most patterns end in a suffix that is not there
    at = place = count = mark = 0
    star = -1
    while at < len(step):
        count += 1
        token = piece[place] if place < len(piece) else None
        if token == STAR:
            star, mark = place, at
            place += 1
        elif token is not None and step[at] in token:
            place, at = place + 1, at + 1
        elif star >= 0:
            mark += 1
            at, place = mark, star + 1
        else:
            break
    work.spend(count)
    return at == len(step) and all(token == STAR for token in piece[place:])


def _pieces(text: str) -> tuple[tuple[Piece, ...], bool] | None:
    """A pattern's pieces, and whether it matches folders only; None for one that matches nothing.

    Without a slash before its end it is looked for in every folder.
    """
    folder = text.endswith("/")
    body = text[:-1] if folder else text
    pieces = _split(body.removeprefix("/").encode("utf-8", "surrogatepass"))
    if not body or pieces is None:
        return None
    return (*(() if "/" in body else (DEEP,)), *pieces), folder


def _split(text: bytes) -> list[Piece] | None:
    """The tokens of a pattern, divided at its slashes; None where a set or an escape is not ended."""
    pieces: list[list[frozenset[int]]] = [[]]
    at = 0
    while at < len(text):
        byte = text[at : at + 1]
        if byte == b"\\" and at + 1 == len(text):
            return None
        if byte == b"[":
            found = _set(text, at + 1)
            if found is None:
                return None
            token, at = found
            pieces[-1].append(token)
            continue
        at += 2 if byte == b"\\" else 1
        if text[at - 1 : at] == b"/":
            pieces.append([])
        elif byte == b"*":
            pieces[-1].append(STAR)
        else:
            pieces[-1].append(_ANY if byte == b"?" else frozenset(text[at - 1 : at]))
    return [DEEP if len(piece) > 1 and all(token == STAR for token in piece) else tuple(piece) for piece in pieces]


def _set(text: bytes, at: int) -> tuple[frozenset[int], int] | None:
    """The bytes of a set ``[...]`` that begins before `at`, and where it ends; None when it does not."""
    negated = text[at : at + 1] in (b"!", b"^")
    at += negated
    chosen: set[int] = set()
    before = first = at
    last = -1  # the byte a range may begin with
    while at < len(text) and (at == first or text[at : at + 1] != b"]"):
        if text[at : at + 2] == b"[:":
            end = text.find(b"]", at + 2)
            if end < 0:
                return None
            if end > at + 2 and text[end - 1 : end] == b":":
                named = _CLASSES.get(text[at + 2 : end - 1])
                if named is None:
                    return None
                chosen, at, last = chosen | named, end + 1, -1
                continue
        ranged = text[at : at + 1] == b"-" and last >= 0 and text[at + 1 : at + 2] not in (b"", b"]")
        at += ranged
        at += text[at : at + 1] == b"\\"
        if at >= len(text):
            return None
        chosen |= {*range(last, text[at] + 1)} if ranged else {text[at]}
        last, at = -1 if ranged else text[at], at + 1
    if at >= len(text) or at == before:
        return None
    return (frozenset(_ANY - chosen) if negated else frozenset(chosen)), at + 1


def _rule(text: str, keep: bool) -> list[Rule]:
    found = _pieces(text)
    return [] if found is None else [Rule(found[0], keep, found[1])]


DEFAULT = tuple(rule for name in LARGE_NAMES for rule in _rule(name, True))


def read_attributes(text: str | None) -> Sequence[Rule]:
    """Rules of a `.gitattributes`: ``filter=lfs`` stores large, ``-filter`` or another filter does not."""
    if text is None:
        return DEFAULT
    rules = []
    for line in text.splitlines():
        name, *attributes = line.split()[:50] or [""]
        decided = [a for a in attributes if a.lstrip("-!").partition("=")[0] == "filter"]
        if decided and not name.startswith(("#", "!", "[attr]")) and len(name) < 256:
            rules += _rule(name, decided[-1] == "filter=lfs")
    return rules


def read_ignores(text: str) -> Sequence[Rule]:
    """Rules of a `.gitignore`; `keep` is False for what is to be left out."""
    rules = []
    for line in text.removeprefix("\ufeff").split("\n")[:1000]:
        body = re.sub(r"(?<!\\) +\Z", "", line.removesuffix("\r"))
        if body and not body.startswith("#") and len(body) < 256:
            pattern = body.removeprefix("!")
            rules += _rule(pattern, pattern != body)
    return rules


def decide(rules: Sequence[Rule], path: str, work: Work | None = None) -> bool | None:
    """What the last rule that matches a file says of it; None when none matches."""
    steps, work = _steps(path), work or Work()
    for rule in reversed(rules):
        if not rule.folder and rule.ends(steps, work)[-1:] == [len(steps)]:
            return rule.keep
    return None


def ignored(rules: Sequence[Rule], path: str, work: Work | None = None) -> bool:
    """Whether a file is left out: it, or a folder that it is in, which no later line about the file brings back."""
    steps, work = _steps(path), work or Work()
    verdicts: list[bool | None] = [None] * (len(steps) + 1)
    for rule in rules:
        for end in rule.ends(steps, work):
            if end and not (rule.folder and end == len(steps)):
                verdicts[end] = rule.keep
    return any(verdict is False for verdict in verdicts)


def _steps(path: str) -> list[bytes]:
    return path.encode("utf-8", "surrogatepass").split(b"/")


def is_large(path: str, size: int, head: bytes, rules: Sequence[Rule] = DEFAULT, work: Work | None = None) -> bool:
    """Whether a file is stored as a large object.

    Args:
        path: in the repository.
        size: bytes; an empty file is never large (object stores refuse empty uploads).
        head: its first bytes, some hundred at least; a NUL or bytes that are not UTF-8 mean binary.
        rules: of the repository's `.gitattributes`, or `DEFAULT`.
        work: what matching may cost.
    """
    if size == 0:
        return False
    named = decide(rules, path, work)
    return named is True or size >= LARGE_BYTES or is_binary(head)


def is_binary(head: bytes) -> bool:
    """Whether these first bytes are not text in UTF-8 (a character cut at their end does not count)."""
    if b"\0" in head:
        return True
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start < len(head) - 3 or error.reason != "unexpected end of data"
    return False
