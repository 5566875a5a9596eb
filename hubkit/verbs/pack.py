"""`pack`: make an adapter folder complete, checked and bound to its base; a plain PEFT folder is adopted.

Packing the same content again gives the same bytes, in any folder. What is in the folder and does not belong to an
adapter (optimizer states, pickles, logs) is never carried along, and never deleted: then a new folder must be named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hubkit.adopting.adopt import adopt
from hubkit.adopting.folders import TRAINER_STATE, folders_apart
from hubkit.artifact.adapterhub import FILES as ADAPTERHUB_FILES
from hubkit.artifact.folder import (
    CARD_NAME,
    MANIFEST_NAME,
    PEFT_CONFIG,
    TENSORS_NAME,
    WEIGHTS_NAME,
    AdapterFolder,
    check_adapter,
    open_adapter,
    tensors_bytes,
    write_adapter,
)
from hubkit.documents.arguments import checked
from hubkit.documents.files import read, refusing
from hubkit.documents.manifest import Manifest
from hubkit.documents.schema import MAX_BYTES, parse
from hubkit.documents.shown import Shown
from hubkit.errors import HubkitError
from hubkit.named.members import with_members_from
from hubkit.named.sources import base_with_record, chosen_name
from hubkit.named.where import Where
from hubkit.named.writing import require_version
from hubkit.registry.api import Progress

_NOT_COPIED = {MANIFEST_NAME, CARD_NAME, PEFT_CONFIG, WEIGHTS_NAME, TENSORS_NAME}
_HEAD = 512
_LOCAL_BASE = re.compile(r"^(base_model: *|- *['\"]?base_model:\w+:)(['\"]*|['\"]?[/~.][^\n]*)\n", re.MULTILINE)
"""Front matter in which other tools name a folder of somebody's machine as the base."""


@dataclass(frozen=True, repr=False)
class Packed(Shown):
    """A packed adapter.

    Args:
        path: its folder.
        digest: its identity.
        manifest: as written.
        adopted: it came without a manifest, from another tool.
        renamed: how the names of its tensors differed from those that its tool writes: an adapter's name, wrappers.
        left_out: files and folders inside that do not belong to the adapter.
        changed: whether anything was written.
        dry_run: nothing was written.
    """

    path: Path
    digest: str
    manifest: Manifest
    adopted: bool
    renamed: tuple[str, ...]
    left_out: tuple[str, ...]
    changed: bool
    dry_run: bool


