"""`pack`: make an adapter folder complete, checked and bound to its base; a plain PEFT folder is adopted.

Packing the same content again gives the same bytes, in any folder. What is in the folder and does not belong to an
adapter (optimizer states, pickles, logs) is never carried along, and never deleted: then a new folder must be named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.folder import (
    CARD_NAME,
    MANIFEST_NAME,
    PEFT_CONFIG,
    TENSORS_NAME,
    WEIGHTS_NAME,
    AdapterFolder,
    open_adapter,
    tensors_bytes,
    write_adapter,
)
from hubkit.documents.files import read, refusing
from hubkit.documents.manifest import Manifest, Plugin
from hubkit.documents.schema import MAX_BYTES, parse
from hubkit.errors import USAGE, HubkitError
from hubkit.verbs.sources import Progress, base_reference, base_source

if TYPE_CHECKING:
    from hubkit.artifact.digest import BaseRecord
    from hubkit.methods.host import Method
    from hubkit.tensors.base import Base

_VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")
_NOT_COPIED = {MANIFEST_NAME, CARD_NAME, PEFT_CONFIG, WEIGHTS_NAME, TENSORS_NAME}
_HEAD = 512
_LOCAL_BASE = re.compile(r"^(base_model: *|- *['\"]?base_model:\w+:)(['\"]*|['\"]?[/~.][^\n]*)\n", re.MULTILINE)
"""Front matter in which other tools name a folder of somebody's machine as the base."""


@dataclass(frozen=True)
class Packed:
    """A packed adapter.

    Args:
        path: its folder.
        digest: its identity.
        manifest: as written.
        adopted: it came without a manifest, from another tool.
        left_out: files of the folder that do not belong to an adapter.
        changed: whether anything was written.
        dry_run: nothing was written.
    """

    path: Path
    digest: str
    manifest: Manifest
    adopted: bool
    left_out: tuple[str, ...]
    changed: bool
    dry_run: bool


