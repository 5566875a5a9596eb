"""Whether a merged model says what the base with its adapters says: one after the other, on the same texts, in fp32."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.errors import USAGE, HubkitError
from hubkit.named.terms import Term, attached
from hubkit.named.vocabulary import one_vocabulary, tokenizer_with

if TYPE_CHECKING:
    from torch import Tensor

    from hubkit.training.drift import Said

FLOAT32 = "float32"


@dataclass(frozen=True)
class Behaviour:
    """The check of what the merged model says: on which prompts, and how far it may be off."""

    prompts: Path | None
    kl: float
    top1: float

    def __post_init__(self) -> None:
        if not (0 <= self.kl < math.inf and 0 <= self.top1 <= 1):
            want, have = "check_kl of 0 or more, check_top1 from 0 to 1", f"{self.kl}, {self.top1}"
            raise HubkitError("HK-OPTIONS", "out of range", want=want, have=have, status=USAGE)

    def texts(self, members: list[Term], base: Path) -> tuple[list[Tensor], bool]:
        """See `hubkit.training.drift.read_texts`."""
        from hubkit.tensors.base.decoder import context_of_folder
        from hubkit.tensors.base.tokenizer import require_decoder
        from hubkit.training.drift import ANSWER, MOST, read_texts

        require_decoder(base, "--check", "leave --check out")
        tokenizer = tokenizer_with(base, one_vocabulary(members), " + ".join(member.name for member in members))
        return read_texts(self.prompts, tokenizer, (context_of_folder(base) or MOST) - ANSWER)

    def adapted(
        self, texts: tuple[list[Tensor], bool], members: list[Term], mix: str, base: Path, codec: str | None
    ) -> Said:
        """What the base with its adapters says, quantized where they were trained so."""
        from hubkit.compat.transformers import quiet
        from hubkit.tensors.live.loading import load_base
        from hubkit.training.drift import said

        with quiet():
            return said(attached(load_base(base, FLOAT32, codec, "cpu"), members, mix), texts[0], continued=texts[1])

    def require(self, words: Said, merged: Path, where: str) -> dict[str, float]:
        """How far what the merged model says lies from `words`; refused beyond the budget."""
        from hubkit.compat.transformers import quiet
        from hubkit.tensors.live.loading import load_base
        from hubkit.training.drift import drift, require_within, said

        with quiet():
            found = drift(words, said(load_base(merged, FLOAT32, device="cpu"), words.texts, continued=False))
        require_within(found, self.kl, self.top1, where)
        return {name: float(f"{value:.4g}") for name, value in dataclasses.asdict(found).items()}
