"""A run in a process of its own, to be killed: ``python killed_run.py FOLDER PAUSE``; prints each step it has done.

The model is torch alone, so that the process starts in the time it takes to import that.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import VOCABULARY, rows, train_step
from torch import Tensor, nn

from hubkit.training.events import Stepped
from hubkit.training.loop import fit
from hubkit.training.options import TrainOptions

OPTIONS = TrainOptions(
    steps=40, batch_size=2, accumulate=2, learning_rate=0.02, seed=4, save_every=3, eval_every=4, patience=30
)


class Bigrams(nn.Module):
    """A language model of one token's context, with dropout and the tied output head of a causal model."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        table = torch.randn(VOCABULARY, 8, generator=generator)
        self.embed = nn.Embedding.from_pretrained(table)  # type: ignore[no-untyped-call]
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.part = nn.Parameter(torch.randn(8, 8, generator=generator) * 0.1)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        logits = self.head(x + self.dropout(x) @ self.part)
        if labels is None:
            return SimpleNamespace(loss=None, logits=logits)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


def main(folder: Path, pause: float = 0.0) -> None:
    """Trains, or goes on with what is there; the trained parameter ends in FOLDER/done."""
    model = Bigrams()

    def report(event: object) -> None:
        if isinstance(event, Stepped):
            print(event.step, flush=True)
            time.sleep(pause)

    fit(
        model,
        {"part": model.part},
        train_step,
        rows(18),
        rows(4, seed=9),
        OPTIONS,
        run_dir=folder,
        report=report,
        resume=True,
    )
    save_file({"part": model.part.detach()}, folder / "done")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), float(sys.argv[2]))
