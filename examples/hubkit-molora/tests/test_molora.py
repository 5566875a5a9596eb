from hubkit.methods.suite import MethodSuite


class TestMoLora(MethodSuite):
    method = "molora"
    configs = {"llama": ({}, {"targets": "all-linear", "experts": 3}), "gpt2": ({"targets": ["c_attn"], "rank": 2},)}  # noqa: RUF012
