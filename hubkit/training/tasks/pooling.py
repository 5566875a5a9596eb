"""One vector of the hidden states of a text, as sentence-transformers makes it, and the loss that tells texts apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hubkit.errors import HubkitError

MEAN, FIRST, LAST = "mean", "cls", "lasttoken"
POOLINGS = (MEAN, FIRST, LAST)
"""Over the tokens of a text that are no padding: their mean, the first of them, the last."""
_FLAGS = {
    "pooling_mode_cls_token": FIRST,
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": MEAN,
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": LAST,
}
"""How releases of sentence-transformers before 5.4 say it."""
_DONE = ("Transformer", "Pooling", "Normalize")


def pooling_of(folder: Path) -> str:
    """How the base in `folder` makes a vector of a text: as sentence-transformers noted it there, else the mean.

    Raises:
        HubkitError: ``HK-HEAD`` where it does so in another way than those of `POOLINGS`, or does more.
    """
    modules, config = _read(folder / "modules.json"), _read(folder / "1_Pooling" / "config.json")
    kinds = [str(one.get("type", "")).rpartition(".")[2] for one in modules if isinstance(one, Mapping)]
    asked: Any = MEAN
    if isinstance(config, Mapping):
        asked = config.get("pooling_mode", [mode for flag, mode in _FLAGS.items() if config.get(flag) is True])
        asked = asked[0] if isinstance(asked, list) and len(asked) == 1 else asked
    odd = [kind for kind in kinds if kind not in _DONE] + ([] if asked in POOLINGS else [f"pooling {asked}"])
    if odd:
        what, want = "vectors of this base are made in a way that hubkit does not have", f"one of {', '.join(POOLINGS)}"
        raise HubkitError("HK-HEAD", what, where=str(folder), want=want, have=odd, fix="another base")
    return str(asked)


def _read(path: Path) -> Any:
    """What a JSON file holds; an empty list where there is none: ``HK-JSON`` for one that cannot be read."""
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise HubkitError("HK-JSON", "this is no JSON", where=str(path), have=str(e)) from e


def vectors(model: nn.Module, inputs: Mapping[str, Tensor], pooling: str) -> Tensor:
    """A vector of length 1 for each text, (texts, hidden), float32, with grad.

    Args:
        model: gives ``last_hidden_state``.
        inputs: ``input_ids`` and ``attention_mask``, (texts, tokens), padded on the right.
        pooling: one of `POOLINGS`.
    """
    mask = inputs["attention_mask"]
    hidden = model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state.float()
    mask = mask.to(hidden.device)
    if pooling == FIRST:
        pooled = hidden[:, 0]
    elif pooling == LAST:
        at = (mask.sum(1) - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        pooled = hidden.gather(1, at).squeeze(1)
    else:
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1)
    return F.normalize(pooled, dim=-1)


def contrast(found: Tensor, right: Tensor, wrong: Tensor, scale: float) -> Tensor:
    """The mean over anchors of the cross-entropy of their own candidate among all that they are told from (InfoNCE).

    With nothing masked it is the MultipleNegativesRankingLoss of sentence-transformers. An anchor that is told from
    nothing has the loss 0 and no gradient.

    Args:
        found: vectors of the anchors, then of the candidates, (rows + candidates, hidden), float32.
        right: the number of each anchor's own candidate, (rows,), int64.
        wrong: which candidates it is told from, (rows, candidates), bool.
        scale: what cosines are multiplied by: 1 / temperature.
    """
    anchors, candidates = found[: len(right)], found[len(right) :]
    scores = anchors @ candidates.t() * scale
    counted = wrong.scatter(1, right[:, None], True)
    return F.cross_entropy(scores.masked_fill(~counted, float("-inf")), right)
