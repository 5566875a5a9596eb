"""The probes of an adapter: made on a live base, and asked of one again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.folder import CARD_NAME, write_adapter
from hubkit.documents.manifest import Manifest
from hubkit.documents.probes import MAX_BYTES, PROBES_NAME, Probes, Prompt, Row
from hubkit.documents.schema import canonical
from hubkit.engines.runtimes.fit import BOUNDS, COMPARED, DECIDABLE, Answers, effect_of
from hubkit.errors import HubkitError
from hubkit.named.sources import Source, base_with_record
from hubkit.named.terms import Term, attached, codec_of_terms, open_sources, require_base
from hubkit.named.vocabulary import one_vocabulary, tokenizer_with
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from torch import Tensor

    from hubkit.tensors.live.attached import Attached
    from hubkit.tensors.parts.mix import Mix

SCALES = (0.0, 0.25, 0.5, 1.0, 2.0)
LIKELIEST = 20
DEFAULT = 8
"""How many of the default prompts are used."""
_DIGITS = 4
_LEAST = -1000.0
"""What stands for a token that is impossible, or that the bare base does not have."""


class Live:
    """A base with one adapter or mix on this machine, that answers probes.

    Args:
        base: folder of the base.
        members: the adapter or mix, as one term.
        dtype: in which the base computes; its own by default.
    """

    def __init__(self, base: Path, members: Sequence[Term], dtype: str | None = "float32") -> None:
        from hubkit.compat.transformers import quiet
        from hubkit.tensors.base.tokenizer import require_decoder
        from hubkit.tensors.live.loading import load_base

        require_decoder(base, "a probe", "leave the probes out")
        with quiet():
            model = load_base(base, dtype, codec_of_terms(members), "cpu")
            self.model: Attached = attached(model, members, "sum")
        mix = self.model.mix
        assert mix is not None  # of one term at least
        self.mix: Mix = mix

    def rows(self, prompts: Iterable[Sequence[int]], scale: float) -> list[Tensor]:
        """For each prompt the log-probability of every next token, float32, with the adapter at `scale`."""
        import torch

        from hubkit.tensors.parts.mix import Sum

        with torch.no_grad(), self.model.using(None if scale == 0 else Sum([(self.mix, scale)])):
            return [self._next(ids) for ids in prompts]

    def _next(self, ids: Sequence[int]) -> Tensor:
        import torch

        logits: Tensor = self.model(input_ids=torch.tensor([list(ids)])).logits[0, -1]
        return logits.float().log_softmax(-1)

    def answers(self, prompts: Sequence[Prompt], scale: float) -> Answers:
        """As a server would answer: the likeliest tokens of each prompt."""
        found = [row.topk(min(COMPARED, len(row))) for row in self.rows([one.ids for one in prompts], scale)]
        return [dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)) for top in found]

    def shuffle(self) -> None:
        """Puts a null adapter in the place of each: the same values, tensor by tensor, in random order."""
        import torch

        from hubkit.tensors.seed import generator_for

        for name, adapter in self.model.adapters.items():
            values: dict[str, dict[str, Tensor]] = {}
            for site, part in adapter.parts.items():
                for role, value in part.roles().items():
                    order = torch.randperm(value.numel(), generator=generator_for(0, name, site, role))
                    values.setdefault(site, {})[role] = value.detach().flatten()[order].view(value.shape)
            config, base = adapter.config, adapter.base
            self.model.swap(name, type(adapter).of_factors(name, adapter.method, config, base, values))


def add_probes(
    folder: Path,
    manifest: Manifest,
    files: dict[str, bytes | Path],
    prompts: Path | str | None,
    base: Path | str,
    revision: str | None,
    where: Where,
    allow: bool,
) -> tuple[float, tuple[str, ...]]:
    """Adds probes to the `files` of an adapter or mix that is about to be written.

    Args:
        folder: where it lies now; members of a mix are found from there.
        prompts: see `make_probes`.
        base: folder or repository of its base.
        revision: of the base.
        allow: go on with another base than the manifest's.

    Returns:
        how far it moves the answers to them, and the dtypes in which that cannot be seen.

    Raises:
        HubkitError: as `make_probes`; ``HK-BASE-MISMATCH``, what pulling the base raises.
    """
    source, record = base_with_record(base, revision, where)
    with tempfile.TemporaryDirectory() as room:
        packed = folder
        if manifest.kind == "adapter":
            packed = Path(room) / manifest.name
            write_adapter(packed, manifest, {**files, CARD_NAME: b""})
        members = open_sources([(Source(packed, str(folder)), 1.0)], where)
        require_base(members, record, allow)
        made = make_probes(members, source.path, None if prompts is None else Path(prompts))
    files[PROBES_NAME] = made.to_bytes()
    effect = effect_of(made)
    return effect, tuple(dtype for dtype, bound in BOUNDS.items() if effect < DECIDABLE * bound)


def make_probes(members: Sequence[Term], base: Path, prompts: Path | None) -> Probes:
    """The probes of an adapter or mix, computed in float32 on the CPU.

    Args:
        members: it, as one term.
        base: folder of its base.
        prompts: a file, one prompt a line; a few in several languages, and code, by default.

    Raises:
        HubkitError: ``HK-MISSING``, ``HK-NO-ROWS``; ``HK-PROBES`` for more or longer prompts than fit, or one without a
            token; what loading and attaching raise.
    """
    from hubkit.training.drift import PROMPTS, read_prompts

    texts = list(PROMPTS[:DEFAULT]) if prompts is None else read_prompts(prompts)
    tokenizer = tokenizer_with(base, one_vocabulary(members), " + ".join(member.name for member in members))
    ids = [[int(token) for token in tokenizer(text).input_ids] for text in texts]
    _require_short(texts, ids, base)
    live = Live(base, members)
    scales, rows = _scaled(live, ids)
    live.shuffle()
    null = live.rows(ids, 1.0)
    size = max(len(row) for row in (*rows[-1], *null))
    for likeliest in range(min(LIKELIEST, size), 0, -1):
        made = [
            _prompt(text, one, [row[number] for row in rows], null[number], likeliest, size)
            for number, (text, one) in enumerate(zip(texts, ids, strict=True))
        ]
        found = Probes(scales, likeliest, tuple(made), _versions())
        if likeliest <= min(COMPARED, size) or len(canonical(found.to_document())) <= MAX_BYTES:
            break
    found.to_bytes()
    return found


def _scaled(live: Live, ids: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], list[list[Tensor]]]:
    """The scales that the adapter has, and for each the rows of all prompts."""
    parts = (part for adapter in live.model.adapters.values() for part in adapter.parts.values())
    scales = SCALES if all(part.weighable for part in parts) else (0.0, 1.0)  # learned tokens are there or not
    return scales, [live.rows(ids, scale) for scale in scales]


def _prompt(text: str, ids: Sequence[int], rows: Sequence[Tensor], null: Tensor, likeliest: int, size: int) -> Prompt:
    tokens = sorted({int(token) for row in rows for token in row.topk(min(likeliest, len(row))).indices})

    def listed(row: Tensor) -> Row:
        known = [float(row[token]) if token < len(row) else _LEAST for token in tokens]
        return tuple(min(max(round(value, _DIGITS), _LEAST), 0.0) for value in known)

    assert size > max(tokens)
    return Prompt(text, tuple(ids), tuple(tokens), tuple(listed(row) for row in rows), listed(null))


def _require_short(texts: Sequence[str], ids: Sequence[Sequence[int]], base: Path) -> None:
    from hubkit.tensors.base.decoder import context_of_folder

    longest = context_of_folder(base)
    wrong = [
        repr(text)[:60] for text, one in zip(texts, ids, strict=True) if not one or len(one) > (longest or len(one))
    ]
    if wrong:
        what, want = "these prompts cannot be probes", f"1 to {longest or 'any number of'} tokens each"
        raise HubkitError("HK-PROBES", what, where=str(base), want=want, have=wrong, fix="--prompts with other ones")


def _versions() -> dict[str, Any]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers")}
