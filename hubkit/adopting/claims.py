"""What a configuration of PEFT claims, held against what is there: the base it was trained on, the modules it changes.

PEFT compares neither (its loader drops what fits nowhere and makes up what is missing), so both are often wrong.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.folder import PEFT_CONFIG
from hubkit.artifact.identity.base_match import OVERRIDE
from hubkit.errors import HubkitError
from hubkit.named.sources import Source, base_reference, base_with_record, under_its_name
from hubkit.registry.opening import Where
from hubkit.registry.reference import Reference

if TYPE_CHECKING:
    from hubkit.artifact.identity.digest import BaseRecord
    from hubkit.tensors.base.base import Base

PARTIAL = "allow-partial"
"""The override that goes on with an adapter of fewer modules than its configuration claims, as manifests name it."""
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


def found_base(
    config: Mapping[str, Any], folder: Path, base: Path | str | None, revision: str | None, where: Where, allow: bool
) -> tuple[Source, BaseRecord, list[str]]:
    """The base that is given, or the one that the configuration names; its identity; the overrides that were needed.

    Args:
        folder: the adapter's.
        base: folder or repository; the declared one when None.
        revision: of it.
        where: where it is looked for.
        allow: the user's ``--allow-base-mismatch``.

    Raises:
        HubkitError: ``HK-BASE-NEEDED``, ``HK-BASE-MISMATCH``; what fetching and reading the base raise.
    """
    named = base or config.get("base_model_name_or_path")
    if not named:
        raise HubkitError("HK-BASE-NEEDED", "the adapter names no base", where=str(folder), fix="--base BASE")
    named = named if isinstance(named, Path) else str(named)
    asked, used = require_declared(config, named, revision, str(folder / PEFT_CONFIG), allow)
    source, record = base_with_record(named, asked, where)
    return source, under_its_name(source, record, _declared(config)), used


def require_declared(
    config: Mapping[str, Any], base: Path | str, revision: str | None, where: str, allow: bool
) -> tuple[str | None, list[str]]:
    """Refuses a base that is clearly another one than the configuration names.

    Compared are names of repositories and, where both are known, commits; a path says nothing.

    Args:
        base: the base given.
        revision: of it, as given.
        where: the configuration, for messages.
        allow: the user's ``--allow-base-mismatch``.

    Returns:
        the revision to ask for, the declared one where none was given; and the overrides that were needed.

    Raises:
        HubkitError: ``HK-BASE-MISMATCH``; ``HK-REFERENCE`` for a `base` that is no reference.
    """
    want, have = _declared(config), base_reference(base, revision)
    if want is None or want.repo is None or have.repo is None:
        return revision, []
    same = want.repo.casefold() == have.repo.casefold()
    if same and have.revision is None:
        return want.revision, []
    if same and not _other_commit(str(want.revision), str(have.revision)):
        return revision, []
    if not allow:
        raise HubkitError(
            "HK-BASE-MISMATCH",
            "the adapter says that it was trained on another base",
            where=f"{where}#/base_model_name_or_path",
            want=str(want),
            have=str(have),
            fix=f"--base {want}    or    --{OVERRIDE}",
        )
    return revision, [OVERRIDE]


def _declared(config: Mapping[str, Any]) -> Reference | None:
    """The repository that a configuration names as its base; None for a path, or nothing that can be read."""
    text, revision = config.get("base_model_name_or_path"), config.get("revision")
    try:
        found = base_reference(text) if isinstance(text, str) else None
    except HubkitError:
        return None
    if found is None or found.kind != "repo" or found.revision or not isinstance(revision, str):
        return found
    return replace(found, revision=revision)


def _other_commit(want: str, have: str) -> bool:
    known = _COMMIT.fullmatch(want) and _COMMIT.fullmatch(have)
    return bool(known) and not (want.startswith(have) or have.startswith(want))


def require_promised(
    config: Mapping[str, Any],
    keys: tuple[str, str],
    present: Collection[str],
    base: Base,
    layers: int | None,
    where: str,
    allow: bool,
) -> list[str]:
    """Refuses an adapter with fewer modules than its configuration claims: another base, or half of a file.

    Args:
        config: PEFT's.
        keys: of the targets in it: modules, and weights of modules.
        present: the modules that the file has tensors for.
        layers: how many the base's configuration counts; files can hold more, for predicting several tokens.
        where: the folder, for messages.
        allow: the user's ``--allow-partial``.

    Returns:
        The overrides that were needed.

    Raises:
        HubkitError: ``HK-TARGET`` naming targets that match nothing in the base; ``HK-KEYS`` naming modules that are
            targets and have no tensors.
    """
    from hubkit.tensors.base.layers import layer_of
    from hubkit.tensors.base.site import natural

    targets = _targets(config, *keys)
    groups = {site.group for site in base.sites.values() if site.number is not None}
    known = {end for name in (*base.modules(), *groups) for end in _endings(name)}
    absent = [t for t in targets if isinstance(t, str) and t not in known]
    places = {name: layer_of(name) for name in base.sites}
    pool = [name for name, at in places.items() if layers is None or at is None or at < layers]
    pool = [n for n in pool if base.sites[n].kind in ("linear", "embedding") and not _excluded(config, n)]
    there, kinds, missing = set(present), {_kind(name) for name in present}, set[str]()
    by_ending = _by_ending(pool, base)
    for target in targets:
        near = by_ending.get(target, ()) if isinstance(target, str) else pool
        chosen = {name for name in near if _chooses(config, target, name, base.sites[name].group)}
        missing |= {n for n in chosen - there if _kind(n) in kinds or not chosen & there}
    if not (absent or missing):
        return []
    if not allow:
        mend = f"--base with the base that it was trained on; --{PARTIAL} goes on with what is there, and is recorded"
        if absent:
            raise HubkitError(
                "HK-TARGET",
                "targets of the adapter match nothing in the base",
                where=f"{where}#/{keys[0]}",
                have=absent,
                want="modules of the base",
                fix=mend,
            )
        raise HubkitError(
            "HK-KEYS",
            f"the adapter has no tensors for {len(missing)} modules that its configuration names",
            where=where,
            want=[f"missing: {name}" for name in sorted(missing, key=natural)],
            have=f"tensors of {len(present)} modules",
            fix=mend,
        )
    return [PARTIAL]


def _targets(config: Mapping[str, Any], key: str, parameters: str) -> list[str | re.Pattern[str]]:
    """The targets of a configuration: names, or one expression; none where they are not to be read."""
    from hubkit.tensors.base.expressions import expression

    given, weights = config.get(key), config.get(parameters) or []
    named: list[str | re.Pattern[str]] = [name.removesuffix(".weight") for name in weights if isinstance(name, str)]
    if isinstance(given, list):
        return named + [name for name in given if isinstance(name, str)]
    if not isinstance(given, str) or given == "all-linear":  # PEFT lists what it stands for, and saves the list
        return named
    try:
        return [*named, expression(given)]
    except re.error:
        return named


def _endings(name: str) -> list[str]:
    """All that a module's name ends in, at its points."""
    steps = name.split(".")
    return [".".join(steps[n:]) for n in range(len(steps))]


