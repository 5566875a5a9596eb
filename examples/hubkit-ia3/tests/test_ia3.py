from hubkit.methods.suite import MethodSuite


class TestIA3(MethodSuite):
    method = "ia3"
    configs = {"llama": ({},), "gpt2": ({"targets": ["c_attn"], "feedforward": ["mlp.c_proj"]},)}  # noqa: RUF012
