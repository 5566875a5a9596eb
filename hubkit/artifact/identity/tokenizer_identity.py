"""The digests of what a tokenizer does and of the chat template: only what changes the ids that a text becomes.

Of ``tokenizer.json``: normalizer, pre_tokenizer, post_processor, model, added_tokens, brought to one form (versions of
the tokenizers library write merges as ``"a b"`` or as pairs, and write or leave out defaults); beside it the ids of the
special tokens. Not truncation, padding and decoder, and not the class names and options of ``tokenizer_config.json``,
which differ between versions of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from hubkit.documents.schema import sha256
from hubkit.errors import HubkitError

SPECIAL: Final = ("bos", "eos", "pad", "unk")
"""The special tokens whose ids belong to a base's identity."""

_PARTS: Final = ("normalizer", "pre_tokenizer", "post_processor", "added_tokens", "model")
_UNSET: Final = (None, "", False)
_MODEL_DEFAULTS: Final = (
    *("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback"),
    *("ignore_merges", "unk_id"),
)


def tokenizer_digest(tokenizer_json: bytes | Mapping[str, Any], special: Mapping[str, int | None]) -> str:
    """The digest of a tokenizer.

    Args:
        tokenizer_json: the file's bytes, what they parse to, or ``backend_tokenizer.to_str().encode()`` of a live one.
        special: ids of ``bos``, ``eos``, ``pad``, ``unk``; None or absent when there is no such token. The id of
            ``unk`` counts only when the model has an unknown token: byte-level models never produce it, and versions
            of transformers disagree whether they name one.

    Returns:
        ``sha256:<hex>`` of canonical JSON (RFC 8785).

    Raises:
        HubkitError: ``HK-TOKENIZER`` when it is no tokenizer.json.
    """
    document = load(tokenizer_json) if isinstance(tokenizer_json, bytes) else tokenizer_json
    model = document.get("model")
    if not isinstance(model, Mapping):
        raise _refusal("an object without 'model'")
    body = {name: _plain(document[name]) for name in _PARTS if document.get(name) is not None}
    try:
        body["model"] = _model(model)
    except TypeError:
        raise _refusal("merges that are not pairs of text") from None
    ids = {name: special.get(name) for name in SPECIAL}
    if unknown_token(document) is None:
        ids["unk"] = None
    added = body.get("added_tokens")
    if isinstance(added, list):
        body["added_tokens"] = sorted(added, key=lambda token: json.dumps(token.get("id"), default=str))
    return sha256(_canonical({**body, "special": {k: v for k, v in ids.items() if v is not None}}))


def _canonical(body: Mapping[str, Any]) -> bytes:
    """The RFC 8785 bytes of a tokenizer; a vocabulary of whole numbers goes through the far faster json encoder."""
    import rfc8785

    try:
        if _same_in_json(body):
            return json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
        return rfc8785.dumps(dict(body))
    except (rfc8785.CanonicalizationError, ValueError, TypeError, RecursionError) as error:
        raise _refusal(f"values without a canonical form: {str(error)[:200]}") from None


def _same_in_json(body: Mapping[str, Any]) -> bool:
    # json and RFC 8785 write alike but for floats, long integers, and keys beyond the basic plane, sorted by UTF-16
    model = dict(body["model"])
    vocab, merges = model.pop("vocab"), model.pop("merges", [])
    if (
        not isinstance(vocab, dict)
        or not set(map(type, vocab.values())) <= {int}
        or not set(map(type, merges)) <= {str}
    ):
        return False
    small = max(vocab.values(), default=0) < 2**53 and min(vocab.values(), default=0) >= 0
    return small and _basic("".join(vocab)) and _exact({**body, "model": model})


def _exact(value: Any) -> bool:
    if isinstance(value, dict):
        return _basic("".join(value)) and all(map(_exact, value.values()))
    if isinstance(value, list):
        return all(map(_exact, value))
    return isinstance(value, str | bool | None) or (type(value) is int and abs(value) < 2**53)


def _basic(text: str) -> bool:
    return text.isascii() or len(text.encode("utf-16-le")) == 2 * len(text)


def load(data: bytes) -> dict[str, Any]:
    """A parsed ``tokenizer.json``.

    Raises:
        HubkitError: ``HK-TOKENIZER``.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _refusal(str(error)[:200]) from None
    if not isinstance(document, dict):
        raise _refusal("not a JSON object")
    return document


def unknown_token(document: Mapping[str, Any]) -> int | None:
    """The id of the token that the model gives for what it does not know; None when it has none."""
    model = document.get("model")
    if not isinstance(model, Mapping):
        return None
    if isinstance(unk_id := model.get("unk_id"), int):
        return unk_id
    token = model.get("unk_token")
    return token_id(document, token) if isinstance(token, str) and token else None


def token_id(document: Mapping[str, Any], token: str) -> int | None:
    """The id of a token of a parsed ``tokenizer.json``; None when it has no such token."""
    for added in document.get("added_tokens") or ():
        if isinstance(added, Mapping) and added.get("content") == token:
            found = added.get("id")
            return found if isinstance(found, int) else None
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocab, Mapping):
        found = vocab.get(token)
        return found if isinstance(found, int) else None
    if isinstance(vocab, list):
        return next((i for i, entry in enumerate(vocab) if isinstance(entry, list) and entry[:1] == [token]), None)
    return None


def template_digest(template: str | Mapping[str, str] | None) -> str | None:
    """The digest of a chat template: sha256 of its text, or of the canonical JSON of several by name.

    Line ends count as ``\\n``, as Python reads the file; nothing else is changed.
    """
    if isinstance(template, Mapping):
        if set(template) == {"default"}:
            return template_digest(template["default"])
        import rfc8785

        return sha256(rfc8785.dumps({k: _lines(v) for k, v in template.items()})) if template else None
    return None if template is None else sha256(_lines(template).encode())


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _model(model: Mapping[str, Any]) -> dict[str, Any]:
    out = {
        name: value
        for name, value in model.items()
        if name not in ("merges", "vocab") and value is not None and not (name in _MODEL_DEFAULTS and value in _UNSET)
    }
    if isinstance(model.get("unk_id"), int):
        out["unk_id"] = model["unk_id"]  # 0 equals False above
    out["vocab"] = model.get("vocab")
    if isinstance(merges := model.get("merges"), list):
        out.setdefault("type", "BPE")
        # a pair with a space in it has no form as one string: two different ones would look alike
        out["merges"] = [
            f"{pair[0]} {pair[1]}" if type(pair) is list and len(pair) == 2 and " " not in pair[0] + pair[1] else pair
            for pair in merges
        ]
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    out = {name: _plain(item) for name, item in value.items() if item is not None}
    if out.get("type") == "ByteLevel":
        out.setdefault("use_regex", True)
    if out.get("type") == "Metaspace":
        prefixed = out.pop("add_prefix_space", True)
        out.setdefault("prepend_scheme", "always" if prefixed else "never")
        out.setdefault("split", True)
        out.pop("str_rep", None)
    return out


def _refusal(have: str) -> HubkitError:
    fix = "fetch the tokenizer's files again"
    return HubkitError("HK-TOKENIZER", "this is not a tokenizer.json that can be read", have=have, fix=fix)
