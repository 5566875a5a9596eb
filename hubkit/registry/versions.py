"""Semantic versions and ranges of them: which tag ``org/name@^1.2`` means.

Precedence is that of semver.org 2.0.0 §11; ranges are npm's (``^ ~ >= > <= < =``, ``1.2.x``, ``*``, joined by
commas), because that is what people expect behind an ``@``. A pre-release is taken only when the range itself names
a pre-release of the same major.minor.patch. Versions of a repository are its tags ``v<semver>``.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from warnings import warn

from hubkit.errors import USAGE, HubkitError, Notice, nearest
from hubkit.registry.api import Refs, Registry
from hubkit.registry.yanked import UNREADABLE, read_yanked

_NUMBER = r"(?:0|[1-9][0-9]*)"
_LABEL = rf"(?:{_NUMBER}|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
_TAIL = rf"(?:-(?P<pre>{_LABEL}(?:\.{_LABEL})*))?(?:\+(?P<build>[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*))?"
_VERSION = re.compile(rf"(?P<major>{_NUMBER})\.(?P<minor>{_NUMBER})\.(?P<patch>{_NUMBER}){_TAIL}")
_WILD = rf"(?:{_NUMBER}|[xX*])"
_PARTIAL = re.compile(
    rf"(?P<op>\^|~|>=|<=|>|<|=|) *v?(?P<major>{_WILD})(?:\.(?P<minor>{_WILD})(?:\.(?P<patch>{_WILD}){_TAIL})?)?"
)
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "=": operator.eq}
_MAX_LENGTH = 256
_COMMIT = re.compile(r"[0-9a-f]{40}")
RANGES = "^1.2   ~1.2   >=1,<2   1.2.x   1.2.0   *"


@dataclass(frozen=True)
class Version:
    """One semantic version; compare by `precedence` (build metadata does not take part)."""

    major: int
    minor: int
    patch: int
    pre: tuple[str, ...] = ()
    build: str = ""

    @property
    def core(self) -> tuple[int, int, int]:
        return self.major, self.minor, self.patch

    @property
    def precedence(self) -> tuple[object, ...]:
        """Sorts as semver.org §11: a release above its pre-releases, numbers below words, shorter below longer."""
        labels = tuple((0, int(label), "") if label.isdigit() else (1, 0, label) for label in self.pre)
        return (*self.core, not self.pre, labels)

    def __str__(self) -> str:
        pre = "-" + ".".join(self.pre) if self.pre else ""
        return f"{self.major}.{self.minor}.{self.patch}{pre}" + (f"+{self.build}" if self.build else "")


def parse_version(text: str) -> Version | None:
    """The version that `text` is, strictly by semver.org (no ``v``, no missing numbers); None when it is none."""
    match = _VERSION.fullmatch(text) if len(text) <= _MAX_LENGTH else None
    if match is None:
        return None
    labels = tuple(match["pre"].split(".")) if match["pre"] else ()
    return Version(int(match["major"]), int(match["minor"]), int(match["patch"]), labels, match["build"] or "")


def tag_version(tag: str) -> Version | None:
    """The version a tag names (``v1.2.0``); None for every other tag."""
    return parse_version(tag[1:]) if tag.startswith("v") else None


def is_range(text: str) -> bool:
    """Whether `text`, written behind an ``@``, is a range and cannot be the name of a branch, tag or commit."""
    return text[:1] in tuple("^~<>=*") or "," in text or bool(re.fullmatch(r"v?\d+\.(?:\d+\.)?[xX*]", text))


@dataclass(frozen=True)
class Range:
    """Comparators that must all hold."""

    bounds: tuple[tuple[str, Version], ...]

    def __contains__(self, version: Version) -> bool:
        if not all(_COMPARE[op](version.precedence, bound.precedence) for op, bound in self.bounds):
            return False
        return not version.pre or any(bound.pre and bound.core == version.core for _, bound in self.bounds)


def parse_range(text: str) -> Range:
    """Read a range such as ``^1.2`` or ``>=1,<2``.

    Raises:
        HubkitError: ``HK-VERSION`` when it is not one, with the accepted forms.
    """
    bounds: list[tuple[str, Version]] = []
    pieces = text.split(",") if len(text) <= _MAX_LENGTH else [""]
    for piece in pieces:
        match = _PARTIAL.fullmatch(piece.strip())
        if match is None or not _is_sound(match):
            raise HubkitError("HK-VERSION", "not a version range", want=RANGES, have=text[:_MAX_LENGTH], status=USAGE)
        bounds += _bounds(match["op"], match)
    return Range(tuple(bounds))


def _is_sound(match: re.Match[str]) -> bool:
    """A number behind a wildcard, or a pre-release of a wildcard, means nothing."""
    wild = [match[name] is None or match[name] in "xX*" for name in ("major", "minor", "patch")]
    return wild == sorted(wild) and not (wild[-1] and (match["pre"] or match["build"]))


def _bounds(op: str, match: re.Match[str]) -> list[tuple[str, Version]]:
    """One comparator, written with whole versions; upper bounds end in ``-0``, below every pre-release."""
    given = [int(match[n]) for n in ("major", "minor", "patch") if match[n] is not None and match[n] not in "xX*"]
    major, minor, patch = (*given, 0, 0, 0)[:3]
    full = Version(major, minor, patch, tuple(match["pre"].split(".")) if match["pre"] else ())
    if not given:
        return [("<", _ceiling([0], -1))] if op in ("<", ">") else [(">=", Version(0, 0, 0))]
    if op == "^":
        # the left-most number that is not zero stays; with zeros only, the last one given
        keep = next((i for i, number in enumerate(given) if number), len(given) - 1)
        return [(">=", full), ("<", _ceiling(given, keep))]
    if op == "~":
        return [(">=", full), ("<", _ceiling(given, min(1, len(given) - 1)))]
    if len(given) == 3:
        return [(op or "=", full)]
    above = _ceiling(given, len(given) - 1)
    if op == ">":
        return [(">=", Version(*above.core))]
    lower, upper = (">=", full), ("<", above)
    return {">=": [lower], "<=": [upper], "<": [("<", Version(*full.core, ("0",)))]}.get(op, [lower, upper])


def _ceiling(given: list[int], keep: int) -> Version:
    """The first version whose numbers up to index `keep` differ upwards from `given`; -1: below everything."""
    core = [*given[:keep], given[keep] + 1, 0, 0, 0][:3] if keep >= 0 else [0, 0, 0]
    return Version(core[0], core[1], core[2], ("0",))


def pick_version(constraint: str, tags: Iterable[str]) -> str | None:
    """The tag of the highest version in the range, or None.

    Args:
        constraint: ``^1.2``, ``~1.2``, ``>=1,<2``, ``1.2.x``, ``1.2.0`` or ``v1.2.0``.
        tags: tag names; those that are not ``v<semver>`` are passed over.

    Raises:
        HubkitError: ``HK-VERSION`` when `constraint` is not a range.
    """
    wanted = parse_range(constraint)
    found = [(version.precedence, tag) for tag in tags if (version := tag_version(tag)) and version in wanted]
    return max(found)[1] if found else None  # equal but for build metadata: by name, so that the choice is fixed


def sorted_versions(tags: Iterable[str]) -> list[str]:
    """The version tags among `tags`, lowest version first."""
    found = [(version.precedence, tag) for tag in tags if (version := tag_version(tag))]
    return [tag for _, tag in sorted(found)]


@dataclass(frozen=True)
class Resolved:
    """What a revision means now.

    Args:
        commit: 40 hex digits.
        name: the branch or tag that led to it; None: a commit, or the default branch.
        tag: whether `name` is a tag.
    """

    commit: str
    name: str | None
    tag: bool = False


def resolve_revision(registry: Registry, repo: str, revision: str | None) -> Resolved:
    """The commit that a revision means in a registry, now: a tag before a branch of the same name, as in git.

    A registry of another make may see it the other way round, so its lists are read here and not its answer.

    Args:
        revision: None (default branch), a branch, tag, commit, version (``1.2.0`` and ``v1.2.0`` are the tag
            ``v1.2.0``, never a branch of that name: branches move) or range.

    A range passes over what was yanked; whoever names a version exactly gets it, and the reason as a `Notice`.

    Raises:
        HubkitError: ``HK-NO-REVISION`` when nothing fits, with the names nearest to it; ``HK-YANKED`` when all that
            fits a range was yanked; what `read_yanked` and the registry raise.
    """
    if revision is None:
        return Resolved(registry.resolve(repo, None), None)
    if _COMMIT.fullmatch(revision):
        try:
            return Resolved(registry.resolve(repo, revision), None)
        except HubkitError as fault:
            if fault.code != "HK-NOT-FOUND":
                raise
    refs = registry.refs(repo)  # refuses when it is the repository that is not there
    version = is_range(revision) or parse_version(revision.removeprefix("v")) is not None
    tag = revision if revision in refs.tags else pick_version(revision, refs.tags) if version else None
    if tag is not None:
        if is_range(revision):
            yanked = read_yanked(registry, repo, refs)
            tag = _not_yanked(registry, repo, revision, refs, yanked) if tag in yanked else tag
        elif tag_version(tag) is not None:
            _notice_yanked(registry, repo, tag, refs)
        return Resolved(refs.tags[tag], tag, True)
    if revision in refs.branches:
        if version:
            raise no_revision(registry.name, repo, revision, refs.tags, branch=refs.branches[revision])
        return Resolved(refs.branches[revision], revision)
    try:
        if not is_range(revision):
            commit = registry.resolve(repo, revision)  # the beginning of a commit's id, or refs/heads/name
            return Resolved(commit, None if commit.startswith(revision) else revision)
    except HubkitError as fault:
        if fault.code not in ("HK-NOT-FOUND", "HK-NO-REVISION"):
            raise
    known = refs.tags if is_range(revision) else [*refs.branches, *refs.tags]
    raise no_revision(registry.name, repo, revision, known)


def _notice_yanked(registry: Registry, repo: str, tag: str, refs: Refs) -> None:
    """Says of a version that was named exactly when it was yanked; a list that cannot be read keeps nobody from it."""
    try:
        yanked = read_yanked(registry, repo, refs)
    except HubkitError as fault:
        if fault.code not in UNREADABLE:
            raise
        warn(f"whether {repo}@{tag} was yanked cannot be read: {fault.where}", Notice, stacklevel=3)
        return
    if tag in yanked:
        warn(f"{repo}@{tag} was yanked: {yanked[tag]}", Notice, stacklevel=3)


def _not_yanked(registry: Registry, repo: str, revision: str, refs: Refs, yanked: Mapping[str, str]) -> str:
    """The tag of the highest version in a range that was not yanked."""
    tag = pick_version(revision, (one for one in refs.tags if one not in yanked))
    if tag is None:
        fitting = [one for one in sorted_versions(yanked)[::-1] if one in refs.tags and pick_version(revision, [one])]
        have = [f"{one.removeprefix('v')}: {yanked[one]}" for one in fitting]
        what, where = f"every version of {repo} in {revision} was yanked", f"{registry.name}/{repo}"
        fix = f"another range; to have one all the same: {repo}@{fitting[0].removeprefix('v')}"
        raise HubkitError("HK-YANKED", what, where=where, want=revision, have=have, fix=fix)
    return tag


def no_revision(
    where: str, repo: str, revision: str, names: Iterable[str], *, branch: str | None = None
) -> HubkitError:
    """The refusal of a revision that a repository does not have, with what it has instead.

    Args:
        where: the registry's name.
        names: branch and tag names to choose from.
        branch: the commit of a branch that is named like the version asked for.
    """
    known = sorted(names)
    versions = sorted_versions(known)[::-1]
    have = versions[:5] if is_range(revision) else nearest(revision, known) or versions[:5]
    what, said = f"{repo} has no revision {revision}", ", ".join(have) or "no versions"
    fix = f"{repo}@{have[0]}" if have else ""
    if branch is not None:
        what, said = f"{repo} has no version {revision}", f"a branch of that name, which moves; {said}"
        fix = " or ".join(filter(None, [fix, f"{repo}@{branch}"]))
    return HubkitError("HK-NO-REVISION", what, where=where, want=revision, have=said, fix=fix)
