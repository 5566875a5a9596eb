"""Recipes that fit the base: the learning rate by its width, the rank by how much there is to learn.

The rate's formula is that of Thinking Machines' tinker-cookbook (``hyperparam_utils.get_lr``), whose sweep found how a
LoRA's best rate falls as bases grow wider; it stands here and nowhere else. That capacity matters only from where the
rows hold more than the adapter can: LoRA Without Regret, https://thinkingmachines.ai/blog/lora/.

Rates by layer: ULMFiT, Howard and Ruder 2018, https://arxiv.org/abs/1801.06146, §3.1; in the form of ELECTRA, Clark et
al. 2020, https://arxiv.org/abs/2003.10555: rate · decay^(steps down from the top), the embeddings below layer 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hubkit.artifact.identity.config_identity import TEXT_TYPE, config_values
from hubkit.errors import HubkitError
from hubkit.tensors.base.layers import layer_of

if TYPE_CHECKING:
    from hubkit.tensors.base.base import Base

MOST_RANK = 256
"""Up to which a rank is doubled."""
_LLAMA, _QWEN = 0.781, 0.0775
_LIKE_LLAMA = re.compile(r"m?llama\d*(_text(_model)?)?|mistral\d*|ministral\d*|smollm\d*")


@dataclass(frozen=True)
class BaseFacts:
    """What a recipe may depend on: facts of a base that its ``config.json`` and the headers of its files say.

    Args:
        hidden: width of its residual stream; None where the config does not say.
        family: model type of its language model, as transformers names it: ``llama``, ``qwen2``.
        parameters: numbers in all its tensors; 0 where that is not known.
    """

    hidden: int | None
    family: str
    parameters: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any], parameters: int = 0) -> BaseFacts:
        """The facts in a parsed ``config.json``, or in the values of one that an adapter records."""
        values = config if "layers" in config else config_values(config)
        hidden, family = values.get("hidden_size"), values.get(TEXT_TYPE) or values.get("model_type")
        return cls(hidden if isinstance(hidden, int) and hidden > 0 else None, str(family or ""), parameters)


def width_rate(facts: BaseFacts) -> float | None:
    """The learning rate of a LoRA on a base of this width, to three digits; None where the width is not known.

    5e-4 · (2000 / hidden)^0.781 for bases like Llama, with the exponent 0.0775 for Qwen. Elsewhere nobody has swept:
    the smaller of Llama's and 5e-4, which is too low rather than too high.
    """
    if facts.hidden is None:
        return None
    if facts.family.startswith("qwen"):
        rate = 5e-4 * (2000 / facts.hidden) ** _QWEN
    else:
        rate = 5e-4 * (2000 / facts.hidden) ** _LLAMA
        if not _LIKE_LLAMA.fullmatch(facts.family):
            rate = min(rate, 5e-4)
    return float(f"{rate:.3g}")  # what is shown is what is used


def width_recipe(facts: BaseFacts, recipe: Mapping[str, Any], share: float = 1.0) -> dict[str, Any]:
    """`recipe` with `share` of `width_rate` as its rate; as it is where the base's width is not known."""
    rate = width_rate(facts)
    return dict(recipe) if rate is None else {**recipe, "learning_rate": float(f"{rate * share:.3g}")}


def doubled_rank(rank: int, given: frozenset[str], widths: Iterable[int], fits: Callable[..., int] = max) -> int | None:
    """Twice the rank, or None where it must stay: the user named it, it is large, or it fills the weights.

    Args:
        rank: the rank now.
        given: names of the options that the user gave.
        widths: of each site, the smaller side of its weight: the most directions that a change of it can have.
        fits: which of these bounds the rank: the widest (max), or each (min) where a start takes directions from all.
    """
    most = min(MOST_RANK, fits(widths, default=0))
    return None if given & {"rank", "rank_pattern"} or 2 * rank > most else 2 * rank


def layers_of(base: Base) -> int:
    """How many layers a base has."""
    return 1 + max((number for site in base.sites if (number := layer_of(site)) is not None), default=-1)


def layer_rate(site: str, decay: float, depth: int) -> float:
    """What multiplies the learning rate at a site.

    Args:
        decay: of one layer to the one below it; 1.0: none.
        depth: how many layers the base has.
    """
    from hubkit.tensors.base.arch import arch_of

    layer = layer_of(site)
    if layer is None:  # what is outside of the layers lies above them, unless it is an embedding
        layer = -1 if site.rpartition(".")[2] in arch_of("").embeddings else depth
    return float(decay ** (depth - layer))


def require_depth(base: Base, decay: float, depth: int) -> None:
    """Refuses a decay that counts from another number of layers than the base has: ``HK-CONFIG``."""
    found = layers_of(base)
    if decay != 1.0 and depth != found:
        raise HubkitError(
            "HK-CONFIG",
            "layer-wise decay counts down from the top of the base",
            where=base.source,
            want=f"depth {found}",
            have=f"depth {depth}",
            fix=f"--set depth={found}",
        )
