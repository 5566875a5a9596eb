"""An adapter on a quantized base, from training to merging: bound to the original base, with the codec on record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from making import make_adapter
from variants import logits, refused, resharded, rows_file, say, tree
from zoo import near

import hubkit
from hubkit.artifact.folder import open_adapter
from hubkit.artifact.identity.digest import hash_file
from hubkit.documents.manifest import FileEntry
from hubkit.methods.reading import read_adapter
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.delta import apply_weight
from hubkit.tensors.base.tokenizer import load_tokenizer
from hubkit.tensors.files.shards import open_shards
from hubkit.tensors.fourbit.linear import packed_of
from hubkit.tensors.fourbit.nf4 import CODEC
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.export import export
from hubkit.verbs.generate import generate
from hubkit.verbs.merge import merge
from hubkit.verbs.train import train
from hubkit.verbs.verify import verify


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
    refused("HK-OPTIONS", merge, str(tiny_llama), str(trained), tmp_path / "no", into="8bit")


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


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2", "shards"])
def test_into_4_bits_only_by_name(
    family: str, method: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is packed is the merged weights, to the bit as bitsandbytes packs them; what that loses is said."""
    from bitsandbytes.functional import quantize_4bit
    from transformers import AutoModelForCausalLM

    llama = request.getfixturevalue("tiny_llama")
    base = resharded(llama, tmp_path / "shards") if family == "shards" else request.getfixturevalue(family)
    rows = rows_file(tmp_path / "rows.jsonl")
    train(str(base), rows, tmp_path / "a", method=method, steps=2, config={"rank": 2}, learning_rate=1e-3)
    plain = merge(str(base), str(tmp_path / "a"), tmp_path / "plain")
    said = say(capsys, "merge", tmp_path / "a", "-b", base, "-o", tmp_path / "merged", "--into", "4bit")
    assert (said.status, "packed again: " in said.out) == (0, True)
    manifest = open_adapter(tmp_path / "merged").manifest
    how = manifest.composition or {}
    # of normal values 4 bits lose about a tenth; of those that are levels already, a part of what was added
    assert how["shift"] < 0.05 if method == "qlora" else 0.05 < how["shift"] < 0.15
    assert how["lost"] > 0.3
    assert how["changed"] == plain.changed
    sites = Base.from_folder(tmp_path / "plain").to_quantize()
    stored, unpacked = open_shards(tmp_path / "merged"), open_shards(tmp_path / "plain")
    for site in sites:
        codes, state = quantize_4bit(site.weight().contiguous(), quant_type="nf4", compress_statistics=True)
        assert stored.read(site.tensor).equal(codes)
        for key, value in state.as_dict(packed=True).items():
            assert stored.read(f"{site.tensor}.{key}").equal(value)
    packed = {site.tensor for site in sites}
    assert all(stored.read(name).equal(unpacked.read(name)) for name in unpacked.headers.keys() - packed)
    ours, theirs = load_base(tmp_path / "merged"), AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for model in (ours, theirs):
        held = {site.name: packed_of(model.get_submodule(site.name)) for site in sites}
        assert all(one is not None and one.codes.equal(stored.read(f"{name}.weight")) for name, one in held.items())
    assert "bit for bit" in verify(str(tmp_path / "merged"), base=str(base)).checks[-1].detail
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_a_changed_code_is_found(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    merged = tmp_path / "merged"
    merge(str(tiny_llama), str(trained), merged, into="4bit")
    tensors = load_file(merged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5] ^= 16
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    manifest = open_adapter(merged, verify=False).manifest
    files = (FileEntry(e.path, (merged / e.path).stat().st_size, hash_file(merged / e.path)) for e in manifest.files)
    sealed = replace(manifest, files=tuple(files))
    (merged / "hubkit.json").write_bytes(sealed.to_bytes())
    error = refused("HK-MERGE-DIFFERS", verify, str(merged), base=str(tiny_llama))
    assert error.have == ["model.layers.1.mlp.up_proj.weight: 1 of 256 values differ"]
    elsewhere = {**(manifest.composition or {}), "processor": "another"}
    (merged / "hubkit.json").write_bytes(replace(sealed, composition=elsewhere).to_bytes())
    assert refused("HK-MERGE-UNPROVEN", verify, str(merged), base=str(tiny_llama)).status == 3


@pytest.mark.slow
@pytest.mark.model
def test_on_the_real_model_nothing_is_lost(smol: Path, tmp_path: Path) -> None:
    """What merged models say of unseen rows beside the unmerged one, in fp32: KL per token, equal first choices.

    The unmerged one is hubkit's, and PEFT's on weights that bitsandbytes has packed.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    data = Path(__file__).parents[2] / "examples" / "data"
    train(str(smol), data / "e2e_train.jsonl", tmp_path / "a", method="qlora", steps=32, config={"rank": 8})
    tokenizer = load_tokenizer(smol)
    rows = [json.loads(line) for line in (data / "e2e_heldout.jsonl").read_text("utf-8").splitlines()[:16]]
    texts = [tokenizer(f"{row['prompt']} {row['completion']}", return_tensors="pt").input_ids for row in rows]

    def said(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(ids).logits[0] for ids in texts]).log_softmax(-1)

    def beside(want: torch.Tensor, have: torch.Tensor, name: str) -> tuple[float, float]:
        divergence = float((want.exp() * (want - have)).sum(-1).mean())
        equal = float((want.argmax(-1) == have.argmax(-1)).float().mean())
        print(f"{name}: {divergence:.4f} nats a token, top-1 equal {equal:.1%}")
        return divergence, equal

    def theirs() -> Any:
        """The base as bitsandbytes packs it."""
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        how = BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=torch.float32)
        return AutoModelForCausalLM.from_pretrained(smol, quantization_config=how, dtype=torch.float32).eval()

    live = attach(load_base(smol, "float32", CODEC), str(tmp_path / "a"), base=smol)
    want = said(live)
    with live.merge():
        assert beside(want, said(live), "live, merged")[0] < 1e-6
    assert said(live).equal(want)
    peft = PeftModel.from_pretrained(theirs(), str(tmp_path / "a")).eval()
    peft.enable_input_require_grads()  # its kernel for a CPU, which has other numbers, runs only without gradients
    referee = torch.cat([peft(ids).logits[0].detach() for ids in texts]).log_softmax(-1)
    assert beside(referee, want, "PEFT and bitsandbytes")[0] < 1e-6
    attached = attach(theirs(), str(tmp_path / "a"), base=smol)
    said(attached)  # a first answer, which rearranges what bitsandbytes holds
    with attached.merge():
        assert beside(want, said(attached), "merged after an answer")[0] < 1e-6

    found: dict[str, tuple[float, float]] = {}
    for into in ("trained", "original", "4bit"):
        merge(str(smol), str(tmp_path / "a"), tmp_path / into, into=into)
        found[into] = beside(referee, said(load_base(tmp_path / into, "float32")), into)
    assert found["trained"][0] <= 0.01
    assert found["trained"][1] >= 0.97
    assert found["original"][0] > 10 * found["trained"][0]
    assert found["4bit"][0] > found["trained"][0]
    done = merge(str(smol), str(tmp_path / "a"), tmp_path / "checked", check=True)
    print(f"by --check: {done.check}")
    refused("HK-MERGE-DRIFT", merge, str(smol), str(tmp_path / "a"), tmp_path / "no", into="original", check=True)


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


def packed_by_bitsandbytes(base: Path, out: Path, kind: str, double: bool) -> Path:
    """A base as transformers writes it that has loaded it in 4 bits, by bitsandbytes itself."""
    import shutil

    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=how, dtype="float32", device_map="cpu")
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_a_base_in_4_bits(family: str, kind: str, double: bool, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Any method trains on it and answers on it; it is merged into its decoded weights, a model like any other."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    base = packed_by_bitsandbytes(request.getfixturevalue(family), tmp_path / "packed", kind, double)
    rows = rows_file(tmp_path / "rows.jsonl")
    for method in ("lora", "qlora"):
        out, merged = tmp_path / method, tmp_path / f"merged-{method}"
        train(str(base), rows, out, method=method, steps=2, learning_rate=0.02, config={"rank": 2})
        generate("x", base=str(base), terms=str(out), max_new_tokens=2)
        attached = hubkit.attach(load_base(base), str(out))
        assert quantized(attached) == {"tiny_llama": 14, "tiny_gpt2": 8}[family]
        done = merge(str(base), str(out), merged, check=True)
        assert done.codec == f"{kind}/64/{'double' if double else 'single'}"
        near(logits(load_base(merged)), logits(attached))
        near(logits(AutoModelForCausalLM.from_pretrained(merged)), logits(attached))
        config = json.loads((merged / "config.json").read_text())
        assert "quantization_config" not in config
        assert "bit for bit" in verify(str(merged), base=str(base)).checks[-1].detail
        assert merge(str(base), str(out), tmp_path / f"half-{method}", dtype="bfloat16").size < done.size
        before = tree(tmp_path)
        error = refused("HK-NOT-MERGEABLE", merge, str(base), str(out), tmp_path / "o", into="original")
        assert "16-bit base" in error.fix
        assert tree(tmp_path) == before
