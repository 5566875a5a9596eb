"""`pack`: make an adapter folder complete, checked and bound to its base; a plain PEFT folder is adopted.

Packing the same content again gives the same bytes, in any folder. What is in the folder and does not belong to an
adapter (optimizer states, pickles, logs) is never carried along, and never deleted: then a new folder must be named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hubkit.adopting.adopt import adopt
from hubkit.adopting.folders import TRAINER_STATE, folders_apart
from hubkit.artifact.adapterhub import FILES as ADAPTERHUB_FILES
from hubkit.artifact.adapterhub import HEAD_PICKLE, HEAD_WEIGHTS
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
    untold,
    write_adapter,
)
from hubkit.artifact.identity.digest import hash_file
from hubkit.artifact.task_types import LABELS_NAME
from hubkit.documents.arguments import checked
from hubkit.documents.files import read, refusing, require_unlinked
from hubkit.documents.licenses import require_license
from hubkit.documents.manifest import Manifest
from hubkit.documents.probes import PROBES_NAME
from hubkit.documents.schema import MAX_BYTES, parse
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.members import with_members_from
from hubkit.named.probing import add_probes
from hubkit.named.runs.recording import without_stale
from hubkit.named.sound import remarks
from hubkit.named.sources import base_with_record, chosen_name, named_base, under_its_name
from hubkit.named.writing import codec_named, require_version
from hubkit.registry.address import is_repo
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where

_NOT_COPIED = {MANIFEST_NAME, CARD_NAME, PEFT_CONFIG, WEIGHTS_NAME, TENSORS_NAME, PROBES_NAME}
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
        untold: it does not say whether it was trained on a base in 4 bits; see `codec` of `pack`.
        changed: whether anything was written.
        dry_run: nothing was written.
        effect: how far it moves the base's answers to its probes, mean difference in nats; None without new probes.
        unseen: the dtypes of servers in which rounding hides so little.
        stale: its probes were left out: they are not those of its tensors any more.
        notes: what is odd about its values, none of which is wrong.
    """

    path: Path
    digest: str
    manifest: Manifest
    adopted: bool
    renamed: tuple[str, ...]
    left_out: tuple[str, ...]
    changed: bool
    dry_run: bool
    untold: bool = False
    effect: float | None = None
    unseen: tuple[str, ...] = ()
    stale: bool = False
    notes: tuple[str, ...] = ()


