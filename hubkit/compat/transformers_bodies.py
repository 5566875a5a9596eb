"""The body of a model alone: what gives hidden states, without an output head, under the names that it has below one.

transformers' ``AutoModel`` makes the body itself, whose modules are then called otherwise than in the files of most
bases: ``layers.0``, not ``model.layers.0``. A class of transformers with the body as its one child is called as the
files are, and its ``from_pretrained`` puts the prefix in front where the files leave it out. That such a class works is
what every architecture's own head classes rely on, but only its parent (``BertPreTrainedModel``) is there to make one
of: read in 4.57 and 5.23.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any


class Bodies:
    """Stands where an Auto class of transformers stands."""

    @staticmethod
    def from_config(config: Any, **options: Any) -> Any:
        """The model of a configuration, with values drawn at random."""
        return _class_of(config)(config)

    @staticmethod
    def from_pretrained(folder: Any, *, config: Any, **options: Any) -> Any:
        """The model with the values in a folder."""
        options.pop("trust_remote_code", None)  # nothing but transformers' own classes is ever made
        return _class_of(config).from_pretrained(folder, config=config, **options)


def _class_of(config: Any) -> Any:
    from transformers import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"transformers has no model that gives the hidden states of {type(config).__name__}")
    found = MODEL_MAPPING[type(config)]
    return _around(found[0] if isinstance(found, tuple | list) else found)


@functools.cache
def _around(body: Any) -> Any:
    """The class whose one child is `body`, a class of transformers, under the name that its own head classes use.

    A pooler is left out where it can be: nothing that is made of hidden states looks at it.
    """
    from transformers import PreTrainedModel

    parents = (kind for kind in body.__mro__[1:] if issubclass(kind, PreTrainedModel))
    parent, prefix = next(parents), body.base_model_prefix
    if not prefix:
        raise ValueError(f"{body.__name__} has no name below its heads")
    options = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(body.__init__).parameters else {}

    def __init__(self: Any, config: Any) -> None:
        parent.__init__(self, config)
        setattr(self, prefix, body(config, **options))
        self.post_init()

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, prefix)(*args, **kwargs)

    forward.__signature__ = inspect.signature(body.forward)  # type: ignore[attr-defined]
    name = f"{body.__name__.removesuffix('Model')}ForEmbedding"
    made = {"__init__": __init__, "forward": forward, "__module__": __name__, "body": f"{prefix}."}
    return type(name, (parent,), made)


def body_of(model: Any) -> tuple[str, tuple[str, ...]]:
    """What names of modules lack in the model that ``AutoModel`` makes, and the names here of those that it has beside.

    Of a model made here: ``("bert.", ("bert.pooler.dense",))``; nothing for any other.
    """
    kind = type(model)
    if kind.__module__ != __name__:
        return "", ()
    pools = "add_pooling_layer" in inspect.signature(type(model.base_model).__init__).parameters
    return kind.body, (f"{kind.body}pooler.dense",) if pools else ()
