"""The tokenizer and chat template of a base, found among its files; what they mean is `tokenizer_identity`'s matter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

from hubkit.artifact.identity import digest_cache
from hubkit.artifact.identity.base_files import TEMPLATES, BaseFiles
from hubkit.artifact.identity.tokenizer_identity import (
    SPECIAL,
    load,
    template_digest,
    token_id,
    tokenizer_digest,
    unknown_token,
)
from hubkit.documents.schema import sha256
from hubkit.errors import HubkitError

TOKENIZER: Final = "tokenizer.json"
_MODELS: Final = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_LISTS: Final = ("vocab.json", "merges.txt", "vocab.txt")


def base_tokenizer(base: BaseFiles, config: Mapping[str, Any]) -> str | None:
    """The digest of a base's tokenizer, None when it has none.

    From ``tokenizer.json``; where there is none, the sha256 of the SentencePiece model, or of the vocabulary's files.

    Raises:
        HubkitError: ``HK-TOKENIZER``, ``HK-JSON``.
    """
    if TOKENIZER in base.files:
        return _cached(base, _special(base, config))
    for name in _MODELS:
        if (data := base.whole(name)) is not None:
            return sha256(data)
    lists = [(name, data) for name in _LISTS if (data := base.whole(name)) is not None]
    return sha256("\n".join(f"{name} {sha256(data)}" for name, data in lists).encode()) if lists else None


def base_template(base: BaseFiles) -> str | None:
    """The digest of a base's chat template, None when it has none.

    From ``chat_template.jinja`` (and ``additional_chat_templates/``), ``chat_template.json`` or the entry in
    ``tokenizer_config.json``: the first that is there, as transformers reads them.
    """
    templates: dict[str, str] = {}
    for name in sorted(base.files):
        if name == "chat_template.jinja" or (name.startswith(TEMPLATES + "/") and name.endswith(".jinja")):
            stem = name.rsplit("/", 1)[-1].removesuffix(".jinja")
            templates["default" if name == "chat_template.jinja" else stem] = _text(base, name)
    if templates:
        return template_digest(templates)
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = (base.json(name) or {}).get("chat_template")
        if isinstance(template, str):
            return template_digest(template)
        if isinstance(template, list):
            return template_digest(
                {str(t.get("name")): str(t.get("template")) for t in template if isinstance(t, dict)}
            )
    return None


def _text(base: BaseFiles, name: str) -> str:
    try:
        return (base.whole(name) or b"").decode()
    except UnicodeDecodeError:
        what = "the chat template is not UTF-8 text"
        raise HubkitError("HK-BASE-FILES", what, where=base.place(name), fix="fetch the base again") from None


def _special(base: BaseFiles, config: Mapping[str, Any]) -> dict[str, str | int | None]:
    """The special tokens, each as its text or its id.

    The tokenizer's own files say which there are. Where they say nothing at all (the oldest repositories leave it to
    the class), the model's config has the ids.
    """
    named: dict[str, str | int | None] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        document = base.json(file) or {}
        for name in SPECIAL:
            value = document.get(f"{name}_token")
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                named[name] = text
    if named:
        return named
    sources = (config, base.json("generation_config.json") or {})
    for name in SPECIAL:
        for source in sources:
            value = source.get(f"{name}_token_id")
            value = value[0] if isinstance(value, list) and value else value
            if type(value) is int and name not in named:
                named[name] = value
    return named


def _cached(base: BaseFiles, special: Mapping[str, str | int | None]) -> str:
    if base.folder is None:
        return _digest(base, special)
    path = base.folder / TOKENIZER
    status = path.stat()
    key = "tokenizer:" + hashlib.sha256(repr(sorted(special.items())).encode()).hexdigest()
    known = digest_cache.recall(path, status).get(key)
    if not isinstance(known, str):
        known = _digest(base, special)
        digest_cache.note(path, status, {key: known})
    return known


def _digest(base: BaseFiles, special: Mapping[str, str | int | None]) -> str:
    try:
        document = load(base.whole(TOKENIZER) or b"")
        ids = {k: token_id(document, v) if isinstance(v, str) else v for k, v in special.items()}
        ids["unk"] = ids.get("unk", unknown_token(document))
        return tokenizer_digest(document, ids)
    except HubkitError as error:
        if error.code == "HK-TOKENIZER" and not error.where:
            error.where = base.place(TOKENIZER)
        raise
