"""A resolver for vLLM: a request for an adapter that the server does not know yet is answered with hubkit.

vLLM asks `HubkitResolver` for the folder of a model name that is none of its own. The name is looked up in
``hubkit.lock`` (``HUBKIT_LOCK``), or in the registry where there is no lock; the adapter is pulled, every byte of it is
hashed, and its base is compared with the one that is served. What does not hold is refused with status 409 and hubkit's
own text, because a resolver that says nothing gives a 404 that hides the reason.

vLLM's side: https://docs.vllm.ai/en/latest/design/lora_resolver_plugins.html (0.32 and 0.33).
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import hubkit
from hubkit import HubkitError, Manifest
from hubkit.engines.vllm import RANKS, unreadable
from hubkit.errors import nearest
from hubkit.registry.opening import open_registry
from hubkit.registry.reference import Reference, parse_reference

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

DIGEST = re.compile(r"[0-9a-f]{12}")
LOCK = "HUBKIT_LOCK"


def register() -> None:
    """vLLM's entry point; it is called in every process, and in some of them twice."""
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    if "hubkit" not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolver.register(HubkitResolver)
        LoRAResolverRegistry.register_resolver("hubkit", HubkitResolver())


@dataclass(frozen=True)
class Proven:
    """An adapter that may be served.

    Args:
        name: under which it is served: with the first digits of its digest.
        path: its folder, which nothing writes to.
    """

    name: str
    path: Path


