"""All that hubkit asks of a method, as hooks; `describe` and `inject` are required.

An implementation takes any subset of a hook's arguments, by name: so arguments can be added later, and a method written
today stays right. A hook that is left out, or returns None, means what its last sentence says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy

from hubkit.methods.info import MethodInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hubkit.artifact.adapterhub import AdapterHubForm
    from hubkit.artifact.forms import PeftForm
    from hubkit.methods.recipes import BaseFacts
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.base.delta import Delta
    from hubkit.tensors.base.site import Site
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.tensors.parts.part import Part
    from hubkit.tensors.parts.tied import Tied
    from hubkit.tensors.parts.whole import Holds

PROJECT = "hubkit"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def describe() -> MethodInfo:  # type: ignore[empty-body]
    """The method's description. Required; it touches no model."""


@hookspec(firstresult=True)
def inject(base: Base, config: Any) -> Mapping[str, Part]:  # type: ignore[empty-body]
    """Site name -> part. Required; it makes the parts and never touches the model.

    Shapes depend on sites and config only: it also runs on the meta device, to load an adapter or to judge a base by
    its headers. ``base.match(config.targets, kind=...)`` finds sites and refuses any target that matches nothing.
    """


@hookspec(firstresult=True)
def train_step(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:  # type: ignore[empty-body]
    """The loss of one micro-batch: the mean over its target tokens, with gradient. Default: ``model(**batch).loss``."""


@hookspec(firstresult=True)
def merge(site: Site, tensors: Mapping[str, Tensor], config: Any) -> Delta:  # type: ignore[empty-body]
    """What is added to the weight (out, in) and bias of one site. Pure: the same for files and live models.

    Absent, or raising `NotMergeable`, it means that merging is refused. `tensors` and ``site.weight()`` come in the
    dtype of accumulation.
    """


@hookspec(firstresult=True)
def export(adapter: Adapter, target: str) -> Mapping[str, bytes]:  # type: ignore[empty-body]
    """file name -> bytes in the form `target` (``"peft"``). Default: through the `foreign_form`."""


@hookspec(firstresult=True)
def foreign_form(target: str) -> PeftForm | AdapterHubForm | None:
    """How another tool writes adapters of this method, as data: both directions follow from it.

    Args:
        target: the tool: ``"peft"`` (a `PeftForm`) or ``"adapterhub"`` (an `AdapterHubForm`).

    Default: it does not, and an adapter of this method is hubkit's own.
    """


@hookspec(firstresult=True)
def learning_rate(config: Any, site: Site, role: str) -> float:  # type: ignore[empty-body]
    """What multiplies the learning rate of the tensor `role` at `site`: finite, not negative. Default: 1."""


@hookspec(firstresult=True)
def recipe_for(facts: BaseFacts, config: Any) -> Mapping[str, Any] | None:
    """The training defaults on this base, under this configuration; `width_recipe` gives the rate by the base's width.

    Default: the recipe of `describe`, on every base.
    """


@hookspec(firstresult=True)
def grown(config: Any, given: frozenset[str], sites: Mapping[str, Site]) -> Any:
    """The next larger configuration, for rows that hold more target tokens than the adapter has parameters.

    Args:
        config: that of training.
        given: names of the options that the user gave: they stay as they are.
        sites: name -> site of each part.

    Default, and where it should grow no more: None.
    """


@hookspec(firstresult=True)
def narrow(config: Any, changed: frozenset[str]) -> Any:
    """The configuration that makes only some of the tensors, for an adapter that leaves out what did not change.

    Args:
        config: that of training.
        changed: names ``<site>.<role>`` of the tensors that are not zero.

    Default: `config`; every tensor is stored.
    """


@hookspec(firstresult=True)
def low_rank(targets: tuple[str, ...], rank: int, saved: tuple[str, ...], tied: Tied) -> Any:
    """The configuration under which the part at a site is exactly B·A, scale 1: what `hubkit compose` writes sums with.

    Args:
        targets: names of modules.
        rank: of A (rank, in) and B (out, rank).
        saved: names of modules that are held whole beside them, as PEFT's ``modules_to_save``; none in a sum.
        tied: whether a tied output head follows its table: ``break``, or ``keep``.

    Default: parts of this method cannot hold just any low-rank change.
    """


@hookspec(firstresult=True)
def whole(tensors: tuple[str, ...], tied: Tied, holds: Holds) -> Any:
    """The configuration under which parts hold whole tensors: what `hubkit compose` writes all else with.

    Args:
        tensors: names ``<site>.weight`` and ``<site>.bias``; parts have roles ``weight`` and ``bias``.
        tied: whether a tied output head follows its table: ``keep`` or ``break``.
        holds: ``change``: parts hold what is added, (out, in); ``values``: all that the module holds then, laid out as
            it stores it.

    Default: parts of this method cannot hold that.
    """
