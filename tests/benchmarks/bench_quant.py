"""Packing and unpacking a 2048x2048 weight beside bitsandbytes, both with double quantization, two threads.

python tests/benchmarks/bench_quant.py
"""

from __future__ import annotations

from functools import partial

import torch
from harness import compare, report

from hubkit.tensors.fourbit.decode import dequantize
from hubkit.tensors.fourbit.nf4 import decoded_by_torch, quantize


def speeds(size: int, figures: tuple[float, float, float]) -> None:
    print(f"  {size / figures[0] / 1e9:.2f} GB/s of 16 or 32 bits, bitsandbytes {size / figures[1] / 1e9:.2f}")


def main() -> None:
    from bitsandbytes import functional

    torch.set_num_threads(2)
    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    for dtype, target in ((torch.bfloat16, 0.40), (torch.float32, 0.40)):
        values = weight.to(dtype)

        def theirs(values: torch.Tensor = values) -> object:
            return functional.quantize_4bit(values, quant_type="nf4", compress_statistics=True)

        figures = compare(partial(quantize, values), theirs, 15)
        report(f"encode {str(dtype).removeprefix('torch.')}", figures, target)
        speeds(values.nbytes, figures)
    values = weight.to(torch.bfloat16)
    packed = quantize(values)
    for double, target in ((True, 1 / 0.45), (False, 10.0)):
        codes, state = functional.quantize_4bit(values, quant_type="nf4", compress_statistics=double)
        figures = compare(lambda: dequantize(packed), lambda: functional.dequantize_4bit(codes, state), 15)  # noqa: B023
        report(f"decode to bfloat16, theirs {'double' if double else 'single'}", figures, target)
        speeds(values.nbytes, figures)
    codes, state = functional.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    figures = compare(
        lambda: decoded_by_torch(packed, torch.bfloat16), lambda: functional.dequantize_4bit(codes, state), 15
    )
    report("  the same in torch alone, theirs double", figures, 1 / 0.45)
    speeds(values.nbytes, figures)


if __name__ == "__main__":
    main()
