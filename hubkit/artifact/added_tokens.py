"""Tokens that an adapter adds to its base's tokenizer: their ids, the files that know them, and what must agree.

``tokenizer.json`` is the base's own with one entry more per token; every other file is copied byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from hubkit.artifact.identity.base_tokenizer import TOKENIZER
from hubkit.artifact.identity.tokenizer_identity import load
from hubkit.documents.files import refusing
from hubkit.errors import HubkitError

BESIDE: Final = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
"""Files of a tokenizer beside ``tokenizer.json``."""

_PLAIN: Final = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def vocabulary_of(document: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id, of a parsed ``tokenizer.json``, added tokens included."""
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocab, list):  # Unigram: pairs of token and score, the place is the id
        found = {str(entry[0]): number for number, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    else:
        found = {str(token): number for token, number in (vocab or {}).items() if type(number) is int}
    added = [token for token in document.get("added_tokens") or () if isinstance(token, Mapping)]
    return found | {str(token.get("content")): token["id"] for token in added if type(token.get("id")) is int}


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """The parsed ``tokenizer.json`` in `folder`.

    Raises:
        HubkitError: ``HK-VOCABULARY`` when there is none; ``HK-TOKENIZER``.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise HubkitError(
            "HK-VOCABULARY",
            "which tokens there are is not known",
            where=str(folder),
            want=TOKENIZER,
            have="no such file",
        )
    with refusing(path):
        return load(path.read_bytes())


def with_tokens(folder: Path, tokens: Sequence[str]) -> tuple[dict[str, int], dict[str, bytes | Path]]:
    """The ids that `tokens` get beside those of the tokenizer in `folder`, and the files of the longer tokenizer.

    Raises:
        HubkitError: ``HK-VOCABULARY`` for a token that is there already, twice, or empty; as `read_tokenizer`.
    """
    document = read_tokenizer(folder)
    known = vocabulary_of(document)
    wrong = [f"{token}: is there already, with id {known[token]}" for token in tokens if token in known]
    wrong += [f"{token!r}: {tokens.count(token)} times" for token in dict.fromkeys(tokens) if tokens.count(token) > 1]
    wrong += ["an empty token" for token in tokens if not token.strip()]
    if wrong:
        raise HubkitError(
            "HK-VOCABULARY",
            "these tokens cannot be added to the base's tokenizer",
            where=str(folder / TOKENIZER),
            want="tokens that it does not have",
            have=wrong,
            fix="leave them out of add_tokens",
        )
    first = 1 + max(known.values(), default=-1)
    ids = {token: first + number for number, token in enumerate(tokens)}
    document["added_tokens"] = [
        *(document.get("added_tokens") or ()),
        *({"id": number, "content": token, **_PLAIN} for token, number in ids.items()),
    ]
    files: dict[str, bytes | Path] = {name: folder / name for name in BESIDE if (folder / name).is_file()}
    files[TOKENIZER] = json.dumps(document, ensure_ascii=False, indent=2).encode()
    return ids, files


def require_ids(adapter: str, tokens: Mapping[str, int], have: Mapping[str, int], where: str) -> None:
    """Refuses a tokenizer that maps an added token elsewhere, or another token to its id: ``HK-VOCABULARY``."""
    holders = {number: token for token, number in have.items()}
    wrong = [
        f"{token}: {number} in the adapter, {have[token]} in the tokenizer"
        for token, number in tokens.items()
        if have.get(token, number) != number
    ]
    wrong += [
        f"{number}: {token} in the adapter, {holders[number]} in the tokenizer"
        for token, number in tokens.items()
        if holders.get(number, token) != token
    ]
    if wrong:
        raise HubkitError(
            "HK-VOCABULARY",
            f"the tokens that adapter {adapter!r} adds are others in this tokenizer",
            where=where,
            have=wrong,
            fix="use the base and tokenizer that it was trained on",
        )


def added_since(base: Path, longer: Path, first: int, count: int) -> list[str]:
    """The tokens with the ids `first`, ``first + 1``..., which the tokenizer in `longer` adds to that in `base`.

    Raises:
        HubkitError: ``HK-VOCABULARY`` when it does not name them all, or maps the base's tokens elsewhere.
    """
    mine, theirs = vocabulary_of(read_tokenizer(base)), vocabulary_of(read_tokenizer(longer))
    moved = [
        f"{token}: {number}, not {theirs.get(token)}" for token, number in mine.items() if theirs.get(token) != number
    ]
    names = {number: token for token, number in theirs.items() if token not in mine}
    absent = [f"no token with id {i}" for i in range(first, first + count) if i not in names]
    if moved or absent:
        raise HubkitError(
            "HK-VOCABULARY",
            "the adapter's tokenizer is not the base's with tokens added",
            where=str(longer / TOKENIZER),
            want=f"{len(mine)} tokens of the base, and names for {count} rows from {first} on",
            have=[*moved[:10], *absent[:10]],
            fix="put the tokenizer.json it was trained with into its folder",
        )
    return [names[i] for i in range(first, first + count)]
