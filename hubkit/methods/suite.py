"""The conformance kit of methods: laws that every method obeys, as an importable pytest class.

    from hubkit.methods.suite import MethodSuite

    class TestMine(MethodSuite):
        method = "mine"

The laws run on tiny random models with random, non-identity tensors. GPT-2 runs in fp64 (its layer norm does, too),
where equal means 1e-10; Llama runs in fp32 and 1e-5, because transformers computes RMSNorm and RoPE in fp32. So does
``gpt2-float32``, for methods that PEFT keeps in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.methods.config import config_document, parse_config
from hubkit.methods.foreign import own_files
from hubkit.methods.host import Method, host
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.site import Site
from hubkit.tensors.files.shards import open_shards
from hubkit.tensors.fourbit.linear import packed_of
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Stack, Sum
from hubkit.tensors.parts.part import Part
from hubkit.tensors.parts.vocabulary import TokenRows
from hubkit.tensors.weights.merging import plan_merge, write_merged

VOCABULARY, HIDDEN = 48, 16
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def tiny_model(family: str) -> nn.Module:
    """A seeded random language model of two layers, biases and norms random too.

    ``llama`` (fp32), ``gpt2`` (fp64) or ``gpt2-float32``.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    if family.startswith("gpt2"):
        shape = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
        model: nn.Module = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **shape))
        model = model.double() if family == "gpt2" else model
    else:
        sizes = {"hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # zeros and ones would hide what a method does with them
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.eval()


def batch() -> Tensor:
    """Token ids, (3, 7), fixed."""
    return torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(2))