def _by_ending(pool: Iterable[str], base: Base) -> dict[str, list[str]]:
    """Target -> the modules among `pool` whose names end so; of experts in one tensor, those that it says by name."""
    found: dict[str, list[str]] = {}
    for name in pool:
        group = base.sites[name].group
        ends = [end for end in (*_endings(name), *_endings(group)) if "experts" in end] if group else _endings(name)
        for end in ends:
            found.setdefault(end, []).append(name)
    return found


def _chooses(config: Mapping[str, Any], target: str | re.Pattern[str], name: str, group: str) -> bool:
    """Whether PEFT takes module `name` for `target` (``tuners_utils.check_target_module_exists`` of 0.21).

    Args:
        group: of an expert that the files hold in one tensor with others, whom only names mean; empty for others.
    """
    if not isinstance(target, str):
        return not group and target.fullmatch(name) is not None
    if group:
        return True
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if name == target or not _ends(name, target) or layers in (None, []):
        return _ends(name, target)
    before = patterns if isinstance(patterns, list) else [patterns]
    steps = name.split(".")
    behind = (n for n in range(1, len(steps)) if not before or any(_ends(".".join(steps[:n]), one) for one in before))
    number = next((int(steps[n]) for n in behind if steps[n].isdigit()), None)
    return number in (layers if isinstance(layers, list) else [layers])


def _excluded(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT passes over module `name`, whatever the targets say."""
    from hubkit.tensors.base.expressions import expression

    excluded, saved = config.get("exclude_modules") or [], config.get("modules_to_save") or []
    if any(f".{one}." in f".{name}." for one in saved):
        return True
    if not isinstance(excluded, str):
        return isinstance(excluded, list) and any(_ends(name, one) for one in excluded)
    try:
        return expression(excluded).fullmatch(name) is not None
    except re.error:
        return True


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _kind(name: str) -> str:
    """The name of a module without its numbers: the same in every layer, and for every expert."""
    return ".".join("*" if step.isdigit() else step for step in name.split("."))