def pack(
    folder: Path | str,
    *,
    base: str | None = None,
    out: Path | str | None = None,
    version: str | None = None,
    name: str | None = None,
    license: str | None = None,
    revision: str | None = None,
    registry: str | None = None,
    offline: bool = False,
    allow_base_mismatch: bool = False,
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
        allow_base_mismatch: bind an adapter to another base than its manifest says; recorded.
        replace_out: replace an adapter that is at `out`.
        dry_run: check everything, write nothing.

    Raises:
        HubkitError: ``HK-NOT-ADAPTER``, ``HK-PICKLE``, ``HK-SAFETENSORS``, ``HK-OPTION``, ``HK-KEYS``, ``HK-SHAPE``,
            ``HK-NAN``, ``HK-TARGET``, ``HK-BASE-*``, ``HK-VERSION``, ``HK-EXISTS``.
    """
    folder = Path(folder)
    if version is not None and not _VERSION.fullmatch(version):
        raise HubkitError(
            "HK-VERSION", "this is no semantic version", want="MAJOR.MINOR.PATCH, e.g. 1.2.0", have=version,
            fix="https://semver.org", status=USAGE,
        )  # fmt: skip
    given: dict[str, Any] = {"version": version, "name": name, "license": license}
    if (folder / MANIFEST_NAME).is_file():
        manifest, files = _repack(folder, base, revision, registry, offline, allow_base_mismatch, progress)
        adopted = False
    else:
        manifest, files = _adopt(folder, base, revision, registry, offline, progress)
        adopted = True
    manifest = replace(manifest, **{key: value for key, value in given.items() if value is not None})
    extra, left_out = _others(folder)
    files = {**extra, **files}
    if left_out and out is None:
        raise HubkitError(
            "HK-EXTRA-FILES", "the folder holds files that do not belong to an adapter", where=str(folder),
            have=list(left_out), fix="hubkit pack DIR --out NEW-DIR leaves them where they are",
        )  # fmt: skip
    dest = Path(out) if out is not None else folder
    files[CARD_NAME] = _card(folder, manifest, files)
    if dry_run:
        return Packed(dest, "", manifest, adopted, left_out, False, True)
    before = _digest(dest)
    made = write_adapter(dest, manifest, files, replace=out is None or replace_out)
    return Packed(dest, made.digest, made, adopted, left_out, made.digest != before, False)


def _repack(
    folder: Path, base: str | None, revision: str | None, registry: str | None, offline: bool, allow: bool,
    progress: Progress | None,
) -> tuple[Manifest, dict[str, bytes | Path]]:  # fmt: skip
    """The manifest and files of an adapter of ours; checked as they are now, whatever the manifest's list says."""
    from hubkit.artifact.base_match import require_same_base
    from hubkit.methods.reading import read_adapter, recorded_base

    path = folder / MANIFEST_NAME
    with refusing(path):
        manifest = Manifest.from_document(parse(path.read_bytes(), str(path)), str(path))  # canonical or not
    files: dict[str, bytes | Path] = {e.path: folder / e.path for e in manifest.files if (folder / e.path).is_file()}
    missing = [entry.path for entry in manifest.files if entry.path not in files]
    if missing:
        raise HubkitError("HK-FILES", "files of the adapter are missing", where=str(folder), have=missing)
    if manifest.kind != "adapter":
        return manifest, files
    opened = AdapterFolder(folder, manifest)
    if base is None:
        read_adapter(opened, recorded_base(opened))
        return manifest, files
    record = _record(base, revision, registry, offline, progress)
    if manifest.base is not None:
        have = record.fingerprint, opened.base_tensors(), record.tensors
        used = require_same_base(manifest.name, str(folder), manifest.base, *have, allow)
        manifest = replace(manifest, overrides=tuple(dict.fromkeys([*manifest.overrides, *used])))
    read_adapter(opened, _base(record, base))
    files[TENSORS_NAME] = tensors_bytes(record.tensors)
    return replace(manifest, base=record.fingerprint), files


def _adopt(
    folder: Path, base: str | None, revision: str | None, registry: str | None, offline: bool, progress: Progress | None
) -> tuple[Manifest, dict[str, bytes | Path]]:
    """The manifest and files of another tool's adapter: every option and every tensor accounted for."""
    from hubkit.artifact.forms import from_peft_config, short_targets, split_keys
    from hubkit.artifact.header import read_header
    from hubkit.methods.config import config_document, parse_config
    from hubkit.methods.foreign import own_files
    from hubkit.tensors.adapter import Adapter

    foreign = _foreign_config(folder)
    method = _method_for(str(foreign.get("peft_type")), folder)
    form = method.peft_form
    assert form is not None
    values = from_peft_config(form, foreign, str(folder / PEFT_CONFIG))
    weights = _weights(folder)
    parts = split_keys(form, read_header(weights), str(weights)).parts
    if not parts:
        raise HubkitError("HK-KEYS", "the file holds no tensor of an adapter", where=str(weights))
    named = base or foreign.get("base_model_name_or_path")
    if not named:
        raise HubkitError("HK-BASE-NEEDED", "the adapter names no base", where=str(folder), fix="--base BASE")
    asked = revision or (foreign.get("revision") if base is None else None)
    record = _record(str(named), asked, registry, offline, progress)
    sites = _base(record, str(named))
    homeless = [site for site in parts if site not in sites.sites]
    if homeless:
        raise HubkitError(
            "HK-KEYS", f"{len(homeless)} of {len(parts)} adapted modules do not exist in the base", where=str(weights),
            want=f"modules of {named}", have=homeless, fix="--base with the base that the adapter was trained on",
        )  # fmt: skip
    values["targets"] = short_targets(parts, sites.sites)
    config = parse_config(method.info.config, values, str(folder / PEFT_CONFIG))
    name = folder.resolve().name
    adapter = Adapter.read(name, method, config, sites, weights, None)
    manifest = Manifest(
        kind="adapter", name=name, method=method.name, base=record.fingerprint, config=config_document(config),
        plugin=Plugin(method.offer.distribution, method.offer.version),
    )  # fmt: skip
    public = manifest.shareable().base
    assert public is not None
    adapter.source, adapter.revision = public.source, public.revision
    files: dict[str, bytes | Path] = {**own_files(adapter), TENSORS_NAME: tensors_bytes(record.tensors)}
    return manifest, files


def _foreign_config(folder: Path) -> Mapping[str, Any]:
    path = folder / PEFT_CONFIG
    if not path.is_file():
        raise HubkitError(
            "HK-NOT-ADAPTER", f"there is no adapter in {str(folder)!r}", want=f"{MANIFEST_NAME} or {PEFT_CONFIG}",
            have=", ".join(sorted(p.name for p in folder.iterdir())[:10]) if folder.is_dir() else "no such folder",
            fix="hubkit train makes one",
        )  # fmt: skip
    with refusing(path):
        return parse(read(path, MAX_BYTES), str(path))


def _method_for(peft_type: str, folder: Path) -> Method:
    """The installed method that reads this type of PEFT; methods that cannot be imported are passed over.

    Raises:
        HubkitError: ``HK-METHOD-UNKNOWN``.
    """
    from hubkit.methods.host import host

    known: list[str] = []
    for name in host().offers():
        try:
            method = host().load(name)
        except HubkitError:
            continue
        if method.peft_form is not None:
            known.append(method.peft_form.peft_type)
            if method.peft_form.peft_type == peft_type:
                return method
    raise HubkitError(
        "HK-METHOD-UNKNOWN", f"no installed method reads adapters of type {peft_type!r}",
        where=f"{folder / PEFT_CONFIG}#/peft_type", want=", ".join(sorted(known)), have=peft_type,
    )  # fmt: skip


def _weights(folder: Path) -> Path:
    path = folder / WEIGHTS_NAME
    pickles = [p.name for p in folder.glob("adapter_model.*") if p.name != WEIGHTS_NAME]
    if not path.is_file() and pickles:
        raise HubkitError(
            "HK-PICKLE", "the adapter's weights are a pickle, which can run code when it is read", where=str(folder),
            want=WEIGHTS_NAME, have=", ".join(pickles), fix="save it again with safe_serialization=True",
        )  # fmt: skip
    return path


def _record(
    base: str, revision: str | None, registry: str | None, offline: bool, progress: Progress | None
) -> BaseRecord:
    from hubkit.artifact.digest import fingerprint_folder

    source = base_source(base, revision, registry=registry, offline=offline, progress=progress)
    named = base_reference(base, revision).repo or source.reference
    return fingerprint_folder(source.path, source=named, revision=source.commit)


def _base(record: BaseRecord, source: str) -> Base:
    from hubkit.methods.reading import base_of_tensors

    return base_of_tensors(record.tensors, record.fingerprint.config, source)


def _others(folder: Path) -> tuple[dict[str, bytes | Path], tuple[str, ...]]:
    """Further files that may travel with an adapter (tokenizer, licence, metrics), and those that may not."""
    from hubkit.artifact.names import check_allowed

    kept: dict[str, bytes | Path] = {}
    left: list[str] = []
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir()):
        inside = path.relative_to(folder).as_posix()
        if inside in _NOT_COPIED or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            with path.open("rb") as file:
                check_allowed(inside, file.read(_HEAD), str(path))
        except HubkitError:
            left.append(inside)
            continue
        if path.suffix == ".safetensors" or path.is_symlink():
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
