"""`merge`: fold adapters into their base and write a new checkpoint, shard by shard.

Accumulated in fp32, cast once. Peak memory: one tensor and a few blocks, whatever the size of the base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.artifact.folder import CARD_NAME, PEFT_CONFIG, TENSORS_NAME, quantized_for, staged
from hubkit.documents.arguments import checked
from hubkit.documents.manifest import MANIFEST_NAME, FileEntry, Manifest, Parent
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.sources import base_with_record, chosen_name
from hubkit.named.terms import Term, Terms, adapters, mix_of, open_terms, require_base, require_mix
from hubkit.named.vocabulary import tokenizer_files
from hubkit.named.where import Where
from hubkit.registry.api import Progress

if TYPE_CHECKING:
    from hubkit.tensors.files.shards import Shards
    from hubkit.tensors.weights.merging import MergePlan

_SKIPPED = {"config.json", "README.md", MANIFEST_NAME, TENSORS_NAME, PEFT_CONFIG}
_HEAD = 512
INTO = ("trained", "original")


@dataclass(frozen=True, repr=False)
class Merged(Shown):
    """A merged checkpoint.

    Args:
        path: its folder.
        digest: of its manifest.
        changed: tensors that differ from the base's.
        tensors: all tensors.
        size: bytes of the weight files.
        unties: the base tied its output head to the embeddings, the result does not.
        overrides: named overrides used.
        dry_run: nothing was written.
        codec: how the base was quantized for an adapter that was trained so; None where none was.
        into: which weights it was merged into then: ``trained`` or ``original``.
        shift: how far the weights of ``original`` lie from those that it was trained beside: the norm of their
            difference over the norm of the original ones.
    """

    path: Path
    digest: str
    changed: int
    tensors: int
    size: int
    unties: bool
    overrides: tuple[str, ...]
    dry_run: bool
    codec: str | None = None
    into: str = "trained"
    shift: float | None = None


@checked
def merge(
    base: Path | str,
    terms: Terms,
    out: Path | str,
    *,
    mix: str = "sum",
    into: str = "trained",
    dtype: str | None = None,
    name: str | None = None,
    license: str | None = None,
    revision: str | None = None,
    registry: str | None = None,
    offline: bool = False,
    allow_base_mismatch: bool = False,
    replace: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Merges adapters into their base.

    Args:
        base: folder or repository.
        terms: what to merge: ``"1.0*./a + -0.5*org/b"``, or a mapping reference -> weight.
        out: folder of the new checkpoint.
        mix: ``sum``, or ``stack``: each on top of the one before.
        into: where an adapter was trained on a quantized base: ``trained``, the weights that it was trained beside,
            decoded, so that the result computes what was trained; or ``original``, those before quantizing, which moves
            every weight that the adapter was trained beside (see `Merged.shift`). The same for all other adapters.
        dtype: of all floating tensors of the result; the base's own by default.
        replace: replace a merged checkpoint that is at `out`.

    Raises:
        HubkitError: ``HK-TERMS``, ``HK-MIX``, ``HK-NAME``, ``HK-BASE-MISMATCH``, ``HK-NOT-MERGEABLE``,
            ``HK-VOCABULARY``, ``HK-MERGE-NOOP`` when nothing would change, ``HK-NAN``, ``HK-EXISTS``, ``HK-DISK``; what
            pulling and reading raise.
    """
    from hubkit.tensors.files.dtypes import dtype_named
    from hubkit.tensors.files.shards import open_shards

    out = Path(out)
    wanted, name = dtype_named(dtype), chosen_name(name, out)
    require_mix(mix)
    _require_into(into)
    _require_replaceable(out, replace)
    where = Where(registry, offline, progress)
    members = open_terms(terms, where)
    source, record = base_with_record(base, revision, where)
    overrides = require_base(members, record, allow_base_mismatch)
    shards, tokenizer = open_shards(source.path), tokenizer_files(members, source.path)
    codec, compute_dtype = quantized_for(term.folder for term in adapters(members))
    shards, shift = _weights(shards, into, codec, compute_dtype)
    plan = _plan(members, mix, shards)
    size = sum(info.stop - info.start for info in shards.headers.values())
    count, unties = len(shards.headers), plan.tied_head is not None
    planned = Merged(out, "", len(plan.sites), count, size, unties, overrides, True, codec, into, shift)
    if dry_run:
        return planned
    trained = {"codec": codec, "compute_dtype": compute_dtype} if into == "trained" else {}
    manifest = Manifest(
        kind="model",
        name=name,
        base=dataclasses.replace(record.fingerprint, **trained),  # type: ignore[arg-type]
        parents=tuple(Parent(m.reference, m.folder.manifest.digest, m.weight) for m in members),
        mix=_tree(plan),
        license=license,
        overrides=overrides,
    ).shareable()
    with staged(out, replace=replace) as stage:
        from hubkit.tensors.weights.merging import write_merged

        files = write_merged(plan, shards, stage, wanted)
        if not files.changed:
            fix = "another adapter or weight" if dtype == "float32" else "another adapter or weight, or --dtype float32"
            raise HubkitError(
                "HK-MERGE-NOOP",
                "the merged weights are the base's, bit for bit",
                where=str(base),
                have="every change is zero, or too small for the dtype",
                fix=fix,
            )
        digest, size = _finish(stage, source.path, manifest, dict(files.files), tokenizer)
    return dataclasses.replace(
        planned, digest=digest, changed=len(files.changed), tensors=count + unties, size=size, dry_run=False
    )


