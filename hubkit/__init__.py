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
    "add", "advise", "bundle", "cache", "completion", "compose", "config", "copy", "deploy", "diff", "eval", "export",
    "extract", "generate", "inspect", "list", "lock", "log", "login", "merge", "methods", "migrate", "mix", "outdated",
    "pack", "plan", "predict", "probe", "pull", "push", "rebase", "remove", "search", "serve", "sync", "tag", "train",
    "users", "verify", "yank",
)  # fmt: skip

if TYPE_CHECKING:
    from hubkit.adopting.renaming import Renaming as Renaming
    from hubkit.artifact.folder import AdapterFolder as AdapterFolder
    from hubkit.documents.lock import Lock as Lock
    from hubkit.documents.manifest import Manifest as Manifest
    from hubkit.documents.manifest import Parent as Parent
    from hubkit.documents.mix import MixMember as MixMember
    from hubkit.documents.mix import NodeKind as NodeKind
    from hubkit.engines.runtimes.fit import Fit as Fit
    from hubkit.errors import HubkitError as HubkitError
    from hubkit.errors import Notice as Notice
    from hubkit.locking.differences import Moved as Moved
    from hubkit.named.terms import Terms as Terms
    from hubkit.registry.api import Progress as Progress
    from hubkit.registry.directory.keeping import Checked as Checked
    from hubkit.registry.directory.keeping import Collected as Collected
    from hubkit.registry.searching import Hit as Hit
    from hubkit.registry.searching import Wanted as Wanted
    from hubkit.tensors.base.tokenizer import load_tokenizer as load_tokenizer
    from hubkit.tensors.live.attached import Attached as Attached
    from hubkit.tensors.live.loading import load_base as load_base
    from hubkit.tensors.parts.mix import Mix as Mix
    from hubkit.tensors.parts.mix import Route as Route
    from hubkit.tensors.parts.mix import Stack as Stack
    from hubkit.tensors.parts.mix import Sum as Sum
    from hubkit.tensors.weights.between import SiteChange as SiteChange
    from hubkit.tensors.weights.differing import SiteDifference as SiteDifference
    from hubkit.tensors.weights.estimate import MergeEstimate as MergeEstimate
    from hubkit.tensors.weights.extracting import ExtractedSite as ExtractedSite
    from hubkit.tensors.weights.interference import Interference as Interference
    from hubkit.training.advice.choosing import Reason as Reason
    from hubkit.training.drift import Drift as Drift
    from hubkit.training.events import Event as Event
    from hubkit.training.events import Finished as Finished
    from hubkit.training.events import Fitted as Fitted
    from hubkit.training.events import Metrics as Metrics
    from hubkit.training.events import Saved as Saved
    from hubkit.training.events import Started as Started
    from hubkit.training.events import Stepped as Stepped
    from hubkit.training.events import Stopped as Stopped
    from hubkit.training.events import Validated as Validated
    from hubkit.training.options import TrainGiven as TrainGiven
    from hubkit.training.options import TrainOptions as TrainOptions
    from hubkit.training.rows.data import Columns as Columns
    from hubkit.training.rows.marked import MarkedRow as MarkedRow
    from hubkit.training.rows.marked import Piece as Piece
    from hubkit.training.rows.summary import Lengths as Lengths
    from hubkit.training.rows.summary import Prepared as Prepared
    from hubkit.verbs.add import Added as Added
    from hubkit.verbs.add import add as add
    from hubkit.verbs.advise import Advised as Advised
    from hubkit.verbs.advise import advise as advise
    from hubkit.verbs.attach import attach as attach
    from hubkit.verbs.bundle import Bundled as Bundled
    from hubkit.verbs.bundle import bundle as bundle
    from hubkit.verbs.cache import Cached as Cached
    from hubkit.verbs.cache import Examined as Examined
    from hubkit.verbs.cache import Freed as Freed
    from hubkit.verbs.cache import cache as cache
    from hubkit.verbs.completion import Completion as Completion
    from hubkit.verbs.completion import completion as completion
    from hubkit.verbs.compose import Composed as Composed
    from hubkit.verbs.compose import compose as compose
    from hubkit.verbs.config import Setting as Setting
    from hubkit.verbs.config import config as config
    from hubkit.verbs.copy import Copied as Copied
    from hubkit.verbs.copy import CopiedVersion as CopiedVersion
    from hubkit.verbs.copy import copy as copy
    from hubkit.verbs.deploy import Deployed as Deployed
    from hubkit.verbs.deploy import deploy as deploy
    from hubkit.verbs.diff import Difference as Difference
    from hubkit.verbs.diff import Differing as Differing
    from hubkit.verbs.diff import diff as diff
    from hubkit.verbs.eval import Evaluated as Evaluated
    from hubkit.verbs.eval import eval as eval
    from hubkit.verbs.export import Exported as Exported
    from hubkit.verbs.export import export as export
    from hubkit.verbs.extract import Extraction as Extraction
    from hubkit.verbs.extract import extract as extract
    from hubkit.verbs.generate import Generated as Generated
    from hubkit.verbs.generate import generate as generate
    from hubkit.verbs.inspect import Inspected as Inspected
    from hubkit.verbs.inspect import inspect as inspect
    from hubkit.verbs.list import Listed as Listed
    from hubkit.verbs.list import list as list
    from hubkit.verbs.lock import Locked as Locked
    from hubkit.verbs.lock import lock as lock
    from hubkit.verbs.log import Logged as Logged
    from hubkit.verbs.log import log as log
    from hubkit.verbs.login import Login as Login
    from hubkit.verbs.login import login as login
    from hubkit.verbs.merge import Merged as Merged
    from hubkit.verbs.merge import merge as merge
    from hubkit.verbs.methods import DescribedMethod as DescribedMethod
    from hubkit.verbs.methods import InstalledMethod as InstalledMethod
    from hubkit.verbs.methods import NewMethod as NewMethod
    from hubkit.verbs.methods import Option as Option
    from hubkit.verbs.methods import methods as methods
    from hubkit.verbs.migrate import Migrated as Migrated
    from hubkit.verbs.migrate import migrate as migrate
    from hubkit.verbs.mix import Mixed as Mixed
    from hubkit.verbs.mix import mix as mix
    from hubkit.verbs.offer import offer as offer
    from hubkit.verbs.outdated import Outdated as Outdated
    from hubkit.verbs.outdated import outdated as outdated
    from hubkit.verbs.pack import Packed as Packed
    from hubkit.verbs.pack import pack as pack
    from hubkit.verbs.plan import MethodPlan as MethodPlan
    from hubkit.verbs.plan import TrainingPlan as TrainingPlan
    from hubkit.verbs.plan import plan as plan
    from hubkit.verbs.predict import Predicted as Predicted
    from hubkit.verbs.predict import predict as predict
    from hubkit.verbs.preview import Preview as Preview
    from hubkit.verbs.preview import preview as preview
    from hubkit.verbs.probe import Probed as Probed
    from hubkit.verbs.probe import ProbedAdapter as ProbedAdapter
    from hubkit.verbs.probe import probe as probe
    from hubkit.verbs.pull import Pulled as Pulled
    from hubkit.verbs.pull import pull as pull
    from hubkit.verbs.push import Pushed as Pushed
    from hubkit.verbs.push import push as push
    from hubkit.verbs.rebase import Rebased as Rebased
    from hubkit.verbs.rebase import rebase as rebase
    from hubkit.verbs.remove import Removed as Removed
    from hubkit.verbs.remove import remove as remove
    from hubkit.verbs.save import SavedAdapter as SavedAdapter
    from hubkit.verbs.save import save as save
    from hubkit.verbs.search import Found as Found
    from hubkit.verbs.search import search as search
    from hubkit.verbs.serve import serve as serve
    from hubkit.verbs.sync import Synced as Synced
    from hubkit.verbs.sync import SyncedEntry as SyncedEntry
    from hubkit.verbs.sync import sync as sync
    from hubkit.verbs.tag import Tagged as Tagged
    from hubkit.verbs.tag import tag as tag
    from hubkit.verbs.train import Trained as Trained
    from hubkit.verbs.train import train as train
    from hubkit.verbs.trainer_callback import trainer_callback as trainer_callback
    from hubkit.verbs.users import Member as Member
    from hubkit.verbs.users import Roster as Roster
    from hubkit.verbs.users import users as users
    from hubkit.verbs.verify import Check as Check
    from hubkit.verbs.verify import Verified as Verified
    from hubkit.verbs.verify import verify as verify
    from hubkit.verbs.yank import Yanked as Yanked
    from hubkit.verbs.yank import yank as yank

