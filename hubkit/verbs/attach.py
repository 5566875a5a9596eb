"""`attach`: adapters on a live model, after proving that it is the base they were trained on. Python only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.added_tokens import require_ids
from hubkit.documents.arguments import checked_but
from hubkit.errors import HubkitError
from hubkit.named.sources import base_record
from hubkit.named.terms import Terms, adapters, codec_of_terms, mix_of, open_terms, require_base, require_mix
from hubkit.named.vocabulary import one_vocabulary
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from torch import nn

    from hubkit.tensors.live.attached import Attached


@checked_but("model", "terms")
def attach(
    model: nn.Module | Attached,
    terms: Terms,
    *,
    base: Path | str | None = None,
    tokenizer: Any = None,
    mix: str = "sum",
    trainable: bool = False,
    registry: str | None = None,
    offline: bool = False,
    allow_base_mismatch: bool = False,
    progress: Progress | None = None,
) -> Attached:
    """Attaches adapters to a model in memory and makes their mix the active one.

    Args:
        model: a live base, or what an earlier `attach` returned: then these adapters are added to it.
        terms: ``"./chat"``, ``"1.0*./a + -0.5*org/b"``, a path, several of these, or a mapping reference -> weight.
        base: folder or repository the model was loaded from. Without it the model's own weights are hashed, once;
            name it where the model was loaded in a narrower dtype than its files have, or has a head that they lack.
        tokenizer: the model's, to be compared as well.
        mix: ``sum`` or ``stack``.
        trainable: fp32 masters that require grad, instead of the base's dtype.
        allow_base_mismatch: attach adapters of another base all the same.

    Returns:
        the module to call, train or compile; ``.detach()`` gives the model back as it was.

    Raises:
        HubkitError: ``HK-NOT-LIVE``, ``HK-TERMS``, ``HK-MIX``, ``HK-BASE-MISMATCH``, ``HK-COMPILED``, ``HK-KEYS``,
            ``HK-SHAPE``, ``HK-TARGET``, ``HK-VOCABULARY``; what pulling and opening raise. The model and what was
            attached to it are then as they were.
    """
    from hubkit.methods.reading import read_adapter
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.live.accepting import require_model
    from hubkit.tensors.live.attached import Attached
    from hubkit.tensors.live.loading import fingerprint_model

    live = model.model if isinstance(model, Attached) else model
    require_mix(mix)
    if live is model:
        require_model(live)
    taken = model.adapters if isinstance(model, Attached) else ()
    where = Where(registry, offline, progress)
    members = open_terms(terms, where, taken=taken)
    tokens = one_vocabulary(members)
    if tokens and tokenizer is not None:
        require_ids(members[0].name, tokens, tokenizer.get_vocab(), "tokenizer")
        tokenizer = None  # with these tokens it is another than the base's, and may be
    record = base_record(base, None, where) if base else fingerprint_model(live, tokenizer)
    try:
        require_base(members, record, allow_base_mismatch)
    except HubkitError as error:
        if base is None and any(one.folder.manifest.task for one in adapters(members)):
            error.fix = "attach(..., base=FOLDER): a model with a head is not, by its weights, what the files hold"
        raise
    sites = model.sites if isinstance(model, Attached) else Base.from_model(live)
    codec = codec_of_terms(members)
    if codec is not None:
        sites.quantize(codec)  # asks for it: the first adapter that is attached has it done
    chosen, dtype = mix_of(members, mix), "master" if trainable else "base"
    read = {m.name: read_adapter(m.folder, sites, name=m.name, dtype=dtype) for m in adapters(members)}
    attached = model if isinstance(model, Attached) else Attached(model, sites)
    try:
        for name, adapter in read.items():
            attached.add(name, adapter)
        attached.set_mix(chosen)
        attached.record = record
    except HubkitError:
        for name in [name for name in read if name in attached.adapters]:
            attached.remove(name)
        if attached is not model:
            attached.detach()
        raise
    return attached
