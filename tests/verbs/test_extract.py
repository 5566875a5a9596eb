"""extract: what went in comes out, exactly where that was asked for, and nothing is left out without a word."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from making import make_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from variants import logits, refused, say, tree

from hubkit.artifact.folder import open_adapter
from hubkit.methods.host import host
from hubkit.methods.reading import read_adapter
from hubkit.tensors.base.base import Base
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.extract import extract
from hubkit.verbs.merge import merge
from hubkit.verbs.train import train
from hubkit.verbs.verify import verify

BACK = 1e-5
"""Relative error of a delta that went through an fp32 merge."""
FAMILIES = ("llama", "gpt2")


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest) -> Path:
    """An untied base, and one that is tied and stores its weights transposed."""
    folder: Path = request.getfixturevalue(f"tiny_{request.param}")
    return folder


def changed(base: Path, out: Path, change: Callable[[str, Tensor], Tensor], dtype: torch.dtype | None = None) -> Path:
    """A copy of a base with other values: `change` of each tensor, by its name."""
    shutil.copytree(base, out)
    tensors = {name: change(name, tensor) for name, tensor in load_file(base / "model.safetensors").items()}
    tensors = {name: t.to(dtype or t.dtype).contiguous() for name, t in tensors.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def tuned(base: Path, out: Path, scale: float = 0.05, dtype: torch.dtype | None = None) -> Path:
    """A base trained as a whole: every tensor moved."""
    generator = torch.Generator().manual_seed(1)
    return changed(base, out, lambda _, t: t + scale * torch.randn(t.shape, generator=generator).to(t.dtype), dtype)


def deltas(adapter: Path, base: Path) -> dict[str, Tensor]:
    read = read_adapter(open_adapter(adapter), Base.from_folder(base))
    found = {site.name: read.delta(site) for site in read.sites.values()}
    return {name: delta.matrix().double() for name, delta in found.items() if delta is not None}  # type: ignore[union-attr]


def test_an_fp32_merge_gives_back_the_delta_and_its_rank(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base, rank=3, alpha=12.0)
    merge(base, adapter, tmp_path / "merged", dtype="float32")
    done = extract(base, tmp_path / "merged", tmp_path / "taken", rank=16)
    assert done.rank == 3
    assert {site.rank for site in done.sites} == {3}
    assert all(site.energy == 1 and not site.more for site in done.sites)
    assert (done.whole, done.left_out, done.notes, done.overrides) == ((), (), (), ())
    want, have = deltas(adapter, base), deltas(tmp_path / "taken", base)
    assert want.keys() == have.keys()
    for name, delta in want.items():
        assert torch.linalg.norm(have[name] - delta) <= BACK * torch.linalg.norm(delta), name
    verify(tmp_path / "taken", base=base)
    assert extract(base, tmp_path / "merged", tmp_path / "all", energy=1.0).rank == 3


def test_of_a_bf16_merge_the_rank_above_the_rounding_floor(tmp_path: Path, tiny_llama: Path) -> None:
    small = changed(tiny_llama, tmp_path / "base", lambda _, t: t, torch.bfloat16)
    adapter = make_adapter(tmp_path / "a", small, rank=3, alpha=3.0)
    merge(small, adapter, tmp_path / "merged")
    done = extract(small, tmp_path / "merged", tmp_path / "taken", energy=1.0)
    assert {site.rank for site in done.sites} == {3}  # the plain rank of the difference is 16
    want, have = deltas(adapter, small), deltas(tmp_path / "taken", small)
    for site in done.sites:
        error = float(torch.linalg.matrix_norm(have[site.site] - want[site.site], 2))
        assert 0 < error < site.floor, site
        plain = load_file(tmp_path / "merged" / "model.safetensors")[f"{site.site}.weight"].double()
        rounding = plain - load_file(small / "model.safetensors")[f"{site.site}.weight"].double() - want[site.site]
        assert (
            float(torch.linalg.matrix_norm(rounding, 2)) < site.floor < 4 * float(torch.linalg.matrix_norm(rounding, 2))
        )
    wide = changed(
        tmp_path / "merged", tmp_path / "wide", lambda _, t: t, torch.float32
    )  # the same values, stored wide
    assert extract(small, wide, tmp_path / "again", energy=1.0).rank == 3


def test_rounding_alone_is_no_change(tiny_llama: Path, tmp_path: Path) -> None:
    rounded = lambda n, t: t.bfloat16().float() if "_proj" in n or n == "lm_head.weight" else t  # noqa: E731
    plain = changed(tiny_llama, tmp_path / "c", rounded)
    refusal = refused("HK-EXTRACT-NOOP", extract, tiny_llama, plain, tmp_path / "o", rank=4)
    assert "rounding alone" in refusal.what
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_merged_is_the_tuned_checkpoint_bit_for_bit(base: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    """Even where V is so small beside W that no difference in fp32 leads from one to the other."""
    stored = changed(base, tmp_path / "base", lambda _, t: t, dtype)
    whole = tuned(stored, tmp_path / "tuned")
    whole = changed(whole, tmp_path / "tiny", lambda _, t: torch.where(torch.rand(t.shape) < 0.1, t * 2**-20, t))
    done = extract(stored, whole, tmp_path / "taken", exact=True)
    merge(stored, tmp_path / "taken", tmp_path / "merged")
    want, have = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "merged"))
    assert want.keys() == have.keys()
    for name, tensor in want.items():
        assert torch.equal(tensor.view(torch.uint8), have[name].view(torch.uint8)), name
    assert done.rank == 0
    assert len(done.whole) == len(open_adapter(tmp_path / "taken").manifest.config["tensors"]) - sum(
        name.endswith(".bias") for name in want
    )
    live, tied = attach(load_base(stored), tmp_path / "taken", base=stored), "lm_head.weight" not in want
    if not tied and dtype == torch.float32:  # a tied head adds its table's change to what the base says
        assert torch.equal(logits(live), logits(load_base(whole)))
    with live.merge() as merged:
        assert torch.equal(logits(merged), logits(load_base(whole)))
    verify(tmp_path / "taken", base=stored)


def test_half_of_it_is_the_change_as_ever(tiny_llama: Path, tmp_path: Path) -> None:
    """Weighed, whole modules are differences: half of the way lies in the middle."""
    whole = tuned(tiny_llama, tmp_path / "tuned")
    extract(tiny_llama, whole, tmp_path / "taken", exact=True)
    merge(tiny_llama, {str(tmp_path / "taken"): 0.5}, tmp_path / "merged")
    one, two, middle = (load_file(folder / "model.safetensors") for folder in (tiny_llama, whole, tmp_path / "merged"))
    for name, tensor in middle.items():
        assert torch.allclose(tensor, (one[name] + two[name]) / 2, atol=1e-6), name


def test_full_rank_and_whole_norms_and_embeddings_are_the_tuned_model(tiny_llama: Path, tmp_path: Path) -> None:
    """Norms and embeddings as PEFT's modules_to_save; PEFT itself reads them and says the same."""
    from peft import PeftModel

    whole = tuned(tiny_llama, tmp_path / "tuned")
    done = extract(tiny_llama, whole, tmp_path / "taken", rank=16)
    assert done.rank == 16
    assert {name.rpartition(".")[2] for name in done.whole} == {
        "embed_tokens",
        "norm",
        "input_layernorm",
        "post_attention_layernorm",
    }
    want = logits(load_base(whole))
    assert (logits(attach(load_base(tiny_llama), tmp_path / "taken")) - want).abs().max() < 1e-4
    theirs = PeftModel.from_pretrained(load_base(tiny_llama), tmp_path / "taken")
    assert (logits(theirs) - want).abs().max() < 1e-4
    merge(tiny_llama, tmp_path / "taken", tmp_path / "merged")
    have, tensors = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", whole))
    assert torch.equal(have["model.norm.weight"], tensors["model.norm.weight"])


