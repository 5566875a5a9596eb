"""The figures of an evaluation: written into an adapter that is there, and read again to be held against gates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubkit.artifact.folder import CARD_NAME, WEIGHTS_NAME, AdapterFolder, check_adapter, write_adapter
from hubkit.artifact.identity.digest import hash_file
from hubkit.artifact.results import FOLDER, result_files
from hubkit.documents.files import read, require_unlinked
from hubkit.documents.manifest import Manifest
from hubkit.documents.schema import MAX_BYTES, parse
from hubkit.errors import HubkitError
from hubkit.named.writing import card_of

SCHEMA = "hubkit/evaluation/1"
"""The first field of a file of figures."""


def require_recordable(folder: AdapterFolder) -> None:
    """Refuses an adapter that cannot be written anew in place, before anything is measured.

    Raises:
        HubkitError: ``HK-EXTRA-FILES``, ``HK-SYMLINK``.
    """
    if loose := folder.unlisted():
        what, fix = "the folder holds files that its manifest does not list", f"hubkit pack {folder.path}"
        raise HubkitError("HK-EXTRA-FILES", what, where=str(folder.path), have=list(loose), fix=fix)
    require_unlinked(folder.path, [entry.path for entry in folder.manifest.files], cached=True)


def record(folder: AdapterFolder, evaluation: Mapping[str, Any], benchmarks: list[dict[str, str]]) -> Manifest:
    """Writes the figures into manifest and card, and ``.eval_results`` for benchmarks; the tensors stay as they are.

    Raises:
        HubkitError: as `write_adapter`; ``HK-GATE`` for a benchmark's figure that was not measured.
    """
    results = result_files(evaluation, benchmarks)
    manifest = dataclasses.replace(folder.manifest, evaluation=dict(evaluation))
    kept = (entry.path for entry in manifest.files if not entry.path.startswith(f"{FOLDER}/"))
    files: dict[str, Any] = {**{path: folder.path / path for path in kept}, **results}
    files[CARD_NAME] = card_of(folder.path, manifest, files)
    check_adapter(folder.path, manifest, files, replace=True)
    return write_adapter(folder.path, manifest, files, replace=True)


def without_stale(manifest: Manifest, folder: Path, files: dict[str, Any]) -> tuple[Manifest, tuple[str, ...]]:
    """`manifest` without figures that are of other tensors than `folder` has now, and what is to be said of it.

    Args:
        manifest: its list of files is that of when the figures were recorded.
        files: of the adapter; results for the Hub go out of it with the figures.
    """
    listed = {entry.path: entry.sha256 for entry in manifest.files}.get(WEIGHTS_NAME)
    if not manifest.evaluation or listed is None or hash_file(folder / WEIGHTS_NAME) == listed:
        return manifest, ()
    for path in [path for path in files if path.startswith(f"{FOLDER}/")]:
        del files[path]
    note = "its figures were of other tensors and are left out: hubkit eval DIR --data ROWS --record"
    return dataclasses.replace(manifest, evaluation=None), (note,)


def evaluation_of(manifest: Manifest, file: Path | None) -> Mapping[str, Any] | None:
    """The figures of an adapter: those of `file`, or those that its manifest records.

    Raises:
        HubkitError: ``HK-GATE`` for a file that is not of this adapter alone; ``HK-MISSING``, ``HK-JSON``.
    """
    if file is None:
        return manifest.evaluation
    try:
        document = parse(read(file, MAX_BYTES), str(file))
    except FileNotFoundError:
        raise HubkitError("HK-MISSING", "the file of figures is not there", where=str(file)) from None
    members = document.get("adapters")
    found = [(one.get("digest"), one.get("weight")) for one in members or () if isinstance(one, dict)]
    if document.get("schema") != SCHEMA or found != [(manifest.digest, 1.0)]:
        raise HubkitError(
            "HK-GATE",
            "these figures are not of this adapter",
            where=str(file),
            want=f"{SCHEMA} of {manifest.digest}",
            have=[f"{weight}*{digest}" for digest, weight in found] or repr(document.get("schema")),
            fix="hubkit eval ADAPTER --data ROWS --out eval.json",
        )
    figures = document.get("figures")
    return figures if isinstance(figures, dict) else None
