"""Heads of tasks: what a model has on top of its body, made here where the base's files have none.

A head that is made is no part of the base, whose digest is that of its files. The adapter stores it whole.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.site import Site, natural
from hubkit.tensors.base.tokenizer import transformers_module
from hubkit.tensors.seed import generator_for

POOLER = "pooler"
"""A module of the body that only heads look at: checkpoints of language models may lack it."""
STD = 0.02
"""Of the weights of a head where the configuration does not say."""


@dataclass(frozen=True)
class Made:
    """A module that is made, not read.

    Args:
        kind: ``linear`` or ``norm``.
        shape: as a site has it: (out, in), (n, 1).
        bias: whether it has one.
    """

    kind: str
    shape: tuple[int, int]
    bias: bool


@dataclass(frozen=True)
class TaskModel:
    """How the model of a task is made of a base's files.

    Args:
        kind: of the task.
        outputs: of the head; None: as the configuration says, of a head that the files hold.
        pad: the id that pads rows; None: as the configuration says.
        made: names of the modules that the files lack -> what they are.
        spare: names of tensors of the files that the model has no place for: a language model's own head.
        without: names of the modules of these; of a head that a new one stands in the place of, too.
        body: what names lack in other tools' model of it, where it is a body without a head: ``model.``.
        poolers: modules that other tools' model has beside.
    """

    kind: str
    outputs: int | None = None
    pad: int | None = None
    made: Mapping[str, Made] = field(default_factory=dict)
    spare: frozenset[str] = frozenset()
    without: tuple[str, ...] = ()
    body: str = ""
    poolers: tuple[str, ...] = ()

    def configure(self, config: Any) -> None:
        """Tells a configuration of transformers what is to be made."""
        if self.outputs is not None:
            config.num_labels = self.outputs
            if self.kind == "classification":
                config.problem_type = "single_label_classification"
        if self.pad is not None:
            config.pad_token_id = self.pad

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what the files need not hold."""
        found: dict[str, tuple[int, ...]] = {}
        for name, one in self.made.items():
            found[f"{name}.weight"] = one.shape[:1] if one.kind == "norm" else one.shape
            if one.bias:
                found[f"{name}.bias"] = one.shape[:1]
        return found

    def sites_of(self, base: Base) -> Base:
        """`base`, known by its files, with the sites that the model of the task has."""
        return with_body(with_made(base, self.made, self.without), self.to_document())

    def to_document(self) -> dict[str, Any]:
        """What is made and what is left out, for a manifest; see `of_document`."""
        made = {
            name: {"kind": one.kind, "shape": [*one.shape], "bias": one.bias} for name, one in sorted(self.made.items())
        }
        found: dict[str, Any] = {"made": made, "without": [*self.without], "pad": self.pad}
        found |= {"body": self.body or None, "poolers": [*self.poolers]}
        return {key: value for key, value in found.items() if value not in ({}, [], None)}


def of_document(document: Mapping[str, Any] | None) -> tuple[dict[str, Made], tuple[str, ...]]:
    """The modules that a manifest's ``task`` says were made, and those of the files that have no place."""
    task = document or {}
    made = {
        str(name): Made(str(one["kind"]), (int(one["shape"][0]), int(one["shape"][1])), bool(one["bias"]))
        for name, one in task.get("made", {}).items()
    }
    return made, tuple(map(str, task.get("without", ())))


def with_made(base: Base, made: Mapping[str, Made], without: Collection[str] = ()) -> Base:
    """`base`, known by its files, with the sites of modules that are made, and without some of its own."""
    new = {name: one for name, one in made.items() if name not in base.sites or name in without}
    if not new and not base.sites.keys() & {*without}:
        base.keep(made)
        return base
    dtype = next((site.dtype for site in base.sites.values() if site.dtype.is_floating_point), torch.float32)
    kept = [site for name, site in base.sites.items() if name not in without]
    sites = [
        Site(name, one.kind, one.shape, dtype, False, f"{name}.weight", f"{name}.bias" if one.bias else None)
        for name, one in new.items()
    ]
    found = copy.copy(base)
    found.keep(made)
    found.sites = {s.name: s for s in sorted((*kept, *sites), key=lambda site: natural(site.name))}
    return found


def with_body(base: Base, document: Mapping[str, Any] | None) -> Base:
    """`base` as a body without a head, where a manifest's ``task`` says that it was one: names in files lack its own.

    Args:
        document: ``body``, what those names lack, ``poolers``, modules that other tools' model has beside, and
            ``without``, modules of the files that are not of the body.
    """
    task = document or {}
    if not task.get("body"):
        return base
    found = copy.copy(with_made(base, {}, of_document(task)[1]))
    found.body, found.poolers = str(task["body"]), tuple(map(str, task.get("poolers", ())))
    return found


def head_sites(model: Any, stored: Base, folder: Path) -> tuple[tuple[str, ...], dict[str, Made]]:
    """The modules of a model's head, and those of them that the files lack.

    Args:
        model: made of the base's configuration for a task.
        stored: the base by its files.

    Raises:
        HubkitError: ``HK-HEAD`` where the head has parameters that are neither of a linear layer nor of a norm.
    """
    body, live = f"{model.base_model_prefix}.", Base.from_model(model).sites
    above = {
        name: site
        for name, site in live.items()
        if not name.startswith(body) or (POOLER in name.split(".") and name not in stored.sites)
    }
    held = {f"{name}.{last}" for name in above for last in ("weight", "bias")}
    loose = [name for name, _ in model.named_parameters() if not name.startswith(body) and name not in held]
    odd = [name for name, site in above.items() if site.kind not in ("linear", "norm") or site.transposed]
    if loose or odd or not above:
        raise HubkitError(
            "HK-HEAD",
            "the head of this class cannot be kept in an adapter",
            where=str(folder),
            want="a head of linear layers and norms",
            have=[*loose, *odd] or type(model).__name__,
            fix="another base",
        )
    lacking = {n: Made(s.kind, s.shape, s.bias_tensor is not None) for n, s in above.items() if n not in stored.sites}
    return tuple(above), lacking


def spare_tensors(architectures: Sequence[str], config: Any, stored: Collection[str]) -> frozenset[str]:
    """The tensors of the files that are above the body of the class that they were saved by.

    Args:
        architectures: names of classes of transformers, as ``config.json`` has them.
        config: of transformers.
        stored: names of the tensors in the files.
    """
    found: set[str] = set()
    for kind in filter(None, (getattr(transformers_module(), name, None) for name in architectures)):
        with torch.device("meta"):
            model = kind(copy.deepcopy(config))
        if hasattr(model, model.base_model_prefix):
            found |= {key for key in model.state_dict() if not key.startswith(f"{model.base_model_prefix}.")}
    return frozenset(found.intersection(stored))


def fill_made(sites: Mapping[str, Site], made: Mapping[str, Made], seed: int, std: float) -> None:
    """Fills the modules that were made, in place: weights drawn from N(0, std), gains 1, biases 0.

    Each module has its own generator, seeded by sha256(seed, "head", its name). The values that transformers drew
    depend on whatever drew before them, and go.

    Args:
        sites: of a live model.
    """
    with torch.no_grad():
        for name, one in made.items():
            module: Any = sites[name].module
            if one.kind == "norm":
                module.weight.fill_(1.0)
            else:
                drawn = torch.randn(module.weight.shape, generator=generator_for(seed, "head", name))
                module.weight.copy_(drawn * std)
            if one.bias:
                module.bias.zero_()
