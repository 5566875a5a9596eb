"""`offer`: adapters for a live model that are read when a mix or a route first names them. Python only."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.documents.arguments import checked_but
from hubkit.errors import USAGE, HubkitError
from hubkit.named.sources import base_record
from hubkit.named.terms import as_text, open_terms, require_adapter, require_base
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from torch import nn

    from hubkit.tensors.live.attached import Attached
    from hubkit.tensors.parts.adapter import Adapter


@checked_but("model")
def offer(
    model: nn.Module | Attached,
    adapters: Mapping[str, Path | str],
    *,
    memory: int | None = None,
    base: Path | str | None = None,
    tokenizer: Any = None,
    registry: str | None = None,
    offline: bool = False,
    allow_base_mismatch: bool = False,
    progress: Progress | None = None,
) -> Attached:
    """Names adapters that a model can answer with; each is pulled, checked and read when it is first asked for.

    Args:
        model: a live base, or what `attach` or an earlier `offer` returned.
        adapters: the name it is called by in a mix or route -> its folder or repository. Thousands cost nothing.
        memory: bytes that adapters read in this way may take together; the least recently used give way. None: as
            before, at first without a limit.
        base: folder or repository the model was loaded from; without it the model's own weights are hashed, once.
        tokenizer: the model's, to be compared as well.
        allow_base_mismatch: take adapters of another base all the same.

    Returns:
        the module to call: ``model(ids, route=["chat", None, "sql"])``.

    Raises:
        HubkitError: ``HK-NAME-TAKEN``, ``HK-COMPILED``, ``HK-OPTIONS``. When an adapter is first named: what `attach`
            raises, and ``HK-MEMORY`` when those that one call needs exceed `memory`; nothing has changed then.
    """
    from hubkit.tensors.live.attached import Attached
    from hubkit.tensors.live.loading import fingerprint_model

    if memory is not None and memory < 1:
        raise HubkitError("HK-OPTIONS", "out of range", want="memory >= 1 byte", have=str(memory), status=USAGE)
    references = {name: as_text(reference) for name, reference in adapters.items()}
    attached = model if isinstance(model, Attached) else Attached(model)
    taken = sorted(set(adapters) & {*attached.adapters, *attached.offered})
    if taken:
        raise HubkitError("HK-NAME-TAKEN", "these names are taken", have=taken, fix="other names, or remove them first")
    where = Where(registry, offline, progress)

    @functools.cache
    def record() -> Any:
        return base_record(base, None, where) if base else fingerprint_model(attached.model, tokenizer)

    def load(name: str, reference: str) -> Adapter:
        from hubkit.methods.reading import read_adapter

        members = open_terms({reference: 1.0}, where)
        require_base(members, record(), allow_base_mismatch)
        return read_adapter(require_adapter(members[0].folder), attached.sites, name=name, dtype="base")

    for name, reference in references.items():
        attached.offer(name, functools.partial(load, name, reference))
    if memory is not None:
        attached.memory = memory
    return attached