@checked
def pack(
    folder: Path | str,
    *,
    base: Path | str | None = None,
    out: Path | str | None = None,
    version: str | None = None,
    name: str | None = None,
    license: str | None = None,
    codec: str | None = None,
    labels: Sequence[str] | None = None,
    without_head: bool = False,
    probes: bool = False,
    prompts: Path | str | None = None,
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
        codec: how the base was quantized while another tool trained the adapter, which does not say so itself:
            ``nf4`` (blocks of 64, double quantization), and what it was decoded to, where that is not its files' dtype:
            ``nf4:bfloat16``. It is then run on, and merged into, such weights.
        labels: names of the labels that the head of another tool's adapter chooses, in the order of its outputs; by
            default those of the folder or the base, else LABEL_0, LABEL_1...
        without_head: leave out the head that AdapterHub keeps beside an adapter.
        probes: load the base and record what it says with the adapter on a few prompts, by which servers are tested.
        prompts: a file of these prompts, one a line, and `probes`; without it a few in several languages, and code.
        revision: of the base, where it is a repository that names none.
        allow_base_mismatch: bind an adapter to another base than its manifest or PEFT's configuration says; recorded.
        allow_partial: adopt a PEFT adapter of fewer modules than its configuration names; recorded.
        replace_out: replace an adapter that is at `out`.
        dry_run: check everything, write nothing.

    Raises:
        HubkitError: ``HK-NOT-ADAPTER``, ``HK-FOREIGN``, ``HK-PICKLE``, ``HK-SAFETENSORS``, ``HK-OPTION``, ``HK-KEYS``,
            ``HK-SHAPE``, ``HK-DTYPE``, ``HK-NAN``, ``HK-CODEC``, ``HK-TARGET``, ``HK-HEAD``, ``HK-LABELS``,
            ``HK-BASE-*``, ``HK-VERSION``, ``HK-NAME``, ``HK-EXISTS``, ``HK-EXTRA-FILES``; ``HK-PROBES``, ``HK-NO-ROWS``
            and what loading the base raises, with `probes`.
    """
    require_license(license)
    folder = Path(folder)
    require_version(version)
    quantized = None if codec is None else codec_named(codec)
    where = Where(registry, offline, progress)
    require_unlinked(folder, sorted(_NOT_COPIED), cached=True)
    adopted = not (folder / MANIFEST_NAME).is_file()
    if name is not None or (adopted and folder.is_dir()):
        name = chosen_name(name, folder)
    given: dict[str, Any] = {"version": version, "name": name, "license": license}
    renamed: tuple[str, ...] = ()
    if adopted:
        allowed = {"allow_partial": allow_partial, "allow_base_mismatch": allow_base_mismatch}
        allowed |= {"without_head": without_head}
        found = adopt(folder, name or folder.name, base, revision, where, labels=labels, **allowed)
        manifest, files, renamed = found.manifest, found.files, found.renamed
    else:
        _require_foreign(labels, without_head, str(folder))
        probing = probes or prompts is not None
        manifest, files = _repack(folder, base, revision, allow_base_mismatch, where, probing)
    manifest = manifest if quantized is None else _trained_on(manifest, *quantized, str(folder))
    manifest = replace(manifest, **{key: value for key, value in given.items() if value is not None})
    extra, left_out = _others(folder, {**files, **dict.fromkeys(_spent(manifest, without_head) if adopted else ())})
    files = {**extra, **files}
    _require_own(folder, left_out if out is None else ())
    dest, replacing = Path(out) if out is not None else folder, out is None or replace_out
    stale = not adopted and _drop_stale_probes(folder, files)
    manifest, notes = without_stale(manifest, folder, files)
    effect, unseen = None, tuple[str, ...]()
    if (probes or prompts is not None) and not dry_run:
        check_adapter(dest, manifest, files, replace=replacing)
        given_base = named_base(base, revision, manifest.base)
        effect, unseen = add_probes(folder, manifest, files, prompts, *given_base, where, allow_base_mismatch)
    if manifest.kind == "mix" and manifest.mix is not None and out is not None:
        manifest = replace(manifest, mix=with_members_from(manifest.mix, folder, dest))
    files[CARD_NAME] = _card(folder, manifest, files)
    check_adapter(dest, manifest, files, replace=replacing)
    if dry_run:
        return Packed(
            dest, "", manifest, adopted, renamed, left_out, False, True, _untold(manifest, files), stale=stale
        )
    before = _digest(dest)
    made = write_adapter(dest, manifest, files, replace=replacing)
    changed = made.digest != before
    told = _untold(made, files), effect, unseen, stale and effect is None, (*notes, *remarks(AdapterFolder(dest, made)))
    return Packed(dest, made.digest, made, adopted, renamed, left_out, changed, False, *told)


def _spent(manifest: Manifest, without_head: bool) -> set[str]:
    """Files of another tool's folder whose content is in the adapter now."""
    left = {HEAD_WEIGHTS, HEAD_PICKLE} if without_head else set()
    return {*ADAPTERHUB_FILES, *((LABELS_NAME,) if manifest.task else ())} - left


def _require_foreign(labels: Sequence[str] | None, without_head: bool, where: str) -> None:
    """Refuses what is said of another tool's folder for one of ours: ``HK-OPTIONS``."""
    given = [name for name, value in (("labels", labels), ("without-head", without_head)) if value]
    if given:
        what, fix = "these say something of another tool's adapter", f"leave out --{given[0]}"
        raise HubkitError("HK-OPTIONS", what, where=where, have=given, fix=fix, status=USAGE)


def _require_own(folder: Path, left_out: tuple[str, ...]) -> None:
    """Refuses to pack in place what would have to leave files out: they would be lost."""
    if left_out:
        raise HubkitError(
            "HK-EXTRA-FILES",
            "the folder holds files that do not belong to an adapter",
            where=str(folder),
            have=list(left_out),
            fix="hubkit pack DIR --out NEW-DIR leaves them where they are",
        )


def _drop_stale_probes(folder: Path, files: dict[str, bytes | Path]) -> bool:
    """Takes probes out of `files` that are of other tensors than the folder has now; whether it did."""
    if PROBES_NAME not in files:
        return False
    path = folder / MANIFEST_NAME
    listed = {one["path"]: one["sha256"] for one in parse(read(path, MAX_BYTES), str(path)).get("files", ())}
    if all(hash_file(folder / name) == listed.get(name) for name in (PROBES_NAME, WEIGHTS_NAME) if name in files):
        return False
    del files[PROBES_NAME]
    return True


def _untold(manifest: Manifest, files: Mapping[str, bytes | Path]) -> bool:
    """Whether nobody knows if it was trained in 4 bits: the adapter does not say, and its base is not stored so."""
    listed = files.get(TENSORS_NAME, b"")
    tensors = listed if isinstance(listed, bytes) else listed.read_bytes()
    return untold(manifest) and b".quant_state." not in tensors


def _repack(
    folder: Path, base: Path | str | None, revision: str | None, allow: bool, where: Where, probing: bool
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
    require_unlinked(folder, [entry.path for entry in manifest.files], cached=True)
    files: dict[str, bytes | Path] = {e.path: folder / e.path for e in manifest.files if (folder / e.path).is_file()}
    missing = [entry.path for entry in manifest.files if entry.path not in files]
    if missing:
        raise HubkitError(
            "HK-FILES", "files of the adapter are missing", where=str(folder), have=missing, fix="pull or make it again"
        )
    opened = AdapterFolder(folder, manifest)
    if manifest.kind != "adapter":
        if base is not None and not (manifest.kind == "mix" and probing):
            require_adapter(opened)
        return manifest, files
    if base is None:
        check_tensors(opened, recorded_base(opened))
        return manifest, files
    source, record = base_with_record(base, revision, where)
    record = under_its_name(source, record)
    used: list[str] = []
    if manifest.base is not None:
        have = record.fingerprint, opened.base_tensors(), record.tensors
        used = require_same_base(manifest.name, str(folder), manifest.base, *have, allow)
        manifest = replace(manifest, overrides=tuple(dict.fromkeys([*manifest.overrides, *used])))
    check_tensors(opened, Base.from_folder(source.path))
    files[TENSORS_NAME] = tensors_bytes(record.tensors)
    was, bound = manifest.base or record.fingerprint, record.fingerprint
    if not used and was.source and is_repo(was.source) and not (bound.source and is_repo(bound.source)):
        bound = replace(bound, source=was.source, revision=was.revision)  # the same bytes, under a name others can use
    bound = replace(bound, codec=was.codec, compute_dtype=was.compute_dtype, declared=was.declared)
    return replace(manifest, base=bound), files


def _trained_on(manifest: Manifest, codec: str, compute_dtype: str | None, where: str) -> Manifest:
    """The manifest of an adapter that was trained on a quantized base, which it did not say."""
    base = manifest.base
    if manifest.kind != "adapter" or base is None or not (untold(manifest) or base.codec == codec):
        have = base.codec if base is not None and base.codec else f"{manifest.kind}, trained on a base as it is"
        what, fix = "the adapter says what it was trained on", "leave --codec out"
        raise HubkitError("HK-CODEC", what, where=where, want=codec, have=have, fix=fix)
    return replace(manifest, base=replace(base, codec=codec, compute_dtype=compute_dtype))


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
