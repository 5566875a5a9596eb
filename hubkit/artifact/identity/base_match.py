"""Whether two fingerprints are of one base, and every difference when they are not.

The same values prove a base (`weights`), and so do the same files (`files`: what a registry tells of a base that was
not downloaded). The same layout proves nothing. Tokenizer, chat template, config and codec are compared where both are
known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from hubkit.artifact.identity.config_identity import TEXT_TYPE
from hubkit.artifact.identity.counted import TensorDigest
from hubkit.documents.manifest import BaseFingerprint
from hubkit.errors import UNDECIDED, HubkitError

OVERRIDE: Final = "allow-base-mismatch"
"""The name under which the override is recorded in what is written."""
LISTED: Final = 5
"""Names of tensors listed in full; a longer list is cut, and the rest counted."""


@dataclass(frozen=True)
class _Difference:
    field: str
    want: str
    have: str
    text: str


def differences(
    want: BaseFingerprint,
    have: BaseFingerprint,
    want_tensors: Iterable[TensorDigest] | None = None,
    have_tensors: Iterable[TensorDigest] | None = None,
) -> list[str]:
    """All differences between two bases, in words; empty when nothing that both know differs.

    An empty list is a proof only when `proven` is True.

    Args:
        want: the base something was made for.
        have: the base at hand.
        want_tensors: tensors of `want` (``tensors.json``), for naming those that differ.
        have_tensors: tensors of `have` (`BaseRecord.tensors`).
    """
    return [d.text for d in _differences(want, have, want_tensors, have_tensors)]


def proven(want: BaseFingerprint, have: BaseFingerprint) -> bool | None:
    """Whether the weights of two bases are the same; None when neither values nor files of both are known."""
    if want.weights and have.weights:
        return want.weights == have.weights
    if want.files and have.files:
        # the names of the files do not matter: which tensor is in which file stands in the files
        return sorted(want.files.values()) == sorted(have.files.values())
    return None


def require_same_base(
    adapter_name: str,
    where: str,
    want: BaseFingerprint,
    have: BaseFingerprint,
    want_tensors: Iterable[TensorDigest] | None = None,
    have_tensors: Iterable[TensorDigest] | None = None,
    allow: bool = False,
) -> list[str]:
    """Refuse to use an adapter on another base than the one it was trained on.

    Args:
        adapter_name: for the message.
        where: the adapter's reference, e.g. ``ana/chat@9f31c2e`` or its folder.
        want: the base in its manifest.
        have: the base at hand.
        want_tensors: the tensors in its ``tensors.json``, where it has one.
        have_tensors: the tensors of the base at hand.
        allow: the user's ``--allow-base-mismatch``.

    Returns:
        The overrides that were needed, to be recorded: ``[]`` or ``["allow-base-mismatch"]``.

    Raises:
        HubkitError: ``HK-BASE-MISMATCH`` with all differences; ``HK-BASE-UNPROVEN`` (status 3) when nothing differs
            but neither values nor files of both are known.
    """
    found = _differences(want, have, want_tensors, have_tensors)
    same = proven(want, have)
    if same and not found:
        return []
    if allow:
        return [OVERRIDE]
    fix = f"hubkit pull --base {where.rpartition('@')[0] or where}    or    --{OVERRIDE}"
    if not found:
        raise HubkitError(
            "HK-BASE-UNPROVEN",
            f"it is not known whether adapter {adapter_name!r} was trained on this base",
            where=f"{where}  hubkit.json#/base",
            want=f"the digest of the weights or of their files  ({_origin(want)})",
            have=f"only the layout  ({_origin(have)})",
            fix=fix,
            status=UNDECIDED,
        )
    raise HubkitError(
        "HK-BASE-MISMATCH",
        f"adapter {adapter_name!r} was trained on another base",
        where=f"{where}  " + ", ".join(dict.fromkeys(f"hubkit.json#/base/{d.field}" for d in found)),
        want=[f"{d.want}  ({_origin(want)})" for d in found],
        have=[f"{d.have}  ({_origin(have)}): {d.text}" for d in found],
        fix=fix,
    )


def _differences(
    want: BaseFingerprint,
    have: BaseFingerprint,
    want_tensors: Iterable[TensorDigest] | None,
    have_tensors: Iterable[TensorDigest] | None,
) -> list[_Difference]:
    found = []
    if not proven(want, have):
        found += _weights(want, have, list(want_tensors or ()), list(have_tensors or ()))
    if want.config and have.config:
        found += _config(want.config, have.config)
    for field, name in (("tokenizer", "the tokenizer"), ("template", "the chat template"), ("codec", "the codec")):
        one, other = getattr(want, field), getattr(have, field)
        if one is not None and other is not None and one != other:
            found.append(_Difference(field, _short(one), _short(other), f"{name} differs"))
    return found


def _weights(
    want: BaseFingerprint, have: BaseFingerprint, want_tensors: list[TensorDigest], have_tensors: list[TensorDigest]
) -> list[_Difference]:
    texts = _tensors(want_tensors, have_tensors) if want_tensors and have_tensors else []
    if want.weights and have.weights:
        pair = ("weights", _short(want.weights), _short(have.weights))
        return [_Difference(*pair, text) for text in texts or ["the values of the weights differ"]]
    if proven(want, have) is False:
        mine, other = sorted(want.files.items()), sorted(have.files.items())
        alone = [(n, d) for n, d in other if d not in want.files.values()] or other
        missing = [(n, d) for n, d in mine if d not in have.files.values()] or mine
        listed = _listed([name for name, _ in alone])
        count = f"{len(alone)} of {len(other)} weight files {'differs' if len(alone) == 1 else 'differ'}: {listed}"
        pair = ("files", _short(missing[0][1]), _short(alone[0][1]))
        return [_Difference(*pair, text) for text in [*texts, count]]
    return [_Difference("layout", _short(want.layout), _short(have.layout), text) for text in texts]


def _tensors(want: list[TensorDigest], have: list[TensorDigest]) -> list[str]:
    """How two lists of tensors differ; digests count where both are known, otherwise names and shapes alone."""
    mine, other = {t.name: t for t in want}, {t.name: t for t in have}
    both = sorted(mine.keys() & other.keys())
    reshaped = [name for name in both if mine[name].shape != other[name].shape]
    changed = [
        name
        for name in both
        if name in reshaped
        or (mine[name].sha256 and other[name].sha256 and _values(mine[name]) != _values(other[name]))
    ]
    out = []
    if changed:
        shapes = {n: f"{n} ({_shape(other[n].shape)}, not {_shape(mine[n].shape)})" for n in reshaped}
        verb = "tensor differs" if len(mine) == 1 else "tensors differ"
        out.append(f"{len(changed)} of {len(mine)} {verb}: {_listed([shapes.get(n, n) for n in changed])}")
    for names, word in ((sorted(mine.keys() - other.keys()), "missing"), (sorted(other.keys() - mine.keys()), "more")):
        if names:
            out.append(f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {word}: {_listed(names)}")
    return out


def _values(tensor: TensorDigest) -> tuple[str, str]:
    return tensor.dtype, tensor.sha256


def _config(want: Mapping[str, Any], have: Mapping[str, Any]) -> list[_Difference]:
    return [
        _Difference(f"config/{key}", _value(want, key), _value(have, key), f"config value {key} differs")
        for key in sorted(want.keys() | have.keys())
        if want.get(key) != have.get(key) and key != TEXT_TYPE
    ]


def _value(config: Mapping[str, Any], key: str) -> str:
    import json

    return f"{key} = {json.dumps(config[key], sort_keys=True)}" if key in config else f"{key} by default"


def _listed(names: list[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _short(digest: str) -> str:
    return f"{digest[:13]}.." if digest.startswith("sha256:") else digest


def _origin(base: BaseFingerprint) -> str:
    source = base.source or "unknown source"
    return f"{source} @ {base.revision[:7]}" if base.revision else source
