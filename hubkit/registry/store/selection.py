"""Which files of a repository make up an adapter or a base: decided from the listing, before they are downloaded.

What is not part of the artifact is not fetched: other formats, training leftovers, adapters in other folders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from hubkit.documents.manifest import MANIFEST_NAME, MAX_MANIFEST, Manifest
from hubkit.documents.names import check_allowed, check_names
from hubkit.documents.schema import parse
from hubkit.errors import HubkitError, nearest
from hubkit.registry.api import RemoteFile

PEFT_CONFIG = "adapter_config.json"
CARD = "README.md"
INDEX = "model.safetensors.index.json"
MAX_DOCUMENT = 32 << 20
"""Bytes of an index of shards."""
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".dill", ".h5",
    ".msgpack",
)  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_BASE_NAMES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", MANIFEST_NAME, "tensors.json", "LICENSE",
    "modules.json", "1_Pooling/config.json",
)  # fmt: skip

ReadSmall = Callable[[RemoteFile], bytes]
"""Gives the whole content of one small remote file."""


@dataclass(frozen=True)
class Selection:
    """What is to be downloaded.

    Args:
        files: path inside the artifact to the remote file, sorted.
        manifest: of a hubkit repository; None for a plain one.
        content: what was read already for the decision, by path inside the artifact.
    """

    files: Mapping[str, RemoteFile]
    manifest: Manifest | None = None
    content: Mapping[str, bytes] = field(default_factory=dict)


def select_adapter(listing: Iterable[RemoteFile], folder: str | None, read: ReadSmall, where: str) -> Selection:
    """The files of the adapter in `folder` (None: at the top) of a repository.

    With a ``hubkit.json``: what it lists and the model card, after the listing was compared with it. Without: the plain
    files of that folder that an adapter may consist of.

    Raises:
        HubkitError: HK-FILES (listing and manifest differ, every difference), HK-NOT-ADAPTER, HK-PICKLE (the weights
            are pickles only), HK-NAME, HK-FORBIDDEN-FILE, HK-NOT-FOUND (no such folder), and what the manifest raises.
    """
    every = list(listing)
    inside = _inside(every, folder, where)
    if MANIFEST_NAME in inside:
        return _listed(inside, read, where)
    if PEFT_CONFIG not in inside:
        found = sorted({str(PurePosixPath(f.path).parent) for f in every if _is_root(f.path)} - {"."})
        fixes = ", ".join(f"{where}:{name}" for name in found[:5])
        want = f"{MANIFEST_NAME} or {PEFT_CONFIG}"
        raise HubkitError("HK-NOT-ADAPTER", "there is no adapter here", where=where, want=want, fix=fixes)
    plain = {path: file for path, file in inside.items() if "/" not in path}
    taken = {path: file for path, file in plain.items() if path != ".gitattributes" and _is_allowed(path)}
    _require_tensors(taken, plain, where)
    return _selection(taken, None, {}, where)


def select_base(listing: Iterable[RemoteFile], folder: str | None, read: ReadSmall, where: str) -> Selection:
    """The files of a model: configuration, tokenizer, safetensors with their index; never a pickle.

    Raises:
        HubkitError: HK-NOT-MODEL, HK-PICKLE, HK-FILES (a shard that the index names is missing), HK-NAME.
    """
    inside = _inside(listing, folder, where)
    if MANIFEST_NAME in inside:
        return _listed(inside, read, where)
    if "config.json" not in inside:
        raise HubkitError("HK-NOT-MODEL", "there is no model here", where=where, want="config.json")
    content: dict[str, bytes] = {}
    if "model.safetensors" in inside:
        weights = ["model.safetensors"]
    elif INDEX in inside:
        content[INDEX] = _small(inside[INDEX], read, where)
        weights = [INDEX, *_shards(content[INDEX], f"{where}  {INDEX}")]
    else:
        weights = []
    missing = [f"{name}: missing" for name in weights if name not in inside]
    if missing:
        raise HubkitError("HK-FILES", "the index names files that are not there", where=where, have=missing)
    taken = {path: inside[path] for path in (*_BASE_NAMES, *weights) if path in inside}
    _require_tensors(taken, inside, where)
    return _selection(taken, None, content, where)


def _inside(listing: Iterable[RemoteFile], folder: str | None, where: str) -> dict[str, RemoteFile]:
    """Paths below the folder, made relative to it."""
    files = list(listing)
    if folder is None:
        return {file.path: file for file in files}
    prefix = f"{folder}/"
    found = {file.path.removeprefix(prefix): file for file in files if file.path.startswith(prefix)}
    if not found:
        folders = {str(parent) for file in files for parent in PurePosixPath(file.path).parents} - {"."}
        near = ", ".join(nearest(folder, folders)) or ", ".join(sorted(folders)[:5]) or "no folders"
        raise HubkitError("HK-NOT-FOUND", f"no folder '{folder}' in the repository", where=where, have=near)
    return found


def _is_root(path: str) -> bool:
    return path.rsplit("/", 1)[-1] in (MANIFEST_NAME, PEFT_CONFIG)


def _listed(inside: Mapping[str, RemoteFile], read: ReadSmall, where: str) -> Selection:
    """What the manifest lists, when the listing agrees with it."""
    data = _small(inside[MANIFEST_NAME], read, where, MAX_MANIFEST)
    manifest = Manifest.from_bytes(data, f"{where}  {MANIFEST_NAME}")
    wanted = {entry.path: entry for entry in manifest.files}
    others = {path.rpartition("/")[0] for path in inside if _is_root(path)} - {""}
    differences = []
    for path, entry in wanted.items():
        file = inside.get(path)
        if file is None:
            differences.append(f"{path}: missing")
        elif file.size != entry.size:
            differences.append(f"{path}: {file.size} bytes, the manifest says {entry.size}")
        elif file.sha256 is not None and file.sha256 != entry.sha256:
            differences.append(f"{path}: {file.sha256}, the manifest says {entry.sha256}")
    for path in sorted(inside.keys() - wanted.keys()):
        elsewhere = any(path.startswith(f"{other}/") for other in others)  # another adapter of the repository
        if path.casefold().endswith(_WEIGHTS) and not elsewhere:
            differences.append(f"{path}: weights that the manifest does not list")
    if differences:
        raise differing(differences, where)
    taken = {path: inside[path] for path in (MANIFEST_NAME, CARD, *wanted) if path in inside}
    return _selection(taken, manifest, {MANIFEST_NAME: data}, where)


def differing(differences: Sequence[str], where: str) -> HubkitError:
    """The refusal of files that are not those of the manifest."""
    what, fix = "the files are not those that the manifest lists", "publish the adapter again: hubkit push"
    return HubkitError("HK-FILES", what, where=where, have=list(differences), fix=fix)


def _selection(
    taken: Mapping[str, RemoteFile], manifest: Manifest | None, content: Mapping[str, bytes], where: str
) -> Selection:
    check_names(taken, where)
    for path in taken:
        check_allowed(path, b"", where)
    return Selection(dict(sorted(taken.items())), manifest, content)


def _is_allowed(path: str) -> bool:
    try:
        check_allowed(path, b"", "")
    except HubkitError:
        return False
    return True


def _require_tensors(taken: Iterable[str], there: Iterable[str], where: str) -> None:
    if any(path.endswith(".safetensors") for path in taken):
        return
    pickles = sorted(path for path in there if path.endswith(_PICKLES) and "/" not in path)
    code = "HK-PICKLE" if pickles else "HK-MISSING"
    what = (
        "the weights are pickles only, which can run code when they are loaded" if pickles else "there are no weights"
    )
    fix = "ask the publisher for safetensors, or convert a copy with a tool you trust" if pickles else ""
    raise HubkitError(code, what, where=where, want="safetensors", have=pickles, fix=fix)


def _small(file: RemoteFile, read: ReadSmall, where: str, limit: int = MAX_DOCUMENT) -> bytes:
    if file.size > limit:
        want, have = f"at most {limit} bytes", f"{file.size} bytes"
        raise HubkitError("HK-LIMIT", "a document is too large", where=f"{where}  {file.path}", want=want, have=have)
    return read(file)


def _shards(index: bytes, where: str) -> list[str]:
    names = parse(index, where).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise HubkitError("HK-JSON", "not an index of shards", where=where, want="weight_map: tensor name to file name")
    shards = sorted(set(names.values()))
    if not all(name.endswith(".safetensors") for name in shards):
        raise HubkitError("HK-PICKLE", "the index names files that are not safetensors", where=where, have=shards[:20])
    return shards
