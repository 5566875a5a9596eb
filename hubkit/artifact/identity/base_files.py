"""The files of a base, in a folder or listed by a registry: which hold its weights, and the small ones beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hubkit.artifact.identity.header import TensorInfo, header_length, parse_header
from hubkit.documents.names import check_name
from hubkit.errors import HubkitError

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
TEMPLATES: Final = "additional_chat_templates"
SMALL_BYTES: Final = 256 * 2**20
"""Largest file other than weights that is read whole."""

_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".ot")
_FIRST_READ: Final = 128 * 1024

ReadRange = Callable[[str, int, int | None], bytes]
"""Reads bytes of a file by its name: from where, to where (None: its end)."""


@dataclass(frozen=True)
class BaseFiles:
    """A base's files by name.

    Args:
        where: the folder or reference, for messages.
        files: name to size in bytes and sha256 where a listing tells it.
        read: `(name, start, stop)` to bytes; stop None is the end. Called from several threads.
        folder: where the files lie, None for a registry.
    """

    where: str
    files: Mapping[str, tuple[int, str | None]]
    read: ReadRange
    folder: Path | None = None

    def place(self, name: str) -> str:
        """How messages call one file."""
        return f"{self.where}/{name}"

    def whole(self, name: str) -> bytes | None:
        """The content of a small file, None when there is none.

        Raises:
            HubkitError: ``HK-BASE-FILES`` when it is too large to be one.
        """
        if name not in self.files:
            return None
        if self.files[name][0] > SMALL_BYTES:
            have = f"{self.files[name][0]} bytes"
            raise HubkitError("HK-BASE-FILES", "a file of the base is too large", where=self.place(name), have=have)
        return self.read(name, 0, None)

    def json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in a small file, None when there is no such file. ``Infinity`` is read: configs hold it.

        Raises:
            HubkitError: ``HK-JSON``, ``HK-BASE-FILES``.
        """
        data = self.whole(name)
        if data is None:
            return None
        try:
            document = json.loads(data.decode(), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self._not_json(name, str(error)[:200]) from None
        if not isinstance(document, dict):
            raise self._not_json(name, "not an object")
        return document

    def _not_json(self, name: str, have: str) -> HubkitError:
        what, fix = "a file of the base is not the JSON it should be", "fetch the base again"
        return HubkitError("HK-JSON", what, where=self.place(name), want="one JSON object", have=have, fix=fix)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key occurs twice")
    return out


def local(path: Path) -> BaseFiles:
    """The files of a base's folder; links are followed (a download cache is made of them).

    Raises:
        HubkitError: ``HK-BASE-MISSING`` when there is no such folder or it cannot be read.
    """
    try:
        files = dict(_scan(path, ""))
    except OSError as error:
        reason = "no such folder" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        fix = "give the folder that holds config.json and model.safetensors, or pull the base"
        raise HubkitError("HK-BASE-MISSING", "the base is not there", where=str(path), have=reason, fix=fix) from None

    def read(name: str, start: int, stop: int | None) -> bytes:
        try:
            with open(path / name, "rb") as file:
                file.seek(start)
                return file.read() if stop is None else file.read(stop - start)
        except OSError as error:
            have = error.strerror or str(error)
            place = str(path / name)
            raise HubkitError("HK-BASE-FILES", "a file of the base cannot be read", where=place, have=have) from None

    return BaseFiles(str(path), files, read, path)


def _scan(path: Path, prefix: str) -> Iterable[tuple[str, tuple[int, None]]]:
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_file():
                yield prefix + entry.name, (entry.stat().st_size, None)
            elif not prefix and entry.name == TEMPLATES and entry.is_dir():
                yield from _scan(path / TEMPLATES, TEMPLATES + "/")


def weight_headers(base: BaseFiles) -> dict[str, dict[str, TensorInfo]]:
    """The weight files of a base and their tensors: ``model.safetensors``, or the shards that its index names.

    Raises:
        HubkitError: ``HK-BASE-FILES`` with every disagreement between index and files; ``HK-PICKLE`` when there are
            only pickled weights; ``HK-SAFETENSORS``, ``HK-JSON``, ``HK-NAME`` for what is malformed.
    """
    index = None
    if WEIGHTS in base.files:
        shards = [WEIGHTS]
    else:
        index = _index(base)
        shards = sorted(set(index.values()))
        absent = [f"{name}: missing, but named in the index" for name in shards if name not in base.files]
        if absent:
            raise _disagree(base, absent)
    if len(shards) == 1:
        headers = {name: _header(base, name) for name in shards}
    else:
        with ThreadPoolExecutor(8) as pool:
            headers = dict(zip(shards, pool.map(lambda name: _header(base, name), shards), strict=True))
    if not any(headers.values()):
        raise _disagree(base, [f"{name}: no tensors" for name in shards])
    if index is not None and (faults := _index_faults(index, headers)):
        raise _disagree(base, faults)
    return headers


def _index(base: BaseFiles) -> dict[str, str]:
    document = base.json(INDEX)
    if document is None:
        raise _no_weights(base)
    found = document.get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise _disagree(base, [f"{INDEX}: no 'weight_map' from tensors to files"])
    for name in sorted(set(found.values())):
        check_name(name, base.place(INDEX))
        if not name.endswith(".safetensors"):
            raise _disagree(base, [f"{name}: named in the index, not a safetensors file"])
    return found


def _header(base: BaseFiles, name: str) -> dict[str, TensorInfo]:
    where, size = base.place(name), base.files[name][0]
    head = base.read(name, 0, min(size, _FIRST_READ))
    length = 8 + header_length(head[:8], where)
    if len(head) < length <= size:
        head += base.read(name, len(head), length)
    return parse_header(head, size, where)


def _index_faults(index: Mapping[str, str], headers: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    absent = [
        f"{name}: not in {file}, where the index has it" for name, file in index.items() if name not in headers[file]
    ]
    more = [
        f"{name}: in {file}, but the index {'has it in ' + index[name] if name in index else 'does not name it'}"
        for file, tensors in headers.items()
        for name in tensors
        if index.get(name) != file
    ]
    return sorted(absent) + sorted(more)


def _no_weights(base: BaseFiles) -> HubkitError:
    names = sorted(base.files)
    pickles = [name for name in names if name.casefold().endswith(_PICKLES)]
    if pickles:
        return HubkitError(
            "HK-PICKLE",
            "the base has only pickled weights, which can run code when they are loaded",
            where=base.where,
            want=f"{WEIGHTS} or {INDEX}",
            have=pickles,
            fix="use a revision with safetensors, or convert: load the model and save_pretrained() it",
        )
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    fix = "give the folder or revision that holds the model's weights"
    if "adapter_config.json" in names:
        fix = "this is an adapter, not a base: give the base it was trained on"
    want = f"{WEIGHTS} or {INDEX}"
    what = "the base has no weights"
    return HubkitError("HK-BASE-FILES", what, where=base.where, want=want, have=others or "no weight file", fix=fix)


def _disagree(base: BaseFiles, have: list[str]) -> HubkitError:
    what, fix = "the weight files of the base are not what its index says", "fetch the base again"
    return HubkitError("HK-BASE-FILES", what, where=base.where, want="one file for each tensor", have=have, fix=fix)


def read_config(base: BaseFiles) -> dict[str, Any]:
    """The parsed ``config.json``.

    Raises:
        HubkitError: ``HK-BASE-FILES`` when there is none, ``HK-JSON``.
    """
    config = base.json(CONFIG)
    if config is None:
        fix = "give the folder or revision that save_pretrained() wrote"
        if "adapter_config.json" in base.files:
            fix = "this is an adapter, not a base: give the base it was trained on"
        raise HubkitError("HK-BASE-FILES", f"the base has no {CONFIG}", where=base.where, want=CONFIG, fix=fix)
    return config
