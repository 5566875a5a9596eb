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
            {"init": "pissa", "rank": 3, "alpha_pattern": {"v_proj": 3}, "rank_pattern": {"q_proj": 2}},
            {"init": "olora", "rank": 4, "rslora": True, "layers": [1]},
            {"rank": 4, "modules_to_save": ["lm_head", "embed_tokens", "norm", "layers.1.mlp.up_proj"]},
            {"rank": 4, "token_ids": [1, 40]},
        ),
        "gpt2": (
            {},
            {"targets": ["c_attn", "wte"], "rank": 4},
            {"targets": r".*\.h\.0\..*c_(fc|proj)", "rslora": True},
            {"init": "pissa", "rank": 4},
            {"init": "olora", "rank": 4, "targets": ["c_fc", "wte"], "alpha": 3},
            {"rank": 4, "modules_to_save": ["lm_head", "h.1.mlp.c_proj", "ln_f"]},
            {"rank": 4, "modules_to_save": ["wte", "wpe"]},
            {"rank": 4, "modules_to_save": ["wte"], "tied": "keep"},
            {"rank": 4, "targets": ["c_attn", "wte"], "tied": "keep"},
            {"rank": 4, "targets": ["lm_head"], "init": "pissa", "tied": "keep"},
            {"rank": 4, "targets": ["c_attn", "wte", "lm_head"], "tied": "break"},
            {"rank": 4, "targets": ["c_attn"], "token_ids": [7, 3]},
        ),
    }
