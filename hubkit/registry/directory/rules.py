"""Which files a repository stores as large objects, and which an ignore file leaves out: git's patterns as data.

The Hub decides by `.gitattributes`, size and a look at the first bytes; so does this module, for the directory
registry and its server alike. Pattern syntax: https://git-scm.com/docs/gitignore.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

LARGE_BYTES = 10_000_000
"""A file of this many bytes or more is a large object whatever its name, as on the Hub."""

LARGE_NAMES = (
    *("*.safetensors", "*.bin", "*.gguf", "*.h5", "*.model", "*.msgpack", "*.onnx", "*.ot", "*.pb", "*.tflite"),
    *("*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.mlmodel", "*.npy", "*.npz", "*.ftz"),
    *("*.7z", "*.bz2", "*.gz", "*.rar", "*.tar", "*.tar.*", "*.tgz", "*.xz", "*.zip", "*.zst"),
    *("*.arrow", "*.parquet", "*.wasm", "saved_model/**/*", "*tfevents*"),
)


@dataclass(frozen=True)
class Rule:
    """One pattern line: `match` is applied to the path; `keep` says what a match means."""

    match: re.Pattern[str]
    keep: bool


@lru_cache(maxsize=1024)
def pattern(text: str) -> re.Pattern[str]:
    """The regular expression of one gitignore-style pattern; a match of a folder covers what is in it."""
    anchored = "/" in text.rstrip("/")
    folder_only = text.endswith("/")
    body = text.strip("/")
    out = ""
    position = 0
    while position < len(body):
        if body.startswith("**/", position):
            out, position = out + r"(?:[^/]+/)*", position + 3
        elif body.startswith("**", position):
            out, position = out + r".*", position + 2
        elif body[position] == "*":
            out, position = out + r"[^/]*", position + 1
        elif body[position] == "?":
            out, position = out + r"[^/]", position + 1
        else:
            out, position = out + re.escape(body[position]), position + 1
    head = "" if anchored else r"(?:.*/)?"
    tail = r"/.*" if folder_only else r"(?:/.*)?"
    return re.compile(head + out + tail, re.DOTALL)


DEFAULT = tuple(Rule(pattern(name), True) for name in LARGE_NAMES)


def read_attributes(text: str | None) -> Sequence[Rule]:
    """Rules of a `.gitattributes`: ``filter=lfs`` stores large, ``-filter`` or another filter does not."""
    if text is None:
        return DEFAULT
    rules = []
    for line in text.splitlines():
        name, *attributes = line.split()[:50] or [""]
        decided = [a for a in attributes if a.lstrip("-!").startswith("filter")]
        if decided and not name.startswith("#") and len(name) < 256:
            rules.append(Rule(pattern(name), decided[-1] == "filter=lfs"))
    return rules


def read_ignores(text: str) -> Sequence[Rule]:
    """Rules of a `.gitignore`; `keep` is False for what is to be left out."""
    rules = []
    for line in text.splitlines()[:1000]:
        body = line.strip()
        if body and not body.startswith("#") and len(body) < 256:
            rules.append(Rule(pattern(body.removeprefix("!")), body.startswith("!")))
    return rules


def decide(rules: Iterable[Rule], path: str) -> bool | None:
    """What the last matching rule says of `path`; None when none matches."""
    found = None
    for rule in rules:
        if rule.match.fullmatch(path):
            found = rule.keep
    return found


def is_large(path: str, size: int, head: bytes, rules: Sequence[Rule] = DEFAULT) -> bool:
    """Whether a file is stored as a large object.

    Args:
        path: in the repository.
        size: bytes; an empty file is never large (object stores refuse empty uploads).
        head: its first bytes, some hundred at least; a NUL or bytes that are not UTF-8 mean binary.
        rules: of the repository's `.gitattributes`, or `DEFAULT`.
    """
    if size == 0:
        return False
    named = decide(rules, path)
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