class HubkitResolver:
    """Answers ``name``, ``name@1.2.0`` and ``name@0123456789ab`` (the first digits of the adapter's digest).

    With ``HUBKIT_LOCK`` the names are those of the lock, and nothing else is served. Without, they are ``org/name`` in
    the default registry (``HUBKIT_REGISTRY``), and what a name meant first it means until the server ends.
    """

    def __init__(self) -> None:
        self._known: dict[str, str] = {}  # of a name in a registry: the commit that it meant first
        self._copies = tempfile.TemporaryDirectory(prefix="hubkit-vllm-")
        self._one = threading.Lock()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The folder of an adapter, for vLLM to load.

        Args:
            base_model_name: what the server was started with, a folder or a name of the Hub.
            lora_name: the model that a request names.

        Raises:
            fastapi.HTTPException: 404 for a name that is not known, 409 for everything else that hubkit refuses.
        """
        from fastapi import HTTPException
        from vllm.lora.request import LoRARequest

        try:
            # hashing and the network, in a thread: requests for what is loaded, and /health, go on
            found = await asyncio.to_thread(self.find, base_model_name, lora_name)
        except HubkitError as error:
            unknown = error.code in ("HK-NOT-FOUND", "HK-REFERENCE", "HK-NO-REVISION")
            raise HTTPException(404 if unknown else 409, error.render()) from None
        return LoRARequest(lora_name=found.name, lora_int_id=1, lora_path=str(found.path))

    def find(self, base: str, name: str) -> Proven:
        """The adapter of that name, proven whole and made for the base that is served.

        Raises:
            HubkitError: ``HK-NOT-FOUND``, ``HK-NO-REVISION``; ``HK-LOCK-DRIFT`` for another than was locked;
                ``HK-FILES``; ``HK-BASE-MISMATCH``; ``HK-ENGINE`` for what vLLM cannot run; what pulling raises.
        """
        with self._one:
            lock = os.environ.get(LOCK)
            path, stem = self._locked(Path(lock), name) if lock else self._published(name)
        manifest = Manifest.read(path)
        reasons = _not_adapter(manifest) or unreadable(path, most=served_rank(sys.argv))
        if reasons:
            what, fix = f"vLLM cannot run {name!r} as it is", "hubkit deploy --engine vllm, which lowers it, or merged"
            raise HubkitError("HK-ENGINE", what, where=str(path), have=reasons, fix=fix)
        self._prove(path, manifest, base)
        return Proven(f"{stem}@{manifest.digest.removeprefix('sha256:')[:12]}", path)

    def _prove(self, path: Path, manifest: Manifest, base: str) -> None:
        """Every byte, every tensor, and the base: by its digest where it lies in a folder, else by its name."""
        if Path(base).is_dir():
            hubkit.verify(path, base=Path(base))
            return
        source = manifest.base.source if manifest.base else None
        if source != base:
            what = f"adapter {manifest.name!r} was trained on another base than the server runs"
            raise HubkitError("HK-BASE-MISMATCH", what, where=str(path), want=str(source), have=base)

    def _locked(self, lock: Path, name: str) -> tuple[Path, str]:
        """Folder and name of an adapter of the lock."""
        pinned = hubkit.Lock.read(lock)
        stem, _, asked = name.partition("@")
        entry = next((one for one in pinned.adapters if one.name == stem), None)
        if entry is None:
            names = [one.name for one in pinned.adapters]
            what, near = f"no adapter {stem!r} is locked", nearest(stem, names)
            fix = f"ask for {near[0]}" if near else ""
            raise HubkitError("HK-NOT-FOUND", what, where=str(lock), want=", ".join(names), have=name, fix=fix)
        digest = entry.digest.removeprefix("sha256:")
        if asked and asked not in (entry.version, f"v{entry.version}", digest[:12]):
            what = f"{stem!r} is locked as another than was asked for"
            have = f"{stem}@{entry.version or digest[:12]}  ({entry.digest})"
            raise HubkitError("HK-NO-REVISION", what, where=str(lock), want=name, have=have, fix=f"ask for {stem}")
        reference = parse_reference(entry.source)
        if reference.path is not None:
            path = self._copy(lock.parent / reference.path, entry.digest)
        else:
            path = hubkit.pull(str(replace(reference, revision=entry.revision))).path
        if (have := Manifest.read(path).digest) != entry.digest:
            what, fix = f"{stem!r} is not what was locked", "hubkit lock, after making sure that the change is wanted"
            raise HubkitError("HK-LOCK-DRIFT", what, where=entry.source, want=entry.digest, have=have, fix=fix)
        return path, stem

    def _published(self, name: str) -> tuple[Path, str]:
        """Folder and name of an adapter in the registry."""
        reference = parse_reference(name)
        if reference.path is not None or reference.scheme is not None or reference.folder is not None:
            what, want = "this is no name of an adapter in the registry", "org/name, org/name@1.2.0"
            raise HubkitError("HK-NOT-FOUND", what, want=want, have=name)
        if name not in self._known:
            self._known[name] = _commit(reference) if DIGEST.fullmatch(reference.revision or "") else ""
            reference = replace(reference, revision=self._known[name] or reference.revision)
            found = hubkit.pull(str(reference))
            self._known[name] = found.commit
        else:
            found = hubkit.pull(str(replace(reference, revision=self._known[name])))
        return found.path, str(reference.repo)

    def _copy(self, folder: Path, digest: str) -> Path:
        """A folder that is not in the store, where nobody changes it while it is served: vLLM reads it again later."""
        target = Path(self._copies.name) / digest.replace(":", "-")
        if not target.is_dir():
            draft = Path(tempfile.mkdtemp(dir=self._copies.name))
            manifest = Manifest.read(folder)
            for file in ("hubkit.json", *(entry.path for entry in manifest.files)):
                (draft / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / file, draft / file)
            if manifest.digest != digest:
                target = draft
            else:
                draft.rename(target)
        return target


def _commit(reference: Reference) -> str:
    """The commit among a repository's branches and tags whose adapter has the digest that `reference` asks for."""
    repo, asked = str(reference.repo), str(reference.revision)
    refs = open_registry(reference).refs(repo)
    for commit in dict.fromkeys([*refs.branches.values(), *refs.tags.values()]):
        path = hubkit.pull(f"{repo}@{commit}").path
        if Manifest.read(path).digest.removeprefix("sha256:").startswith(asked):
            return commit
    raise HubkitError("HK-NO-REVISION", f"{repo} has no adapter of this digest", want=asked, have=", ".join(refs.tags))


def served_rank(line: Sequence[str]) -> int:
    """The ``--max-lora-rank`` of a server's command line; vLLM's own largest where only a file of options says it."""
    words = [part for word in line for part in (word.split("=", 1) if word.startswith("--") else [word])]
    names = [word.replace("_", "-") for word in words]
    for option, value in zip(names, words[1:], strict=False):
        if option == "--max-lora-rank" and value.isdecimal():
            return int(value)
    return 16 if "serve" in words and "--config" not in names else RANKS[-1]


def _not_adapter(manifest: Manifest) -> list[str]:
    return [] if manifest.kind == "adapter" else [f"it is a {manifest.kind}, not an adapter"]
