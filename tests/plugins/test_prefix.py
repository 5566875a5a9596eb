"""Prefix tuning obeys the laws of methods, in all its configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from variants import refused

from hubkit.methods.foreign import own_files
from hubkit.methods.suite import VOCABULARY, MethodSuite, batch, tiny_model
from hubkit.tensors.base.base import Base
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.parts.adapter import Adapter


class TestPrefix(MethodSuite):
    method = "prefix"
    configs = {  # noqa: RUF012
        "llama": ({"num_virtual_tokens": 5}, {"num_virtual_tokens": 1}, {}),
        "gpt2-float32": ({"num_virtual_tokens": 5}, {"num_virtual_tokens": 12}),
    }

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_a_perceptron_is_folded_when_saved(self, family: str, tmp_path: Path) -> None:
        attached = Attached(tiny_model(family))
        config = {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 7}
        attached.add("a", self.adapter(attached.sites, config))
        attached.set_mix("a")
        adapter = attached.adapters["a"]
        want = attached(batch()).logits
        assert {name.rpartition(".")[2] for name in adapter.parameters()} == {"start", "weight", "bias"}
        files = own_files(adapter)
        (tmp_path / "w").write_bytes(files["adapter_model.safetensors"])
        read = Adapter.read("b", adapter.method, adapter.config, attached.sites, tmp_path / "w", "master")
        attached.add("b", read)
        attached.set_mix("b")
        assert torch.equal(attached(batch()).logits, want)
        assert [p.requires_grad for p in read.parameters().values()] == [True]
        adapter.to_compute_dtype()
        assert own_files(adapter) == files
        assert list(adapter.parameters()) == ["kv.prefix"]

    def test_a_perceptron_trains(self) -> None:
        attached = Attached(tiny_model("llama"))
        attached.add("a", self.adapter(attached.sites, {"num_virtual_tokens": 5, "prefix_projection": True}))
        attached.set_mix("a")
        parameters = attached.adapters["a"].parameters()
        optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
        losses = []
        for _ in range(5):
            loss = self.load().train_step(attached.train(), {"input_ids": batch(), "labels": batch()})
            losses.append(float(loss.detach()))
            loss.backward()  # type: ignore[no-untyped-call]
            assert all(p.grad is not None for p in parameters.values())
            optimizer.step()
            optimizer.zero_grad()
        assert losses == sorted(losses, reverse=True)

    def test_a_fresh_prefix_is_what_the_base_makes_of_tokens(self) -> None:
        model = tiny_model("llama")
        base = Base.from_model(model)
        (prefix,) = self.adapter(base, {}).parameters().values()
        every = torch.arange(VOCABULARY)[:, None]
        known = model(every, use_cache=True).past_key_values.layers[0].values.flatten(1)  # read no position, no other
        values = prefix.view(20, 2, 2, -1)[:, 0, 1]
        assert all((known - row).abs().amax(1).min() < 1e-6 for row in values)
        assert torch.equal(prefix, *self.adapter(base, {}).parameters().values())

    def test_other_starts(self) -> None:
        base = Base.from_model(tiny_model("llama"))
        for init, std in (("zero", 0.0), ("small", 0.02), ("gaussian", 1.0)):
            (prefix,) = self.adapter(base, {"num_virtual_tokens": 60, "init": init}).parameters().values()
            assert float(prefix.detach().std()) == pytest.approx(std, rel=0.1)

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
            attached.add("long", self.adapter(attached.sites, {"num_virtual_tokens": 40, "init_text": text}))
            attached.detach()

    def test_what_a_text_needs(self, tiny_llama: Path) -> None:
        config = {"num_virtual_tokens": 5, "init_text": "Two"}
        refused("HK-TOKENIZER-NEEDED", self.adapter, Base.from_model(tiny_model("llama")), config)
        refused("HK-BASE-NEEDED", self.adapter, Base.from_folder(tiny_llama), config)
        refused("HK-CONFIG", self.adapter, Base.from_folder(tiny_llama), {**config, "prefix_projection": True})
