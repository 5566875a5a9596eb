"""Adapters that add tokens: the tokenizer they need, made from the base's and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hubkit.artifact.added_tokens import BESIDE, read_tokenizer, require_ids, vocabulary_of, with_tokens
from hubkit.artifact.folder import AdapterFolder
from hubkit.artifact.identity.base_tokenizer import TOKENIZER
from hubkit.documents.manifest import Manifest
from hubkit.errors import HubkitError
from hubkit.named.terms import Term, adapters


def added_tokens(manifest: Manifest) -> dict[str, int]:
    """Token -> id, of the tokens that an adapter adds.

    Raises:
        HubkitError: ``HK-VOCABULARY`` when its manifest and its configuration disagree.
    """
    listed = (manifest.vocabulary or {}).get("tokens", {})
    found = (manifest.config.get(name) or [] for name in ("add_tokens", "token_ids"))
    names, ids = (value if isinstance(value, list) else [] for value in found)
    held = dict(zip(map(str, names), ids[max(0, len(ids) - len(names)) :], strict=False))
    if listed != held:
        raise HubkitError(
            "HK-VOCABULARY",
            f"the manifest of {manifest.name!r} says two things of its added tokens",
            where="hubkit.json#/vocabulary",
            want=[f"{t} = {i}" for t, i in held.items()] or "none",
            have=str(listed),
            fix="hubkit pack writes it anew",
        )
    return held


def prepared(config: Any, base: Path) -> tuple[Any, Mapping[str, Any] | None, dict[str, bytes | Path]]:
    """`config` with the ids of the tokens it adds, the manifest's `vocabulary`, and the tokenizer's files.

    Raises:
        HubkitError: ``HK-VOCABULARY``, ``HK-TOKENIZER``.
    """
    tokens = getattr(config, "add_tokens", ())
    if not tokens:
        return config, None, {}
    ids, files = with_tokens(base, tokens)
    given = tuple(i for i in config.token_ids if i not in ids.values())
    return dataclasses.replace(config, token_ids=(*given, *ids.values())), {"tokens": ids}, files


def vocabulary_document(config: Any) -> Mapping[str, Any] | None:
    """The manifest's `vocabulary` of an adapter with this configuration; None when it adds no tokens."""
    names = getattr(config, "add_tokens", ())
    ids = config.token_ids[len(config.token_ids) - len(names) :] if names else ()
    return {"tokens": dict(zip(names, ids, strict=True))} if names else None


def tokenizer_with(base: Path, tokens: Mapping[str, int], name: str) -> Any:
    """The tokenizer of the base in folder `base`, with `tokens` added.

    Raises:
        HubkitError: ``HK-VOCABULARY`` when a token gets another id than it has; ``HK-TOKENIZER-LOAD``.
    """
    from hubkit.tensors.base.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(base)
    if not tokens:
        return tokenizer
    from tokenizers import AddedToken

    require_ids(name, tokens, tokenizer.get_vocab(), str(base))
    for token, number in sorted(tokens.items(), key=lambda item: item[1]):
        if token not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
        require_ids(name, {token: number}, tokenizer.get_vocab(), str(base))
    return tokenizer


def one_vocabulary(members: Iterable[Term]) -> dict[str, int]:
    """The tokens that the members of a mix add, all the same ones.

    Raises:
        HubkitError: ``HK-VOCABULARY`` for members that add different tokens.
    """
    from hubkit.tensors.parts.vocabulary import require_one_vocabulary

    added = {member.name: added_tokens(member.folder.manifest) for member in adapters(members)}
    require_one_vocabulary(added)
    return next((tokens for tokens in added.values() if tokens), {})


def tokenizer_files(members: Iterable[Term], base: Path) -> dict[str, Path]:
    """The files of the longer tokenizer that members of a mix bring, checked against the base's and their manifests.

    Raises:
        HubkitError: ``HK-VOCABULARY``, ``HK-TOKENIZER``.
    """
    members = adapters(members)
    tokens = one_vocabulary(members)
    owner = next((m for m in members if m.folder.manifest.vocabulary), None)
    if owner is None:
        return {}
    require_ids(owner.name, tokens, vocabulary_of(read_tokenizer(base)), str(base / TOKENIZER))
    _require_own(owner.folder, tokens)
    listed = {entry.path for entry in owner.folder.manifest.files}
    return {name: owner.folder.path / name for name in (TOKENIZER, *BESIDE) if name in listed}


def _require_own(folder: AdapterFolder, tokens: Mapping[str, int]) -> None:
    have = vocabulary_of(read_tokenizer(folder.path))
    absent = [f"{token} = {number}" for token, number in tokens.items() if have.get(token) != number]
    if absent:
        raise HubkitError(
            "HK-VOCABULARY",
            "the adapter's own tokenizer does not have the tokens that it adds",
            where=str(folder.path / TOKENIZER),
            want=absent,
            fix="pull it again, or train it again",
        )
