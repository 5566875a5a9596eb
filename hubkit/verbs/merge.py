"""`merge`: fold adapters into their base and write a new checkpoint, in tiles from file to file.

Accumulated in fp32, cast once. Memory: a ring of buffers, whatever the size of the base; see `MergeEstimate`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit import __version__
from hubkit.artifact.folder import CARD_NAME, PEFT_CONFIG, TENSORS_NAME, quantized_for, staged, untold
from hubkit.documents.arguments import checked, size_of
from hubkit.documents.licenses import require_license
from hubkit.documents.manifest import MANIFEST_NAME, FileEntry, Manifest, Parent
from hubkit.documents.schema import canonical, sha256
from hubkit.documents.shown import Shown
from hubkit.errors import HubkitError
from hubkit.named.behaviour import Behaviour
from hubkit.named.merging import Made, Prepared, prepared, require_into, write
from hubkit.named.sources import base_with_record, chosen_name
from hubkit.named.terms import Term, Terms, adapters, mix_of, open_terms, require_base, require_mix
from hubkit.named.vocabulary import tokenizer_files
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    import torch

    from hubkit.artifact.identity.digest import BaseRecord
    from hubkit.tensors.files.shards import Shards
    from hubkit.tensors.weights.estimate import MergeEstimate
    from hubkit.tensors.weights.merging import MergePlan

_SKIPPED = {"config.json", "README.md", MANIFEST_NAME, TENSORS_NAME, PEFT_CONFIG}
_HEAD = 512
HASHED = 2 << 30
"""Bytes of a base that a dry run hashes, at most; of a larger one that is not known yet it knows the headers."""


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
        plan: what the merge will need; of a dry run alone.
        kept: tensors that were read back and are the base's own, bit for bit; all others were read back and are what
            was computed.
        codec: how the base was quantized for an adapter that was trained so, or is in its files; None where it is not.
        into: which weights it was merged into: ``trained`` or ``original``; ``4bit``: the former, packed again.
        shift: how far the weights of ``original`` lie from those that it was trained beside, or those of ``4bit`` from
            those that were packed: the norm of their difference over the norm of the original or unpacked ones.
        lost: of ``4bit``: the norm of that difference over the norm of what the adapters changed.
        untold: adapters that do not say whether they were trained on a base in 4 bits, where none says that it was.
        rounding: what storing it in 16 bits rounds off, by a few layers: of the norm of the ``weights``, of that of
            their ``change``, and the part of that change's values that ``vanished``. None in 32 bits.
        decoded: weights that the base stores as codes and the result does not: name -> how they are stored now.
        check: where it was asked for: how far what it says lies from what the adapted base says, in fp32: ``kl`` (nats
            a token), ``top1`` (part of equal first choices), ``largest`` (difference of two logits), ``tokens``.
    """

    path: Path
    digest: str
    changed: int
    tensors: int
    size: int
    unties: bool
    overrides: tuple[str, ...]
    dry_run: bool
    kept: int = 0
    codec: str | None = None
    into: str = "trained"
    shift: float | None = None
    untold: tuple[str, ...] = ()
    lost: float | None = None
    check: Mapping[str, float] | None = None
    rounding: Mapping[str, float] | None = None
    plan: MergeEstimate | None = None
    decoded: Mapping[str, str] = field(default_factory=dict)


