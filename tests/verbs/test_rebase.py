"""rebase: the same tensors on the same base; what changed beneath an adapter is named, and its drift is measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from making import make_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from variants import logits, refused, rows_file, say

from hubkit.artifact.folder import TENSORS_NAME, open_adapter
from hubkit.methods.host import host
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.tokenizer import load_tokenizer
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.merge import merge
from hubkit.verbs.rebase import rebase
from hubkit.verbs.train import train
from hubkit.verbs.verify import verify

TWO = ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight")


def moved(base: Path, out: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """A copy of a base with other values: `change` of each tensor, by its name."""
    shutil.copytree(base, out)
    tensors = {name: change(name, t).contiguous() for name, t in load_file(base / "model.safetensors").items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def in_two_layers(base: Path, out: Path, scale: float = 0.01) -> Path:
    return moved(base, out, lambda name, t: t * (1 + scale) if name in TWO else t)


def weights(folder: Path) -> str:
    return next(e.sha256 for e in open_adapter(folder).manifest.files if e.path == "adapter_model.safetensors")


def test_onto_the_same_base_it_has_the_same_tensors(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Stored otherwise, but with the same values; nothing needs the old base, and nothing is measured."""
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    tensors = {name: t.double() for name, t in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    done = rebase(adapter, other, tmp_path / "carried")
    assert weights(tmp_path / "carried") == weights(adapter)
    assert (done.changed, done.others, done.drift, done.notes, done.overrides) == ((), (), None, (), ())
    manifest = open_adapter(tmp_path / "carried").manifest
    (parent,) = manifest.parents
    assert parent.digest == open_adapter(adapter).manifest.digest
    assert manifest.rebase is not None
    assert manifest.rebase["modules_changed"] == 0
    verify(tmp_path / "carried", base=other)


def test_two_layers_that_changed_are_named_and_measured(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    new = in_two_layers(tiny_llama, tmp_path / "new")
    done = rebase(adapter, new, tmp_path / "carried", base=tiny_llama)
    assert {one.site for one in done.changed} == {name.removesuffix(".weight") for name in TWO}
    for one in done.changed:
        assert one.adapted
        assert one.change is not None
        assert abs(one.change - 0.01) < 1e-6
    text = tmp_path / "rows.jsonl"
    text.write_text(json.dumps({"text": "the river rose"}) + "\n")
    found = rebase(adapter, new, tmp_path / "again", base=tiny_llama, prompts=text)
    tokenizer = load_tokenizer(new)
    ids = torch.tensor([[*tokenizer("the river rose")["input_ids"], tokenizer.eos_token_id]])
    for likeness, adapted in ((found.drift, True), (found.base_drift, False)):
        sides = [load_base(folder) for folder in (tiny_llama, new)]
        sides = [attach(side, adapter, base=tiny_llama) for side in sides] if adapted else sides
        p, q = (side(input_ids=ids).logits[0].detach().double().log_softmax(-1) for side in sides)
        assert likeness is not None
        kl = float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))
        assert likeness.kl == pytest.approx(kl, rel=1e-3)
        assert likeness.tokens == ids.shape[1]
        assert kl > 0
    assert weights(tmp_path / "carried") == weights(adapter)
    manifest = open_adapter(tmp_path / "carried").manifest
    assert manifest.rebase is not None
    assert manifest.rebase["from"]["weights"] == open_adapter(adapter).manifest.base.weights  # type: ignore[union-attr]
    assert manifest.rebase["drift"]["kl"] == pytest.approx(done.drift.kl, rel=1e-5)  # type: ignore[union-attr]
    verify(tmp_path / "carried", base=new)
    refused("HK-BASE-MISMATCH", verify, tmp_path / "carried", base=tiny_llama)


