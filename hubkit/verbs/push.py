"""`push`: publish an adapter folder as ONE commit and one version tag, or nothing; or a base, which has no version.

Everything that can be refused is refused before the first byte is sent. A kill leaves the old tip, or the new commit
without its tag, which the next push of the same folder adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hubkit.artifact.card import render_card
from hubkit.artifact.folder import CARD_NAME, PEFT_CONFIG, AdapterFolder, open_adapter
from hubkit.artifact.gates import parse_gates, require_passed
from hubkit.documents.arguments import checked
from hubkit.documents.files import read, refusing, require_unlinked
from hubkit.documents.manifest import MANIFEST_NAME
from hubkit.documents.names import check_allowed, check_names
from hubkit.documents.schema import sha256
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.members import require_published
from hubkit.named.publishing import BaseContent, Publication, base_content, is_base, retrying
from hubkit.named.runs.recording import evaluation_of
from hubkit.named.sound import remarks, require_sound
from hubkit.registry.address import is_repo
from hubkit.registry.api import Registry
from hubkit.registry.opening import Where, open_registry
from hubkit.registry.reference import parse_reference
from hubkit.registry.versions import sorted_versions, tag_version

MAX_TEXT = 4 << 20


@dataclass(frozen=True, repr=False)
class Pushed(Shown):
    """What was published.

    Args:
        repo: ``org/name``.
        registry: its name, without credentials.
        version: of the manifest; the tag is ``v<version>``. None for a base: `tag` gives it one.
        digest: the adapter's identity, the sha256 of its ``hubkit.json``; of a base that of the list of its files.
        commit: the 40-hex commit that holds it; None in a dry run that would make one.
        created: the repository was (would be) made.
        uploaded: files that were (would be) sent.
        removed: files of the version before that were (would be) taken out.
        left_out: files in the folder that the manifest does not list, or of which no base consists: they stay here.
        dry_run: nothing was sent.
        notes: what is odd about it although it may be published.
    """

    repo: str
    registry: str
    version: str | None
    digest: str
    commit: str | None
    created: bool
    uploaded: tuple[str, ...]
    removed: tuple[str, ...]
    left_out: tuple[str, ...]
    dry_run: bool
    notes: tuple[str, ...] = ()

    @property
    def unchanged(self) -> bool:
        """These very bytes were already published."""
        return not (self.created or self.uploaded or self.removed)


@checked
def push(
    folder: Path | str,
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    registry: str | None = None,
    dry_run: bool = False,
    require: str | None = None,
    evaluation: Path | str | None = None,
) -> Pushed:
    """Publish an adapter, or a base.

    Args:
        folder: the adapter's folder, as ``hubkit pack`` leaves it; or a model's, with ``config.json``, safetensors and
            tokenizer.
        repo: ``org/name``; made if it is not there.
        private: make it private, if it is made.
        message: of the commit; name and version by default.
        registry: where, if not the default registry.
        dry_run: check everything, send nothing.
        require: gates, ``"heldout.loss<1.3, forgetting<0.05"``, on the figures that the manifest records.
        evaluation: a file that `hubkit.eval` wrote of this adapter: its figures instead.

    Raises:
        HubkitError: what opening the folder raises; ``HK-NAME``, ``HK-PICKLE``, ``HK-FORBIDDEN-FILE``, ``HK-SYMLINK``;
            what `verify` would refuse of its tensors: ``HK-KEYS``, ``HK-SHAPE``, ``HK-NAN``, ``HK-METHOD-UNKNOWN``;
            ``HK-MIX-MEMBER`` for a mix with a member that others could not get;
            ``HK-VERSION-EXISTS`` when the version is published with other content; ``HK-STALE`` when others keep
            committing; ``HK-FILES`` when the registry holds other bytes than were sent; what the registry raises;
            ``HK-GATE`` for a figure that is missing or does not pass. Of a base
            ``HK-NOT-MODEL``, ``HK-BASE-FILES``, ``HK-SAFETENSORS``; ``HK-EXISTS`` for the repository of an adapter.
    """
    folder, target = Path(folder), parse_reference(repo)
    if target.repo is None or target.revision or target.folder:
        raise HubkitError("HK-REFERENCE", "push needs a repository", want="org/name", have=repo, status=USAGE)
    gates = parse_gates(require)
    if evaluation is not None and not gates:
        what, fix = "figures are read for gates, and none is given", '--require "forgetting<0.05", or no --evaluation'
        raise HubkitError("HK-GATE", what, where=str(evaluation), want="--require GATES", have="none", fix=fix)
    if is_base(folder):
        require_passed(gates, None, str(folder), "leave --require out: a base has no figures")
        base, place, name = base_content(folder), open_registry(target, registry), target.repo
        return retrying(lambda: _push_base(Publication(place, name), base, private, message, dry_run))
    adapter = open_adapter(folder)
    if gates:
        figures = evaluation_of(adapter.manifest, None if evaluation is None else Path(evaluation))
        fix = f"hubkit eval {folder} --data ROWS --record, or --out eval.json and --evaluation eval.json"
        require_passed(gates, figures, str(folder), fix)
    content = _content(adapter)
    if adapter.manifest.kind == "mix":
        require_published(adapter, target, Where(registry))
    place, name = open_registry(target, registry), target.repo
    return retrying(lambda: _Publication(place, name, adapter, content).run(private, message, dry_run))


class _Publication(Publication):
    """One attempt: what the repository holds, what must change, the commit, the tag."""

    def __init__(self, place: Registry, repo: str, adapter: AdapterFolder, content: Mapping[str, Path]) -> None:
        super().__init__(place, repo)
        self.adapter, self.content = adapter, content

    def run(self, private: bool, message: str | None, dry_run: bool) -> Pushed:
        manifest, created = self.adapter.manifest, not self.exists
        tagged = self._tagged()
        add = self.lacking(self.content)
        card = self._card()
        if card is not None:
            add[CARD_NAME] = card
        removed = self.leftovers(self.content)
        commit = None if add or removed else tagged or self.tip
        if not dry_run:
            self.create(private)
            if commit is None:
                commit = self.commit(add, removed, message or f"{manifest.name} {manifest.version}", self.content)
            if tagged is None:
                self.place.tag(self.repo, f"v{manifest.version}", commit)
        return Pushed(
            repo=self.repo,
            registry=self.place.name,
            version=manifest.version,
            digest=manifest.digest,
            commit=commit,
            created=created,
            uploaded=tuple(sorted(add)),
            removed=removed,
            left_out=self.adapter.unlisted(),
            dry_run=dry_run,
            notes=_notes(self.adapter),
        )

    def _tagged(self) -> str | None:
        """The commit that already carries this version, when its content is ours."""
        manifest = self.adapter.manifest
        commit = self.refs.tags.get(f"v{manifest.version}")
        if commit is None:
            return None
        have = self._digest_at(commit)
        if have != manifest.digest:
            raise HubkitError(
                "HK-VERSION-EXISTS",
                f"version {manifest.version} of {self.repo} is published with other content",
                where=f"{self.where}@v{manifest.version}",
                want=f"{manifest.digest}  ({self.adapter.path})",
                have=have,
                fix=f"hubkit pack {self.adapter.path} --version {self._next()}",
            )
        return commit

    def _next(self) -> str:
        """The first patch version above all that are published."""
        known = [v for tag in self.refs.tags if (v := tag_version(tag))]
        top = max(known, key=lambda version: version.precedence)
        return f"{top.major}.{top.minor}.{top.patch + 1}"

    def _digest_at(self, commit: str) -> str:
        try:
            return sha256(self.place.read(self.repo, commit, MANIFEST_NAME))
        except HubkitError as error:
            if error.code != "HK-NOT-FOUND":
                raise
            return f"no {MANIFEST_NAME}"

    def _card(self) -> bytes | None:
        """The model card to send, None when the tip has it. Text that people wrote on the registry since the last
        version stays; otherwise the folder's text is published. Only our block is rewritten."""
        local = self.adapter.path / CARD_NAME
        text = read(local, MAX_TEXT).decode("utf-8", "replace") if local.is_file() else None
        there = self._text_at(self.tip) if self.tip else None
        versions = sorted_versions(self.refs.tags)
        if there is not None and (not versions or self._text_at(self.refs.tags[versions[-1]]) != there):
            text = there
        wanted = render_card(self.adapter.manifest, text, repository=self.repo)
        return None if wanted == there else wanted.encode()

    def _text_at(self, commit: str) -> str | None:
        try:
            return self.place.read(self.repo, commit, CARD_NAME, 0, MAX_TEXT).decode("utf-8", "replace")
        except HubkitError as error:
            if error.code != "HK-NOT-FOUND":
                raise
            return None


