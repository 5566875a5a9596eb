"""What an adapter's tensors must be before others get them, and what is worth a word although it is allowed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from hubkit.artifact.folder import WEIGHTS_NAME, AdapterFolder
from hubkit.documents.files import refusing
from hubkit.documents.manifest import MANIFEST_NAME
from hubkit.documents.names import check_allowed, check_names
from hubkit.errors import HubkitError

HUGE = 1e6
"""Values that training does not come to; a float32 holds 1e38, and nothing else would be said of it."""


def require_sound(adapter: AdapterFolder) -> None:
    """Refuses to publish what `verify` would refuse for its own tensors, whatever its manifest vouches for.

    An adapter's tensors are held against the base that its ``tensors.json`` lists; of a merged checkpoint, whose
    tensors only a second merge can prove, the files' headers are read; a mix has none.

    Raises:
        HubkitError: ``HK-FILES``, ``HK-SAFETENSORS``, ``HK-KEYS``, ``HK-SHAPE``, ``HK-DTYPE``, ``HK-NAN``,
            ``HK-CONFIG``, ``HK-TARGET``, ``HK-METHOD-UNKNOWN``; ``HK-BASE-NEEDED`` where the base's are not listed.
    """
    from hubkit.artifact.identity.header import read_header
    from hubkit.methods.reading import check_tensors, recorded_base

    if adapter.manifest.kind == "adapter":
        check_tensors(adapter, recorded_base(adapter))
    for entry in adapter.manifest.files if adapter.manifest.kind == "model" else ():
        if entry.path.endswith(".safetensors"):
            read_header(adapter.path / entry.path)


def require_files(adapter: AdapterFolder) -> str:
    """Names, kinds, sizes and digests of all files, from their bytes as they are now; in words what was proven.

    Raises:
        HubkitError: ``HK-FILES`` with every difference; ``HK-NAME``, ``HK-PICKLE``, ``HK-FORBIDDEN-FILE``, ``HK-IO``.
    """
    manifest, folder = adapter.manifest, adapter.path
    check_names([MANIFEST_NAME, *(entry.path for entry in manifest.files)], str(folder))
    wrong: list[str] = []
    for entry in manifest.files:
        path = folder / entry.path
        with refusing(path), path.open("rb") as file:
            check_allowed(entry.path, file.read(512), str(folder))
            file.seek(0)
            have = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        if have != entry.sha256:
            wrong.append(f"{entry.path}: {have}, not {entry.sha256}")
    if wrong:
        what = f"the files of {manifest.name!r} are not those of its manifest"
        fix = "pull it again; after a wanted change: hubkit pack"
        raise HubkitError("HK-FILES", what, where=f"{folder / MANIFEST_NAME}#/files", have=wrong, fix=fix)
    if manifest.kind == "mix" and not manifest.files:
        return "the manifest is whole; a mix has no other files"
    size = sum(entry.size for entry in manifest.files)
    return f"{len(manifest.files)} files, {size} bytes: every one is what the manifest says"


def remarks(adapter: AdapterFolder) -> tuple[str, ...]:
    """What is odd about an adapter's values, in words: a kind of tensor that is all zeros, values beyond `HUGE`."""
    if WEIGHTS_NAME not in {entry.path for entry in adapter.manifest.files}:
        return ()
    zero: dict[str, list[bool]] = {}
    huge: list[tuple[float, str]] = []
    for name, top in _largest(adapter.weights_path):
        zero.setdefault(".".join(name.split(".")[-2:]), []).append(top == 0)
        huge += [(top, name)] if top > HUGE else []
    said = [f"all {len(found)} tensors '{kind}' hold nothing but zeros" for kind, found in zero.items() if all(found)]
    if huge:
        top, name = max(huge)
        said.append(f"{len(huge)} tensors hold values above {HUGE:g}: up to {top:.3g} in {name}")
    return tuple(said)


def _largest(weights: Path) -> Iterator[tuple[str, float]]:
    """Each tensor of numbers with the largest of its absolute values."""
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            value = file.get_tensor(name)
            if value.is_floating_point() and value.numel():
                yield name, float(value.abs().max())
