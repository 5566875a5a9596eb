"""An adapter whose modules the base calls otherwise: the same files of PEFT under the base's names, to be adopted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.adopting.adopt import method_for, whole_modules
from hubkit.adopting.folders import foreign_config, weights_of
from hubkit.adopting.keys import plain_keys
from hubkit.adopting.live_names import LiveNames, live_names
from hubkit.adopting.renaming import Place, Renaming, kind_of, renamed_config, renamings
from hubkit.artifact.folder import PEFT_CONFIG, WEIGHTS_NAME
from hubkit.artifact.forms import PEFT_PREFIX
from hubkit.errors import USAGE, HubkitError

if TYPE_CHECKING:
    from hubkit.artifact.identity.digest import TensorDigest
    from hubkit.tensors.base.base import Base


@dataclass(frozen=True)
class Renamed:
    """An adapter's files of PEFT under other names.

    Args:
        files: ``adapter_config.json`` and ``adapter_model.safetensors``.
        renamed: which kinds of modules are called otherwise.
        names: old name of each of these modules -> its new one.
    """

    files: Mapping[str, bytes]
    renamed: Sequence[Renaming]
    names: Mapping[str, str]


def renamed_files(
    folder: Path,
    base: Path,
    tensors: Iterable[TensorDigest],
    own: Iterable[TensorDigest] | None,
    given: Sequence[tuple[str, str]],
) -> Renamed:
    """The files of the adapter in `folder` under the names of the base in `base`.

    Args:
        tensors: of the base, with their digests.
        own: of the base that the adapter was made on, where it lists them.
        given: beginnings of names and what to put in their places, before anything is proposed.

    Raises:
        HubkitError: ``HK-MIGRATE`` where a module has no certain place, where nothing needs another name, and for an
            adapter that is no PEFT adapter of an installed method; what reading the folder raises.
    """
    from hubkit.artifact.forms import split_keys
    from hubkit.artifact.identity.header import read_header
    from hubkit.tensors.base.base import Base

    config, weights = foreign_config(folder), weights_of(folder)
    read = method_for(config, folder)
    if read is None:
        what = "adapters of this type are carried as they are: their modules cannot be renamed"
        raise HubkitError("HK-MIGRATE", what, where=str(folder), have=str(config.get("peft_type")))
    header = read_header(weights)
    plain = plain_keys(read[1], header, str(weights)).names
    shapes = {name: header[key].shape for key, name in plain.items()}
    saved = [name for names in whole_modules(*read[1:]) for name in names]
    parts = split_keys(read[1], shapes, str(weights), saved).parts
    sites, live = Base.from_folder(base), live_names(base)
    moved = {name: _moved(name, given) for name in parts}
    places = _places(sites, live, tensors)
    homed = {name for name, new in moved.items() if new in places}
    sizes = {new: frozenset(size for key in parts[old].values() for size in shapes[key]) for old, new in moved.items()}
    back = {new: old for old, new in moved.items()}
    lost = {moved[name]: sizes[moved[name]] for name in parts if name not in homed}
    known = _digests(own)
    digests = {new: known[old] for new, old in back.items() if old in known}
    made, names = renamings(lost, places, digests, [moved[name] for name in homed], str(weights))
    every = {old: names.get(new, new) for old, new in moved.items()}
    changed = {old: new for old, new in every.items() if old != new}
    if len({*every.values()}) < len(every):
        twice = [f"{old}: {new}" for old, new in every.items() if sum(new == one for one in every.values()) > 1]
        raise HubkitError("HK-MIGRATE", "two modules would be one", where=str(folder), have=twice, fix="--rename less")
    if not changed:
        what = "every module of the adapter has its place in the base already"
        raise HubkitError(
            "HK-MIGRATE", what, where=str(folder), fix="hubkit pack; for a base of other values hubkit rebase"
        )
    _require_values(changed, known, places, str(folder))
    made += _by_hand(moved, homed)
    return Renamed(_files(folder, config, plain, parts, every), made, changed)


def _moved(name: str, given: Sequence[tuple[str, str]]) -> str:
    """A module's name after what the user asked for: the first beginning that it has."""
    for old, new in given:
        if f"{name}.".startswith(f"{old}.") if old else True:
            return f"{new}.{name[len(old) :].lstrip('.')}".strip(".")
    return name