@checked
def pack(
    folder: Path | str,
    *,
    base: Path | str | None = None,
    out: Path | str | None = None,
    version: str | None = None,
    name: str | None = None,
    license: str | None = None,
    revision: str | None = None,
    registry: str | None = None,
    offline: bool = False,
    allow_base_mismatch: bool = False,
    allow_partial: bool = False,
    replace_out: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Packed:
    """Packs an adapter folder.

    Args:
        folder: an adapter of hubkit, to get another version, name, licence or base record; or a PEFT folder.
        base: folder or repository of the base; needed for a PEFT folder whose config names none that can be had.
        out: write here instead of in place.
        version: semantic version; the manifest's, or 0.1.0, by default.
        name: the adapter's; the manifest's, or the folder's name, by default.
        license: SPDX identifier.
        revision: of the base, where it is a repository that names none.
        allow_base_mismatch: bind an adapter to another base than its manifest or PEFT's configuration says; recorded.
        allow_partial: adopt a PEFT adapter of fewer modules than its configuration names; recorded.
        replace_out: replace an adapter that is at `out`.
        dry_run: check everything, write nothing.

    Raises:
        HubkitError: ``HK-NOT-ADAPTER``, ``HK-FOREIGN``, ``HK-PICKLE``, ``HK-SAFETENSORS``, ``HK-OPTION``, ``HK-KEYS``,
            ``HK-SHAPE``, ``HK-DTYPE``, ``HK-NAN``, ``HK-TARGET``, ``HK-BASE-*``, ``HK-VERSION``, ``HK-NAME``,
            ``HK-EXISTS``, ``HK-EXTRA-FILES``.
    """
    folder = Path(folder)
    require_version(version)
    where = Where(registry, offline, progress)
    adopted = not (folder / MANIFEST_NAME).is_file()
    if name is not None or (adopted and folder.is_dir()):
        name = chosen_name(name, folder)
    given: dict[str, Any] = {"version": version, "name": name, "license": license}
    renamed: tuple[str, ...] = ()
    if adopted:
        allowed = {"allow_partial": allow_partial, "allow_base_mismatch": allow_base_mismatch}
        found = adopt(folder, name or folder.name, base, revision, where, **allowed)
        manifest, files, renamed = found.manifest, found.files, found.renamed
    else:
        manifest, files = _repack(folder, base, revision, allow_base_mismatch, where)
    manifest = replace(manifest, **{key: value for key, value in given.items() if value is not None})
    extra, left_out = _others(folder, {**files, **dict.fromkeys(ADAPTERHUB_FILES if adopted else ())})
    files = {**extra, **files}
    if left_out and out is None:
        raise HubkitError(
            "HK-EXTRA-FILES",
            "the folder holds files that do not belong to an adapter",
            where=str(folder),
            have=list(left_out),
            fix="hubkit pack DIR --out NEW-DIR leaves them where they are",
        )
    dest = Path(out) if out is not None else folder
    if manifest.kind == "mix" and manifest.mix is not None and out is not None:
        manifest = replace(manifest, mix=with_members_from(manifest.mix, folder, dest))
    files[CARD_NAME] = _card(folder, manifest, files)
    replacing = out is None or replace_out
    check_adapter(dest, manifest, files, replace=replacing)
    if dry_run:
        return Packed(dest, "", manifest, adopted, renamed, left_out, False, True)
    before = _digest(dest)
    made = write_adapter(dest, manifest, files, replace=replacing)
    return Packed(dest, made.digest, made, adopted, renamed, left_out, made.digest != before, False)


def _repack(
    folder: Path, base: Path | str | None, revision: str | None, allow: bool, where: Where
) -> tuple[Manifest, dict[str, bytes | Path]]:
    """The manifest and files of an adapter of ours; checked as they are now, whatever the manifest's list says."""
    from hubkit.artifact.identity.base_match import require_same_base
    from hubkit.documents.names import check_names
    from hubkit.methods.reading import check_tensors, recorded_base
    from hubkit.named.terms import require_adapter
    from hubkit.tensors.base.base import Base

    path = folder / MANIFEST_NAME
    manifest = Manifest.from_document(parse(read(path, MAX_BYTES), str(path)), str(path))  # canonical or not
    check_names([entry.path for entry in manifest.files], f"{path}#/files")
    files: dict[str, bytes | Path] = {e.path: folder / e.path for e in manifest.files if (folder / e.path).is_file()}
    missing = [entry.path for entry in manifest.files if entry.path not in files]
    if missing:
        raise HubkitError(
            "HK-FILES", "files of the adapter are missing", where=str(folder), have=missing, fix="pull or make it again"
        )
    opened = AdapterFolder(folder, manifest)
    if manifest.kind != "adapter":
        if base is not None:
            require_adapter(opened)
        return manifest, files
    if base is None:
        check_tensors(opened, recorded_base(opened))
        return manifest, files
    source, record = base_with_record(base, revision, where)
    if manifest.base is not None:
        have = record.fingerprint, opened.base_tensors(), record.tensors
        used = require_same_base(manifest.name, str(folder), manifest.base, *have, allow)
        manifest = replace(manifest, overrides=tuple(dict.fromkeys([*manifest.overrides, *used])))
    check_tensors(opened, Base.from_folder(source.path))
    files[TENSORS_NAME] = tensors_bytes(record.tensors)
    codec = manifest.base.codec if manifest.base is not None else None
    return replace(manifest, base=replace(record.fingerprint, codec=codec)), files


def _others(folder: Path, known: Mapping[str, Any]) -> tuple[dict[str, bytes | Path], tuple[str, ...]]:
    """Further files that may travel with an adapter (tokenizer, licence, metrics), and those that may not.

    A folder inside that is another adapter or a checkpoint is left as a whole, and named as one.
    """
    from hubkit.documents.names import check_allowed

    kept: dict[str, bytes | Path] = {}
    apart = folders_apart(folder)
    left = [f"{name}/" for name in apart]
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir()):
        inside, parts = path.relative_to(folder).as_posix(), path.relative_to(folder).parts
        if inside in _NOT_COPIED or inside in known or parts[0] in apart or any(part.startswith(".") for part in parts):
            continue
        try:
            with path.open("rb") as file:
                check_allowed(inside, file.read(_HEAD), str(path))
        except HubkitError:
            left.append(inside)
            continue
        if path.suffix == ".safetensors" or path.is_symlink() or path.name == TRAINER_STATE:
            left.append(inside)
        else:
            kept[inside] = path
    return kept, tuple(left)


def _card(folder: Path, manifest: Manifest, files: Mapping[str, Any]) -> bytes:
    from hubkit.artifact.card import card_file

    card = folder / CARD_NAME
    with refusing(card):
        existing = card.read_bytes().decode(errors="replace") if card.is_file() else None
    return card_file(manifest, files, None if existing is None else _LOCAL_BASE.sub("", existing))


def _digest(dest: Path) -> str:
    try:
        return open_adapter(dest).manifest.digest
    except HubkitError:
        return ""
