"""Insides of transformers, as they are from 4.57 to 5.23. It is imported when a function needs it: it is optional.

What has a public name is used where it is needed: attentions, for example (``AttentionInterface``). Here is what has
none, what is public but described by example only, and what is set for a while and put back.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hubkit.compat.silence import Silence

Checkpoint = Callable[..., Any]
_NONE = (lambda: None).__code__
_REGISTERING = threading.Lock()


def _silenced() -> Callable[[], None]:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def restore() -> None:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

    return restore


quiet = Silence(_silenced)
"""``with quiet():`` no warnings and no progress bars; the user's settings come back when the last thread is out. All of
it is public; it is here because it belongs to the whole process."""


def attention_of(config: Any) -> str | None:
    """The attention that a model's configuration has chosen: ``sdpa``, ``eager``, ...

    ``config._attn_implementation``: models choose by ``set_attn_implementation`` and have no public way to ask.
    """
    found: str | None = getattr(config, "_attn_implementation", None)
    return found


def commit_of(config: Any) -> str | None:
    """The commit of the Hub that a configuration was loaded from, where it says so.

    ``_commit_hash`` in transformers 4; 5.23 resolves a revision once and keeps it nowhere that a loaded model leads to.
    """
    found: str | None = getattr(config, "_commit_hash", None)
    return found


class AdaptersLoaded:
    """A model that says: adapters are here. Without, the Trainer refuses to train a quantized model.

    Its only word for it is ``_hf_peft_config_loaded``.
    """

    _hf_peft_config_loaded = True


@functools.cache
def _quantizer() -> Any:
    """The class of a quantization's settings, once its quantizer is known to transformers."""
    from transformers.quantizers import HfQuantizer, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Settings(QuantizationConfigMixin):  # type: ignore[misc]
        def __init__(self, prepare: Callable[[Any], None]) -> None:
            self.quant_method, self.prepare = "hubkit", prepare

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": self.quant_method}

    @register_quantizer("hubkit")
    class Preparing(HfQuantizer):  # type: ignore[misc]
        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            self.quantization_config.prepare(model)
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            self.remove_quantization_config(model)
            return model

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    return Settings


def quantization(prepare: Callable[[Any], None]) -> Any:
    """A ``quantization_config`` for ``from_pretrained``: `prepare` is called with the model before it has weights, and
    what it puts in the places of layers is left alone. Nothing of it stays on the model.

    ``register_quantizer`` is public (https://huggingface.co/docs/transformers/quantization/contribute). The methods of
    ``HfQuantizer`` are described there by example only, and some have other arguments in 5 than in 4.
    """
    with _REGISTERING:
        settings = _quantizer()
    return settings(prepare)


def has_its_values(module: Any) -> None:
    """Tells transformers 4 that it need not draw values for `module`, which `quantization` puts in a layer's place.

    ``_is_hf_initialized``: without, it initializes whatever holds the module again, and Bamba's mixer cannot be.
    """
    module._is_hf_initialized = True


def keeps_some_wide(model: Any) -> bool:
    """Whether ``from_pretrained`` may give some weights of `model` another dtype than it is asked for.

    ``_keep_in_fp32_modules`` and ``_keep_in_fp32_modules_strict``, of the class or of the object, in 4.57 as in 5.23.
    """
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return any(getattr(module, name, None) for module in model.modules() for name in names)


def compute_buffers(model: Any) -> None:
    """Has a model whose parameters are on meta compute the buffers that are in no file, as ``from_pretrained`` does.

    That computes them after the model is made, in torch's default dtype, in ``initialize_weights`` of transformers 5:
    skipped for modules whose ``_is_hf_initialized`` says that it was done. Before 5 they are made with the modules.
    """
    from transformers import __version__

    if int(__version__.partition(".")[0]) >= 5:
        for module in model.modules():
            module._is_hf_initialized = False
        model.initialize_weights()


def checkpoint_of(module: Any) -> Checkpoint | None:
    """The function by which `module` checkpoints what is below it; None where nobody has switched that on.

    ``_gradient_checkpointing_func``: the ``context_fn`` of torch's checkpointing would be public, but only whoever
    switches it on can give one, and not for reentrant checkpointing.
    """
    found: Checkpoint | None = vars(module).get("_gradient_checkpointing_func")
    return found


def set_checkpoint(module: Any, function: Checkpoint) -> None:
    """Sets what `checkpoint_of` gives."""
    vars(module)["_gradient_checkpointing_func"] = function


def flattens_by_its_size(model: Any) -> bool:
    """Whether `model` computes its loss itself and takes logits to be as long as its configuration's ``vocab_size``.

    Read from the names in its forward, and in those that this one calls by ``super``: transformers moves its models to
    ``loss_function`` one by one, and bart and bert are not there in 5.23.
    """
    names: set[str] = set()
    for kind in type(model).__mro__:
        if "forward" in vars(kind):
            used = getattr(inspect.unwrap(vars(kind)["forward"]), "__code__", _NONE).co_names
            names |= {*used}
            if "super" not in used:
                break
    return "vocab_size" in names and "loss_function" not in names


@contextmanager
def lengthened_loss(model: Any, lengthened: Callable[[], bool]) -> Iterator[None]:
    """Inside, the loss of `model` takes logits to be as long as they are where `lengthened` says so: the model itself
    gives its configuration's ``vocab_size`` to it. Of a model without ``loss_function`` nothing is changed.

    That one is public and can be set; to unset it, ``_loss_function`` has to be deleted.
    """
    own, before = getattr(model, "loss_function", None), vars(model).get("_loss_function")
    if own is None:
        yield
        return

    @functools.wraps(own)
    def loss(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(own).bind(*args, **kwargs)
        if {"logits", "vocab_size"} <= given.arguments.keys() and lengthened():
            given.arguments["vocab_size"] = given.arguments["logits"].shape[-1]
        return own(*given.args, **given.kwargs)

    model.loss_function = loss
    try:
        yield
    finally:
        if before is None:
            del model._loss_function
        else:
            model.loss_function = before


def keys_after(cache: Any, tokens: int, layer: int) -> int:
    """How many keys an attention sees once `cache`, or none, has taken in `tokens` more.

    ``Cache.get_mask_sizes`` takes their number since transformers 5, and before that their positions; no release note
    promises either.
    """
    if cache is None:
        return tokens
    by_number = next(iter(inspect.signature(cache.get_mask_sizes).parameters)) == "query_length"
    asked: Any = tokens
    if not by_number:
        import torch

        asked = torch.arange(tokens) + cache.get_seq_length(layer)
    found: int = cache.get_mask_sizes(asked, layer)[0]
    return found
