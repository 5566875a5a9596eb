"""An adapter on a quantized base, from training to merging: bound to the original base, with the codec on record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from making import make_adapter
from variants import logits, refused, rows_file, tree
from zoo import near

import hubkit
from hubkit.artifact.folder import open_adapter
from hubkit.methods.reading import read_adapter
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.delta import apply_weight
from hubkit.tensors.base.tokenizer import load_tokenizer
from hubkit.tensors.fourbit.linear import packed_of
from hubkit.tensors.fourbit.nf4 import CODEC
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.export import export
from hubkit.verbs.generate import generate
from hubkit.verbs.merge import merge
from hubkit.verbs.train import train


@pytest.fixture
def trained(tiny_llama: Path, tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    config = {"rank": 2, "dropout": 0.0}
    rows, out = rows_file(tmp_path / "rows.jsonl"), tmp_path / "chat"
    train(str(tiny_llama), rows, out, method="qlora", steps=4, learning_rate=0.02, config=config)
    return out


def quantized(model: Any) -> int:
    return sum(packed_of(module) is not None for module in model.modules())


def test_train_attach_merge(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    manifest = open_adapter(trained).manifest
    assert manifest.base is not None
    assert (manifest.method, manifest.base.codec) == ("qlora", CODEC)
    model = load_base(tiny_llama)
    plain = logits(model)
    attached = attach(model, str(trained))
    assert quantized(model) == 14
    live = logits(attached)
    loaded = load_base(tiny_llama, codec=CODEC)
    assert quantized(loaded) == 14
    again = attach(loaded, str(trained))
    assert torch.equal(logits(again), live)
    attach(attached, {str(trained): -1.0})  # once more, on what is quantized by now
    assert list(attached.adapters) == ["chat", "chat-2"]
    assert torch.equal(logits(attached.detach()), plain)
    assert quantized(model) == 0
    generate("x", base=str(tiny_llama), terms=str(trained), max_new_tokens=2)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_it_is_merged_into_what_it_was_trained_beside(
    dtype: str | None, tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    """The merged model computes what the adapter computed on the quantized base, whatever it was decoded to."""
    rows = rows_file(tmp_path / "rows.jsonl")
    for base in (tiny_llama, tiny_gpt2):
        adapter, out = tmp_path / base.name / "chat", tmp_path / base.name / "merged"
        train(str(base), rows, adapter, method="qlora", steps=4, learning_rate=0.02, dtype=dtype)
        fingerprint = open_adapter(adapter).manifest.base
        assert fingerprint is not None
        assert (fingerprint.codec, fingerprint.compute_dtype) == (CODEC, dtype)
        done = merge(str(base), str(adapter), out)
        assert (done.codec, done.into, done.shift) == (CODEC, "trained", None)
        live = attach(load_base(base, dtype, CODEC), str(adapter), base=base)
        weights = {name: site.weight() for name, site in live.sites.sites.items() if packed_of(site.module) is not None}
        merged, stored = Base.from_folder(out).sites, read_adapter(open_adapter(adapter), live.sites)
        assert weights
        for name, weight in weights.items():  # equal to the sum of what was decoded and what was trained
            delta = stored.delta(live.sites.sites[name])
            assert delta is not None
            near(merged[name].weight(), apply_weight(weight.float(), delta, transposed=False, dtype=torch.float32))
        if dtype is None:
            near(logits(load_base(out)), logits(live))


def test_into_the_original_weights_only_by_name(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    done = merge(str(tiny_llama), str(trained), tmp_path / "original", into="original")
    assert done.into == "original"
    assert done.shift is not None
    assert 0.05 < done.shift < 0.15  # of normal values 4 bits lose about a tenth
    plain, merged = (Base.from_folder(folder).sites for folder in (tiny_llama, tmp_path / "original"))
    live = attach(load_base(tiny_llama, codec=CODEC), str(trained), base=tiny_llama)
    name = "model.layers.0.mlp.up_proj"
    delta = live.adapters["chat"].delta(live.sites.sites[name])
    matrix = None if delta is None else delta.matrix()
    assert matrix is not None
    near(merged[name].weight() - plain[name].weight(), matrix)
    refused("HK-OPTIONS", merge, str(tiny_llama), str(trained), tmp_path / "no", into="4bit")


def test_a_plain_adapter_beside_it_is_merged_into_the_same_weights(
    trained: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """As `generate` and `attach` do: where one member wants the base quantized, it is quantized for all."""
    other = make_adapter(tmp_path / "plain", tiny_llama)
    terms = {str(trained): 1.0, str(other): 0.5}
    merge(str(tiny_llama), terms, tmp_path / "merged")
    near(logits(load_base(tmp_path / "merged")), logits(attach(load_base(tiny_llama), terms, base=tiny_llama)))


def test_differently_quantized_bases_are_no_one_base(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows.jsonl")
    train(str(tiny_llama), rows, tmp_path / "other", method="qlora", steps=1, dtype="bfloat16")
    terms = {str(trained): 1.0, str(tmp_path / "other"): 1.0}
    assert len(refused("HK-MIX", merge, str(tiny_llama), terms, tmp_path / "merged").have) == 2
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
@pytest.mark.model
def test_on_the_real_model_nothing_is_lost(smol: Path, tmp_path: Path) -> None:
    """What the merged model says of unseen rows beside the unmerged one, in fp32: KL per token, equal first choices."""
    data = Path(__file__).parents[2] / "examples" / "data"
    train(str(smol), data / "e2e_train.jsonl", tmp_path / "a", method="qlora", steps=32, config={"rank": 8})
    tokenizer = load_tokenizer(smol)
    rows = [json.loads(line) for line in (data / "e2e_heldout.jsonl").read_text("utf-8").splitlines()[:16]]
    texts = [tokenizer(f"{row['prompt']} {row['completion']}", return_tensors="pt").input_ids for row in rows]

    def said(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(ids).logits[0] for ids in texts]).log_softmax(-1)

    want = said(attach(load_base(smol, "float32", CODEC), str(tmp_path / "a"), base=smol))
    found: dict[str, tuple[float, float]] = {}
    for into in ("trained", "original"):
        merge(str(smol), str(tmp_path / "a"), tmp_path / into, into=into)
        have = said(load_base(tmp_path / into, "float32"))
        divergence = float((want.exp() * (want - have)).sum(-1).mean())
        found[into] = divergence, float((want.argmax(-1) == have.argmax(-1)).float().mean())
        print(f"{into}: {divergence:.4f} nats a token, top-1 equal {found[into][1]:.1%}")
    assert found["trained"][0] <= 0.01
    assert found["trained"][1] >= 0.97
    assert found["original"][0] > 10 * found["trained"][0]


def test_the_same_seed_gives_the_same_bytes(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    before = tree(trained)
    config = {"rank": 2, "dropout": 0.0}
    options: dict[str, Any] = {
        "method": "qlora",
        "steps": 4,
        "learning_rate": 0.02,
        "config": config,
        "checkpointing": True,
    }
    train(str(tiny_llama), tmp_path / "rows.jsonl", trained, replace=True, **options)
    assert tree(trained)["adapter_model.safetensors"] == before["adapter_model.safetensors"]


def test_it_is_an_ordinary_peft_adapter(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    export(str(trained), tmp_path / "peft")
    model = load_base(tiny_llama)
    attached = attach(model, str(trained))
    want = logits(attached)
    decoded = {s.name: s.weight() for s in attached.sites.sites.values() if packed_of(s.module) is not None}
    attached.detach()
    for name, weight in decoded.items():
        model.get_submodule(name).weight.data = weight
    assert torch.allclose(logits(PeftModel.from_pretrained(model, str(tmp_path / "peft"))), want, atol=1e-5)


def test_a_base_in_4_bits(tiny_llama: Path, tmp_path: Path) -> None:
    """Any method trains on it and answers on it; nothing is merged into it."""
    torch.set_num_threads(1)
    import shutil

    shutil.copytree(tiny_llama, tmp_path / "packed", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    load_base(tiny_llama, codec=CODEC).save_pretrained(tmp_path / "packed")  # type: ignore[operator]
    base, rows = str(tmp_path / "packed"), rows_file(tmp_path / "rows.jsonl")
    for method in ("lora", "qlora"):
        out = tmp_path / method
        train(base, rows, out, method=method, steps=2, learning_rate=0.02, config={"rank": 2})
        generate("x", base=base, terms=str(out), max_new_tokens=2)
        attached = hubkit.attach(load_base(base), str(out))
        assert quantized(attached) == 14
        before = tree(tmp_path)
        error = refused("HK-NOT-MERGEABLE", merge, base, str(out), tmp_path / "merged")
        assert "16-bit base" in error.fix
        assert tree(tmp_path) == before
