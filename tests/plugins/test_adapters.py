"""Bottleneck adapters obey the laws of methods, in all placements."""

from hubkit.methods.suite import MethodSuite

PLACEMENTS = (
    {"reduction": 4},
    {"placement": "houlsby", "width": 3, "activation": "silu", "scaling": "learned"},
    {"placement": "parallel", "reduction": 0.5, "scaling": "channel", "activation": "gelu", "layers": [1]},
)


class TestAdapters(MethodSuite):
    method = "adapters"
    configs = {"llama": PLACEMENTS, "gpt2": PLACEMENTS}  # noqa: RUF012
