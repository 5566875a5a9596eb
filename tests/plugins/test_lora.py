"""LoRA obeys the laws of methods, in all its configurations."""

from hubkit.methods.suite import MethodSuite


class TestLora(MethodSuite):
    method = "lora"
    configs = {  # noqa: RUF012
        "llama": (
            {},
            {"targets": ["q_proj", "v_proj"], "rank": 4, "rslora": True, "init": "gaussian"},
            {
                "targets": "all-linear",
                "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
                "alpha_pattern": {"v_proj": 3},
            },
            {"targets": ["embed_tokens", "o_proj"], "rank": 4},
        ),
        "gpt2": (
            {},
            {"targets": ["c_attn", "wte"], "rank": 4},
            {"targets": r".*\.h\.0\..*c_(fc|proj)", "rslora": True},
        ),
    }