def test_a_tied_table_is_held_once_and_acts_at_the_head(tiny_llama: Path, tmp_path: Path) -> None:
    """Tied in the tuned checkpoint, it stays so: live, merged and for PEFT."""
    from peft import PeftModel

    base = changed(tiny_llama, tmp_path / "base", lambda _, t: t)
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    whole = tuned(base, tmp_path / "tuned")
    extract(base, whole, tmp_path / "taken", rank=16)
    want = logits(load_base(whole))
    assert (logits(attach(load_base(base), tmp_path / "taken")) - want).abs().max() < 1e-4
    assert not merge(base, tmp_path / "taken", tmp_path / "merged").unties
    assert (logits(load_base(tmp_path / "merged")) - want).abs().max() < 1e-4
    theirs = PeftModel.from_pretrained(load_base(base), tmp_path / "taken")
    assert (logits(theirs) - want).abs().max() < 1e-4


def test_a_low_rank_misses_what_it_says(tiny_llama: Path, tmp_path: Path) -> None:
    """The energy kept is that of the best approximation, computed here by torch's own SVD; what is not low-rank is
    listed."""
    whole = tuned(tiny_llama, tmp_path / "tuned")
    done = extract(tiny_llama, whole, tmp_path / "taken", rank=4)
    one, two = (load_file(folder / "model.safetensors") for folder in (tiny_llama, whole))
    for site in done.sites:
        delta = two[f"{site.site}.weight"].double() - one[f"{site.site}.weight"].double()
        values = torch.linalg.svdvals(delta)
        want = float(values[:4].square().sum() / values[values > site.floor].square().sum())
        assert abs(site.energy - want) < 1e-6
        assert math.isclose(site.change, float(delta.norm() / one[f"{site.site}.weight"].double().norm()), rel_tol=1e-5)
        assert site.more
    document = open_adapter(tmp_path / "taken").manifest.extraction
    assert document is not None
    assert document["not_low_rank"] == len(done.sites)
    assert document["rank_wanted"] == 4
    listed = json.loads((tmp_path / "taken" / "extraction.json").read_text())["sites"]
    assert [row["site"] for row in listed] == [site.site for site in done.sites]


