"""Experts of a mixture as sites: what acts at one matrix of a tensor of all of them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bases.architectures import save
from bases.cells import loaded, logits
from torch import Tensor
from torch.func import functional_call
from variants import refused, rows_file

import hubkit
from hubkit.compat import transformers_names
from hubkit.tensors.base.base import Base
from hubkit.tensors.experts.expert import Expert, is_expert
from hubkit.tensors.experts.finding import experts_of
from hubkit.tensors.experts.products import Products
from hubkit.tensors.files.shards import open_shards
from hubkit.tensors.fourbit.nf4 import CODEC
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.parts.part import LowRank
from hubkit.tensors.weights.decoding import decoded

pytestmark = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="there experts are modules")
KINDS = ["mixtral", "qwen3_moe", "deepseek_v3", "jamba", "nemotron_h"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind in KINDS:
        found[kind] = tmp_path_factory.mktemp(kind)
        save(kind, found[kind])
    return found


@pytest.fixture(scope="module")
def adapter(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained LoRA at every linear layer of the mixtral, experts among them."""
    return trained(bases["mixtral"], tmp_path_factory.mktemp("adapter"))


def trained(base: Path, work: Path, **options: Any) -> Path:
    config = options.pop("config", {"rank": 2})
    rows = rows_file(work / "rows.jsonl", 8)
    options = {"steps": 2, "learning_rate": 0.05, "warmup": 0.0, "dtype": "float32", **options}
    hubkit.train(base, rows, work / "a", config=config, **options)
    return work / "a"


def require_one_map(model: Any, folder: Path) -> None:
    """The law of the map: every site of the model is that of the files, with the same values."""
    live, files = Base.from_model(model), Base.from_folder(folder)
    assert live.sites.keys() == files.sites.keys()
    for name, site in live.sites.items():
        if site.kind != "block":
            assert torch.equal(site.weight(), files.sites[name].weight()), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_is_the_matrix_of_the_files(kind: str, bases: dict[str, Path]) -> None:
    model = loaded(bases[kind])
    require_one_map(model, bases[kind])
    assert len(experts_of(model)) >= 8


