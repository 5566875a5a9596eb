"""hubkit: a package manager for model adapters.

Every command of ``hubkit`` is a function of the same name here: ``hubkit.train(...)``, ``hubkit.push(...)``; beside
them is every type that they take or return. All are imported on first use, so ``import hubkit`` costs nothing; type
checkers and editors read the imports below instead.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

VERBS = (
    "compose", "deploy", "export", "generate", "inspect", "list", "lock", "merge", "methods", "mix", "pack", "pull",
    "push", "serve", "train", "verify",
)  # fmt: skip

if TYPE_CHECKING:
    from hubkit.artifact.folder import AdapterFolder as AdapterFolder
    from hubkit.documents.lock import Lock as Lock
    from hubkit.documents.manifest import Manifest as Manifest
    from hubkit.documents.manifest import Parent as Parent
    from hubkit.documents.mix import MixMember as MixMember
    from hubkit.documents.mix import NodeKind as NodeKind
    from hubkit.errors import HubkitError as HubkitError
    from hubkit.named.terms import Terms as Terms
    from hubkit.registry.api import Progress as Progress
    from hubkit.tensors.base.tokenizer import load_tokenizer as load_tokenizer
    from hubkit.tensors.live.attached import Attached as Attached
    from hubkit.tensors.live.loading import load_base as load_base
    from hubkit.tensors.parts.mix import Mix as Mix
    from hubkit.tensors.parts.mix import Route as Route
    from hubkit.tensors.parts.mix import Stack as Stack
    from hubkit.tensors.parts.mix import Sum as Sum
    from hubkit.tensors.weights.interference import Interference as Interference
    from hubkit.training.data import Columns as Columns
    from hubkit.training.events import Event as Event
    from hubkit.training.events import Finished as Finished
    from hubkit.training.events import Metrics as Metrics
    from hubkit.training.events import Saved as Saved
    from hubkit.training.events import Started as Started
    from hubkit.training.events import Stepped as Stepped
    from hubkit.training.events import Stopped as Stopped
    from hubkit.training.events import Validated as Validated
    from hubkit.training.options import TrainGiven as TrainGiven
    from hubkit.training.options import TrainOptions as TrainOptions
    from hubkit.verbs.attach import attach as attach
    from hubkit.verbs.compose import Composed as Composed
    from hubkit.verbs.compose import compose as compose
    from hubkit.verbs.deploy import Deployed as Deployed
    from hubkit.verbs.deploy import deploy as deploy
    from hubkit.verbs.export import Exported as Exported
    from hubkit.verbs.export import export as export
    from hubkit.verbs.generate import Generated as Generated
    from hubkit.verbs.generate import generate as generate
    from hubkit.verbs.inspect import Inspected as Inspected
    from hubkit.verbs.inspect import inspect as inspect
    from hubkit.verbs.list import Listed as Listed
    from hubkit.verbs.list import list as list
    from hubkit.verbs.lock import Locked as Locked
    from hubkit.verbs.lock import lock as lock
    from hubkit.verbs.merge import Merged as Merged
    from hubkit.verbs.merge import merge as merge
    from hubkit.verbs.methods import DescribedMethod as DescribedMethod
    from hubkit.verbs.methods import InstalledMethod as InstalledMethod
    from hubkit.verbs.methods import NewMethod as NewMethod
    from hubkit.verbs.methods import Option as Option
    from hubkit.verbs.methods import methods as methods
    from hubkit.verbs.mix import Mixed as Mixed
    from hubkit.verbs.mix import mix as mix
    from hubkit.verbs.offer import offer as offer
    from hubkit.verbs.pack import Packed as Packed
    from hubkit.verbs.pack import pack as pack
    from hubkit.verbs.pull import Pulled as Pulled
    from hubkit.verbs.pull import pull as pull
    from hubkit.verbs.push import Pushed as Pushed
    from hubkit.verbs.push import push as push
    from hubkit.verbs.save import SavedAdapter as SavedAdapter
    from hubkit.verbs.save import save as save
    from hubkit.verbs.serve import serve as serve
    from hubkit.verbs.train import Trained as Trained
    from hubkit.verbs.train import train as train
    from hubkit.verbs.trainer_callback import trainer_callback as trainer_callback
    from hubkit.verbs.verify import Check as Check
    from hubkit.verbs.verify import Verified as Verified
    from hubkit.verbs.verify import verify as verify

_HOMES = {
    "hubkit.artifact.folder": ("AdapterFolder",),
    "hubkit.documents.lock": ("Lock",),
    "hubkit.documents.manifest": ("Manifest", "Parent"),
    "hubkit.documents.mix": ("MixMember", "NodeKind"),
    "hubkit.errors": ("HubkitError",),
    "hubkit.named.terms": ("Terms",),
    "hubkit.registry.api": ("Progress",),
    "hubkit.tensors.base.tokenizer": ("load_tokenizer",),
    "hubkit.tensors.live.attached": ("Attached",),
    "hubkit.tensors.live.loading": ("load_base",),
    "hubkit.tensors.parts.mix": ("Mix", "Route", "Stack", "Sum"),
    "hubkit.tensors.weights.interference": ("Interference",),
    "hubkit.training.data": ("Columns",),
    "hubkit.training.events": ("Event", "Finished", "Metrics", "Saved", "Started", "Stepped", "Stopped", "Validated"),
    "hubkit.training.options": ("TrainGiven", "TrainOptions"),
    "hubkit.verbs.attach": ("attach",),
    "hubkit.verbs.compose": ("Composed", "compose"),
    "hubkit.verbs.deploy": ("Deployed", "deploy"),
    "hubkit.verbs.export": ("Exported", "export"),
    "hubkit.verbs.generate": ("Generated", "generate"),
    "hubkit.verbs.inspect": ("Inspected", "inspect"),
    "hubkit.verbs.list": ("Listed", "list"),
    "hubkit.verbs.lock": ("Locked", "lock"),
    "hubkit.verbs.merge": ("Merged", "merge"),
    "hubkit.verbs.methods": ("DescribedMethod", "InstalledMethod", "NewMethod", "Option", "methods"),
    "hubkit.verbs.mix": ("Mixed", "mix"),
    "hubkit.verbs.offer": ("offer",),
    "hubkit.verbs.pack": ("Packed", "pack"),
    "hubkit.verbs.pull": ("Pulled", "pull"),
    "hubkit.verbs.push": ("Pushed", "push"),
    "hubkit.verbs.save": ("SavedAdapter", "save"),
    "hubkit.verbs.serve": ("serve",),
    "hubkit.verbs.train": ("Trained", "train"),
    "hubkit.verbs.trainer_callback": ("trainer_callback",),
    "hubkit.verbs.verify": ("Check", "Verified", "verify"),
}
"""The same once more, for use: module -> what of it is here. `tests/test_face.py` compares the two."""


class VerbPackage(ModuleType):
    """A package inside hubkit that has the name of a verb, as ``hubkit.methods`` does: calling it calls the verb."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._verb(*arguments, **named)

    @property
    def _verb(self) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(f"hubkit.verbs.{name}"), name)

    @property
    def __signature__(self) -> Any:  # what `help` and editors show at a call
        import inspect

        return inspect.signature(self._verb)


if not TYPE_CHECKING:  # a type checker that saw it would let every misspelt name pass
    _MODULES = {name: module for module, names in _HOMES.items() for name in names}
    __all__ = sorted(["__version__", *_MODULES])

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'hubkit' has no attribute {name!r}")
        value = getattr(import_module(_MODULES[name]), name)
        package = sys.modules.get(f"hubkit.{name}")
        if isinstance(package, VerbPackage):
            return package  # one object under one name, whichever was imported first
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return __all__