@checked
def merge(
    base: Path | str,
    terms: Terms,
    out: Path | str,
    *,
    mix: str = "sum",
    into: str = "trained",
    dtype: str | None = None,
    check: bool = False,
    check_prompts: Path | str | None = None,
    check_kl: float = 0.01,
    check_top1: float = 0.97,
    name: str | None = None,
    license: str | None = None,
    revision: str | None = None,
    registry: str | None = None,
    offline: bool = False,
    allow_base_mismatch: bool = False,
    replace: bool = False,
    max_shard_size: int | str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Merges adapters into their base.

    Of a base that stores codes (fp8, int8, compressed-tensors) the weights that change are decoded, and its config says
    so; where that cannot be, all are (`hubkit.tensors.weights.decoding.without_codes`). The manifest lists them.

    Args:
        base: folder or repository.
        terms: what to merge: ``"1.0*./a + -0.5*org/b"``, or a mapping reference -> weight.
        out: folder of the new checkpoint.
        mix: ``sum``, or ``stack``: each on top of the one before.
        into: where an adapter was trained on a quantized base: ``trained``, the weights that it was trained beside,
            decoded, so that the result computes what was trained; or ``original``, those before quantizing, which moves
            every weight that the adapter was trained beside (see `Merged.shift`). The same for all other adapters. A
            base that is stored in 4 bits is decoded: nothing is ever added to codes. ``4bit``: as ``trained``, and the
            linear layers packed into NF4 afterwards, as bitsandbytes and transformers read it, which loses most of a
            small change (see `Merged.lost`).
        dtype: of all floating tensors of the result; the base's own by default, of packed ones that of its config.
        check: also run base with adapters and the merged model, both in float32 on the CPU, on texts of the former's
            own, and keep the merged one only if it says the same; see `Merged.check`.
        check_prompts: what these texts begin with, one prompt a line, or rows as for `train`, which are whole texts;
            asks for the check. By default a few sentences in several languages, and code.
        check_kl: nats a token that it may be off at most.
        check_top1: part of equal first choices that it must have at least.
        replace: replace a merged checkpoint that is at `out`.
        max_shard_size: of the tensors in one weight file, bytes or text like ``5GB``; the base's own files by default.
        dry_run: check everything and say what it would need (`Merged.plan`); write nothing.

    A merge that was killed leaves its finished files; the same merge takes them over.

    Raises:
        HubkitError: ``HK-TERMS``, ``HK-MIX``, ``HK-NAME``, ``HK-BASE-MISMATCH``, ``HK-BASE-FORMAT``,
            ``HK-NOT-MERGEABLE``, ``HK-VOCABULARY``, ``HK-MERGE-NOOP`` when nothing would change, ``HK-MERGE-DIFFERS``
            when what is read back is not what was computed, ``HK-MERGE-DRIFT`` when the check fails, ``HK-NAN``,
            ``HK-EXISTS``, ``HK-DISK``; what pulling and reading raise.
    """
    from hubkit.tensors.device import arithmetic
    from hubkit.tensors.files.dtypes import dtype_named
    from hubkit.tensors.files.shards import unwritten
    from hubkit.tensors.weights.finished import take_over
    from hubkit.tensors.weights.rounding import rounding

    require_license(license)
    out = Path(out)
    wanted, name = dtype_named(dtype), chosen_name(name, out)
    limit = None if max_shard_size is None else size_of(max_shard_size, "max-shard-size")
    require_mix(mix)
    require_into(into)
    behaviour = Behaviour(None if check_prompts is None else Path(check_prompts), check_kl, check_top1)
    _require_replaceable(out, replace)
    where = Where(registry, offline, progress)
    members = open_terms(terms, where)
    source, record = base_with_record(base, revision, where, HASHED if dry_run else None)
    overrides = _overrides(members, record, allow_base_mismatch)
    tokenizer = tokenizer_files(members, source.path)
    ready = prepared(source.path, members, mix_of(members, mix), into, wanted)
    plan, shards, codec = ready.plan, ready.shards, ready.codec
    unties = plan.tied_head is not None
    silent = tuple(one.name for one in adapters(members) if codec is None and untold(one.folder.manifest))
    count, changing = len(shards.headers), len(plan.sites)
    planned = Merged(out, "", changing, count, 0, unties, overrides, True, 0, codec, into, ready.shift, silent)
    planned = dataclasses.replace(planned, decoded=ready.decoded)
    texts = behaviour.texts(members, source.path) if check or check_prompts is not None else None
    needs = _needs(plan, shards, wanted, limit, out, record)
    if dry_run:
        needs = dataclasses.replace(needs, pull=needs.unread if source.outline else 0)
        return dataclasses.replace(planned, size=needs.disk, plan=needs)
    words = None if texts is None else behaviour.adapted(texts, members, mix, source.path, codec)
    trained = quantized_for(term.folder for term in adapters(members)) if into != "original" else (None, None)
    manifest = Manifest(
        kind="model",
        name=name,
        base=dataclasses.replace(record.fingerprint, codec=trained[0], compute_dtype=trained[1]),
        parents=tuple(Parent(m.reference, m.folder.manifest.digest, m.weight) for m in members),
        mix=_tree(plan),
        license=license,
        overrides=overrides,
    ).shareable()
    key = _key(manifest, dtype, into, limit)
    held = unwritten(term.folder.weights_path for term in adapters(members))
    with staged(out, replace=replace, rescue=partial(take_over, key)) as stage, held:
        made = write(ready, stage, wanted, "" if into == "4bit" else key, limit, record.tensors)
        if made is None:
            raise _nothing_changed(str(base), dtype)
        how = _facts(ready, made, into, dtype, limit)
        how["rounding"] = rounding(plan, shards, wanted)
        how["check"] = None if words is None else behaviour.require(words, stage, str(out))
        manifest = dataclasses.replace(manifest, composition=_known({**how, **arithmetic()}))
        digest, size = _finish(stage, source.path, manifest, dict(made.files), tokenizer)
    done: dict[str, Any] = {name: getattr(made, name) for name in ("changed", "tensors", "kept", "shift", "lost")}
    done |= {name: how[name] for name in ("check", "rounding")}
    return dataclasses.replace(planned, digest=digest, size=size, dry_run=False, **done)


def _overrides(members: list[Term], record: BaseRecord, allow: bool) -> tuple[str, ...]:
    """As `require_base`; a base of which a dry run knows the headers alone need not be proven yet."""
    try:
        return require_base(members, record, allow)
    except HubkitError as error:
        if error.code != "HK-BASE-UNPROVEN" or record.fingerprint.files:
            raise
        return ()


def _needs(
    plan: MergePlan, shards: Shards, dtype: torch.dtype | None, limit: int | None, out: Path, record: BaseRecord
) -> MergeEstimate:
    """What the merge will need; a disk without room for it is refused."""
    from hubkit.tensors.weights.estimate import estimate
    from hubkit.tensors.weights.merging import in_files

    unread = 0 if record.fingerprint.weights else sum(info.stop - info.start for info in shards.headers.values())
    needs = estimate(plan, shards, in_files(plan, shards, dtype, limit, set()), out, unread)
    needs.require_room(out)
    return needs


def _key(manifest: Manifest, dtype: str | None, into: str, limit: int | None) -> str:
    """Says what is merged, to the last bit: inputs, options, and what the arithmetic depends on."""
    import torch

    here = [__version__, torch.__version__, torch.backends.cpu.get_cpu_capability(), os.environ.get("MKL_CBWR")]
    return sha256(canonical({"merge": [manifest.digest, dtype, into, limit, *here]}))


def _facts(ready: Prepared, made: Made, into: str, dtype: str | None, limit: int | None) -> dict[str, Any]:
    """How a checkpoint was merged, as its manifest says it."""
    how: dict[str, Any] = {"dtype": dtype, "max_shard_size": limit, "changed": made.changed, "kept": made.kept}
    how |= {"computed": made.tensors - made.kept, "codec": ready.codec, "compute_dtype": ready.compute_dtype}
    how |= {"into": into if ready.codec or into != "trained" else None, "shift": made.shift, "lost": made.lost}
    return {**how, "decoded": dict(ready.decoded) or None}


def _known(facts: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in facts.items() if value is not None}


def _nothing_changed(base: str, dtype: str | None) -> HubkitError:
    return HubkitError(
        "HK-MERGE-NOOP",
        "the merged weights are the base's, bit for bit",
        where=base,
        have="every change is zero, or too small for the dtype",
        fix="another adapter or weight" if dtype == "float32" else "another adapter or weight, or --dtype float32",
    )


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
