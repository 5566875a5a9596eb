"""The manifest, ``hubkit.json``: what an adapter is, which exact base it belongs to, which bytes it consists of.

Written by machines as canonical JSON, so that the sha256 of the file is the adapter's identity. Fields this hubkit does
not know are kept, wherever they stand, and written back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

from hubkit.documents.files import read
from hubkit.documents.mix import MixDocument, read_mix, require_bounded
from hubkit.documents.schema import canonical, check, is_canonical, parse, refuse_secrets, sha256
from hubkit.errors import HubkitError

MANIFEST_NAME = "hubkit.json"
SCHEMA = "hubkit/manifest/1"
MAX_MANIFEST = 8 << 20
"""Bytes of a ``hubkit.json``, and how many files it may list: looked at before anything is read in detail."""
MAX_FILES = 10_000
BASE_TAG = "hubkit:base:"
METHOD_TAG = "hubkit:method:"
"""How tags of a model card begin by which adapters are found: of a base's digest (16 digits of it), and of a method."""
Kind = Literal["adapter", "mix", "model"]
Document = Mapping[str, Any]


def _split(kind: type[Any], document: Document) -> dict[str, Any]:
    """The fields of a dataclass out of a document; what it does not know goes to `extra`."""
    known = {item.name for item in fields(kind)} - {"extra"}
    values: dict[str, Any] = {name: value for name, value in document.items() if name in known}
    values["extra"] = {name: value for name, value in document.items() if name not in known}
    return values


def _join(instance: Any) -> dict[str, Any]:
    """The document of a dataclass; None and empty fields are left out, `extra` is written back."""
    values = {item.name: getattr(instance, item.name) for item in fields(instance) if item.name != "extra"}
    kept = {name: value for name, value in values.items() if not _empty(value)}
    return {**instance.extra, **kept}


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | Mapping | tuple | list) and not value)


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: its path inside it, its size in bytes and the digest of its bytes."""

    path: str
    size: int
    sha256: str
    extra: Document = field(default_factory=dict, hash=False)

    @classmethod
    def from_document(cls, document: Document) -> FileEntry:
        """Read a checked JSON object."""
        return cls(**_split(cls, document))

    def to_document(self) -> dict[str, Any]:
        """The JSON object that ``from_document`` reads."""
        return _join(self)


@dataclass(frozen=True)
class BaseFingerprint:
    """The identity of a base model; see the field descriptions in ``schemas/manifest-1.json``.

    Args:
        source: repository or folder it came from, informative.
        revision: the resolved commit, 40 hexadecimal digits.
        layout: digest over the sorted tensor names, dtypes and shapes; proves nothing about values.
        weights: digest over the values of all tensors, None when only a listing was seen.
        files: weight file name -> digest of its bytes.
        config: the values of the base's configuration that change what it computes.
        tokenizer: digest of what the tokenizer does.
        template: digest of the chat template.
        codec: how the base was quantized while training, e.g. ``nf4/64/double``.
        compute_dtype: what a quantized base was decoded to while training; None: the dtype of its files.
        declared: the repository that another tool's configuration named, where the base given was a folder: unproven.
    """

    source: str | None
    revision: str | None
    layout: str
    weights: str | None
    files: Mapping[str, str]
    config: Mapping[str, Any]
    tokenizer: str | None
    template: str | None
    codec: str | None = None
    compute_dtype: str | None = None
    declared: str | None = None
    extra: Document = field(default_factory=dict, hash=False)

    @classmethod
    def from_document(cls, document: Document) -> BaseFingerprint:
        """Read a checked JSON object."""
        absent: dict[str, Any] = dict.fromkeys(("source", "revision", "weights", "tokenizer", "template"))
        return cls(**{**absent, "files": {}, "config": {}, **_split(cls, document)})

    def to_document(self) -> dict[str, Any]:
        """The JSON object that ``from_document`` reads; what is not known is left out."""
        return _join(self)


@dataclass(frozen=True)
class Plugin:
    """The distribution that offered the method, and its version."""

    distribution: str
    version: str
    extra: Document = field(default_factory=dict, hash=False)

    @classmethod
    def from_document(cls, document: Document) -> Plugin:
        """Read a checked JSON object."""
        return cls(**_split(cls, document))

    def to_document(self) -> dict[str, Any]:
        """The JSON object that ``from_document`` reads."""
        return _join(self)


@dataclass(frozen=True)
class Parent:
    """An adapter this one was made from: how it was named, its manifest's digest, its weight."""

    reference: str
    digest: str
    weight: float
    extra: Document = field(default_factory=dict, hash=False)

    @classmethod
    def from_document(cls, document: Document) -> Parent:
        """Read a checked JSON object."""
        made = cls(**_split(cls, document))
        return replace(made, weight=float(made.weight))

    def to_document(self) -> dict[str, Any]:
        """The JSON object that ``from_document`` reads."""
        return _join(self)