@pytest.mark.parametrize("energy", [0.5, 0.9])
def test_energy_takes_the_smallest_rank_that_keeps_it(energy: float, tiny_llama: Path, tmp_path: Path) -> None:
    whole = tuned(tiny_llama, tmp_path / "tuned")
    done = extract(tiny_llama, whole, tmp_path / "taken", energy=energy)
    one, two = (load_file(folder / "model.safetensors") for folder in (tiny_llama, whole))
    for site in done.sites:
        squares = torch.linalg.svdvals(
            two[f"{site.site}.weight"].double() - one[f"{site.site}.weight"].double()
        ).square()
        shares = squares.cumsum(0) / squares.sum()
        assert site.rank == int((shares < energy).sum()) + 1
        assert site.energy >= energy


def test_biases_are_refused_and_left_out_only_by_name(tiny_gpt2: Path, tmp_path: Path) -> None:
    whole = tuned(tiny_gpt2, tmp_path / "tuned")
    error = refused("HK-EXTRACT", extract, tiny_gpt2, whole, tmp_path / "taken", rank=4)
    assert any(line.startswith("h.0.attn.c_attn.bias") or ".h.0.attn.c_attn.bias" in line for line in error.have)
    assert not (tmp_path / "taken").exists()
    done = extract(tiny_gpt2, whole, tmp_path / "taken", rank=4, partial=True)
    manifest = open_adapter(tmp_path / "taken").manifest
    assert done.overrides == manifest.overrides == ("partial",)
    assert done.whole == ()
    assert any("ln_f: a norm" in line for line in done.left_out)
    assert any("wte: an embedding" in line for line in done.left_out)
    assert manifest.extraction is not None
    assert set(manifest.extraction["left_out"]) == set(done.left_out)


