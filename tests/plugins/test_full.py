"""Full fine-tuning: the laws of every method."""

from __future__ import annotations

from hubkit.methods.suite import MethodSuite


class TestFull(MethodSuite):
    method = "full"
    configs = {  # noqa: RUF012
        "llama": ({}, {"targets": ["norm", "lm_head"]}, {"holds": "values"}),
        "gpt2": (
            {},
            {"targets": ["lm_head", "wte"]},
            {"targets": ["lm_head", "wte"], "tied": "break"},
            {"biases": False},
            {"holds": "values"},
        ),
    }
