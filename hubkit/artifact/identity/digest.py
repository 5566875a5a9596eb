"""Digests of files and of whole bases: a folder's from its bytes, a registry's from its listing and headers."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hubkit.artifact.identity import digest_cache
from hubkit.artifact.identity.base_files import BaseFiles, local, read_config, weight_headers
from hubkit.artifact.identity.base_tokenizer import base_template, base_tokenizer
from hubkit.artifact.identity.config_identity import config_values, ties
from hubkit.artifact.identity.counted import TensorDigest, compose_weights, counted, is_alias, is_buffer, layout_digest
from hubkit.artifact.identity.header import TensorInfo
from hubkit.artifact.identity.tokenizer_identity import template_digest, tokenizer_digest
from hubkit.artifact.identity.values import BLOCK, digest_blocks, values_digest
from hubkit.documents.manifest import BaseFingerprint
from hubkit.errors import HubkitError

__all__ = [
    "BaseRecord",
    "TensorDigest",
    "compose_weights",
    "config_values",
    "counted",
    "fingerprint_folder",
    "fingerprint_listing",
    "hash_file",
    "is_alias",
    "is_buffer",
    "layout_digest",
    "read_again",
    "template_digest",
    "ties",
    "tokenizer_digest",
    "values_digest",
]

_CACHED_FROM: Final = 256 * 1024  # hashing fewer bytes is as fast as looking them up

_thread = threading.local()

Headers = Mapping[str, Mapping[str, TensorInfo]]


@dataclass(frozen=True)
class BaseRecord:
    """A base's identity, and its tensors one by one for saying what differs.

    Args:
        fingerprint: as it goes into a manifest.
        tensors: those that count (`hubkit.artifact.identity.counted`), sorted by name.
    """

    fingerprint: BaseFingerprint
    tensors: tuple[TensorDigest, ...]


def hash_file(path: Path) -> str:
    """``sha256:<hex>`` of a file's bytes; remembered while its path, size, times and inode stay.

    Raises:
        HubkitError: ``HK-MISSING`` when there is no such file, ``HK-IO`` when it cannot be read or changes meanwhile.
    """
    status = _status(path)
    if status.st_size < _CACHED_FROM:
        return _hash(path, status)
    known = digest_cache.recall(path, status).get("sha256")
    if not isinstance(known, str):
        known = _hash(path, status)
        digest_cache.note(path, status, {"sha256": known})
    return known


def read_again(
    folder: Path, files: Mapping[str, Iterable[TensorInfo]], *, whole: bool = True
) -> dict[str, tuple[str, list[TensorDigest]]]:
    """The digest of each file (empty unless `whole`) and those of some of its tensors, from the bytes as they are now.

    Nothing that was remembered is believed, and nothing is remembered.

    Args:
        files: names in `folder` -> the tensors that are wanted.

    Raises:
        HubkitError: as `hash_file`.
    """
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        pending = {
            name: (
                pool.submit(_hash, folder / name, _status(folder / name)) if whole else None,
                [pool.submit(_hash_tensor, folder / name, info) for info in infos],
            )
            for name, infos in files.items()
        }
        return {
            name: ("" if digest is None else digest.result(), [one.result() for one in tensors])
            for name, (digest, tensors) in pending.items()
        }


def fingerprint_folder(
    path: Path, *, source: str | None = None, revision: str | None = None, at_most: int | None = None
) -> BaseRecord:
    """The identity of a base in a folder, from its bytes.

    Args:
        path: the folder of ``config.json``, the tokenizer's files and ``model.safetensors`` or shards with an index.
        source: where it came from, e.g. ``org/name``; the folder's path when None.
        revision: its commit, 40 hexadecimal digits.
        at_most: bytes to read for digests that are not remembered; a base with more is known by its headers alone, as
            in `fingerprint_listing`, and without ``files``.

    Raises:
        HubkitError: ``HK-BASE-MISSING`` (no folder), ``HK-BASE-FILES`` (files missing or contradicting the index),
            ``HK-PICKLE`` (only pickled weights), ``HK-SAFETENSORS``, ``HK-JSON``, ``HK-TOKENIZER``.
    """
    base = local(path)
    config = read_config(base)
    headers = weight_headers(base)
    if at_most is not None and unread(path, headers) > at_most:
        return _by_headers(base, config, headers, {}, source if source is not None else str(path), revision)
    pool = ThreadPoolExecutor(max(2, os.cpu_count() or 1))
    try:
        pending = {name: _WeightFile(path / name, tensors, pool) for name, tensors in headers.items()}
        tokenizer, template = base_tokenizer(base, config), base_template(base)
        results = {name: file.result() for name, file in pending.items()}
    finally:
        pool.shutdown(cancel_futures=True)
    tensors = counted((t for _, found in results.values() for t in found), ties(config))
    fingerprint = BaseFingerprint(
        source=source if source is not None else str(path),
        revision=revision,
        layout=layout_digest(_infos(headers), ties(config)),
        weights=compose_weights(tensors),
        files={name: results[name][0] for name in sorted(results)},
        config=config_values(config),
        tokenizer=tokenizer,
        template=template,
    )
    return BaseRecord(fingerprint, tensors)


def fingerprint_listing(
    files: Mapping[str, tuple[int, str | None]],
    read: Callable[[str, int, int | None], bytes],
    *,
    source: str,
    revision: str,
) -> BaseRecord:
    """The identity of a base that is not here: from a registry's listing, headers and small files.

    Args:
        files: path to size in bytes and ``sha256:<hex>`` as the registry lists it; a weight file listed without one
            (too small for large-file storage) is read and hashed.
        read: `(path, start, stop)` to the bytes of that range, stop None for all; called from up to eight threads.
        source: e.g. ``org/name``.
        revision: the resolved commit.

    Returns:
        A record whose ``weights`` is None and whose tensors have names, the files' dtypes and shapes only.

    Raises:
        HubkitError: as `fingerprint_folder`, and what `read` raises.
    """
    base = BaseFiles(f"{source}@{revision[:7]}", files, read)
    config = read_config(base)
    headers = weight_headers(base)
    digests = {name: files[name][1] or _hash_remote(base, name) for name in sorted(headers)}
    return _by_headers(base, config, headers, digests, source, revision)


def unread(path: Path, headers: Headers) -> int:
    """Bytes of the weight files in folder `path` whose digests are not remembered.

    Args:
        headers: file name -> its tensors, as `weight_headers` gives them.
    """
    found = ((path / name, _status(path / name), tensors) for name, tensors in headers.items())
    return sum(s.st_size for file, s, tensors in found if _remembered(digest_cache.recall(file, s), tensors) is None)


def _by_headers(
    base: BaseFiles,
    config: Mapping[str, Any],
    headers: Headers,
    digests: Mapping[str, str],
    source: str,
    revision: str | None,
) -> BaseRecord:
    """The record of a base whose values are not read: ``weights`` is None."""
    tied = ties(config)
    fingerprint = BaseFingerprint(
        source=source,
        revision=revision,
        layout=layout_digest(_infos(headers), tied),
        weights=None,
        files=digests,
        config=config_values(config),
        tokenizer=base_tokenizer(base, config),
        template=base_template(base),
    )
    tensors = counted((TensorDigest(i.name, i.dtype, i.shape, "") for i in _infos(headers)), tied)
    return BaseRecord(fingerprint, tensors)


def _infos(headers: Headers) -> Iterator[TensorInfo]:
    return (info for tensors in headers.values() for info in tensors.values())


class _WeightFile:
    """The digests of one weight file, remembered or being made by a pool."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], pool: ThreadPoolExecutor) -> None:
        self.path = path
        self.status = _status(path)
        notes = digest_cache.recall(path, self.status)
        self.known = _remembered(notes, tensors)
        if self.known is not None:
            return
        known = notes.get("sha256")
        self.whole: Future[str] | str = known if isinstance(known, str) else pool.submit(_hash, path, self.status)
        # long ones first: the pool ends evenly
        order = sorted(tensors.values(), key=lambda info: info.start - info.stop)
        self.parts = [pool.submit(_hash_tensor, path, info) for info in order]

    def result(self) -> tuple[str, list[TensorDigest]]:
        """The file's digest and its tensors' digests; they are remembered."""
        if self.known is not None:
            return self.known
        whole = self.whole if isinstance(self.whole, str) else self.whole.result()
        tensors = [part.result() for part in self.parts]
        _check_unchanged(self.path, self.status)
        rows = [[t.name, t.dtype, list(t.shape), t.sha256] for t in tensors]
        digest_cache.note(self.path, self.status, {"sha256": whole, "tensors": rows})
        return whole, tensors