def test_untied_by_training(tiny_gpt2: Path, tmp_path: Path) -> None:
    """A head that parted from its table: both are extracted, and the merged model has two tensors as the tuned one."""
    other = changed(tiny_gpt2, tmp_path / "tuned", lambda _, t: t)
    tensors = load_file(other / "model.safetensors")
    (table,) = [name for name in tensors if name.endswith("wte.weight")]
    tensors["lm_head.weight"] = tensors[table] + 0.1
    tensors[table] = tensors[table] - 0.1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    for options in ({"exact": True}, {"rank": 16}):
        out, merged = tmp_path / f"a-{len(options)}-{'rank' in options}", tmp_path / f"m-{'rank' in options}"
        extract(tiny_gpt2, other, out, **options)
        assert merge(tiny_gpt2, out, merged).unties
        have = load_file(merged / "model.safetensors")
        for name in (table, "lm_head.weight"):
            assert torch.allclose(have[name], tensors[name], atol=1e-5), name


@pytest.mark.slow
def test_the_same_bits_for_any_number_of_cores(tiny_llama: Path, tmp_path: Path) -> None:
    whole = tuned(tiny_llama, tmp_path / "tuned")
    line = "import sys; from hubkit import extract; extract(*sys.argv[1:4], rank=3, name='x')"
    trees = []
    for number, threads in enumerate(("1", "3")):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        command: list[str] = [sys.executable, "-c", line, str(tiny_llama), str(whole), str(tmp_path / f"o{number}")]
        before = ["taskset", "-c", "0"] if number == 0 and shutil.which("taskset") else []
        subprocess.run([*before, *command], check=True, env=environment)
        trees.append(tree(tmp_path / f"o{number}"))
    assert trees[0] == trees[1]


def test_options_that_cannot_be(tiny_llama: Path, tmp_path: Path) -> None:
    whole, out = tuned(tiny_llama, tmp_path / "tuned"), tmp_path / "out"
    assert "no tensor differs" in refused("HK-EXTRACT-NOOP", extract, tiny_llama, tiny_llama, out, rank=4).have
    refused("HK-USAGE", extract, tiny_llama, whole, out)
    refused("HK-USAGE", extract, tiny_llama, whole, out, exact=True, rank=4)
    refused("HK-RANK", extract, tiny_llama, whole, out, rank=0)
    refused("HK-ENERGY", extract, tiny_llama, whole, out, energy=1.5)
    refused("HK-DTYPE", extract, tiny_llama, whole, out, rank=4, dtype="float31")
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("x")
    refused("HK-EXISTS", extract, tiny_llama, whole, out, rank=4)
    refused("HK-EXISTS", extract, tiny_llama, whole, out, rank=4, replace=True)


