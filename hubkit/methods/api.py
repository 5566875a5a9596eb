"""All that the author of a method imports.

    from hubkit.methods.api import Delta, Edit, MethodInfo, hookimpl

A method is one module of functions marked ``@hookimpl`` (see `hubkit.methods.hookspecs`), offered by an entry point of
group ``hubkit.methods``. `hubkit.methods.suite.MethodSuite` tests it.
"""

from hubkit.artifact.adapterhub import AdapterHubForm
from hubkit.artifact.forms import PeftForm
from hubkit.compat.torch import version_of
from hubkit.errors import HubkitError
from hubkit.methods.config import LATER
from hubkit.methods.foreign import foreign_files
from hubkit.methods.hookspecs import hookimpl
from hubkit.methods.info import MethodInfo, NotMergeable
from hubkit.methods.lowrank import LowRankConfig
from hubkit.methods.patterns import pattern_value
from hubkit.methods.recipes import BaseFacts, layer_rate, require_depth, width_rate, width_recipe
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.blocks import Block
from hubkit.tensors.base.choose import choose_blocks
from hubkit.tensors.base.delta import Delta
from hubkit.tensors.base.site import Site
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.additive import additive_parts
from hubkit.tensors.parts.part import KV, Edit, LowRank, Part, Tokens
from hubkit.tensors.parts.whole import whole_parts, whole_sites

__all__ = [
    "KV", "LATER", "Adapter", "AdapterHubForm", "Base", "BaseFacts", "Block", "Delta", "Edit", "HubkitError", "LowRank",
    "LowRankConfig", "MethodInfo", "NotMergeable", "Part", "PeftForm", "Site", "Tokens", "additive_parts",
    "choose_blocks", "foreign_files", "hookimpl", "layer_rate", "pattern_value", "require_depth", "version_of",
    "whole_parts", "whole_sites", "width_rate", "width_recipe",
]  # fmt: skip
