"""`tag`: give a commit that is there a version."""

from __future__ import annotations

from dataclasses import dataclass

from hubkit.documents.arguments import checked
from hubkit.documents.manifest import MANIFEST_NAME, Manifest
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.registry.opening import open_registry
from hubkit.registry.reference import parse_reference
from hubkit.registry.versions import parse_version, resolve_revision


@dataclass(frozen=True, repr=False)
class Tagged(Shown):
    """A version of a repository.

    Args:
        repo: ``org/name``.
        registry: its name, without credentials.
        version: the tag is ``v<version>``.
        commit: the 40-hex commit that it names.
        created: False: it was there already, at this commit.
    """

    repo: str
    registry: str
    version: str
    commit: str
    created: bool


@checked
def tag(reference: str, version: str, *, registry: str | None = None) -> Tagged:
    """Give a commit a version; a version never moves.

    Args:
        reference: the repository, at a revision or at its default branch.
        version: by semver.org, with or without a ``v``; where the commit holds an adapter, that adapter's own.
        registry: where, if not the default registry.

    Raises:
        HubkitError: ``HK-VERSION`` (status 2) for what is no version, or another one than the adapter's;
            ``HK-VERSION-EXISTS`` when it is at another commit; ``HK-NO-REVISION``; what the registry raises.
    """
    target = parse_reference(reference)
    if target.repo is None or target.folder:
        what, want = "a version is given to a repository", "org/name   org/name@revision"
        raise HubkitError("HK-REFERENCE", what, want=want, have=reference, status=USAGE)
    wanted = parse_version(version.removeprefix("v"))
    if wanted is None:
        want = "three numbers, as in 1.2.0 or 1.2.0-rc.1"
        raise HubkitError("HK-VERSION", "not a version", want=want, have=version[:100], status=USAGE)
    place, repo = open_registry(target, registry), target.repo
    commit = resolve_revision(place, repo, target.revision).commit
    if MANIFEST_NAME in {file.path for file in place.files(repo, commit)}:
        where = f"{place.name}/{repo}@{commit[:12]}  {MANIFEST_NAME}"
        own = Manifest.from_bytes(place.read(repo, commit, MANIFEST_NAME), where).version
        if own != str(wanted):
            what, fix = "the adapter at this commit has another version", f"hubkit tag {repo}@{commit[:12]} {own}"
            raise HubkitError("HK-VERSION", what, where=where, want=own, have=version, fix=fix, status=USAGE)
    name = f"v{wanted}"
    created = name not in place.refs(repo).tags
    place.tag(repo, name, commit)
    return Tagged(repo, place.name, str(wanted), commit, created)