def test_above_its_budget_nothing_is_written(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    new = in_two_layers(tiny_llama, tmp_path / "new", 2.0)
    error = refused("HK-REBASE-DRIFT", rebase, adapter, new, tmp_path / "carried", base=tiny_llama, max_drift=1e-6)
    assert "trainable=True" in error.fix
    assert [line.partition(":")[0] for line in error.have] == ["the adapted model", "the bare bases"]
    assert not (tmp_path / "carried").exists()
    budget = float(error.fix.split()[1])
    assert rebase(adapter, new, tmp_path / "carried", base=tiny_llama, max_drift=budget).drift is not None


def test_held_out_rows(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """The loss that transformers computes of the same rows."""
    new = in_two_layers(tiny_llama, tmp_path / "new")
    rows = tmp_path / "rows.jsonl"
    texts = ["the river rose", "a train leaves at noon"]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = rebase(adapter, new, tmp_path / "carried", base=tiny_llama, data=rows)
    assert done.drift is not None
    assert done.loss is not None
    tokenizer = load_tokenizer(new)
    model = attach(load_base(new), adapter, base=tiny_llama)
    total = count = 0.0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        loss = float(model(input_ids=ids, labels=ids).loss)
        total, count = total + loss * (ids.shape[1] - 1), count + ids.shape[1] - 1
    assert done.loss[1] == pytest.approx(total / count, rel=1e-5)
    assert done.loss[0] != done.loss[1]


@pytest.mark.parametrize("method", ["full", "heads", "tokens", "dora"])
def test_values_of_the_old_base_go_on_as_the_same_change(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    """A module held whole would put the old base's values back; carried, it adds what it added."""
    new = moved(tiny_llama, tmp_path / "new", lambda name, t: t + 0.01 * torch.randn(t.shape, generator=seeded()))
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "full": ("full", {"holds": "values"}),
        "heads": ("lora", {"modules_to_save": ["lm_head", "norm"], "targets": ["q_proj"]}),
        "tokens": ("lora", {"token_ids": [5, 7], "targets": ["q_proj"]}),
        "dora": ("dora", {}),
    }
    name, given = options[method]
    make_adapter(tmp_path / "a", tiny_llama, method=host().load(name), **given)
    done = rebase(tmp_path / "a", new, tmp_path / "carried", base=tiny_llama, max_drift=100)
    places = {"full": 21, "heads": 2, "tokens": 2, "dora": 0}
    assert len(done.carried) == places[method]
    assert bool(done.notes) == (method == "dora")
    if method == "dora":
        assert weights(tmp_path / "carried") == weights(tmp_path / "a")
        return
    merge(tiny_llama, tmp_path / "a", tmp_path / "before")
    merge(new, tmp_path / "carried", tmp_path / "after")
    old, young, before, after = (
        load_file(folder / "model.safetensors") for folder in (tiny_llama, new, tmp_path / "before", tmp_path / "after")
    )
    for key, tensor in after.items():
        assert torch.allclose(tensor - young[key], before[key] - old[key], atol=1e-5), key
    assert (
        logits(attach(load_base(new), tmp_path / "carried")) - logits(load_base(tmp_path / "after"))
    ).abs().max() < 1e-3


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_without_the_old_base(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Which modules changed is known by digests alone; how far, and the drift, only with the old base."""
    new = in_two_layers(tiny_llama, tmp_path / "new")
    error = refused("HK-BASE-NEEDED", rebase, adapter, new, tmp_path / "carried")
    assert "--unmeasured" in error.fix
    done = rebase(adapter, new, tmp_path / "carried", unmeasured=True)
    assert [(one.site + ".weight", one.change) for one in done.changed] == [(name, None) for name in sorted(TWO)]
    assert (done.drift, done.overrides) == (None, ("unmeasured",))
    assert open_adapter(tmp_path / "carried").manifest.overrides == ("unmeasured",)
    heads = make_adapter(tmp_path / "h", tiny_llama, modules_to_save=["lm_head"], targets=["q_proj"])
    other = moved(tiny_llama, tmp_path / "other", lambda name, t: t + 0.1 if name == "lm_head.weight" else t)
    refused("HK-BASE-NEEDED", rebase, heads, other, tmp_path / "no", unmeasured=True)
    assert not (tmp_path / "no").exists()


def test_what_does_not_fit_is_refused_with_names(
    adapter: Path, tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    out = tmp_path / "carried"
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.num_hidden_layers = 3
    shutil.copytree(tiny_llama, tmp_path / "deeper")
    LlamaForCausalLM(config).save_pretrained(tmp_path / "deeper")
    error = refused("HK-SHAPE", rebase, adapter, tmp_path / "deeper", out)
    assert error.have == ["model.layers.2: in the second alone (9 modules)"]
    refused("HK-SHAPE", rebase, adapter, tiny_gpt2, out)
    config.num_hidden_layers, config.intermediate_size = 2, 48
    shutil.copytree(tiny_llama, tmp_path / "wider")
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wider")
    error = refused("HK-SHAPE", rebase, adapter, tmp_path / "wider", out)
    assert "model.layers.0.mlp.up_proj: 32x16, 48x16" in error.have
    new = in_two_layers(tiny_llama, tmp_path / "new")
    refused("HK-BASE-MISMATCH", rebase, adapter, new, out, base=new)
    refused("HK-OPTIONS", rebase, adapter, new, out, max_drift=float("nan"))
    refused("HK-MISSING", rebase, adapter, new, out, base=tiny_llama, prompts=tmp_path / "none.txt")
    merge(tiny_llama, adapter, tmp_path / "merged")
    refused("HK-NOT-ADAPTER", rebase, tmp_path / "merged", new, out)
    tokenizer = json.loads((new / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:1]
    (new / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused("HK-REBASE", rebase, adapter, new, out, base=tiny_llama)
    assert not out.exists()


def test_a_longer_vocabulary_is_none_of_its_business(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Unless the adapter acts there, or adds tokens itself."""
    from transformers import LlamaForCausalLM

    new = Path(shutil.copytree(tiny_llama, tmp_path / "new"))
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(324, mean_resizing=False)
    model.save_pretrained(new)
    done = rebase(adapter, new, tmp_path / "carried", base=tiny_llama)
    assert done.drift is not None
    assert done.drift.kl < 1e-9
    table = make_adapter(tmp_path / "t", tiny_llama, targets=["embed_tokens"])
    refused("HK-SHAPE", rebase, table, new, tmp_path / "no", base=tiny_llama)
    assert not (tmp_path / "no").exists()


def test_modules_that_files_name_otherwise(tiny_gpt2: Path, tmp_path: Path) -> None:
    """Old files of GPT-2 leave a prefix out: the same modules, so the same adapter, and nothing changed."""
    adapter = make_adapter(tmp_path / "a", tiny_gpt2)
    bare = Path(shutil.copytree(tiny_gpt2, tmp_path / "bare"))
    tensors = load_file(bare / "model.safetensors")
    assert all(name.startswith("transformer.") for name in tensors)
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    refused("HK-BASE-MISMATCH", verify, adapter, base=bare)
    done = rebase(adapter, bare, tmp_path / "carried")
    assert (done.changed, done.others, done.drift) == ((), (), None)
    assert weights(tmp_path / "carried") == weights(adapter)
    verify(tmp_path / "carried", base=bare)
    two = logits(attach(load_base(bare), tmp_path / "carried", base=bare))
    assert torch.equal(logits(attach(load_base(tiny_gpt2), adapter)), two)


def test_onto_the_base_in_four_bits(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """As bitsandbytes writes it: what quantizing changed in each layer, and what it does to the adapter."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    new = Path(shutil.copytree(tiny_llama, tmp_path / "new"))
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=four).save_pretrained(new)
    done = rebase(adapter, new, tmp_path / "carried", base=tiny_llama, max_drift=100)
    assert {one.site for one in done.changed} == {name for name in Base.from_folder(new).sites if "_proj" in name}
    assert all(one.change is not None and 0.03 < one.change < 0.2 for one in done.changed)
    assert done.drift is not None
    assert done.drift.kl > 0
    verify(tmp_path / "carried", base=new)


def test_a_quantized_adapter_stays_one(tiny_llama: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows.jsonl")
    train(tiny_llama, rows, tmp_path / "q", method="qlora", steps=2, learning_rate=0.02)
    new = in_two_layers(tiny_llama, tmp_path / "new")
    rebase(tmp_path / "q", new, tmp_path / "carried", base=tiny_llama)
    one, two = (open_adapter(tmp_path / name).manifest.base for name in ("q", "carried"))
    assert one is not None
    assert two is not None
    assert (one.codec, one.compute_dtype) == (two.codec, two.compute_dtype)


def test_as_typed(adapter: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, out = in_two_layers(tiny_llama, tmp_path / "new"), tmp_path / "carried"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo words\n")
    line = ["rebase", adapter, "--onto", new, "--base", tiny_llama, "--prompts", prompts, "--out", out]
    done = say(capsys, *line)
    assert done.status == 0, done.err
    assert f"rebased  {out} (2 modules of the base changed, 2 of them adapted)" in done.out
    assert "drift  adapted: " in done.out
    assert say(capsys, *line).status == 1
    document = json.loads(say(capsys, *line, "--replace", "--json").out)
    assert len(document["changed"]) == 2
    assert "REBASE" in say(capsys, "inspect", out).out
    assert TENSORS_NAME in {path.name for path in out.iterdir()}