def test_checkpoints_of_another_depth_name_the_layers(tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    deeper, out = tmp_path / "deeper", tmp_path / "out"
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.num_hidden_layers = 3
    LlamaForCausalLM(config).save_pretrained(deeper)
    error = refused("HK-SHAPE", extract, tiny_llama, deeper, out, rank=4)
    assert error.have == ["model.layers.2: in the second alone (9 modules)"]
    error = refused("HK-SHAPE", extract, deeper, tiny_llama, out, exact=True)
    assert error.have == ["model.layers.2: in the first alone (9 modules)"]
    refused("HK-SHAPE", extract, tiny_llama, tiny_gpt2, out, rank=4)
    assert not out.exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_numbers_are_refused(value: float, tiny_llama: Path, tmp_path: Path) -> None:
    whole, out, module = tuned(tiny_llama, tmp_path / "tuned"), tmp_path / "out", "model.layers.1.mlp.up_proj.weight"
    broken = changed(whole, tmp_path / "broken", lambda n, t: torch.full_like(t, value) if n == module else t)
    for pair in ((tiny_llama, broken), (broken, tiny_llama)):
        assert module in refused("HK-NAN", extract, *pair, out, rank=4).where
    assert any(module in line for line in refused("HK-NAN", extract, tiny_llama, broken, out, exact=True).have)
    assert not out.exists()


def test_what_no_adapter_holds_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """More tokens, and another configuration: weights alone would not be the tuned model."""
    from transformers import LlamaForCausalLM

    whole, out = tuned(tiny_llama, tmp_path / "tuned"), tmp_path / "out"
    model = LlamaForCausalLM.from_pretrained(whole)
    model.resize_token_embeddings(324, mean_resizing=False)
    model.save_pretrained(tmp_path / "longer")
    error = refused("HK-EXTRACT", extract, tiny_llama, tmp_path / "longer", out, exact=True)
    assert error.have == [
        "lm_head: 320x16, 324x16 tokens of the vocabulary",
        "model.embed_tokens: 16x320, 16x324 tokens of the vocabulary",
    ]
    text = json.loads((whole / "config.json").read_text())
    text |= {"rope_theta": 5e5, "rope_parameters": {**text.get("rope_parameters", {}), "rope_theta": 5e5}}
    (whole / "config.json").write_text(json.dumps(text))
    (line,) = refused("HK-EXTRACT", extract, tiny_llama, whole, out, exact=True).have
    assert line.startswith("config.json, ")
    assert not out.exists()
    done = extract(tiny_llama, whole, out, exact=True, partial=True)
    assert done.left_out == (line,)


def test_in_another_dtype_and_as_typed(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(tmp_path / "a", tiny_llama, rank=3)
    merge(tiny_llama, adapter, tmp_path / "merged")
    arguments = ["--base", tiny_llama, "--tuned", tmp_path / "merged", "--rank", 8, "--out"]
    said = say(capsys, "extract", *arguments, tmp_path / "taken", "--dtype", "bfloat16")
    assert said.status == 0, said.err
    assert "(rank 3 at 14 layers)" in said.out
    assert {t.dtype for t in load_file(tmp_path / "taken" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    document = json.loads(say(capsys, "extract", *arguments, tmp_path / "json", "--json").out)
    assert document["rank"] == 3
    assert len(document["sites"]) == 14
    assert say(capsys, "extract", *arguments[:4], "--out", tmp_path / "o").status == 2
    assert say(capsys, "inspect", tmp_path / "taken").out.count("EXTRACTION") == 1


def test_only_methods_that_can_hold_it_are_asked(tiny_llama: Path) -> None:
    """The host names none: some answer the hooks, and those that do hold what is said."""
    able = [name for name in host().offers() if host().load(name).whole(("model.norm.weight",), "keep", "values")]
    assert able


@pytest.mark.slow
@pytest.mark.model
def test_on_the_real_model_an_adapter_comes_back_with_its_rank(smol: Path, tmp_path: Path) -> None:
    """Of a bf16 merge, too, whose difference has full rank: nearly every layer shows the rank that was trained."""
    data = Path(__file__).parents[2] / "examples" / "data" / "e2e_train.jsonl"
    train(smol, data, tmp_path / "a", steps=8, config={"rank": 8})
    want = deltas(tmp_path / "a", smol)
    for dtype, error in (("float32", BACK), (None, 0.3)):
        merge(smol, tmp_path / "a", tmp_path / f"merged-{dtype}", dtype=dtype)
        done = extract(smol, tmp_path / f"merged-{dtype}", tmp_path / f"taken-{dtype}", rank=16)
        have = deltas(tmp_path / f"taken-{dtype}", smol)
        missed = {name: float(torch.linalg.norm(have[name] - delta) / delta.norm()) for name, delta in want.items()}
        ranks = Counter(site.rank for site in done.sites)
        print(f"{dtype}: worst error {max(missed.values()):.2e}, ranks {dict(ranks)}")
        assert max(missed.values()) < error
        assert ranks[8] >= (0.95 if dtype is None else 1.0) * len(done.sites)


def test_four_bits_are_no_checkpoint_to_take_a_difference_of(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = Path(shutil.copytree(tiny_llama, tmp_path / "packed"))
    AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=four).save_pretrained(packed)
    for pair in ((tiny_llama, packed), (packed, tiny_llama)):
        refused("HK-BASE-FORMAT", extract, *pair, tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()