def randomize(adapter: Adapter, seed: int) -> Adapter:
    """Random, non-identity values in every tensor, in place: a law must not hold only at the start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters().values():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return adapter


def draws(part: Part, site: Site, base: Base) -> bool:
    """Whether the starting values of a part are random: drawn from its generator, and not from a range of one value."""
    generator = torch.Generator()
    before = generator.get_state()
    with torch.no_grad():
        part.reset(site, base, generator)
    drawn = not torch.equal(generator.get_state(), before)
    return drawn and any(bool((value != value.flatten()[0]).any()) for value in part.parameters())


class MethodSuite:
    """Laws of a method. Subclass it, name the method, and, if its defaults do not fit, configurations per family."""

    method: ClassVar[str]
    configs: ClassVar[Mapping[str, tuple[Mapping[str, Any], ...]]] = {"llama": ({},), "gpt2": ({},)}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            cases = [(family, config) for family, configs in self.configs.items() for config in configs]
            metafunc.parametrize("case", cases, ids=[f"{f}-{i}" for i, (f, _) in enumerate(cases)])

    def load(self) -> Method:
        """The method, through the host, as every user gets it."""
        return host().load(self.method)

    def adapter(self, base: Base, config: Mapping[str, Any], seed: int = 0) -> Adapter:
        """A fresh adapter of this method."""
        method = self.load()
        return Adapter.fresh("fresh", method, parse_config(method.info.config, config, self.method), base, seed)

    def attached(self, case: tuple[str, Mapping[str, Any]], count: int = 1) -> Attached:
        """A tiny model with `count` random adapters, ``a``, ``b``..."""
        attached = Attached(tiny_model(case[0]))
        for index in range(count):
            attached.add("abc"[index], randomize(self.adapter(attached.sites, case[1], index), index))
        return attached

    def decoded(self, attached: Attached, family: str) -> nn.Module:
        """The base that the adapters see, in plain layers: a copy with the decoded weights where they are quantized."""
        packed = {name: site for name, site in attached.sites.sites.items() if packed_of(site.module) is not None}
        if not packed:
            return attached.model
        model = tiny_model(family)
        for name, site in packed.items():
            weight = model.get_submodule(name).get_parameter("weight")
            weight.data = site.weight().t().contiguous() if site.transposed else site.weight()
        return model

    def test_describes_itself(self) -> None:
        info = self.load().info
        assert info.name == self.method
        assert info.summary
        assert "\n" not in info.summary
        assert info.paper
        assert parse_config(info.config, config_document(info.config()), "config") == info.config()

    def test_fresh_is_the_base_bit_for_bit(self, case: tuple[str, Mapping[str, Any]]) -> None:
        if not self.load().info.identity:
            pytest.skip("a fresh adapter of this method changes the base, as its description says")
        attached = Attached(tiny_model(case[0]))
        attached.add("a", self.adapter(attached.sites, case[1]))
        want = attached(batch()).logits
        attached.set_mix("a")
        assert torch.equal(attached(batch()).logits, want)

    def test_same_seed_same_parts(self, case: tuple[str, Mapping[str, Any]]) -> None:
        base = Base.from_model(tiny_model(case[0]))
        one, two = (self.adapter(base, case[1], 5).parameters() for _ in range(2))
        assert len(one) > 0
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_another_seed_gives_another_adapter(self, case: tuple[str, Mapping[str, Any]]) -> None:
        base = Base.from_model(tiny_model(case[0]))
        one, other = (self.adapter(base, case[1], seed) for seed in (5, 6))
        if not any(draws(part, base.site(site), base) for site, part in self.adapter(base, case[1]).parts.items()):
            pytest.skip("nothing is drawn at the start")
        values = other.parameters()
        assert one.parameters().keys() == values.keys()
        assert any(not torch.equal(value, values[name]) for name, value in one.parameters().items())

    def test_only_the_adapter_trains(self, case: tuple[str, Mapping[str, Any]]) -> None:
        attached = self.attached(case)
        attached.set_mix("a")
        before = {n: p.detach().clone() for n, p in attached.model.named_parameters()}
        parameters = attached.adapters["a"].trainables()
        values = {n: p.detach().clone() for n, p in parameters.items()}
        optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
        loss = self.load().train_step(attached, {"input_ids": batch(), "labels": batch()})
        assert loss.requires_grad, "the loss does not depend on the adapter"
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters.values())
        optimizer.step()
        assert all(p.grad is None and torch.equal(p, before[n]) for n, p in attached.model.named_parameters())
        assert any(not torch.equal(p, values[n]) for n, p in parameters.items())

    def test_write_read_write_gives_the_same_bytes(self, case: tuple[str, Mapping[str, Any]], tmp_path: Path) -> None:
        base = Base.from_model(tiny_model(case[0]))
        adapter = randomize(self.adapter(base, case[1]), 3)
        files = own_files(adapter)
        (tmp_path / "w").write_bytes(files["adapter_model.safetensors"])
        again = Adapter.read("again", adapter.method, adapter.config, base, tmp_path / "w", None)
        assert own_files(again) == files
        assert all(torch.equal(p, adapter.parameters()[n]) for n, p in again.parameters().items())

    def test_detaching_restores_the_base(self, case: tuple[str, Mapping[str, Any]]) -> None:
        model = tiny_model(case[0])
        want, names = model(batch()).logits, [n for n, _ in model.named_parameters()]
        attached = Attached(model)
        attached.add("a", randomize(self.adapter(attached.sites, case[1]), 1))
        attached.set_mix("a")
        assert not torch.equal(attached(batch()).logits, want)
        assert attached.detach() is model
        assert torch.equal(model(batch()).logits, want)
        assert [n for n, _ in model.named_parameters()] == names

    def test_a_sum_does_not_depend_on_order_and_opposites_cancel(self, case: tuple[str, Mapping[str, Any]]) -> None:
        attached = self.attached(case, 2)
        base = attached(batch()).logits
        if not all(part.weighable for part in attached.adapters["a"].parts.values()):
            self.only_whole_members(attached)
            return
        attached.set_mix(Sum({"a": 0.7, "b": -0.4}))
        one = attached(batch()).logits
        attached.set_mix(Sum({"b": -0.4, "a": 0.7}))
        self.near(attached(batch()).logits, one)
        attached.set_mix(Sum([("a", 1.0), ("a", -1.0)]))
        self.near(attached(batch()).logits, base)
        assert not torch.allclose(one, base, atol=1e-3)

    def test_a_routed_row_is_that_row_alone(self, case: tuple[str, Mapping[str, Any]]) -> None:
        attached = self.attached(case, 2)
        rows = torch.cat([batch(), batch()[:1].flip(1)])
        route = ["a", None, Sum(["b", "a"]), "a"]  # two rows of one mix act together, and must not see each other
        if any(isinstance(part, TokenRows) for part in attached.adapters["a"].parts.values()):
            with pytest.raises(HubkitError, match="HK-ROUTE"):  # logits have one length for all rows
                attached(rows, route=route)
            return
        have = attached(rows, route=route).logits
        for number, mix in enumerate(route):
            attached.set_mix(mix)
            self.near(have[number], attached(rows[number : number + 1]).logits[0])

    def only_whole_members(self, attached: Attached) -> None:
        """Parts that have no weight are refused one, and a sum of them is their stack."""
        for mix in (Sum({"a": 0.7, "b": 1.0}), Sum([("a", 1.0), ("a", -1.0)]), Stack([("a", 0.0)])):
            with pytest.raises(HubkitError, match="HK-MIX"):
                attached.set_mix(mix)
        attached.set_mix("a")
        alone = attached(batch()).logits
        attached.set_mix(Sum(["a", "b"]))
        both = attached(batch()).logits
        attached.set_mix(Stack(["a", "b"]))
        assert torch.equal(attached(batch()).logits, both)
        assert not torch.allclose(both, alone, atol=1e-4)

    def test_merged_equals_live(self, case: tuple[str, Mapping[str, Any]], tmp_path: Path) -> None:
        attached = self.attached(case, 2)
        decoded = self.decoded(attached, case[0])
        decoded.save_pretrained(tmp_path / "base", max_shard_size="8KB")  # type: ignore[operator]
        for mix in ("a", Sum({"a": 1.0, "b": -0.5}), Stack([("a", 0.5), "b"]), Sum([(Stack(["b", "a"]), -1.0), "a"])):
            if self.load().unmergeable:
                with pytest.raises(HubkitError, match="HK-NOT-MERGEABLE"):
                    plan_merge(attached.sites, mix, attached.adapters)
                continue
            attached.set_mix(mix)
            want = attached(batch()).logits
            streamed = Base.from_folder(tmp_path / "base")
            out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
            out.mkdir()
            write_merged(plan_merge(streamed, mix, attached.adapters), open_shards(tmp_path / "base"), out)
            stored = open_shards(out)
            plan = plan_merge(attached.sites, mix, attached.adapters)
            for site in plan.sites:
                name = f"{site.name}.weight" if site.tied else site.tensor
                assert torch.equal(stored.read(name), plan.weight(site)), "streamed and in memory: the same bits"
            self.near(load_base(out)(batch()).logits, want)

    def test_to_peft_and_back_and_peft_agrees(self, case: tuple[str, Mapping[str, Any]], tmp_path: Path) -> None:
        if self.load().peft_form is None:
            pytest.skip("PEFT does not know this method")
        peft = pytest.importorskip("peft")

        attached = self.attached(case)
        attached.set_mix("a")
        want = attached(batch()).logits
        for name, data in attached.adapters["a"].method.export(attached.adapters["a"], "peft").items():
            (tmp_path / name).write_bytes(data)
        decoded = self.decoded(attached, case[0])
        attached.detach()
        model = peft.PeftModel.from_pretrained(decoded, str(tmp_path))
        self.near(model(input_ids=batch()).logits[:, -want.shape[1] :], want)  # PEFT's prompt has outputs of its own

    def near(self, have: Tensor, want: Tensor) -> None:
        """Equal within the tolerance of the dtype, relative to the largest value."""
        assert (have - want).detach().abs().max() <= TOLERANCE[want.dtype] * max(1.0, float(want.detach().abs().max()))