def _push_base(there: Publication, base: BaseContent, private: bool, message: str | None, dry_run: bool) -> Pushed:
    """One attempt for a base: its files, and none of those that a state of it before had beside them."""
    if adapter := sorted({MANIFEST_NAME, PEFT_CONFIG} & there.files.keys()):
        what, fix = "there is an adapter in this repository, and a base goes beside none", "hubkit push DIR ORG/NAME"
        raise HubkitError("HK-EXISTS", what, where=there.where, have=adapter, fix=fix)
    created, add = not there.exists, there.lacking(base.files)
    removed = there.leftovers(base.files, weights=True)
    commit = None if add or removed else there.tip
    if not dry_run:
        there.create(private)
        commit = commit or there.commit(add, removed, message or base.folder.resolve().name, base.files)
    digest, sent = base.digest, tuple(sorted(add))
    return Pushed(there.repo, there.place.name, None, digest, commit, created, sent, removed, base.left_out, dry_run)


def _notes(adapter: AdapterFolder) -> tuple[str, ...]:
    base = adapter.manifest.base
    local = base is not None and not (base.source and is_repo(base.source))
    what = "others cannot get its base, of which no repository is recorded; where it has one: hubkit pack DIR --base"
    return (*remarks(adapter), *((f"{what} ORG/NAME",) if local else ()))


def _content(adapter: AdapterFolder) -> dict[str, Path]:
    """Path -> file of everything the manifest vouches for, and the manifest; judged by name, kind and values."""
    paths = [MANIFEST_NAME, *(entry.path for entry in adapter.manifest.files)]
    check_names(paths, str(adapter.path))
    require_unlinked(adapter.path, [*paths, CARD_NAME])
    content = {path: adapter.path / path for path in paths}
    for path, source in content.items():
        with refusing(source), source.open("rb") as file:
            check_allowed(path, file.read(512), str(adapter.path))
    require_sound(adapter)
    return content
