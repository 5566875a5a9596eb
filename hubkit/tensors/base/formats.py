"""Number formats of a base's weights: numbers, and codes that only their kernels and scales make numbers of.

fp8 (with ``weight_scale_inv``), int8 of bitsandbytes (``SCB``), GPTQ, AWQ and compressed-tensors store codes. Adapters
act beside such layers like beside any other; nothing can be added to the codes. NF4 and FP4 of bitsandbytes are decoded
(`hubkit.tensors.fourbit`) and do not count as codes here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hubkit.errors import HubkitError
from hubkit.tensors.files.coded import QUANTIZATION

PACKED = (".qweight", ".weight_packed")
"""Ends of the names under which GPTQ, AWQ and compressed-tensors store what stands for a ``weight``."""
DECODED = {
    "compressed-tensors": "hubkit.load_base(folder), or in transformers "
    "quantization_config=CompressedTensorsConfig(dequantize=True); where that fails, the 16-bit base",
    "mxfp4": "a base without codes: in transformers, from_pretrained with quantization_config="
    "Mxfp4Config(dequantize=True), then save_pretrained",
}
"""``quant_method`` -> how to get weights where a model has packed ones."""
UNPACKED = (
    "the 16-bit base that it was made from; an adapter of this one is merged into that with --allow-base-mismatch"
)
ORIGINAL = "the 16-bit base that it was made from; or the adapter beside this one: hubkit generate, hubkit deploy"


def is_coded(dtype: torch.dtype) -> bool:
    """Whether values of `dtype` are codes: no floating point of 16 bits or more."""
    return not dtype.is_floating_point or dtype.itemsize < torch.float16.itemsize


def computed_in(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which a base computes whose weights are codes; bfloat16 where its config does not say."""
    stated = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), None)
    return stated if isinstance(stated, torch.dtype) and not is_coded(stated) else torch.bfloat16


def format_name(config: Mapping[str, Any]) -> str:
    """What a base's config calls its number format; ``codes`` where it says nothing."""
    facts = config.get(QUANTIZATION)
    return str(facts.get("quant_method") or "codes") if isinstance(facts, Mapping) else "codes"


def require_weights_of_their_own(names: Iterable[str], config: Mapping[str, Any], source: str) -> None:
    """Refuses a base whose linear layers have no weight, in files or in memory, but codes packed in a way that is not
    read here: ``HK-BASE-FORMAT``."""
    packed = [name for name in names if name.endswith(PACKED)]
    if packed:
        kind = format_name(config)
        raise HubkitError(
            "HK-BASE-FORMAT",
            f"the base's weights are packed ({kind}), which hubkit does not read",
            where=source,
            have=f"{len(packed)} packed weights, first {packed[0]}",
            fix=DECODED.get(kind, UNPACKED),
        )


def refuse_codes(names: Iterable[str], source: str) -> None:
    """Refuses to add to weights that are codes: ``HK-BASE-FORMAT``."""
    have = list(names)
    if have:
        raise HubkitError(
            "HK-BASE-FORMAT",
            "the base stores codes at these weights: what is added to a code changes another weight",
            where=source,
            have=have,
            fix=ORIGINAL,
        )
