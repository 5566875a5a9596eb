"""Selective fine-tuning: the laws of every method."""

from __future__ import annotations

from hubkit.methods.suite import MethodSuite


class TestSelective(MethodSuite):
    method = "selective"
    configs = {  # noqa: RUF012
        "llama": ({}, {"weights": ["q_proj", "embed_tokens"]}, {"weights": "all-linear", "layers": "1"}),
        "gpt2": (
            {},
            {"weights": []},
            {"weights": ["wte", "c_proj"], "biases": ["ln_1"], "layer_decay": 0.5, "depth": 2},
        ),
    }
