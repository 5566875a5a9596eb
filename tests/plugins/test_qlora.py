"""QLoRA obeys the laws of methods, on the base as it sees it: quantized."""

from hubkit.methods.suite import MethodSuite


class TestQlora(MethodSuite):
    method = "qlora"
    configs = {  # noqa: RUF012
        "llama": ({"rank": 4}, {"targets": ["q_proj", "v_proj", "embed_tokens"], "rank": 3, "rslora": True}),
        "gpt2": ({"rank": 4}, {"targets": ["c_attn"], "rank": 2, "modules_to_save": ["lm_head", "ln_f"]}),
    }