def _by_hand(moved: Mapping[str, str], homed: Iterable[str]) -> list[Renaming]:
    """What the user's own renaming gave a home."""
    pairs: dict[tuple[str, str], int] = {}
    for old in homed:
        if moved[old] != old:
            pair = kind_of(old), kind_of(moved[old])
            pairs[pair] = pairs.get(pair, 0) + 1
    return [Renaming(old, new, count, "given") for (old, new), count in sorted(pairs.items())]


def _places(base: Base, live: LiveNames, tensors: Iterable[TensorDigest]) -> dict[str, Place]:
    """The modules of a base, by the names of its files and, where these differ, of its model."""
    known = _digests(tensors)
    made = {name: Place(site.shape, known.get(name, "")) for name, site in base.sites.items() if site.kind != "block"}
    made |= {new: made[old] for old, new in live.modules.items() if old in made}
    for fused in live.experts:
        made |= {fused.module: Place(None), f"{fused.module}.base_layer": Place(None)}
    return made


def _digests(tensors: Iterable[TensorDigest] | None) -> dict[str, str]:
    """Module -> digest of its weight."""
    return {one.name.removesuffix(".weight"): one.sha256 for one in tensors or () if one.name.endswith(".weight")}


def _require_values(
    names: Mapping[str, str], known: Mapping[str, str], places: Mapping[str, Place], where: str
) -> None:
    """Refuses a base whose renamed modules hold other values than those that the adapter was made on."""
    pairs = [(old, new, known.get(old, ""), places[new].digest) for old, new in names.items() if new in places]
    wrong = [
        f"{old}: {mine}; {new}: {theirs}" for old, new, mine, theirs in pairs if mine and theirs and mine != theirs
    ]
    if wrong:
        raise HubkitError(
            "HK-MIGRATE",
            "the modules that are called otherwise hold other values, too: this is another base",
            where=where,
            have=wrong[:24] + ([f"and {len(wrong) - 24} more"] if len(wrong) > 24 else []),
            fix="the base that it was trained on, under its new names; then hubkit rebase onto this one",
        )


def _files(
    folder: Path,
    config: Mapping[str, Any],
    plain: Mapping[str, str],
    parts: Mapping[str, Mapping[str, str]],
    every: Mapping[str, str],
) -> dict[str, bytes]:
    from safetensors.torch import save

    from hubkit.tensors.files.shards import read_file

    at = {key: site for site, roles in parts.items() for key in roles.values()}
    stored = {}
    for key, value in read_file(weights_of(folder)).items():
        name = plain[key]
        site = at.get(name)
        if site is not None:
            name = name.replace(f"{PEFT_PREFIX}{site}.", f"{PEFT_PREFIX}{every[site]}.", 1)
        stored[name] = value.contiguous()
    changed = {old: new for old, new in every.items() if old != new}
    text = json.dumps(renamed_config(config, changed, [old for old in every if old not in changed]), indent=2)
    data: bytes = save(stored, metadata={"format": "pt"})
    return {PEFT_CONFIG: text.encode(), WEIGHTS_NAME: data}


def pairs_given(words: Iterable[str]) -> list[tuple[str, str]]:
    """``OLD=NEW`` as pairs.

    Raises:
        HubkitError: ``HK-OPTIONS`` (status 2).
    """
    found = [tuple(word.partition("=")[::2]) for word in words]
    wrong = [word for word in words if word.count("=") != 1 or word == "="]
    if wrong:
        raise HubkitError(
            "HK-OPTIONS", "this renames nothing", want="OLD=NEW, beginnings of names", have=wrong, status=USAGE
        )
    return [(old, new) for old, new in found]
