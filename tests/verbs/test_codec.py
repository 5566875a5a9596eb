"""What was trained in 4 bits is deployed, exported, composed and packed as such; what is damaged is one clear error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from variants import logits, other_weights, refused, rows_file, say, tree

from hubkit.artifact.folder import open_adapter
from hubkit.tensors.fourbit.nf4 import CODEC
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.compose import compose
from hubkit.verbs.deploy import deploy
from hubkit.verbs.export import export
from hubkit.verbs.generate import generate
from hubkit.verbs.lock import lock
from hubkit.verbs.merge import merge
from hubkit.verbs.pack import pack
from hubkit.verbs.train import train
from hubkit.verbs.verify import verify

RECIPE = '[base]\nsource = "./model"\n[adapters.chat]\nsource = "./chat"\nweight = {weight}\n'


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def trained(base: Path, out: Path, method: str = "qlora", seed: int = 0) -> Path:
    rows = rows_file(out.with_suffix(".jsonl"), 8)
    train(str(base), rows, out, method=method, steps=3, learning_rate=0.05, config={"rank": 2}, seed=seed)
    return out


@pytest.fixture
def packed(tiny_llama: Path, tmp_path: Path) -> Path:
    """`tiny_llama` in 4 bits, as bitsandbytes writes it."""
    folder = tmp_path / "packed"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    load_base(tiny_llama, codec=CODEC).save_pretrained(folder)  # type: ignore[operator]
    return folder


def runs(folder: Path) -> Any:
    """The model of a deployment, by its own program."""
    spec: dict[str, Any] = {"__file__": str(folder / "run.py"), "__name__": "run"}
    exec(compile((folder / "run.py").read_text(), "run.py", "exec"), spec)
    return spec["load"]()[0]


@pytest.mark.parametrize("engine", ["peft", "merged"])
@pytest.mark.parametrize("weight", [1.0, -0.5])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_a_deployment_carries_the_codec(
    family: str, weight: float, engine: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base, project = request.getfixturevalue(family), tmp_path / "project"
    project.mkdir()
    (project / "model").symlink_to(base)
    trained(base, project / "chat")
    (project / "hubkit.toml").write_text(RECIPE.format(weight=weight))
    lock(project)
    out = tmp_path / "out"
    done = deploy(out, engine=engine, lock=project)
    assert deploy(tmp_path / "again", engine=engine, lock=project).digest == done.digest
    assert deploy(out, check=True).checked
    have = logits(runs(out))
    want = logits(attach(load_base(base), {str(project / "chat"): weight}, base=str(base)))
    torch.testing.assert_close(have, want, atol=1e-4, rtol=0)
    if engine == "merged":
        return
    assert (logits(load_base(out / "base")) - logits(load_base(base))).abs().max() > 1e-2
    stored, decoded = (load_file(folder / "model.safetensors") for folder in (base, out / "base"))
    assert {n: (t.shape, t.dtype) for n, t in stored.items()} == {n: (t.shape, t.dtype) for n, t in decoded.items()}


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_base_in_4_bits_is_deployed_merged(method: str, packed: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "model").symlink_to(packed)
    trained(packed, project / "chat", method)
    (project / "hubkit.toml").write_text(RECIPE.format(weight=1.0))
    lock(project)
    deploy(tmp_path / "out", engine="merged", lock=project)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    want = logits(attach(load_base(packed), str(project / "chat"), base=str(packed)))
    torch.testing.assert_close(logits(runs(tmp_path / "out")), want, atol=1e-4, rtol=0)


def test_an_adapter_of_another_tool_is_told_its_codec(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT records none: unknown is said, and what is said of it is used as if it had been recorded."""
    rows = rows_file(tmp_path / "rows.jsonl", 8)
    train(str(tiny_llama), rows, tmp_path / "chat", method="qlora", steps=2, learning_rate=0.05, dtype="bfloat16")
    export(str(tmp_path / "chat"), tmp_path / "peft")
    line = ("pack", tmp_path / "peft", "--base", tiny_llama, "--out", tmp_path / "silent")
    said = say(capsys, *line)
    assert "does not say whether it was trained in 4 bits" in said.out
    said = say(capsys, "merge", tmp_path / "silent", "-b", tiny_llama, "-o", tmp_path / "m")
    assert "not known whether trained in 4 bits" in said.out
    said = say(capsys, *line[:-1], tmp_path / "told", "--codec", "nf4:bfloat16")
    assert (said.status, "does not say" in said.out) == (0, False)
    for name in ("chat", "told"):
        base = open_adapter(tmp_path / name).manifest.base
        assert base is not None
        assert (base.codec, base.compute_dtype) == (CODEC, "bfloat16")
        done = merge(str(tiny_llama), str(tmp_path / name), tmp_path / f"merged-{name}")
        assert (done.codec, done.untold) == (CODEC, ())
    one, two = (load_file(tmp_path / f"merged-{name}" / "model.safetensors") for name in ("chat", "told"))
    assert all(one[name].equal(two[name]) for name in one)
    for code, codec in (("HK-CODEC", "nf4/64/single"), ("HK-CODEC", "int8"), ("HK-DTYPE", "nf4:float7")):
        error = refused(code, pack, tmp_path / "peft", base=str(tiny_llama), out=tmp_path / "no", codec=codec)
        assert error.want
    plain = trained(tiny_llama, tmp_path / "plain", "lora")
    assert refused("HK-CODEC", pack, plain, codec="nf4").have == ["adapter, trained on a base as it is"]
    assert not (tmp_path / "no").exists()


