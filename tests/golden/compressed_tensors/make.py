"""Makes ``weights.safetensors`` beside it: a weight in formats of compressed-tensors, and what that library decodes.

    pip install compressed-tensors==0.20.1      (in an environment of its own, with torch)
    python tests/golden/compressed_tensors/make.py

Tensors are named ``FORMAT.a.PART``, the decoded ones ``FORMAT.decoded``; the file's metadata has each format's config.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

GROUPS = {"strategy": "group", "group_size": 16}
BLOCKS = {"strategy": "block", "block_structure": [16, 32]}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "float8 channel": ("float-quantized", {"type": "float", "num_bits": 8, "strategy": "channel"}),
    "float8 tensor": ("float-quantized", {"type": "float", "num_bits": 8, "strategy": "tensor"}),
    "float8 block": ("float-quantized", {"type": "float", "num_bits": 8, **BLOCKS}),
    "int8 channel": ("int-quantized", {"type": "int", "num_bits": 8, "strategy": "channel"}),
    "uint8 channel": ("int-quantized", {"type": "int", "num_bits": 8, "strategy": "channel", "symmetric": False}),
    "int4 group": ("pack-quantized", {"type": "int", "num_bits": 4, **GROUPS}),
    "uint4 group": ("pack-quantized", {"type": "int", "num_bits": 4, "symmetric": False, **GROUPS}),
    "uint3 channel": ("pack-quantized", {"type": "int", "num_bits": 3, "symmetric": False, "strategy": "channel"}),
    "int8 packed": ("pack-quantized", {"type": "int", "num_bits": 8, "strategy": "tensor"}),
}
SHAPE = (20, 64)


def main() -> None:
    """Writes the file."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    torch.manual_seed(0)
    tensors, configs = dict[str, Tensor](), dict[str, str]()
    for name, (kind, arguments) in FORMATS.items():
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(dynamic=False, **arguments))
        weight, (rows, columns) = torch.randn(SHAPE), SHAPE
        reach: dict[str, tuple[int, int]] = {
            "channel": (1, columns),
            "tensor": SHAPE,
            "group": (1, 16),
            "block": (16, 32),
        }
        tall, broad = reach[arguments["strategy"]]
        grid = -(-rows // tall), -(-columns // broad)
        padded = torch.nn.functional.pad(weight, (0, grid[1] * broad - columns, 0, grid[0] * tall - rows))
        parts = padded.reshape(grid[0], tall, grid[1], broad).transpose(1, 2).reshape(grid[0] * grid[1], -1)
        scale, zero = calculate_qparams(parts.min(1).values, parts.max(1).values, scheme.weights)
        shape = (1,) if arguments["strategy"] == "tensor" else grid
        stored = {"weight": weight, "weight_scale": scale.reshape(shape), "weight_zero_point": zero.reshape(shape)}
        compressor = BaseCompressor.get_value_from_registry(kind)
        stored = compressor.compress(stored, scheme)
        tensors |= {f"{name}.a.{part}": tensor.contiguous() for part, tensor in stored.items()}
        tensors[f"{name}.decoded"] = compressor.decompress(dict(stored), scheme)["weight"].contiguous()
        group = {"targets": ["Linear"], "weights": json.loads(scheme.weights.model_dump_json())}
        configs[name] = json.dumps({"quant_method": "compressed-tensors", "config_groups": {"group_0": group}})
    save_file(tensors, Path(__file__).parent / "weights.safetensors", configs)


if __name__ == "__main__":
    main()
