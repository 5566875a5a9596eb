"""An attached model in its base's place: transformers, accelerate and TRL ask it what they would ask the base.

- Its class has the base's name and forward signature: `transformers.Trainer` reads both, from the class.
- What it does not have itself is the base's (`Likeness.__getattr__`).
- What would write the base without its adapters, or change it beneath them, is refused (``HK-ATTACHED``).
- Its state is its adapters' (`hubkit.tensors.live.state`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, NoReturn

from torch import Tensor, nn

from hubkit.compat.torch import Observed
from hubkit.compat.transformers import AdaptersLoaded
from hubkit.errors import HubkitError
from hubkit.tensors.live import state
from hubkit.tensors.live.accepting import require_model
from hubkit.tensors.parts.adapter import Adapter

STORE = "hubkit.save(attached, NAME, FOLDER) writes an adapter"
WHOLE = "that would write the base, without the adapters attached to it"
BOUND = "adapters are attached to this very base in memory, by hooks that cannot be copied or stored"
BENEATH = "that would change the base beneath the adapters attached to it"


def _refusing(name: str, why: str, fix: str) -> Callable[..., NoReturn]:
    """A method that refuses, in the place of the base's of this name."""

    def refuse(self: Likeness, *args: Any, **kwargs: Any) -> NoReturn:
        raise HubkitError("HK-ATTACHED", f"{name}: {why}", fix=fix)

    refuse.__name__ = refuse.__qualname__ = name
    return refuse


class Likeness(AdaptersLoaded, Observed):
    """The part of `hubkit.tensors.live.attached.Attached` that other libraries see."""

    model: nn.Module

    def __new__(cls, model: nn.Module, *args: Any, **kwargs: Any) -> Likeness:
        require_model(model)
        return super().__new__(_in_place_of(type(model), cls))  # type: ignore[arg-type]

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters that are attached, by name."""
        raise NotImplementedError

    @property
    def offered(self) -> list[str]:
        """Names of the adapters that are read when they are named."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        """The base's `name`: its public attributes, and private ones that its class declares.

        Private ones of the instance are notes that somebody made about that very module (accelerate's ``_hf_hook``):
        those are not this module's.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or not _is_shared(type(base := super().__getattr__("model")), name):
                raise
        return getattr(base, name)

    @property
    def config(self) -> Any:
        """The base's configuration."""
        return self.model.config

    @config.setter
    def config(self, config: Any) -> None:
        self.model.config = config

    @property
    def generation_config(self) -> Any:
        """How the base generates, unless told otherwise."""
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.model.generation_config = config

    def get_output_embeddings(self) -> Any:
        """The base's output head, for those that read its weight, as TRL's trainers do.

        Raises:
            HubkitError: ``HK-ATTACHED`` where an adapter acts there: reading the weight would leave that out.
        """
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        acting = [name for name, adapter in self.adapters.items() if state.acts_at(adapter, head)]
        if acting:
            raise HubkitError(
                "HK-ATTACHED",
                "an adapter acts at the output head: reading its weight would leave that out",
                have=acting,
                fix="call the model; for trainers that read the weight, an adapter of other targets",
            )
        return head

    @property
    def peft_config(self) -> Any:
        """Nothing: the adapters are hubkit's. PEFT sets it on what it takes over, and is refused."""
        raise AttributeError("peft_config")

    @peft_config.setter
    def peft_config(self, value: Any) -> None:
        raise HubkitError(
            "HK-ATTACHED",
            "PEFT cannot take over an attached model: the two would act at the same modules",
            fix="load the base anew, PEFT has changed it by now; hubkit pack makes PEFT's adapter one to attach",
        )

    save_pretrained = _refusing("save_pretrained", WHOLE, STORE)
    push_to_hub = _refusing("push_to_hub", WHOLE, f"{STORE}; then hubkit push FOLDER ORG/NAME")
    __deepcopy__ = _refusing("deepcopy", BOUND, f"attach to another copy of the base; {STORE}")
    __reduce_ex__ = _refusing("copy, pickle or torch.save", BOUND, STORE)
    _replicated = _refusing("DataParallel", BOUND, "one process per device, or CUDA_VISIBLE_DEVICES=0")
    add_adapter = _refusing("add_adapter", BENEATH, "hubkit.attach(attached, ADAPTER)")
    load_adapter = _refusing("load_adapter", BENEATH, "hubkit.attach(attached, ADAPTER)")
    set_adapter = _refusing("set_adapter", BENEATH, "attached.set_mix(NAME)")
    disable_adapters = _refusing("disable_adapters", BENEATH, "attached.set_mix(None)")
    enable_adapters = _refusing("enable_adapters", BENEATH, "attached.set_mix(NAME)")
    resize_token_embeddings = _refusing("resize_token_embeddings", BENEATH, "the option add_tokens of the method")

    def state_dict(  # type: ignore[override]
        self, *args: Any, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """What the adapters hold, under ``<adapter>.<site>.<tensor>``; the base's is ``attached.model.state_dict()``.

        Of adapters that are only offered nothing: they are read from where they lie.
        """
        destination = {} if destination is None else destination
        destination.update(state.collected(self._kept(), prefix, keep_vars))
        return destination

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> state.Incompatible:
        """Puts values in place that `state_dict` gave, of adapters that are attached under the same names.

        Args:
            strict: refuse what is missing or superfluous; else it is returned, as torch does.
            assign: ignored: values are copied.

        Raises:
            HubkitError: ``HK-KEYS``, also when nothing at all is there; ``HK-SHAPE``. Nothing has changed then.
        """
        return state.put(self._kept(), state_dict, strict)

    def _kept(self) -> dict[str, Adapter]:
        """The adapters whose state is this module's."""
        return {name: adapter for name, adapter in self.adapters.items() if name not in self.offered}


def _is_shared(base: type, name: str) -> bool:
    if not name.startswith("_"):
        return True
    if name.startswith("__"):
        return False
    held = inspect.getattr_static(base, name, None)
    return held is not None and not isinstance(held, FunctionType | classmethod | staticmethod)


@functools.cache
def _in_place_of(base: type, kind: type) -> type:
    """The class `kind` under the name of the class `base`, with its forward's signature and ``route=``."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    functools.update_wrapper(forward, kind.forward)  # type: ignore[attr-defined]
    vars(forward).pop("__wrapped__")
    forward.__signature__ = _with_route(base, kind)  # type: ignore[attr-defined]
    body = {"forward": forward, "__doc__": kind.__doc__, "__module__": kind.__module__}
    return type(base.__name__, (kind,), body | {"__qualname__": f"{kind.__name__}[{base.__name__}]"})


def _with_route(base: type, kind: type) -> inspect.Signature:
    """The signature of the base's forward, and `route`, which only the keyword gives."""
    theirs = inspect.signature(base.forward)  # type: ignore[attr-defined]
    route = inspect.signature(kind.forward).parameters["route"]  # type: ignore[attr-defined]
    given = [p for p in theirs.parameters.values() if p.name != route.name]
    rest = [p for p in given if p.kind is inspect.Parameter.VAR_KEYWORD]
    return theirs.replace(parameters=[*(p for p in given if p not in rest), route, *rest])