@pytest.mark.parametrize("fault", ["swapped experts", "swapped halves", "moved rows", "renamed", "missing"])
def test_a_fault_in_the_map_is_caught(fault: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    right = transformers_names.fused_rows

    def wrong(model: Any) -> dict[str, tuple[str, int, slice]]:
        found = right(model)
        first = next(name for name in found if "w1" in name)
        path, number, rows = found[first]
        if fault == "swapped experts":
            found = {name: (p, {0: 1, 1: 0}.get(n, n), r) for name, (p, n, r) in found.items()}
        elif fault == "swapped halves":
            other = first.replace("w1", "w3") if "w1" in first else first.replace("w3", "w1")
            found[first], found[other] = found[other], found[first]
        elif fault == "moved rows":
            found[first] = path, number, slice(rows.start + 1, rows.stop + 1)
        elif fault == "renamed":
            found[first.replace("experts.0", "experts.9")] = found.pop(first)
        else:
            del found[first]
        return found

    monkeypatch.setattr("hubkit.tensors.experts.finding.fused_rows", wrong)
    with pytest.raises(AssertionError):
        require_one_map(loaded(bases["mixtral"]), bases["mixtral"])


def test_gradients_are_those_of_the_merged_weights(bases: dict[str, Path], adapter: Path) -> None:
    """In fp64, against autograd through W + s·B·A put into the model's own tensors."""
    model = loaded(bases["mixtral"]).double()
    model.set_experts_implementation("eager")  # the others have no fp64
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    attached = hubkit.attach(model, adapter)
    (made,) = attached.adapters.values()
    parts = {n: p.double().requires_grad_() for n, p in made.parts.items() if isinstance(p, LowRank)}
    assert len(parts) == len(made.parts)
    loss = attached(input_ids=ids, labels=ids).loss
    loss.backward()
    have = {name: (part.A.grad, part.B.grad) for name, part in parts.items()}

    weights: dict[str, Tensor] = {}
    paths = {id(parameter): path for path, parameter in model.named_parameters()}
    factors = {}
    for name, part in parts.items():
        site = attached.sites.sites[name]
        a, b = (t.detach().clone().requires_grad_() for t in (part.A, part.B))
        factors[name] = a, b
        change = part.scale * (b @ a)
        if isinstance(site.module, Expert):
            one = site.module
            path, rows = paths[id(one.all)], torch.arange(one.rows.start, one.rows.stop)
            whole = torch.zeros_like(one.all).index_put((torch.tensor(one.number), rows), change)
            weights[path] = weights.get(path, one.all.detach()) + whole
        else:
            assert site.module is not None
            weight = site.module.get_parameter("weight")
            weights[paths[id(weight)]] = weight.detach() + change
    attached.set_mix(None)
    plain = functional_call(model, weights, kwargs={"input_ids": ids, "labels": ids}).loss
    plain.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-9, atol=1e-9)
    for name, (a, b) in factors.items():
        for mine, theirs in zip(have[name], (a.grad, b.grad), strict=True):
            if mine is None:  # an expert without a token
                assert theirs is None or not theirs.any()
            else:
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_the_base_alone_is_untouched_and_gets_its_forward_back(bases: dict[str, Path], adapter: Path) -> None:
    model = loaded(bases["mixtral"])
    before = logits(model)
    attached = hubkit.attach(model, adapter)
    assert not torch.equal(logits(attached), before)
    with attached.using(None):
        assert torch.equal(logits(attached), before)
    attached.detach()
    assert torch.equal(logits(model), before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_threads_have_mixes_of_their_own(bases: dict[str, Path], adapter: Path) -> None:
    model = loaded(bases["mixtral"])
    plain, attached = logits(model), hubkit.attach(model, adapter)
    adapted, wrong = logits(attached), []

    def run(mix: str | None, want: Tensor) -> None:
        for _ in range(10):
            with attached.using(mix):
                if not torch.equal(logits(attached), want):
                    wrong.append(mix)

    threads = [threading.Thread(target=run, args=pair) for pair in ((attached.mix, adapted), (None, plain))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_merged_live_it_has_the_bits_of_the_merged_files(method: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["qwen3_moe"]
    folder = trained(base, tmp_path, method=method, config={} if method == "full" else {"rank": 2})
    hubkit.merge(base, folder, tmp_path / "merged")
    model, files = loaded(base), loaded(tmp_path / "merged")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attached = hubkit.attach(model, folder)
    with attached.merge():
        merged = model.state_dict()
        assert all(torch.equal(value, merged[name]) for name, value in files.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_quantized_they_are_what_the_files_decode_to(bases: dict[str, Path], tmp_path: Path) -> None:
    """Beside the model's own tensors, and packed while they are loaded."""
    base = bases["mixtral"]
    folder, files = trained(base, tmp_path, method="qlora"), Base.from_folder(base)
    view = decoded(open_shards(base), CODEC, "float32")
    beside = hubkit.attach(loaded(base), folder)
    packed = hubkit.attach(load_base(base, dtype="float32", codec=CODEC), folder)
    assert not any(".experts." in name for name, _ in packed.model.named_parameters()), "nothing of 16 bits remains"
    for attached in (beside, packed):
        experts = {name: site for name, site in attached.sites.sites.items() if is_expert(name)}
        assert len(experts) == 24
        assert all(torch.equal(site.weight(), view.read(site.tensor)) for site in experts.values())
        assert not any(torch.equal(site.weight(), files.sites[name].weight()) for name, site in experts.items())
    assert torch.equal(logits(beside), logits(packed))


def test_packed_experts_are_saved_and_loaded_again(bases: dict[str, Path], tmp_path: Path) -> None:
    """Each under the names that bitsandbytes gives, as transformers 4 wrote such bases."""
    model: Any = load_base(bases["mixtral"], dtype="float32", codec=CODEC)
    model.save_pretrained(tmp_path / "packed")
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight.absmax" in open_shards(tmp_path / "packed").headers
    assert torch.equal(logits(load_base(tmp_path / "packed")), logits(model))


def test_experts_that_cannot_be_packed_are_refused(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Products, "works", lambda self: False)
    assert len(refused("HK-BASE-LOAD", load_base, bases["mixtral"], codec=CODEC).have) == 24


def test_what_needs_rows_of_the_batch_is_refused(bases: dict[str, Path], adapter: Path) -> None:
    attached = hubkit.attach(loaded(bases["mixtral"]), adapter)
    ids = torch.ones(2, 4, dtype=torch.long)
    (name,) = attached.adapters
    assert "experts" in refused("HK-ROUTE", attached, ids, route=[name, None]).have[0]
    assert "experts" in refused("HK-SLOTS", attached.compiled).have[0]
    refused("HK-COMPILE", attached.compiled_training().__enter__)


def test_experts_that_are_computed_in_another_way_are_refused_in_a_line_each(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward that does more with its tensors than multiply by one of them has no place where parts could act."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    def summed(self: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        made: Tensor = x @ self.gate_up_proj.sum((0, 1))[:, None] * x
        return made

    monkeypatch.setattr(MixtralExperts, "forward", summed)
    base, rows = bases["mixtral"], rows_file(tmp_path / "rows.jsonl")
    error = refused("HK-BASE-MODULES", hubkit.train, base, rows, tmp_path / "a", steps=1)
    stem, linear = "model.layers.*.block_sparse_moe.experts.*", "in the files, nothing in the model (8 times)"
    assert error.have == [
        f"{stem}.w1: linear (48, 32) {linear}",
        f"{stem}.w2: linear (32, 48) {linear}",
        f"{stem}.w3: linear (48, 32) {linear}",
    ]
    assert not (tmp_path / "a").exists()
    targets = error.fix.removeprefix("--set targets=").split(",")
    hubkit.train(base, rows, tmp_path / "a", steps=1, config={"targets": targets})


def test_in_the_place_of_a_tensor_only_a_product_can_be_had(bases: dict[str, Path]) -> None:
    model = loaded(bases["mixtral"])
    holder = next(iter(experts_of(model).values())).holder
    asked: list[bool] = []

    def acts() -> bool:
        asked.append(True)
        return True

    mine = [e for e in experts_of(model).values() if e.holder is holder]
    products = Products(holder, mine, acts)
    before = logits(model)
    products.attach()
    assert torch.equal(logits(model), logits(model))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4 * float(before.abs().max()))
    assert asked
    products.remove()
    assert torch.equal(logits(model), before)