@dataclass(frozen=True)
class Manifest:
    """``hubkit.json``; see the field descriptions in ``schemas/manifest-1.json``.

    Args:
        kind: ``adapter``, ``mix`` (no tensors of its own: a tree of members) or ``model`` (a merged checkpoint).
        config: the method's configuration, as the plugin's dataclass gives it.
        files: every file but this one and README.md, sorted by path.
        overrides: the named overrides in force when it was made, e.g. ``allow-base-mismatch``.
        extra: fields of a later hubkit, kept.
    """

    kind: Kind
    name: str
    version: str = "0.1.0"
    method: str | None = None
    plugin: Plugin | None = None
    config: Document = field(default_factory=dict)
    base: BaseFingerprint | None = None
    files: tuple[FileEntry, ...] = ()
    vocabulary: Document | None = None
    training: Document | None = None
    evaluation: Document | None = None
    task: Document | None = None
    probes: Document | None = None
    parents: tuple[Parent, ...] = ()
    composition: Document | None = None
    extraction: Document | None = None
    rebase: Document | None = None
    migration: Document | None = None
    license: str | None = None
    overrides: tuple[str, ...] = ()
    mix: Document | None = None
    extra: Document = field(default_factory=dict, hash=False)

    @classmethod
    def from_document(cls, document: Document, where: str = MANIFEST_NAME) -> Manifest:
        """Read a parsed manifest, checking it first.

        Raises:
            HubkitError: ``HK-SCHEMA``, ``HK-NEWER``.
        """
        listed = document.get("files")
        if isinstance(listed, list) and len(listed) > MAX_FILES:  # before each of them is held against the schema
            want, have = f"at most {MAX_FILES}", f"{len(listed)} files"
            raise HubkitError("HK-LIMIT", "the manifest lists too many files", where=where, want=want, have=have)
        if document.get("kind") == "mix":
            require_bounded(document.get("mix"), where)
        check(document, "manifest", where)
        values = _split(cls, document)
        del values["extra"]["schema"]
        readers: dict[str, Any] = {"plugin": Plugin.from_document, "base": BaseFingerprint.from_document}
        for name in readers.keys() & values.keys():
            values[name] = readers[name](values[name])
        values["files"] = tuple(map(FileEntry.from_document, values.get("files", ())))
        values["parents"] = tuple(map(Parent.from_document, values.get("parents", ())))
        values["overrides"] = tuple(values.get("overrides", ()))
        _check_files(values["files"], where)
        if values["kind"] == "mix":
            read_mix(values["mix"], where)
        return cls(**values)

    def mixed(self, where: str = MANIFEST_NAME) -> MixDocument:
        """The members and the tree of a manifest of kind ``mix``.

        Raises:
            HubkitError: ``HK-NOT-MIX`` for another kind.
        """
        if self.kind != "mix" or self.mix is None:
            raise HubkitError("HK-NOT-MIX", f"{self.name!r} is no mix", where=where, want="mix", have=self.kind)
        return read_mix(self.mix, where)

    def to_document(self) -> dict[str, Any]:
        """The JSON object: ``schema`` first, None and empty fields left out, unknown fields written back."""
        made = _join(self)
        for name in ("plugin", "base"):
            if name in made:
                made[name] = made[name].to_document()
        for name in ("files", "parents"):
            if name in made:
                made[name] = [entry.to_document() for entry in made[name]]
        if "overrides" in made:
            made["overrides"] = list(made["overrides"])
        return {"schema": SCHEMA, **made}

    def to_bytes(self) -> bytes:
        """The bytes of ``hubkit.json``: RFC 8785, no trailing newline.

        Raises:
            HubkitError: ``HK-JSON`` for values JSON cannot hold, ``HK-SECRET`` when it would hold a token.
        """
        document = self.to_document()
        refuse_secrets(document, "manifest")
        return canonical(document)

    @property
    def digest(self) -> str:
        """The adapter's identity: the sha256 of ``hubkit.json``."""
        return sha256(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes, where: str = MANIFEST_NAME) -> Manifest:
        """Read the bytes of a ``hubkit.json``.

        They must be the very bytes ``to_bytes`` gives, or the digest of the file would not be the adapter's identity.

        Raises:
            HubkitError: ``HK-JSON``, ``HK-SCHEMA``, ``HK-NEWER``, ``HK-NOT-CANONICAL``.
        """
        made = cls.from_document(parse(data, where), where)
        if not is_canonical(data, made.to_document()):
            want = canonical(made.to_document())
            raise HubkitError(
                "HK-NOT-CANONICAL",
                "the manifest was edited or written by another program: its bytes are not canonical JSON",
                where=where,
                want=f"{len(want)} bytes, {sha256(want)}",
                have=f"{len(data)} bytes, {sha256(data)}",
                fix="hubkit pack DIR writes it anew",
            )
        return made

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read ``hubkit.json`` of a folder.

        Raises:
            HubkitError: as ``from_bytes``; ``HK-NOT-ADAPTER`` when there is none, ``HK-IO``.
        """
        path = folder / MANIFEST_NAME
        try:
            data = read(path, MAX_MANIFEST)
        except FileNotFoundError:
            base = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
            pack = f"this is a base: --base {folder}" if base else f"hubkit pack {folder}"
            fix = pack if folder.is_dir() else "check the path"
            what = f"there is no adapter in {str(folder)!r}"
            raise HubkitError("HK-NOT-ADAPTER", what, want=MANIFEST_NAME, have="nothing", fix=fix) from None
        return cls.from_bytes(data, str(path))

    def shareable(self) -> Manifest:
        """A copy whose sources name no place on this machine: see ``shareable``."""
        parents = tuple(replace(parent, reference=shareable(parent.reference)) for parent in self.parents)
        base = self.base and replace(self.base, source=self.base.source and shareable(self.base.source))
        return replace(self, base=base, parents=parents)


def shareable(source: str) -> str:
    """`source` as it may be published: of a folder outside the working folder, only its own name is left.

    Repositories (``org/name@rev``), URLs of servers and folders named ``./base`` stay as they are.
    """
    local = source.removeprefix("file://")
    if local == source and not re.match(r"[/\\~]|\.\.|[A-Za-z]:[/\\]", source):
        return source
    parts = [part for part in re.split(r"[/\\]+", local) if part.strip(". ")]
    return cast(str, parts[-1]) if parts else "folder"


def _check_files(files: tuple[FileEntry, ...], where: str) -> None:
    paths = [entry.path for entry in files]
    if paths != sorted(set(paths)):
        fix = "each path once, in the order of its code points"
        raise HubkitError("HK-SCHEMA", "the manifest's files are not sorted", where=f"{where}#/files", want=fix)
