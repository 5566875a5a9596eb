"""`diff`: what two adapters differ in: manifests, tensors, and what they add to the base, site by site."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.folder import WEIGHTS_NAME, AdapterFolder, open_adapter
from hubkit.documents.arguments import checked
from hubkit.documents.shown import Shown
from hubkit.errors import HubkitError
from hubkit.named.sources import adapter_source
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.weights.differing import SiteDifference


@dataclass(frozen=True)
class Differing:
    """One value of two manifests that differs.

    Args:
        name: where it stands, ``base/weights``.
        first: None where the first has none.
        second: None where the second has none.
    """

    name: str
    first: Any
    second: Any


@dataclass(frozen=True, repr=False)
class Difference(Shown):
    """How two adapters differ.

    Args:
        first: what was compared: a folder, or a repository at its commit.
        second: with what.
        digests: of their manifests.
        same: both manifests are the same to the byte, and with them every file.
        fields: of the manifests; configuration and files aside.
        config: of the configurations.
        files: files that one has alone, or that have other bytes.
        tensors: tensors that one has alone, or in another dtype or shape; None for the one that has none.
        sites: what each adds to the base.
        relative: norm of the difference over that of the first, all sites together where weights change, else all
            tensors; None where nothing was compared, or the first adds nothing.
        left_out: why nothing was compared site by site; "" where it was.
        notes: what to know of the figures.
    """

    first: str
    second: str
    digests: tuple[str, str]
    same: bool
    fields: tuple[Differing, ...] = ()
    config: tuple[Differing, ...] = ()
    files: tuple[Differing, ...] = ()
    tensors: tuple[Differing, ...] = ()
    sites: tuple[SiteDifference, ...] = ()
    relative: float | None = None
    left_out: str = ""
    notes: tuple[str, ...] = ()


@checked
def diff(
    first: Path | str,
    second: Path | str,
    *,
    base: Path | str | None = None,
    registry: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Difference:
    """Compare two adapters; pulled where they are not here.

    Args:
        first: a folder or a repository, at a revision or not.
        second: likewise.
        base: their base, for methods whose change depends on the base's own weights.
        registry: for references that name none, if not the default registry.
        offline: use only what was pulled before.
        progress: of each pull.

    Raises:
        HubkitError: what pulling and opening raise; ``HK-BASE-MISMATCH`` for a `base` that is not theirs.
    """
    where = Where(registry, offline, progress)
    sources = adapter_source(first, where), adapter_source(second, where)
    folders = open_adapter(sources[0].path), open_adapter(sources[1].path)
    names = sources[0].reference, sources[1].reference
    digests = folders[0].manifest.digest, folders[1].manifest.digest
    if digests[0] == digests[1]:
        return Difference(*names, digests, True)
    documents = [folder.manifest.to_document() for folder in folders]
    configs, files = ([document.pop(name, {}) for document in documents] for name in ("config", "files"))
    listed = [{file["path"]: file["sha256"] for file in some} for some in files]
    sites, left_out, notes = _compared(*folders, base, where)
    return Difference(
        *names,
        digests,
        False,
        fields=tuple(differing(documents[0], documents[1])),
        config=tuple(differing(configs[0], configs[1])),
        files=tuple(differing(listed[0], listed[1])),
        tensors=tuple(differing(_tensors(folders[0]), _tensors(folders[1]))),
        sites=sites,
        relative=_relative(sites),
        left_out=left_out,
        notes=notes,
    )


def _relative(sites: tuple[SiteDifference, ...]) -> float | None:
    chosen = [one for one in sites if not one.values] or sites
    size = math.sqrt(sum(one.norms[0] ** 2 for one in chosen))
    return math.sqrt(sum(one.difference**2 for one in chosen)) / size if size > 0 else None


def differing(first: Mapping[str, Any], second: Mapping[str, Any], above: str = "") -> Iterator[Differing]:
    """Values that differ, each by its own name; lists are one value."""
    for name in sorted({*first, *second}):
        a, b = first.get(name), second.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differing(a, b, f"{above}{name}/")
        elif a != b:
            yield Differing(above + name, a, b)


def _tensors(folder: AdapterFolder) -> dict[str, str]:
    """Name -> dtype and shape of the tensors of an adapter that has some."""
    if WEIGHTS_NAME not in {entry.path for entry in folder.manifest.files}:
        return {}
    return {name: f"{one.dtype} {'x'.join(map(str, one.shape))}" for name, one in folder.header().items()}


def _compared(
    first: AdapterFolder, second: AdapterFolder, base: Path | str | None, where: Where
) -> tuple[tuple[SiteDifference, ...], str, tuple[str, ...]]:
    """(site by site, why that was left out, notes)."""
    one, two = first.manifest, second.manifest
    for manifest in (one, two):
        if manifest.kind != "adapter":
            return (), f"{manifest.name!r} is a {manifest.kind}, which has no tensors of an adapter", ()
    assert one.base is not None  # an adapter without one does not open
    assert two.base is not None
    if one.base.layout != two.base.layout:
        return (), "their bases have other tensors, so that no module of one is a module of the other", ()
    from hubkit.artifact.identity.base_match import proven
    from hubkit.methods.info import NotMergeable
    from hubkit.methods.reading import read_adapter, recorded_base
    from hubkit.tensors.weights.differing import site_differences

    notes = ["their bases have other weights"] if proven(one.base, two.base) is False else []
    notes += [f"their methods are {one.method} and {two.method}"] if one.method != two.method else []
    sites = _base(base, (first, second), where) if base is not None else None
    try:
        sites = sites or recorded_base(first)
        adapters = [read_adapter(folder, sites, mapped=True) for folder in (first, second)]
        apart = next((adapter.method.unmergeable for adapter in adapters if adapter.method.unmergeable), "")
        if apart and one.method != two.method:
            return (), f"one of their methods changes no weight, and the other is another: {apart}", tuple(notes)
        notes += ["what was learned is compared, tensor by tensor: it changes no weight"] if apart else []
        found = tuple(site_differences(*adapters))
        whole = [one.site for one in found if one.values] if not apart else []
        said = "which are held whole, are compared by their values: --base with their base shows what they change"
        notes += [f"{', '.join(whole)}, {said}"] if whole else []
        return found, "", tuple(notes)
    except NotMergeable as reason:
        return (), str(reason), tuple(notes)
    except HubkitError as fault:
        if fault.code not in ("HK-BASE-NEEDED", "HK-METHOD-UNKNOWN"):
            raise
        more = "; --base with their base" if fault.code == "HK-BASE-NEEDED" else ""
        return (), f"{fault.what}{more}", tuple(notes)


def _base(text: Path | str, folders: tuple[AdapterFolder, AdapterFolder], where: Where) -> Base:
    from hubkit.artifact.identity.base_match import require_same_base
    from hubkit.named.sources import base_with_record
    from hubkit.tensors.base.base import Base

    source, record = base_with_record(text, None, where)
    for folder in folders:
        wanted = folder.manifest.base
        assert wanted is not None  # an adapter without one does not open
        require_same_base(folder.manifest.name, str(folder.path), wanted, record.fingerprint)
    return Base.from_folder(source.path)
