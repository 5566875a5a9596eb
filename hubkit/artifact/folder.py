"""An adapter as a folder: written atomically, opened only when every file is what the manifest says."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.staging import recover, staged, wait_for
from hubkit.documents.files import read, refusing
from hubkit.documents.manifest import MANIFEST_NAME, FileEntry, Manifest
from hubkit.documents.schema import MAX_BYTES, SAFE_INTEGER, canonical, parse
from hubkit.errors import HubkitError

if TYPE_CHECKING:
    from hubkit.artifact.identity.digest import TensorDigest
    from hubkit.artifact.identity.header import TensorInfo

__all__ = [
    "CARD_NAME", "MANIFEST_NAME", "PEFT_CONFIG", "TENSORS_NAME", "WEIGHTS_NAME", "AdapterFolder", "check_adapter",
    "open_adapter", "recover", "staged", "tensors_bytes", "write_adapter",
]  # fmt: skip

TENSORS_NAME = "tensors.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
CARD_NAME = "README.md"
TENSORS_SCHEMA = "hubkit/tensors/1"
Source = bytes | Path | Callable[[Path], str]
"""The content of a file: bytes, a file to copy, or what writes the file and gives its ``sha256:...``."""
_BLOCK = 4 << 20
_HEAD = 512


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk, opened.

    Args:
        path: the folder.
        manifest: its ``hubkit.json``.
    """

    path: Path
    manifest: Manifest

    @property
    def weights_path(self) -> Path:
        """The adapter's tensors; of a mix or of an adapter whose manifest does not list them there are none.

        Raises:
            HubkitError: ``HK-FILES``.
        """
        if WEIGHTS_NAME not in {entry.path for entry in self.manifest.files}:
            what = f"the {self.manifest.kind} {self.manifest.name!r} has no tensors of its own"
            where = f"{self.path / MANIFEST_NAME}#/files"
            raise HubkitError("HK-FILES", what, where=where, want=WEIGHTS_NAME, have="not listed")
        return self.path / WEIGHTS_NAME

    def header(self) -> dict[str, TensorInfo]:
        """Names, dtypes, shapes and byte ranges of the adapter's tensors; no values are read.

        Raises:
            HubkitError: ``HK-SAFETENSORS``, ``HK-FILES``.
        """
        from hubkit.artifact.identity.header import read_header

        return read_header(self.weights_path)

    def base_tensors(self) -> tuple[TensorDigest, ...] | None:
        """Every tensor of the base this adapter was made on, from ``tensors.json``; None when there is none.

        Raises:
            HubkitError: ``HK-JSON``, ``HK-SCHEMA``, ``HK-IO``.
        """
        if TENSORS_NAME not in {entry.path for entry in self.manifest.files}:
            return None
        path = self.path / TENSORS_NAME
        try:
            data = read(path, MAX_BYTES)
        except FileNotFoundError:
            raise HubkitError("HK-FILES", "a file of the adapter is missing", where=str(path)) from None
        return _read_tensors(parse(data, str(path)), str(path))

    def unlisted(self) -> tuple[str, ...]:
        """Files in the folder that the manifest does not vouch for (README.md and hidden ones aside), sorted."""
        listed = {entry.path for entry in self.manifest.files} | {MANIFEST_NAME, CARD_NAME}
        found: list[str] = []
        for place, folders, names in os.walk(self.path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            inside = (os.path.relpath(os.path.join(place, name), self.path) for name in names)
            found += [path.replace(os.sep, "/") for path in inside if not os.path.basename(path).startswith(".")]
        return tuple(sorted(set(found) - listed))


def open_adapter(path: Path, *, verify: bool = True) -> AdapterFolder:
    """Open an adapter: its manifest is read, every file it lists is there with the right size and bytes.

    Args:
        path: the folder; one whose replacement was killed half-way is mended first.
        verify: False to look at sizes only.

    Raises:
        HubkitError: ``HK-NOT-ADAPTER`` without ``hubkit.json``; ``HK-NAME``; ``HK-FILES`` with every difference;
            what ``Manifest.from_bytes`` raises; ``HK-IO``.
    """
    from hubkit.documents.names import check_names

    path = Path(path)
    if not path.exists():
        wait_for(path)
    manifest = Manifest.read(path)
    where = f"{path / MANIFEST_NAME}#/files"
    check_names([entry.path for entry in manifest.files], where)
    with refusing(path):
        found = [line for entry in manifest.files for line in _differences(path, entry, verify)]
    if found:
        what = f"the files of {manifest.name!r} are not those of its manifest"
        fix = "pull it again; after a wanted change: hubkit pack"
        raise HubkitError("HK-FILES", what, where=where, have=found, fix=fix)
    return AdapterFolder(path, manifest)


def write_adapter(dest: Path, manifest: Manifest, files: Mapping[str, Source], *, replace: bool = False) -> Manifest:
    """Write an adapter's folder, complete or not at all; the same input gives the same bytes.

    Args:
        dest: the folder to make.
        manifest: what to write into ``hubkit.json``; its `files` are filled in here, and its sources are stripped of
            places on this machine.
        files: path inside the folder -> its content. README.md is written, but not listed.
        replace: replace an adapter that is there; any other folder with something in it is refused all the same.

    Returns:
        the manifest as written.

    Raises:
        HubkitError: before the first byte: ``HK-NAME``, ``HK-PICKLE``, ``HK-FORBIDDEN-FILE``, ``HK-EXISTS``,
            ``HK-SECRET``; then ``HK-DISK`` or ``HK-IO``.
    """
    check_adapter(dest, manifest, files, replace=replace)
    with staged(dest, replace=replace) as stage:
        entries = [_put(stage, name, source) for name, source in sorted(files.items())]
        data = _prepared(manifest, tuple(entry for entry in entries if entry.path != CARD_NAME)).to_bytes()
        made = Manifest.from_bytes(data, str(dest / MANIFEST_NAME))
        _put(stage, MANIFEST_NAME, data)
    return made


def check_adapter(dest: Path, manifest: Manifest, files: Mapping[str, Source], *, replace: bool = False) -> None:
    """Every refusal of `write_adapter` that can be foreseen, for a dry run and before long work; writes nothing.

    Args:
        as `write_adapter`.

    Raises:
        HubkitError: ``HK-NAME``, ``HK-PICKLE``, ``HK-FORBIDDEN-FILE``, ``HK-EXISTS``, ``HK-SCHEMA``, ``HK-SECRET``.
    """
    from hubkit.documents.names import check_names

    check_names([MANIFEST_NAME, *files], str(dest))
    for name, source in files.items():
        _check_source(name, source)
    if not replace and os.path.lexists(dest):
        fix = "choose another folder, or remove this one"
        raise HubkitError("HK-EXISTS", f"{dest.name!r} exists already", where=str(dest), fix=fix)
    _require_replaceable(dest, replace)
    Manifest.from_bytes(_prepared(manifest, ()).to_bytes(), str(dest / MANIFEST_NAME))  # what we write, we can read


def tensors_bytes(tensors: Iterable[TensorDigest]) -> bytes:
    """The bytes of ``tensors.json``: every tensor of a base, sorted by name, as canonical JSON."""
    rows = [
        {"name": one.name, "dtype": one.dtype, "shape": list(one.shape), "sha256": one.sha256}
        for one in sorted(tensors, key=lambda one: one.name)
    ]
    return canonical({"schema": TENSORS_SCHEMA, "tensors": [{k: v for k, v in row.items() if v != ""} for row in rows]})


def _read_tensors(document: dict[str, Any], where: str) -> tuple[TensorDigest, ...]:
    from hubkit.artifact.identity.digest import TensorDigest

    rows = document.get("tensors")
    if document.get("schema") != TENSORS_SCHEMA or not isinstance(rows, list):
        have = repr(document.get("schema"))[:80]
        raise HubkitError("HK-SCHEMA", "this is not a list of tensors", where=where, want=TENSORS_SCHEMA, have=have)
    bad = [f"#/tensors/{index}" for index, row in enumerate(rows) if not _is_tensor(row)]
    if bad:
        want = "name, dtype, shape, sha256"
        raise HubkitError("HK-SCHEMA", "the list of tensors is not valid", where=where, want=want, have=bad[:200])
    return tuple(TensorDigest(row["name"], row["dtype"], tuple(row["shape"]), row.get("sha256", "")) for row in rows)


def _is_tensor(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("shape"), list):
        return False
    texts = all(isinstance(value, str) for value in (row.get("name"), row.get("dtype"), row.get("sha256", "")))
    return texts and all(type(size) is int and 0 <= size <= SAFE_INTEGER for size in row["shape"])


def _differences(folder: Path, entry: FileEntry, verify: bool) -> Iterable[str]:
    from hubkit.artifact.identity.digest import hash_file

    path = folder / entry.path
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return [f"{entry.path}: missing"]
    if not stat.S_ISREG(status.st_mode):
        return [f"{entry.path}: not a file"]
    if status.st_size != entry.size:
        return [f"{entry.path}: {status.st_size} bytes, not {entry.size}"]
    digest = hash_file(path) if verify else entry.sha256
    return [] if digest == entry.sha256 else [f"{entry.path}: {digest}, not {entry.sha256}"]


def _prepared(manifest: Manifest, files: tuple[FileEntry, ...]) -> Manifest:
    return replace(manifest.shareable(), files=tuple(sorted(files, key=lambda entry: entry.path)))


def _check_source(name: str, source: Source) -> None:
    from hubkit.documents.names import check_allowed

    if isinstance(source, Path):
        with refusing(source):
            if not stat.S_ISREG(source.stat().st_mode):
                raise HubkitError("HK-IO", "only plain files go into an adapter", where=str(source))
            with source.open("rb") as file:
                head = file.read(_HEAD)
    else:
        head = source[:_HEAD] if isinstance(source, bytes) else b""
    check_allowed(name, head, name)


def _require_replaceable(dest: Path, replace: bool) -> None:
    """Never let `replace` delete a folder that is no adapter: a mistyped path must not cost somebody's work."""
    with refusing(dest):
        if not replace or not dest.is_dir() or (dest / MANIFEST_NAME).is_file() or (dest / PEFT_CONFIG).is_file():
            return
        if not any(dest.iterdir()):
            return
    fix = "choose another folder, or remove this one yourself"
    raise HubkitError("HK-EXISTS", f"{dest.name!r} holds files but no adapter", where=str(dest), fix=fix)


def _put(folder: Path, name: str, source: Source) -> FileEntry:
    """Write one file, counting and hashing the very bytes that are written."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(source, bytes | Path):
        written = source(path)
        return FileEntry(name, path.stat().st_size, written)
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as out:
        for block in _blocks(source):
            out.write(block)
            digest.update(block)
            size += len(block)
    return FileEntry(name, size, f"sha256:{digest.hexdigest()}")


def _blocks(source: bytes | Path) -> Iterable[bytes]:
    if not isinstance(source, Path):
        yield source
        return
    with source.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def untold(manifest: Manifest) -> bool:
    """Whether an adapter does not say if it was trained on a quantized base: one of another tool's.

    What hubkit trained or composed says so, by having a codec or none.
    """
    told = manifest.training or manifest.parents or (manifest.base is not None and manifest.base.codec)
    return manifest.kind == "adapter" and not told


def quantized_for(folders: Iterable[AdapterFolder]) -> tuple[str | None, str | None]:
    """(codec, compute dtype) of the adapters that were trained on a quantized base; (None, None) where none was.

    Raises:
        HubkitError: ``HK-MIX`` for adapters that were trained beside differently quantized weights.
    """
    bases = (folder.manifest.base for folder in folders)
    found = {(base.codec, base.compute_dtype) for base in bases if base and base.codec}
    if len(found) > 1:
        raise HubkitError(
            "HK-MIX",
            "these adapters were trained beside differently quantized weights, which one base cannot be",
            have=sorted(f"{codec}, {dtype or 'the dtype of the files'}" for codec, dtype in found),
            fix="adapters that were trained with one --dtype",
        )
    return next(iter(found), (None, None))
