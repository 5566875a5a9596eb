"""Prompt tuning obeys the laws of methods, in all its configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tokenizer
from variants import refused

from hubkit.methods.suite import MethodSuite, batch, tiny_model
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.tokenizer import load_tokenizer
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base


class TestPrompt(MethodSuite):
    method = "prompt"
    configs = {  # noqa: RUF012
        "llama": ({"num_virtual_tokens": 5}, {"num_virtual_tokens": 1}, {}),
        "gpt2-float32": ({"num_virtual_tokens": 5}, {"num_virtual_tokens": 12}),
    }

    def test_a_fresh_prompt_is_rows_of_the_vocabulary(self) -> None:
        base = Base.from_model(tiny_model("llama"))
        (prompt,) = self.adapter(base, {}).parameters().values()
        rows = base.sites["model.embed_tokens"].weight().t()
        assert all((rows == row).all(1).any() for row in prompt)
        (random,) = self.adapter(base, {"num_virtual_tokens": 60, "init": "gaussian"}).parameters().values()
        assert float(random.detach().std()) == pytest.approx(1.0, rel=0.1)

    def test_starting_from_a_text_is_that_text_in_front(self, tiny_llama: Path, tiny_gpt2: Path) -> None:
        for folder in (tiny_llama, tiny_gpt2):
            model = load_base(folder)
            attached = Attached(model)
            assert attached.sites.tokenizer is not None
            text = "Two and two are four."
            ids = torch.tensor([attached.sites.tokenizer()(text)["input_ids"]])
            want = model(torch.cat([ids, batch()[:1]], 1)).logits[:, ids.shape[1] :]
            config = {"num_virtual_tokens": ids.shape[1], "init_text": text}
            attached.add("a", self.adapter(attached.sites, config))
            attached.set_mix("a")
            self.near(attached(batch()[:1]).logits, want)
            from_files = self.adapter(Base.from_folder(folder), config).parameters()
            live = attached.adapters["a"].parameters()
            assert all(torch.equal(from_files[name], live[name]) for name in live)
            attached.detach()

    def test_what_a_text_needs(self, tmp_path: Path) -> None:
        refused("HK-TOKENIZER-NEEDED", self.adapter, Base.from_model(tiny_model("llama")), {"init_text": "Two"})
        tokenizer().save_pretrained(tmp_path)  # of words: a space is none
        base = Base.from_model(tiny_model("llama"))
        base.tokenizer = lambda: load_tokenizer(tmp_path)
        assert refused("HK-CONFIG", self.adapter, base, {"init_text": " "}).have == ["' '"]
