"""Shards of a merge that are finished, noted beside them: the same merge, run again after a kill, goes on from there.

A shard is noted when it is on the disk for good. Whoever takes it over hashes it again, so a note is believed only for
the very bytes that it was made of.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from hubkit.artifact.identity.digest import hash_file
from hubkit.documents.files import sync_file, write_through
from hubkit.errors import HubkitError

NOTE = ".finished.json"


class Finished:
    """The note in one folder: a context, at whose end every shard in it is on the disk, and the note is gone.

    Args:
        folder: where the shards are written.
        key: says what is merged, to the last bit: equal keys, equal bytes. Nothing is noted when it is empty.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self._shards: dict[str, dict[str, Any]] = dict(_noted(folder, key))
        self._pending: list[Future[None]] = []

    def __enter__(self) -> Finished:
        self._pool = ThreadPoolExecutor(1, "hubkit-sync")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for future in self._pending:
                future.result()
            with suppress(FileNotFoundError):
                (self._folder / NOTE).unlink()

    def found(self, name: str) -> tuple[str, list[str]] | None:
        """The digest of a shard that is there already, and its tensors that are not the base's; None for any other."""
        noted = self._shards.get(name)
        try:
            if noted is None or hash_file(self._folder / name) != noted["sha256"]:
                return None
        except HubkitError:
            return None
        return noted["sha256"], noted["changed"]

    def add(self, name: str, digest: str, changed: Collection[str]) -> None:
        """Makes a shard durable and notes it, in a thread of its own."""
        if self._key:
            self._pending.append(self._pool.submit(self._add, name, {"sha256": digest, "changed": sorted(changed)}))

    def _add(self, name: str, entry: dict[str, Any]) -> None:
        sync_file(self._folder / name)
        self._shards[name] = entry
        data = json.dumps({"key": self._key, "shards": self._shards}, sort_keys=True).encode()
        write_through(self._folder / f"{NOTE}.{secrets.token_hex(4)}", self._folder / NOTE, data)


def take_over(key: str, left: Path, folder: Path) -> None:
    """Moves the finished shards of a merge that was killed into the folder of the one that goes on."""
    shards = _noted(left, key)
    if not shards or (folder / NOTE).exists():
        return
    for name in shards:
        with suppress(OSError):
            os.rename(left / name, folder / name)
    os.rename(left / NOTE, folder / NOTE)


def _noted(folder: Path, key: str) -> Mapping[str, dict[str, Any]]:
    """Name of a shard -> what is noted of it under `key`."""
    try:
        document = json.loads((folder / NOTE).read_bytes())
        shards = document["shards"] if key and document["key"] == key else {}
        return {name: dict(entry) for name, entry in shards.items() if Path(name).name == name}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
