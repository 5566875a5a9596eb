"""`rebase`: an adapter carried over to another state of its base: a new revision, another dtype, more pretraining.

What changed beneath it is said module by module, by digests where nothing else is at hand. How far the adapted model
has drifted is measured, beside how far the bare bases have: where it is more than the budget, nothing is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.folder import (
    CARD_NAME,
    PEFT_CONFIG,
    TENSORS_NAME,
    WEIGHTS_NAME,
    AdapterFolder,
    Source,
    check_adapter,
    open_adapter,
    tensors_bytes,
    write_adapter,
)
from hubkit.documents.arguments import checked
from hubkit.documents.files import require_unlinked
from hubkit.documents.manifest import Manifest, Parent, shareable
from hubkit.documents.probes import PROBES_NAME
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.sources import adapter_source, base_with_record, chosen_name, named_base
from hubkit.named.terms import require_adapter
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from hubkit.artifact.identity.digest import BaseRecord
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.tensors.weights.between import Between, SiteChange
    from hubkit.training.drift import Drift

MAX_DRIFT = 0.1
"""Nats a token by which the adapted model may have drifted, unless another budget is given."""
UNMEASURED = "unmeasured"


@dataclass(frozen=True, repr=False)
class Rebased(Shown):
    """A carried adapter.

    Args:
        path: its folder.
        digest: its identity.
        changed: modules whose values differ between the two bases, the most changed first.
        others: tensors at no module that differ.
        carried: modules that the adapter holds whole, or rows of, which go on as the same change of the new values.
        drift: what the adapted new base says beside the adapted old one; None where nothing changed or was measured.
        base_drift: the same of the two bare bases.
        loss: held-out loss of the adapted old base and of the adapted new one, nats a token; None without rows.
        notes: what else a user should know.
        overrides: named overrides used.
    """

    path: Path
    digest: str
    changed: tuple[SiteChange, ...]
    others: tuple[str, ...]
    carried: tuple[str, ...]
    drift: Drift | None
    base_drift: Drift | None
    loss: tuple[float, float] | None
    notes: tuple[str, ...]
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class _Side:
    """A base that models are made of: its folder, and what is known of it."""

    path: Path
    record: BaseRecord


@checked
def rebase(
    adapter: Path | str,
    onto: Path | str,
    out: Path | str,
    *,
    base: Path | str | None = None,
    revision: str | None = None,
    max_drift: float = MAX_DRIFT,
    prompts: Path | str | None = None,
    data: Path | str | None = None,
    unmeasured: bool = False,
    name: str | None = None,
    registry: str | None = None,
    offline: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> Rebased:
    """Carries an adapter over to another base with the same modules, and measures what becomes of it.

    Args:
        adapter: a folder or repository.
        onto: folder or repository of the new base.
        out: folder of the carried adapter.
        base: folder or repository of the old base; by default the one that the adapter's manifest names.
        revision: of `onto`.
        max_drift: the largest KL per token, in nats, of the adapted new base from the adapted old one.
        prompts: what the texts begin with that it is measured on, one prompt a line, or rows as for `train`, which are
            whole texts; by default a few sentences in several languages, and code. The adapted old base goes on.
        data: rows, as `train` takes them, whose loss is measured, too.
        unmeasured: go on without the old base; recorded.
        name: its name; the folder's by default.
        replace: replace an adapter that is at `out`.

    Raises:
        HubkitError: ``HK-SHAPE`` for a base of other modules; ``HK-REBASE`` for a tokenizer that reads texts otherwise;
            ``HK-REBASE-DRIFT`` above the budget; ``HK-VOCABULARY``; ``HK-BASE-NEEDED`` where the old base is needed
            and not known; ``HK-BASE-MISMATCH`` where `base` is another; ``HK-NOT-ADAPTER``, ``HK-NAN``,
            ``HK-EXISTS``, ``HK-OPTIONS``; what pulling, reading and loading raise.
    """
    from hubkit.methods.reading import read_adapter
    from hubkit.named.measuring import drift_between, texts_to_compare
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.parts.rebasing import carry, holds_values, reads_values

    out = Path(out)
    if not max_drift >= 0:
        raise HubkitError("HK-OPTIONS", "this is no budget", want="--max-drift >= 0", have=str(max_drift), status=USAGE)
    name, where = chosen_name(name, out), Where(registry, offline, progress)
    source = adapter_source(adapter, where)
    folder = require_adapter(open_adapter(source.path))
    target, record = base_with_record(onto, revision, where)
    new = _Side(target.path, record)
    draft = _draft(name, folder, source.reference, record)
    check_adapter(out, draft, {}, replace=replace)
    sites = Base.from_folder(new.path)
    old, before, found = _compared(folder, base, sites, record, unmeasured, where)
    _refuse(found, folder, record, str(onto))
    moved = {one.site.name for one in found.sites}
    made = read_adapter(folder, sites)
    if holds_values(made, moved) and old is None:
        raise _needed(folder, "modules that the adapter holds whole have changed beneath it")
    carried = carry(made, read_adapter(folder, before), moved) if old is not None and moved else []
    made.require_finite(str(onto))
    notes = _notes(folder, record, reads_values(made, moved))
    measured: dict[str, Any] = {"drift": None, "base_drift": None, "loss": None}
    if old is not None and not found.nothing:
        files = (None if one is None else Path(one) for one in (prompts, data))
        measured = drift_between(folder, old.path, new.path, made, *texts_to_compare(old.path, new.path, made, *files))
        _require_near(measured, max_drift, folder, out)
    changed = _changes(found, made, old is not None)
    blind = (UNMEASURED,) if old is None and not found.nothing else ()
    overrides = tuple(dict.fromkeys((*draft.overrides, *blind)))
    document = _document(folder, found, changed, measured, carried, max_drift)
    manifest = dataclasses.replace(draft, rebase=document, overrides=overrides)
    digest = _write(out, folder, manifest, made, record, bool(carried), replace)
    return Rebased(out, digest, changed, found.others, tuple(carried), **measured, notes=notes, overrides=overrides)


def _draft(name: str, folder: AdapterFolder, reference: str, record: BaseRecord) -> Manifest:
    """The manifest as far as it is known before anything is measured: the adapter's own, on the new base."""
    old = folder.manifest
    assert old.base is not None
    return dataclasses.replace(
        old,
        name=name,
        base=dataclasses.replace(record.fingerprint, codec=old.base.codec, compute_dtype=old.base.compute_dtype),
        parents=(Parent(reference, old.digest, 1.0),),
        probes=None,
    )


