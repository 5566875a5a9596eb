"""Insides of bitsandbytes, as they are from 0.50.0 to 0.50.2: what a 4-bit layer holds, and an optimizer's pages."""

from __future__ import annotations

from typing import Any

from hubkit.errors import HubkitError


def packed_tensors(module: Any) -> dict[str, Any] | None:
    """The tensors of a layer that bitsandbytes has quantized to 4 bits, as it stores them: "" the codes, the statistics
    by their names. None for any other module.

    ``Linear4bit.weight.quant_state`` and its ``as_dict``: the only public way to these is ``state_dict`` of the layer,
    which converts what was rearranged on the way back and forth, in place.

    Raises:
        HubkitError: ``HK-QUANT-STATE`` for a layer that is not quantized yet, or whose weight was rearranged for the
            library's own CPU kernel, which loses bits.
    """
    weight: Any = getattr(module, "weight", None)
    if not hasattr(weight, "quant_state") or not hasattr(weight, "compress_statistics"):
        return None
    state = weight.quant_state
    if state is None or getattr(state, "packing_format_for_cpu", False):
        raise HubkitError(
            "HK-QUANT-STATE",
            "bitsandbytes has rearranged the weight" if state else "the weight is not quantized yet",
            want="a layer of bitsandbytes as it was loaded",
            where=type(module).__name__,
            fix="load the model again and attach before it first answers, or load it with hubkit.load_base",
        )
    return {"": weight.data, **state.as_dict(packed=True)}


def decoded_facts(module: Any) -> tuple[Any, bool] | None:
    """The dtype that a quantized layer's weight decodes to, and whether the layer that it was made of stored (in, out):
    transformers notes that in ``source_cls``. None for any other module; one that cannot be decoded has them, too."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is None:
        return None
    return state.dtype, getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D"


def make_state(optimizer: Any, param: Any) -> None:
    """Makes the buffers in which a paged optimizer keeps what it knows of `param`, as its first step would.

    ``check_overrides`` and ``init_state`` of ``Optimizer8bit``: its ``load_state_dict`` puts what it reads into
    ordinary memory, where nothing is paged.
    """
    optimizer.check_overrides()
    group, place = next(
        (number, at)
        for number, each in enumerate(optimizer.param_groups)
        for at, one in enumerate(each["params"])
        if one is param
    )
    optimizer.init_state(optimizer.param_groups[group], param, group, place)