def test_what_it_is_decoded_to_stays_on_record(tiny_llama: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows.jsonl", 8)
    train(str(tiny_llama), rows, tmp_path / "chat", method="qlora", steps=1, dtype="bfloat16")
    plain = trained(tiny_llama, tmp_path / "plain", "lora")
    compose({str(plain): 1.0, str(tmp_path / "chat"): 1.0}, tmp_path / "both")
    pack(tmp_path / "chat", base=str(tiny_llama), out=tmp_path / "packed")
    for name in ("both", "packed"):
        base = open_adapter(tmp_path / name).manifest.base
        assert base is not None
        assert (base.codec, base.compute_dtype) == (CODEC, "bfloat16")


def test_an_unknown_codec_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "model").symlink_to(tiny_llama)
    trained(tiny_llama, project / "chat")
    manifest = json.loads((project / "chat" / "hubkit.json").read_text())
    manifest["base"]["codec"] = "int3/7"
    (project / "chat" / "hubkit.json").write_text(json.dumps(manifest))
    pack(project / "chat")
    (project / "hubkit.toml").write_text(RECIPE.format(weight=1.0))
    lock(project)
    for engine in ("peft", "merged"):
        error = refused("HK-ENGINE", deploy, tmp_path / "out", engine=engine, lock=project)
        assert "int3/7" in str(error.have)
    refused("HK-CODEC", generate, "x", base=str(tiny_llama), terms=str(project / "chat"))
    refused("HK-CODEC", attach, load_base(tiny_llama), str(project / "chat"), base=str(tiny_llama))
    assert not (tmp_path / "out").exists()


def test_packed_again_it_keeps_the_codec(tiny_llama: Path, tmp_path: Path) -> None:
    chat = trained(tiny_llama, tmp_path / "chat")
    pack(chat, base=str(tiny_llama))
    base = open_adapter(chat).manifest.base
    assert base is not None
    assert base.codec == CODEC


def test_a_sum_has_the_codec_of_any_member(tiny_llama: Path, tmp_path: Path) -> None:
    """Whichever is named first; and live, it acts on the decoded weights, as its members do."""
    one, two = trained(tiny_llama, tmp_path / "one", "lora"), trained(tiny_llama, tmp_path / "two", seed=1)
    want = logits(attach(load_base(tiny_llama), {str(one): 1.0, str(two): 0.5}, base=str(tiny_llama)))
    for number, terms in enumerate(({str(one): 1.0, str(two): 0.5}, {str(two): 0.5, str(one): 1.0})):
        compose(terms, tmp_path / str(number))
        base = open_adapter(tmp_path / str(number)).manifest.base
        assert base is not None
        assert base.codec == CODEC
        have = logits(attach(load_base(tiny_llama), str(tmp_path / str(number)), base=str(tiny_llama)))
        torch.testing.assert_close(have, want, atol=1e-4, rtol=0)