def _compared(
    folder: AdapterFolder,
    base: Path | str | None,
    new: Base,
    record: BaseRecord,
    unmeasured: bool,
    where: Where,
) -> tuple[_Side | None, Base, Between]:
    """The old base where it is needed, its sites, and how the new one differs from it."""
    from hubkit.artifact.identity.base_match import require_same_base
    from hubkit.methods.reading import recorded_base
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.weights.between import between

    tensors, origin = folder.base_tensors(), folder.manifest.base
    assert origin is not None
    if base is None and tensors and all(one.sha256 for one in tensors):
        sites = recorded_base(folder)
        found = between(sites, tensors, new, record.tensors)
        if unmeasured or found.nothing or found.alone:
            return None, sites, found
    try:
        named, revision = named_base(base, None, origin)
        source, old = base_with_record(named, revision, where)
    except HubkitError as error:
        if base is not None:
            raise
        raise _needed(folder, "the base that it was trained on is not at hand") from error
    require_same_base(folder.manifest.name, str(folder.path), origin, old.fingerprint, tensors, old.tensors)
    sites = Base.from_folder(source.path)
    return _Side(source.path, old), sites, between(sites, old.tensors, new, record.tensors)


def _needed(folder: AdapterFolder, what: str) -> HubkitError:
    origin = folder.manifest.base
    have = f"the adapter's manifest says {origin.source!r}" if origin and origin.source else ""
    fix = f"--base DIR-OR-ORG/NAME; where it is lost, --{UNMEASURED} carries over changes, without a measure of drift"
    return HubkitError("HK-BASE-NEEDED", what, where=str(folder.path), have=have, fix=fix)


def _refuse(found: Between, folder: AdapterFolder, record: BaseRecord, onto: str) -> None:
    """Refuses a base that the adapter does not fit: other modules, another vocabulary where it adds tokens."""
    from hubkit.tensors.weights.between import refuse_other_shapes

    what = "the new base does not have the modules of the old one: the adapter cannot be carried over"
    refuse_other_shapes(found, "the adapter's base", onto, what, "a base made from the old one; or train on this one")
    origin = folder.manifest.base
    assert origin is not None
    if folder.manifest.vocabulary and (found.grown or origin.tokenizer != record.fingerprint.tokenizer):
        raise HubkitError(
            "HK-VOCABULARY",
            "the adapter adds tokens, and the new base has another vocabulary: their ids may be taken",
            where=onto,
            have=list(found.grown) or "another tokenizer",
            fix="train it on the new base",
        )