_HOMES = {
    "hubkit.adopting.renaming": ("Renaming",),
    "hubkit.artifact.folder": ("AdapterFolder",),
    "hubkit.documents.lock": ("Lock",),
    "hubkit.documents.manifest": ("Manifest", "Parent"),
    "hubkit.documents.mix": ("MixMember", "NodeKind"),
    "hubkit.engines.runtimes.fit": ("Fit",),
    "hubkit.errors": ("HubkitError", "Notice"),
    "hubkit.locking.differences": ("Moved",),
    "hubkit.named.terms": ("Terms",),
    "hubkit.registry.api": ("Progress",),
    "hubkit.registry.directory.keeping": ("Checked", "Collected"),
    "hubkit.registry.searching": ("Hit", "Wanted"),
    "hubkit.tensors.base.tokenizer": ("load_tokenizer",),
    "hubkit.tensors.live.attached": ("Attached",),
    "hubkit.tensors.live.loading": ("load_base",),
    "hubkit.tensors.parts.mix": ("Mix", "Route", "Stack", "Sum"),
    "hubkit.tensors.weights.between": ("SiteChange",),
    "hubkit.tensors.weights.differing": ("SiteDifference",),
    "hubkit.tensors.weights.estimate": ("MergeEstimate",),
    "hubkit.tensors.weights.extracting": ("ExtractedSite",),
    "hubkit.tensors.weights.interference": ("Interference",),
    "hubkit.training.advice.choosing": ("Reason",),
    "hubkit.training.drift": ("Drift",),
    "hubkit.training.events": (
        "Event",
        "Finished",
        "Fitted",
        "Metrics",
        "Saved",
        "Started",
        "Stepped",
        "Stopped",
        "Validated",
    ),
    "hubkit.training.options": ("TrainGiven", "TrainOptions"),
    "hubkit.training.rows.data": ("Columns",),
    "hubkit.training.rows.marked": ("MarkedRow", "Piece"),
    "hubkit.training.rows.summary": ("Lengths", "Prepared"),
    "hubkit.verbs.add": ("Added", "add"),
    "hubkit.verbs.advise": ("Advised", "advise"),
    "hubkit.verbs.attach": ("attach",),
    "hubkit.verbs.bundle": ("Bundled", "bundle"),
    "hubkit.verbs.cache": ("Cached", "Examined", "Freed", "cache"),
    "hubkit.verbs.completion": ("Completion", "completion"),
    "hubkit.verbs.compose": ("Composed", "compose"),
    "hubkit.verbs.config": ("Setting", "config"),
    "hubkit.verbs.copy": ("Copied", "CopiedVersion", "copy"),
    "hubkit.verbs.deploy": ("Deployed", "deploy"),
    "hubkit.verbs.diff": ("Difference", "Differing", "diff"),
    "hubkit.verbs.eval": ("Evaluated", "eval"),
    "hubkit.verbs.export": ("Exported", "export"),
    "hubkit.verbs.extract": ("Extraction", "extract"),
    "hubkit.verbs.generate": ("Generated", "generate"),
    "hubkit.verbs.inspect": ("Inspected", "inspect"),
    "hubkit.verbs.list": ("Listed", "list"),
    "hubkit.verbs.lock": ("Locked", "lock"),
    "hubkit.verbs.log": ("Logged", "log"),
    "hubkit.verbs.login": ("Login", "login"),
    "hubkit.verbs.merge": ("Merged", "merge"),
    "hubkit.verbs.methods": ("DescribedMethod", "InstalledMethod", "NewMethod", "Option", "methods"),
    "hubkit.verbs.migrate": ("Migrated", "migrate"),
    "hubkit.verbs.mix": ("Mixed", "mix"),
    "hubkit.verbs.offer": ("offer",),
    "hubkit.verbs.outdated": ("Outdated", "outdated"),
    "hubkit.verbs.pack": ("Packed", "pack"),
    "hubkit.verbs.plan": ("MethodPlan", "TrainingPlan", "plan"),
    "hubkit.verbs.predict": ("Predicted", "predict"),
    "hubkit.verbs.preview": ("Preview", "preview"),
    "hubkit.verbs.probe": ("Probed", "ProbedAdapter", "probe"),
    "hubkit.verbs.pull": ("Pulled", "pull"),
    "hubkit.verbs.push": ("Pushed", "push"),
    "hubkit.verbs.rebase": ("Rebased", "rebase"),
    "hubkit.verbs.remove": ("Removed", "remove"),
    "hubkit.verbs.save": ("SavedAdapter", "save"),
    "hubkit.verbs.search": ("Found", "search"),
    "hubkit.verbs.serve": ("serve",),
    "hubkit.verbs.sync": ("Synced", "SyncedEntry", "sync"),
    "hubkit.verbs.tag": ("Tagged", "tag"),
    "hubkit.verbs.train": ("Trained", "train"),
    "hubkit.verbs.trainer_callback": ("trainer_callback",),
    "hubkit.verbs.users": ("Member", "Roster", "users"),
    "hubkit.verbs.verify": ("Check", "Verified", "verify"),
    "hubkit.verbs.yank": ("Yanked", "yank"),
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