def test_exported_and_composed_on_a_base_in_4_bits(packed: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Its headers do not say what its tensors hold: the base has to be named, and is proven."""
    one, two = trained(packed, tmp_path / "one", "lora"), trained(packed, tmp_path / "two", "qlora", 1)
    for call in (lambda: export(str(one), tmp_path / "no"), lambda: compose({str(one): 1.0}, tmp_path / "no")):
        assert "--base" in refused("HK-BASE-NEEDED", call).fix
    other = other_weights(tiny_llama, tmp_path / "other")
    refused("HK-BASE-MISMATCH", export, str(one), tmp_path / "no", base=str(other))
    assert not (tmp_path / "no").exists()
    for name, folder in (("one", one), ("two", two)):
        assert verify(str(folder), base=str(packed)).overrides == ()
        pack(folder, base=str(packed))
        export(str(folder), tmp_path / f"peft-{name}", base=str(packed))
        files = [tree(place)["adapter_model.safetensors"] for place in (folder, tmp_path / f"peft-{name}")]
        assert files[0] == files[1]
    compose({str(one): 1.0, str(two): -0.5}, tmp_path / "both", base=str(packed))
    want = logits(attach(load_base(packed), {str(one): 1.0, str(two): -0.5}, base=str(packed)))
    have = logits(attach(load_base(packed), str(tmp_path / "both"), base=str(packed)))
    torch.testing.assert_close(have, want, atol=1e-4, rtol=0)


def test_a_base_with_a_missing_statistic(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat, rows = trained(packed, tmp_path / "chat", "lora"), tmp_path / "chat.jsonl"
    tensors = load_file(packed / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight.absmax"]
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    before = tree(tmp_path)
    lines: list[tuple[object, ...]] = [
        ("train", packed, rows, "-o", tmp_path / "x", "--steps", 1),
        ("generate", "hello", "-b", packed),
        ("generate", "hello", "-b", packed, "-a", chat, "--allow-base-mismatch"),
    ]
    for line in lines:
        said = say(capsys, *line)
        assert said.refusal() == "HK-QUANT-STATE", said.err
        assert "missing: " in said.err
        assert "model.layers.1.mlp.up_proj.weight.absmax" in said.err
        assert tree(tmp_path) == before
    refused("HK-QUANT-STATE", merge, str(packed), str(chat), tmp_path / "x", allow_base_mismatch=True)
    assert tree(tmp_path) == before


@pytest.fixture
def bart(tiny_llama: Path, tmp_path: Path) -> Path:
    """A base of an architecture whose attention and sub-layers are not listed."""
    from transformers import BartConfig, BartForCausalLM

    folder = tmp_path / "bart"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(tiny_llama / "tokenizer_config.json", folder)
    sizes = {"vocab_size": 320, "d_model": 16, "decoder_ffn_dim": 24, "decoder_layers": 1, "decoder_attention_heads": 2}
    BartForCausalLM(BartConfig(**sizes, max_position_embeddings=64)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("method", "options", "code", "said"),
    [
        ("prefix", (), "HK-ARCH", "llama"),
        ("prompt", (), "HK-ARCH", "bart"),
        ("adapters", (), "HK-TARGET", "llama"),
        ("lora", ("targets=c_attn",), "HK-TARGET", "q_proj (2)"),
        ("dora", ("targets=layer_norm",), "HK-TARGET", "layer_norm"),
        ("qlora", ("targets=embed_token",), "HK-TARGET", "embed_tokens"),
        ("selective", ("weights=q_prj",), "HK-TARGET", "q_proj"),
    ],
)
def test_a_method_that_is_wrong_for_the_architecture(
    method: str,
    options: tuple[str, ...],
    code: str,
    said: str,
    bart: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = rows_file(tmp_path / "rows.jsonl")
    before = tree(tmp_path)
    settings = [word for option in options for word in ("--set", option)]
    done = say(capsys, "train", bart, rows, "-o", tmp_path / "x", "--method", method, *settings)
    assert done.refusal().startswith(code), done.err
    assert said in done.err, done.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("reduction", ["7", "0", "-2", "nan", "inf", "1e9", "many"])
def test_a_reduction_that_does_not_divide(
    reduction: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_file(tmp_path / "rows.jsonl")
    before = tree(tmp_path)
    line = ("train", tiny_llama, rows, "-o", tmp_path / "x", "--method", "adapters", "--set", f"reduction={reduction}")
    for _ in range(2):
        said = say(capsys, *line)
        assert "HK-CONFIG" in said.err, said.err
        assert said.status in (1, 2)
        assert "Traceback" not in said.err
        assert said.err.count("error[") == 1
    assert tree(tmp_path) == before