def _notes(folder: AdapterFolder, record: BaseRecord, reading: list[str]) -> tuple[str, ...]:
    origin = folder.manifest.base
    assert origin is not None
    notes = []
    if reading:
        kept = "its method reads the weights: what it holds of the old ones is kept as it is"
        notes.append(f"{len(reading)} changed modules, first {reading[0]}: {kept}")
    if origin.template != record.fingerprint.template:
        notes.append("the new base has another chat template")
    return tuple(notes)


def _require_near(measured: Mapping[str, Any], budget: float, folder: AdapterFolder, out: Path) -> None:
    drift, bare = measured["drift"], measured["base_drift"]
    if drift.kl <= budget:
        return
    have = [f"the adapted model: {_figures(drift)}", f"the bare bases: {_figures(bare)}"]
    have += [f"held-out loss: {measured['loss'][0]:.4f}, now {measured['loss'][1]:.4f}"] if measured["loss"] else []
    raise HubkitError(
        "HK-REBASE-DRIFT",
        "on the new base the adapter says something else than on the old one",
        where=str(folder.path),
        want=f"at most {budget:g} nats a token",
        have=have,
        fix=f"--max-drift {drift.kl * 1.05:.2g} writes it to start from: train it on with"
        f" hubkit.attach(model, {str(out)!r}, trainable=True) and hubkit.save",
    )


def _figures(found: Drift) -> str:
    return f"{found.kl:.4f} nats a token, {found.top1:.1%} equal first choices"


def _changes(found: Between, made: Adapter, readable: bool) -> tuple[SiteChange, ...]:
    """The modules that changed, those first that changed most."""
    from hubkit.tensors.weights.between import SiteChange, relative_changes

    sizes = relative_changes(found.sites) if readable else [None] * len(found.sites)
    pairs = zip(found.sites, sizes, strict=True)
    every = [SiteChange(moved.site.name, size, moved.site.name in made.parts) for moved, size in pairs]
    return tuple(sorted(every, key=lambda one: -(one.change or 0.0)))


def _document(
    folder: AdapterFolder,
    found: Between,
    changed: Sequence[SiteChange],
    measured: Mapping[str, Any],
    carried: Sequence[str],
    budget: float,
) -> dict[str, Any]:
    """The rebase as the manifest tells it; figures to six digits."""
    origin = folder.manifest.base
    assert origin is not None
    source = {"source": origin.source and shareable(origin.source), "revision": origin.revision}
    known = {"layout": origin.layout, "weights": origin.weights, **source}
    said: dict[str, Any] = {
        "from": {key: value for key, value in known.items() if value is not None},
        "modules_changed": len(changed),
        "tensors_changed": len(found.others) + len(found.grown),
    }
    if largest := next((one for one in changed if one.change is not None), None):
        said |= {"largest_change": float(f"{largest.change:.6g}"), "largest_change_module": largest.site}
    said |= {"carried": list(carried)} if carried else {}
    for key in ("drift", "base_drift"):
        if measured[key] is not None:
            said[key] = {name: float(f"{value:.6g}") for name, value in dataclasses.asdict(measured[key]).items()}
            said["max_drift"] = budget
    return said | ({"loss": [float(f"{one:.6g}") for one in measured["loss"]]} if measured["loss"] else {})


def _write(
    out: Path,
    folder: AdapterFolder,
    manifest: Manifest,
    made: Adapter,
    record: BaseRecord,
    changed: bool,
    replace: bool,
) -> str:
    """The carried adapter's folder: tensors that did not change, and what lies beside them, are copied."""
    from hubkit.artifact.card import card_file
    from hubkit.methods.foreign import own_files

    public = manifest.shareable()
    assert public.base is not None
    made.source, made.revision = public.base.source, public.base.revision
    kept = (entry.path for entry in folder.manifest.files if entry.path != PROBES_NAME)  # those are the old base's
    files: dict[str, Source] = {path: folder.path / path for path in kept}
    own = own_files(made)
    if PEFT_CONFIG in own:
        files[PEFT_CONFIG] = own[PEFT_CONFIG]
    if changed:
        files[WEIGHTS_NAME] = own[WEIGHTS_NAME]
    files[TENSORS_NAME] = tensors_bytes(record.tensors)
    card = folder.path / CARD_NAME
    require_unlinked(folder.path, [CARD_NAME])
    files[CARD_NAME] = card_file(public, files, card.read_bytes().decode(errors="replace") if card.is_file() else None)
    return write_adapter(out, public, files, replace=replace).digest
