"""`save`: an adapter of a live model, trained by whatever means, as a complete folder. Python only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.folder import CARD_NAME, check_adapter
from hubkit.documents.arguments import checked_but
from hubkit.documents.licenses import require_license
from hubkit.documents.shown import Shown
from hubkit.errors import HubkitError
from hubkit.named.sources import base_record, base_source, chosen_name
from hubkit.named.writing import card_of, document_of, drafted, require_version, write_live
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from hubkit.artifact.identity.digest import BaseRecord
    from hubkit.methods.host import Method
    from hubkit.tensors.live.attached import Attached


@dataclass(frozen=True, repr=False)
class SavedAdapter(Shown):
    """An adapter that was written.

    Args:
        path: its folder.
        digest: its identity.
        method: its method.
        parameters: numbers in it.
    """

    path: Path
    digest: str
    method: str
    parameters: int


@checked_but("model")
def save(
    model: Attached,
    name: str,
    folder: Path | str,
    *,
    version: str | None = None,
    license: str | None = None,
    base: str | Path | None = None,
    registry: str | None = None,
    replace: bool = False,
) -> SavedAdapter:
    """Writes the adapter that is attached under `name` as `hubkit.train` would have: ready to verify, attach and push.

    The folder holds values of the base's dtype, as it computes; the live ones stay as they are, and training can go on.

    Args:
        model: what `hubkit.attach` returned.
        name: of the adapter there.
        folder: where to write; its own name becomes the adapter's.
        version: semantic version; 0.1.0 by default.
        license: SPDX identifier, for manifest and model card.
        base: folder or repository the model was loaded from, as for `attach`, whose proof is taken without it.
        replace: replace an adapter that is at `folder`.

    Raises:
        HubkitError: ``HK-NOT-LIVE``, ``HK-UNKNOWN-ADAPTER``, ``HK-MERGED``, ``HK-NAN``, ``HK-NAME``, ``HK-VERSION``,
            ``HK-EXISTS``; ``HK-BASE-NEEDED`` for an adapter that adds tokens; what is wrong with `base`.
    """
    from typing import cast

    from hubkit.named.vocabulary import vocabulary_document
    from hubkit.tensors.live.attached import Attached
    from hubkit.tensors.live.loading import codec_loaded
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.tensors.parts.mix import require_known

    require_license(license)
    if not isinstance(model, Attached):
        raise HubkitError(
            "HK-NOT-LIVE",
            "nothing is attached to this",
            want="what hubkit.attach returned",
            have=type(model).__name__,
            fix="attached = hubkit.attach(model, ADAPTER, trainable=True)",
        )
    out, title = Path(folder), chosen_name(None, Path(folder))
    require_version(version)
    require_known(name, model.adapters)
    model.require_unmerged()
    live = model.adapters[name]
    record = _identity(model, base, registry)
    vocabulary = vocabulary_document(live.config)
    beside = _tokenizer(live.config, base, registry, name)
    method = cast("Method", live.method)
    codec = model.sites.codec or codec_loaded(model.model)
    draft = drafted(title, method, live.config, record, codec, license, vocabulary)
    draft = dataclasses.replace(draft, version=version or draft.version)
    check_adapter(out, draft, {CARD_NAME: card_of(out, draft, ())}, replace=replace)
    stored = Adapter.of_stored(title, method, live.config, live.base, live.tensors(), name, "base").without_zeros()
    manifest = dataclasses.replace(draft, config=document_of(stored.config))
    digest = write_live(out, stored, manifest, record, replace, beside).digest
    return SavedAdapter(out, digest, method.name, sum(p.numel() for p in stored.parameters().values()))


def _identity(model: Attached, base: str | Path | None, registry: str | None) -> BaseRecord:
    """What the base is: as named here, or when adapters were attached; else by the weights it has now."""
    from hubkit.tensors.live.loading import fingerprint_model

    proven = model.record
    if base is not None:
        return base_record(base, None, Where(registry))
    if proven is not None and proven.fingerprint.files:
        return proven
    found = fingerprint_model(model.model)
    same = proven is not None and proven.fingerprint.weights == found.fingerprint.weights
    return proven if proven is not None and same else found


def _tokenizer(config: Any, base: str | Path | None, registry: str | None, name: str) -> Mapping[str, bytes | Path]:
    """The files of the longer tokenizer, for an adapter that adds tokens."""
    from hubkit.artifact.added_tokens import with_tokens

    tokens = getattr(config, "add_tokens", ())
    if not tokens:
        return {}
    if base is None:
        raise HubkitError(
            "HK-BASE-NEEDED",
            f"adapter {name!r} adds tokens, and its tokenizer is made from the base's",
            fix="save(..., base=FOLDER or ORG/NAME)",
        )
    return with_tokens(base_source(base, None, Where(registry)).path, tokens)[1]
