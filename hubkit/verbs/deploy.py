"""`deploy`: make a lock runnable for one engine, in one folder that holds everything; check, compare, go back.

What is written is exactly what the lock names: every file of base and adapters is hashed before it is used. What a
deployment replaces is kept beside it (`hubkit.artifact.earlier`), so that one can roll back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.deployed import check_sealed, differences, digest_of, entries, seal
from hubkit.artifact.earlier import copy_linked, earlier, forget, keep
from hubkit.artifact.staging import staged
from hubkit.documents.arguments import checked
from hubkit.documents.deployment import DEPLOYMENT_NAME, Deployment
from hubkit.documents.lock import LOCK_NAME, Lock
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.locked import find_adapter, find_base, needed_by
from hubkit.named.members import open_mix
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where
from hubkit.registry.store.placing import base_digest

if TYPE_CHECKING:
    from hubkit.engines import Engine, Plan

KEPT = 1
"""How many earlier deployments are kept unless it is said."""


@dataclass(frozen=True, repr=False)
class Deployed(Shown):
    """A deployment that was written, that passed the check, or that was gone back to.

    Args:
        path: its folder.
        engine: what runs it.
        digest: sha256 of ``deployment.json``: the identity of everything in the folder.
        lock: digest of the lock it was made from.
        command: what to run in the folder.
        files: how many files it has beside ``deployment.json``.
        size: their bytes.
        checked: it was there already, and every byte is as it was written.
        dry_run: nothing was written.
        unproven: nobody has run deployments for this engine, of this version, with hubkit.
        said: how the adapters were written for it, a line each.
        changed: what it runs otherwise than the deployment that it was compared with, replaced, or went back from.
    """

    path: Path
    engine: str
    digest: str | None
    lock: str
    command: tuple[str, ...]
    files: int
    size: int
    checked: bool
    dry_run: bool
    unproven: bool = False
    said: tuple[str, ...] = ()
    changed: tuple[str, ...] | None = None


@checked
def deploy(
    folder: Path | str,
    *,
    engine: str | None = None,
    lock: Path | str = LOCK_NAME,
    check: bool = False,
    digest: str | None = None,
    diff: Path | str | None = None,
    rollback: bool = False,
    replace: bool = False,
    keep: int = KEPT,
    registry: str | None = None,
    offline: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Deployed:
    """Write a deployment; or check one, compare it, or go back to the one before.

    Args:
        folder: the deployment.
        engine: ``peft``, ``merged``, ``vllm``, ...; needed to write one.
        lock: the lock to make runnable; folders named in it are relative to it. Its targets hold the engine's settings.
        check: write nothing; refuse when one byte in the folder is not what was written.
        digest: with `check`, also refuse any deployment but the one of this digest; with `rollback`, go back to that.
        diff: write nothing; say what `folder` runs otherwise than the deployment in this folder.
        rollback: put the deployment that `folder` held before back, checked, and keep the one that it holds now.
        replace: exchange a deployment that is there, which is kept beside it, in ``FOLDER.earlier``.
        keep: how many earlier deployments are kept there.
        registry: for references that name none, if not the default registry.
        offline: use only what was pulled before.
        dry_run: fetch and prove everything, write nothing.
        progress: of each pull.

    Raises:
        HubkitError: ``HK-DEPLOY-DRIFT`` with every difference (check, rollback); ``HK-ENGINE`` with every reason why
            the engine cannot run the lock exactly; ``HK-ENGINE-UNKNOWN``; ``HK-LOCK-DRIFT`` when what is found is not
            what was locked; ``HK-MISSING`` with nothing to go back to; ``HK-EXISTS``; what reading and pulling raise.
    """
    folder = Path(folder)
    if check:
        return _of(folder, check_sealed(folder, digest), checked=True)
    if diff is not None:
        old, new = Deployment.read(Path(diff)), Deployment.read(folder)
        return _of(folder, new, changed=tuple(differences(old, new)))
    if rollback:
        return _roll_back(folder, digest, max(1, keep))
    from hubkit.engines import ENGINES, engine_named

    if engine is None:
        raise HubkitError("HK-USAGE", "deploy needs an engine", want=", ".join(ENGINES), fix="--engine", status=USAGE)
    chosen, path = engine_named(engine), Path(lock)
    pinned = Lock.read(path)
    settings = pinned.targets.get(engine, {})
    plan = _plan(pinned, path if path.is_dir() else path.parent, settings, Where(registry, offline, progress))
    _require_runnable(chosen, plan, path)
    if dry_run:
        return Deployed(folder, engine, None, pinned.digest, (), 0, 0, False, True, not chosen.proven, _said(plan))
    before = _replaced(folder, replace)
    with staged(folder, replace=replace) as stage:
        command = chosen.write(plan, stage)
        (stage / LOCK_NAME).write_bytes(pinned.to_bytes())
        made = _deployment(chosen, pinned, settings, stage, command)
        seal(stage, made)
        if before is not None:
            _keep(folder, keep)
    needed_by(path / LOCK_NAME if path.is_dir() else path, folder / DEPLOYMENT_NAME)
    changed = None if before is None else tuple(differences(before, made))
    return _of(folder, made, said=_said(plan), changed=changed)


def _require_runnable(engine: Engine, plan: Plan, lock: Path) -> None:
    """Refuses what the engine cannot run exactly: ``HK-ENGINE``."""
    from hubkit.engines.plan import encoder_decoder, unknown_settings

    reasons, both = unknown_settings(engine, plan.settings), encoder_decoder(plan)
    reasons = reasons or both or engine.refusals(plan)
    if reasons:
        what = f"the engine {engine.name!r} cannot run this lock exactly"
        fix = "another --engine (merged runs whatever can be merged), other settings or fewer members in the recipe"
        fix = "hubkit merge makes a checkpoint that transformers serves" if reasons == both else fix
        raise HubkitError("HK-ENGINE", what, where=str(lock), have=reasons, fix=fix)


def _said(plan: Plan) -> tuple[str, ...]:
    """How what is served was made, where adapters had to be written anew for an engine."""
    return tuple(f"{one.key}: {line}" for one in plan.made.get("served", ()) for line in one.lowered.said)


def _of(folder: Path, made: Deployment, **more: Any) -> Deployed:
    size = sum(entry.size for entry in made.files)
    known = (folder, made.engine, digest_of(folder), made.lock, made.command, len(made.files), size)
    return Deployed(*known, **{"checked": False, "dry_run": False, "unproven": made.unproven, **more})


def _roll_back(folder: Path, digest: str | None, most: int) -> Deployed:
    """The deployment before becomes the one in use, in one step; the one in use is kept in its place."""
    found = [one for one in earlier(folder) if digest is None or digest_of(one) == digest]
    if not found:
        what = "there is no earlier deployment" + (" of this digest" if digest else "")
        have = [digest_of(one) for one in earlier(folder)] or "none is kept"
        fix = "deploy --replace keeps what it replaces; --keep says how many"
        raise HubkitError("HK-MISSING", what, where=f"{folder}.earlier", want=digest or "", have=have, fix=fix)
    back, now = check_sealed(found[0]), Deployment.read(folder)
    with staged(folder, replace=True) as stage:
        copy_linked(found[0], stage)
        _keep(folder, most + 1)
    forget(found[0])
    return _of(folder, back, changed=tuple(differences(now, back)))


def _replaced(folder: Path, replace: bool) -> Deployment | None:
    """The deployment that is to be replaced, None where there is none; never lets a folder go that is no deployment."""
    if not replace or not folder.is_dir() or not any(folder.iterdir()):
        return None
    if not (folder / DEPLOYMENT_NAME).is_file():
        what, fix = f"{folder.name!r} holds files but no deployment", "choose another folder"
        raise HubkitError("HK-EXISTS", what, where=str(folder), fix=fix)
    return Deployment.read(folder)


def _keep(folder: Path, most: int) -> None:
    keep(folder, digest_of(folder), most)


def _plan(pinned: Lock, folder: Path, settings: Mapping[str, Any], where: Where) -> Plan:
    """Bring everything that is locked here, wherever its digest is found, and hash it."""
    from hubkit.engines import Member, Plan

    base = find_base(pinned.base, folder, where)
    members: list[Member] = []
    for one in pinned.adapters:
        adapter, found = find_adapter(one, folder, where)
        member = Member(one.name, adapter, one.weight)
        if adapter.manifest.kind == "mix":
            taken = {name for known in members for name in known.adapters} | {known.name for known in pinned.adapters}
            mix = open_mix(adapter, found.reference, where, taken=taken)
            inside = {found.name: found.folder for found in mix.adapters}
            member = dataclasses.replace(member, tree=mix.tree, adapters=inside)
        members.append(member)
    files = tuple(file.path for file in pinned.base.files)
    return Plan(base.path, files, tuple(members), pinned.mix, settings, base_digest(pinned.base.files), folder=folder)


def _deployment(
    engine: Engine, pinned: Lock, settings: Mapping[str, Any], folder: Path, command: tuple[str, ...]
) -> Deployment:
    return Deployment(
        engine=engine.name,
        lock=pinned.digest,
        base=pinned.base.fingerprint,
        adapters={one.name: one.digest for one in pinned.adapters},
        files=entries(folder),
        command=command,
        settings=settings,
        overrides=pinned.overrides,
        version=engine.version,
        unproven=not engine.proven,
    )
