"""Packed rows: each computes what it computes alone, in losses and gradients, or the base is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import Adapted, llama
from torch import Tensor, nn
from zoo import SIZES, ids, model_of

from hubkit.errors import HubkitError
from hubkit.training.attention import LONGEST, attend, rows_of
from hubkit.training.loop import fit
from hubkit.training.options import TrainOptions
from hubkit.training.packing import packable, require_packing
from hubkit.training.rows.batching import collate, packed
from hubkit.training.rows.encode import IGNORED, Row

APART = {"llama", "qwen3", "gpt2", "gemma2", "gpt_neox", "olmo2", "phi3", "mixtral"}
"""Whose masks are made of positions; others know of none."""
LENGTHS = (5, 11, 3, 16)


def step(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's loss, in the model's own precision: transformers makes it in float32."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[Row]:
    texts = [ids(1, length, seed)[0].tolist() for seed, length in enumerate(lengths)]
    return [Row(text, [IGNORED, *text[1:]], f"row {n}") for n, text in enumerate(texts)]


def _states(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[float, Tensor]:
    model.zero_grad()
    loss = step(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_rows_stand_behind_each_other() -> None:
    batch = packed([Row([5, 6, 7], [IGNORED, IGNORED, 7]), Row([8, 9], [IGNORED, 9])])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "labels": [[IGNORED, IGNORED, 7, IGNORED, 9]],
    }


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "gpt2", "gemma2", "gpt_neox", "olmo2", "phi3", "opt", "bloom", "mamba"]
)
def test_each_row_is_as_if_alone_or_the_base_is_refused(kind: str) -> None:
    """fp64, but for the softmax of some in fp32: the sums differ in order only.

    What passes the try is held to the loss and gradients of padded rows.
    """
    assert SIZES["max_position_embeddings"] > sum(LENGTHS)
    attention = "eager" if kind in {"gemma2", "bloom", "mamba", "mpt"} else "sdpa"
    model, some = model_of(kind, attention).double(), rows()
    if kind in APART:
        require_packing(model, step, packable(some))
    else:
        with pytest.raises(HubkitError, match="packed rows apart"):
            require_packing(model, step, packable(some))
        return
    (loss, gradient), (want, wanted) = _states(model, packed(some)), _states(model, collate(some))
    assert loss == pytest.approx(want, rel=1e-6)
    assert (gradient - wanted).norm() <= 1e-6 * wanted.norm()


class Leaking(nn.Module):
    """A model that adds to each position's scores what stood two places before it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base

    def forward(self, input_ids: Tensor, labels: Tensor, **inputs: Any) -> Any:
        output = self.base(input_ids=input_ids, **inputs, use_cache=False)
        seen = F.one_hot(input_ids.roll(2, dims=1), output.logits.shape[-1])
        output.loss = self.base.loss_function(output.logits + 3.0 * seen, labels, output.logits.shape[-1])
        return output


def test_a_small_leak_is_seen() -> None:
    model = Leaking(llama())
    with pytest.raises(HubkitError, match="packed rows apart"):
        require_packing(model, lambda model, batch: model(**batch).loss, packable(rows((30,))))


def test_a_packed_training_is_the_padded_one(tmp_path: Path) -> None:
    losses = []
    for packing in (False, True):
        model = Adapted(llama())
        options = TrainOptions(steps=6, batch_size=4, accumulate=2, learning_rate=1e-2, packing=packing)
        metrics = fit(
            model,
            dict(model.parts.items()),
            step,
            rows(LENGTHS * 4),
            rows((7, 9)),
            options,
            run_dir=tmp_path / str(packing),
        )
        losses.append([metrics.loss, metrics.validation_loss])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != losses[1], "the order of sums is another"


def test_what_is_not_asked_for_is_not_in_the_manifest() -> None:
    assert "packing" not in TrainOptions().to_document()
    assert TrainOptions(packing=True).to_document()["packing"] is True


@pytest.mark.parametrize("lengths", [(7, 20, 2), (LONGEST + 9, 5)])
def test_attention_of_packed_rows_is_that_of_each_row(lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    total = sum(lengths)
    q, k, v = (torch.randn(1, heads, total, 8, generator=generator).bfloat16().requires_grad_() for heads in (4, 2, 2))
    own = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = (own[:, None] == own).tril_()[None, None]

    def otherwise(module: nn.Module, *sides: Any, **options: Any) -> tuple[Tensor, None]:
        query, key, value, mask = sides
        out = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), mask, is_causal=mask is None, enable_gqa=True
        )
        return out.bfloat16().transpose(1, 2), None

    def attended(seen: tuple[int, ...]) -> list[Tensor]:
        with rows_of(seen):
            out, _ = attend(otherwise, nn.Identity(), q, k, v, mask)
        return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))]

    for have, want in zip(attended(lengths), attended(()), strict=True):
        # bf16 rounds to 2**-9 of each value, some of which are sums
        assert (have.float() - want.float()).abs().max() <= 2**-6 * want.float().abs().max()


def test_a_mask_that_says_more_is_obeyed() -> None:
    """A window: what a row sees of itself is not all."""
    called = []

    def otherwise(module: nn.Module, query: Tensor, *sides: Any, **options: Any) -> tuple[Tensor, None]:
        called.append(query.shape[2])
        return query.transpose(1, 2), None

    q = torch.ones(1, 2, 6, 4)
    own = torch.tensor([0, 0, 0, 0, 1, 1])
    mask = (own[:, None] == own).tril_()
    with rows_of((4, 2)):
        attend(otherwise, nn.Identity(), q, q, q, mask[None, None])
        mask[3, 0] = False
        attend(otherwise, nn.Identity(), q, q, q, mask[None, None])
    assert called == [4, 2, 6]
