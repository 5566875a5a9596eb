"""QLoRA obeys the laws of methods, on the base as it sees it: quantized."""

from __future__ import annotations

from variants import refused

from hubkit.methods.suite import MethodSuite, tiny_model
from hubkit.tensors.base.base import Base


class TestQlora(MethodSuite):
    method = "qlora"
    configs = {  # noqa: RUF012
        "llama": ({"rank": 4}, {"targets": ["q_proj", "v_proj", "embed_tokens"], "rank": 3, "rslora": True}),
        "gpt2": ({"rank": 4}, {"targets": ["c_attn"], "rank": 2, "modules_to_save": ["lm_head", "ln_f"]}),
    }

    def test_the_options_of_lora_hold(self) -> None:
        base = Base.from_model(tiny_model("llama"))
        adapter = self.adapter(base, {"rank": 2, "layers": "1", "lora_plus_ratio": 4.0})
        assert adapter.parts
        assert all(".layers.1." in site for site in adapter.parts)
        assert {name.rpartition(".")[2] for name, rate in adapter.learning_rates().items() if rate == 4.0} == {"B"}
        refused("HK-CONFIG", self.adapter, base, {"init": "pissa"})
