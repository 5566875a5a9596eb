"""From an adapter in memory to its folder: manifest, tensors, the base's list of tensors, model card."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.folder import CARD_NAME, TENSORS_NAME, tensors_bytes, write_adapter
from hubkit.documents.files import refusing, require_unlinked
from hubkit.documents.manifest import MANIFEST_NAME, Manifest, Plugin
from hubkit.errors import USAGE, HubkitError

_VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")

if TYPE_CHECKING:
    from hubkit.artifact.identity.digest import BaseRecord
    from hubkit.methods.host import Method
    from hubkit.tensors.parts.adapter import Adapter


def drafted(
    name: str,
    method: Method,
    config: Any,
    record: BaseRecord,
    codec: str | None,
    license: str | None,
    vocabulary: Any,
    compute_dtype: str | None = None,
) -> Manifest:
    """The manifest of an adapter as far as it is known before its tensors are.

    Args:
        codec: how the base was quantized while it was trained.
        vocabulary: the tokens that it adds, as `hubkit.named.vocabulary` writes them.
        compute_dtype: what a quantized base is decoded to, where that is not its files' own.
    """
    return Manifest(
        kind="adapter",
        name=name,
        method=method.name,
        plugin=Plugin(method.offer.distribution, method.offer.version),
        config=document_of(config),
        base=dataclasses.replace(record.fingerprint, codec=codec, compute_dtype=compute_dtype if codec else None),
        vocabulary=vocabulary,
        license=license,
    )


def card_of(out: Path, manifest: Manifest, files: Iterable[str]) -> bytes:
    """The model card; what people wrote into that of an adapter which is replaced survives."""
    from hubkit.artifact.card import card_file

    card = out / CARD_NAME
    require_unlinked(out, [CARD_NAME])
    with refusing(card):
        ours = (out / MANIFEST_NAME).is_file() and card.is_file()
        existing = card.read_bytes().decode(errors="replace") if ours else None
    return card_file(manifest, files, existing)


def write_live(
    out: Path,
    adapter: Adapter,
    manifest: Manifest,
    record: BaseRecord,
    replace: bool,
    beside: Mapping[str, bytes | Path],
) -> Manifest:
    """Writes an adapter whose tensors have the dtypes that files hold, and the files `beside` it.

    Raises:
        HubkitError: as `hubkit.artifact.folder.write_adapter`.
    """
    from hubkit.methods.foreign import own_files

    public = manifest.shareable().base
    assert public is not None
    adapter.source, adapter.revision = public.source, public.revision
    adapter.task = manifest.task
    files: dict[str, bytes | Path] = {**beside, **own_files(adapter), TENSORS_NAME: tensors_bytes(record.tensors)}
    files[CARD_NAME] = card_of(out, manifest, files)
    return write_adapter(out, manifest, files, replace=replace)


def require_version(version: str | None) -> None:
    """Refuses what is given as a version and is none: ``HK-VERSION`` (status 2)."""
    if version is not None and not _VERSION.fullmatch(version):
        raise HubkitError(
            "HK-VERSION",
            "this is no semantic version",
            want="MAJOR.MINOR.PATCH, e.g. 1.2.0",
            have=version,
            fix="https://semver.org",
            status=USAGE,
        )


def document_of(config: Any) -> dict[str, Any]:
    """A configuration as JSON values."""
    from hubkit.methods.config import config_document

    return config_document(config)


def codec_named(text: str) -> tuple[str, str | None]:
    """``nf4:bfloat16`` as codec and compute dtype.

    Raises:
        HubkitError: ``HK-CODEC``, ``HK-DTYPE``.
    """
    from hubkit.tensors.files.dtypes import dtype_named
    from hubkit.tensors.fourbit.nf4 import CODEC

    name, _, dtype = text.partition(":")
    if name not in (CODEC, CODEC.partition("/")[0]):
        raise HubkitError("HK-CODEC", f"unknown codec {name!r}", want=f"nf4 or {CODEC}, :DTYPE after it", have=text)
    dtype_named(dtype or None)
    return CODEC, dtype or None