def _require_into(into: str) -> None:
    if into not in INTO:
        what = "unknown weights to merge into"
        raise HubkitError("HK-OPTIONS", what, want=" or ".join(INTO), have=into, status=USAGE)


def _weights(shards: Shards, into: str, codec: str | None, compute_dtype: str | None) -> tuple[Shards, float | None]:
    """The weights to merge into, and how far they lie from those that an adapter was trained beside; see `merge`."""
    from hubkit.tensors.weights.decoding import decoded, distance

    if codec is None:
        return shards, None
    view = decoded(shards, codec, compute_dtype)
    return (view, None) if into == "trained" else (shards, distance(shards, view))


def _plan(members: list[Term], mix: str, shards: Shards) -> MergePlan:
    from hubkit.methods.reading import read_adapter
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.weights.merging import plan_merge

    base = Base.from_headers(shards.headers, shards.config, str(shards.path), shards.read)
    read = {m.name: read_adapter(m.folder, base, name=m.name) for m in adapters(members)}
    return plan_merge(base, mix_of(members, mix), read)


def _require_replaceable(out: Path, replace: bool) -> None:
    """`replace` never deletes a folder that hubkit did not write."""
    if not out.exists():
        return
    if not replace or not (out / MANIFEST_NAME).is_file():
        fix = "another --out, or --replace" if not replace else "another --out, or remove this folder yourself"
        raise HubkitError("HK-EXISTS", f"{out.name!r} exists already", where=str(out), fix=fix)


def _tree(plan: MergePlan) -> dict[str, object]:
    from hubkit.tensors.parts.mix import to_document

    return to_document(plan.mix)


def _finish(
    stage: Path, base: Path, manifest: Manifest, digests: dict[str, str], tokenizer: Mapping[str, Path]
) -> tuple[str, int]:
    """Copies tokenizer and the like, writes card and manifest; the digest and the weights' size."""
    import shutil
    from dataclasses import replace

    from hubkit.artifact.card import render_card
    from hubkit.artifact.identity.digest import hash_file

    for path in sorted(p for p in base.iterdir() if p.is_file()):
        if _belongs(path):
            shutil.copyfile(path, stage / path.name)
    for name, path in tokenizer.items():
        shutil.copyfile(path, stage / name)
    entries = []
    for path in sorted(p for p in stage.iterdir() if p.is_file()):
        digest = digests.get(path.name) or hash_file(path)
        entries.append(FileEntry(path.name, path.stat().st_size, digest))
    manifest = replace(manifest, files=tuple(entries))
    (stage / CARD_NAME).write_text(render_card(manifest, None), "utf-8")
    (stage / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return manifest.digest, sum(e.size for e in entries if e.path in digests)


def _belongs(path: Path) -> bool:
    """Tokenizer, licence and the like: what may travel with a model and says nothing of the base's own weights."""
    from hubkit.documents.names import check_allowed

    name = path.name
    if name in _SKIPPED or name.startswith(".") or name.endswith((".safetensors", ".index.json")):
        return False
    try:
        with path.open("rb") as file:
            check_allowed(name, file.read(_HEAD), str(path))
    except HubkitError:
        return False
    return True