def _remembered(notes: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> tuple[str, list[TensorDigest]] | None:
    try:
        whole = notes["sha256"]
        found = [TensorDigest(name, dtype, tuple(shape), digest) for name, dtype, shape, digest in notes["tensors"]]
    except (KeyError, TypeError, ValueError):
        return None
    if {t.name: t.shape for t in found} != {info.name: info.shape for info in tensors.values()}:
        return None
    return whole, found


def _status(path: Path) -> os.stat_result:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise HubkitError("HK-MISSING", "a file is missing", where=str(path), fix="fetch the file again") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if not stat.S_ISREG(status.st_mode):
        raise HubkitError("HK-IO", "this is not a file", where=str(path), fix="give the path of a file")
    return status


def _hash(path: Path, status: os.stat_result) -> str:
    digest = hashlib.sha256()
    for block in _blocks(path, 0, status.st_size):
        digest.update(block)
    _check_unchanged(path, status)
    return f"sha256:{digest.hexdigest()}"


def _hash_tensor(path: Path, info: TensorInfo) -> TensorDigest:
    dtype, digest = digest_blocks(info.dtype, lambda: _blocks(path, info.start, info.stop))
    return TensorDigest(info.name, dtype, info.shape, digest)


def _blocks(path: Path, start: int, stop: int) -> Iterator[memoryview]:
    """A range of a file in blocks, all in this thread's one buffer."""
    if not hasattr(_thread, "buffer"):
        _thread.buffer = memoryview(bytearray(BLOCK))
    buffer: memoryview = _thread.buffer
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while start < stop:
                want = min(len(buffer), stop - start)
                filled = 0
                while filled < want:
                    count = file.readinto(buffer[filled:want])
                    if not count:
                        raise _changed(path)
                    filled += count
                start += want
                yield buffer[:want]
    except OSError as error:
        raise _unreadable(path, error) from None


def _check_unchanged(path: Path, status: os.stat_result) -> None:
    if digest_cache.identity(path, _status(path)) != digest_cache.identity(path, status):
        raise _changed(path)


def _hash_remote(base: BaseFiles, name: str) -> str:
    digest, size = hashlib.sha256(), base.files[name][0]
    for start in range(0, size, BLOCK):
        digest.update(base.read(name, start, min(start + BLOCK, size)))
    return f"sha256:{digest.hexdigest()}"


def _unreadable(path: Path, error: OSError) -> HubkitError:
    have = error.strerror or str(error)
    return HubkitError("HK-IO", "a file cannot be read", where=str(path), have=have, fix="check its permissions")


def _changed(path: Path) -> HubkitError:
    fix = "run again when nothing writes to it"
    return HubkitError("HK-IO", "a file changed while it was read", where=str(path), fix=fix)
