"""Data sets of the Hub and folders of the `datasets` library, which reads both: rows, and of which commit."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubkit.compat.huggingface_hub import dataset_commit, is_forbidden
from hubkit.errors import HubkitError
from hubkit.training.rows.files import EXTRA, Record, fault, rows_of_table, rows_of_values

PREFIX = "datasets:"
FORM = "datasets:ORG/NAME[:CONFIG][@REVISION][#SPLIT], or datasets:DIR[#SPLIT]"
AT_ONCE = 1000
"""Rows that are turned from Arrow into Python at a time."""
_REFERENCE = re.compile(r"(?P<name>[^:@#]+)(:(?P<config>[^:@#]+))?(@(?P<revision>[^@#]+))?(#(?P<split>[^#]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)


@dataclass(frozen=True)
class SetReference:
    """What ``datasets:...`` names: a repository of the Hub or a folder, and which part of it; empty: not said."""

    name: str
    config: str = ""
    revision: str = ""
    split: str = ""


def parse_set(text: str) -> SetReference:
    """What ``datasets:...`` names.

    Raises:
        HubkitError: HK-DATA for another form.
    """
    found = _REFERENCE.fullmatch(text.removeprefix(PREFIX))
    if found is None:
        raise fault(text, FORM, text)
    return SetReference(**{part: value or "" for part, value in found.groupdict().items()})


def is_saved(path: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return (path / "dataset_dict.json").is_file() or all(
        (path / n).is_file() for n in ("dataset_info.json", "state.json")
    )


def read_set(text: str, offline: bool = False) -> tuple[list[Record], dict[str, str]]:
    """The rows of a data set, and where they came from: for the manifest, without a path of this machine.

    Args:
        text: `FORM`, or a folder written by ``save_to_disk``.
        offline: fetch nothing.

    Raises:
        HubkitError: HK-EXTRA without `datasets`; HK-DATA where it cannot be read, or its split is not clear;
            HK-OFFLINE; HK-NO-ROWS.
    """
    try:
        import datasets
    except ImportError:
        what = "data sets need the library `datasets`, which is not installed"
        raise HubkitError("HK-EXTRA", what, where=text, fix=EXTRA) from None
    asked = parse_set(text) if text.startswith(PREFIX) else SetReference(text)
    folder, source = Path(asked.name), {}
    name = folder.resolve().name if folder.is_dir() else asked.name
    try:
        if is_saved(folder):
            found = datasets.load_from_disk(str(folder))
        elif folder.is_dir():
            found = datasets.load_dataset(str(folder), asked.config or None)
        else:
            commit = _commit(asked, text, offline)
            found = datasets.load_dataset(asked.name, asked.config or None, revision=commit)
            source = {"dataset": asked.name, "config": asked.config, "revision": commit}
    except HubkitError:
        raise
    except Exception as error:  # readers of files of any kind, a network: they can raise anything
        if is_forbidden(error):
            raise _offline(text) from None
        have = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        raise fault(text, FORM, have, "is it there, and may you read it?") from None
    chosen, split = _split(found, asked.split, text)
    records = list(_records(chosen, f"{name}#{split}" if split else name))
    if not records:
        raise HubkitError("HK-NO-ROWS", "the training data has no rows", where=text, want="at least one row")
    source |= {"split": split, "digest": digest_of(records)}
    return records, {name: value for name, value in source.items() if value}


def _commit(asked: SetReference, text: str, offline: bool) -> str:
    """The commit of the Hub that is meant, asked for unless it is one already."""
    if offline:
        raise _offline(text)
    return asked.revision if _COMMIT.fullmatch(asked.revision) else dataset_commit(asked.name, asked.revision or None)


def _offline(text: str) -> HubkitError:
    fix = "save it once: datasets.load_dataset(...).save_to_disk(DIR), then hubkit train BASE DIR"
    return HubkitError("HK-OFFLINE", "the data set would have to be fetched", where=text, fix=fix)


def _split(found: Any, asked: str, text: str) -> tuple[Any, str]:
    """The split that is meant: the one asked for, ``train``, or the only one."""
    if not isinstance(found, Mapping):
        if asked:
            raise fault(text, "a data set with splits", "a single one", f"leave #{asked} out")
        return found, ""
    names = list(found)
    name = asked or ("train" if "train" in names else names[0] if len(names) == 1 else "")
    if name not in names:
        raise fault(text, "a split of the data set", [f"#{one}" for one in names], f"add #{names[0] if names else ''}")
    return found[name], name


def _records(chosen: Any, name: str) -> Iterator[Record]:
    # pictures and sounds stay the bytes they are: to decode them takes further libraries, and text has no use for them
    if re.search(r"\b(Image|Audio|Video|Pdf|Nifti|Mesh)\(", repr(chosen.features)):
        before = 0
        for table in chosen.with_format("arrow").iter(AT_ONCE):
            yield from rows_of_table(table, name, before)
            before += table.num_rows
    else:
        yield from rows_of_values(chosen.with_format(None), name, 0)


def digest_of(records: Sequence[Record]) -> str:
    """ "sha256:<hex>" over the rows as they were read, one line of JSON each."""
    digest = hashlib.sha256()
    for one in records:
        digest.update(json.dumps(dict(one.values), sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"
