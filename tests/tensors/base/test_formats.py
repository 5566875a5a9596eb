"""Bases that store codes: adapters act beside them as in PEFT; what is merged is decoded, never added to a code.

Judges are the libraries that write and read these formats; compressed-tensors where it is installed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from making import make_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from variants import logits, refused, rows_file, say

import hubkit
from hubkit.artifact.identity.header import TensorInfo
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.formats import computed_in, is_coded
from hubkit.tensors.files.coded import coded_weights, unpacked
from hubkit.tensors.files.dtypes import DTYPE_NAMES
from hubkit.tensors.live.loading import load_base

FAST: dict[str, Any] = {"steps": 2, "learning_rate": 0.1}
OLDER = transformers.__version__.startswith("4.")
Encode = Callable[[Tensor], dict[str, Tensor]]
"""Encodes a weight: last part of a tensor's name -> tensor."""


def with_tensors(
    base: Path, folder: Path, encode: Encode, ends: tuple[str, ...] = ("proj.weight",), **config: Any
) -> Path:
    """`base` with the weights of its projections encoded."""
    shutil.copytree(base, folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        stem = name.removesuffix("weight")
        tensors |= {stem + k: t for k, t in encode(tensor).items()} if name.endswith(ends) else {name: tensor}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**own, **config}))
    return folder


def fp8(block: tuple[int, int], name: str = "weight_scale_inv") -> Encode:
    """As DeepSeek and `FineGrainedFP8Config` do it: a scale for each block, the last ones smaller."""

    def encode(weight: Tensor) -> dict[str, Tensor]:
        spread = torch.zeros(-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1]))
        wide = torch.empty_like(weight)
        for row in range(spread.shape[0]):
            for column in range(spread.shape[1]):
                part = slice(row * block[0], (row + 1) * block[0]), slice(column * block[1], (column + 1) * block[1])
                spread[row, column] = weight[part].abs().max() / torch.finfo(torch.float8_e4m3fn).max
                wide[part] = spread[row, column]
        return {"weight": (weight / wide).to(torch.float8_e4m3fn), name: spread}

    return encode


def compressed(kind: str, **arguments: Any) -> tuple[Encode, dict[str, Any]]:
    """A format of compressed-tensors by its library, and what config.json says of it."""
    compressor, scheme = by_name(kind, arguments)
    qparams = pytest.importorskip("compressed_tensors.quantization.utils").calculate_qparams

    def encode(weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape
        size = {"tensor": weight.numel(), "channel": columns}.get(arguments["strategy"]) or arguments["group_size"]
        parts = weight.reshape(-1, size)
        scale, zero = qparams(parts.min(1).values, parts.max(1).values, scheme.weights)
        shape = (1,) if arguments["strategy"] == "tensor" else (rows, -1)
        made = {"weight": weight, "weight_scale": scale.reshape(shape), "weight_zero_point": zero.reshape(shape)}
        found: dict[str, Tensor] = compressor.compress(made, scheme)
        return found

    group = {"targets": ["Linear"], "weights": json.loads(scheme.weights.model_dump_json()), "format": kind}
    facts = {"quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed"}
    return encode, {**facts, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def by_name(kind: str, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """compressed-tensors' class for a format, and its scheme of a weight."""
    made = pytest.importorskip("compressed_tensors.quantization")
    args = made.QuantizationArgs(**{"dynamic": False, **arguments})
    scheme = made.QuantizationScheme(targets=["Linear"], weights=args)
    base = pytest.importorskip("compressed_tensors.compressors").BaseCompressor
    return base.get_value_from_registry(kind), scheme


def base_in(kind: str, base: Path, folder: Path) -> Path:
    """`base` in the format `kind`."""
    if kind == "int8":  # as bitsandbytes saves it
        pytest.importorskip("bitsandbytes")
        how = transformers.BitsAndBytesConfig(load_in_8bit=True)
        transformers.AutoModelForCausalLM.from_pretrained(
            base, quantization_config=how, dtype=torch.float32
        ).save_pretrained(folder)
        for path in base.glob("*token*"):
            shutil.copy(path, folder)
        return folder
    facts: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if kind == "fp8":
        encode, facts = fp8((8, 8)), {**facts, "weight_block_size": [8, 8]}
    elif kind == "fp8-tensor":
        encode, facts = fp8((1 << 20, 1 << 20)), {**facts, "weight_block_size": [128, 128]}
    else:
        encode, facts = compressed(COMPRESSED[kind][0], **COMPRESSED[kind][1])
    return with_tensors(base, folder, encode, quantization_config=facts)


COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "ct-float": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "ct-float-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "ct-int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "ct-int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}),
    "ct-uint3": (
        "pack-quantized",
        {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 8, "symmetric": False},
    ),
}
KINDS = ("fp8", "fp8-tensor", "int8", *COMPRESSED)


@pytest.fixture
def coded(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path) -> Path:
    return base_in(request.param, tiny_llama, tmp_path / "base")


every = pytest.mark.parametrize("coded", KINDS, indirect=True)


def values(base: Path, kind: str) -> dict[str, Tensor]:
    """The weights of `base` decoded by the library that the format is of: name -> (out, in)."""
    tensors, found = load_file(base / "model.safetensors"), dict[str, Tensor]()
    for stem in {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[0].endswith("proj")}:
        own = {n.removeprefix(f"{stem}."): t for n, t in tensors.items() if n.startswith(f"{stem}.")}
        found[f"{stem}.weight"] = THEIRS[kind.partition("-")[0]](kind, own)
    return found


def by_transformers(kind: str, own: dict[str, Tensor]) -> Tensor:
    """What transformers makes of fp8 where there is no GPU."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    made: Tensor = Fp8Dequantize(None)._dequantize_one(own["weight"], own["weight_scale_inv"], torch.float32)
    return made


def by_bitsandbytes(kind: str, own: dict[str, Tensor]) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    made: Tensor = int8_vectorwise_dequant(own["weight"], own["SCB"])
    return made


def by_compressed_tensors(kind: str, own: dict[str, Tensor]) -> Tensor:
    compressor, scheme = by_name(*COMPRESSED[kind])
    made: Tensor = compressor.decompress(own, scheme)["weight"]
    return made


THEIRS: dict[str, Callable[[str, dict[str, Tensor]], Tensor]] = {
    "fp8": by_transformers,
    "int8": by_bitsandbytes,
    "ct": by_compressed_tensors,
}


@every
def test_codes_are_decoded_as_their_own_library_does(coded: Path, tiny_llama: Path, request: Any) -> None:
    kind = request.node.callspec.params["coded"]
    if OLDER and kind.startswith("fp8"):
        pytest.skip("this release decodes fp8 on a GPU alone")
    base, plain = Base.from_folder(coded), Base.from_folder(tiny_llama)
    assert {name for name, site in base.sites.items() if site.coded} == {n for n in plain.sites if n.endswith("proj")}
    assert {n: (s.kind, s.shape) for n, s in base.sites.items()} == {
        n: (s.kind, s.shape) for n, s in plain.sites.items()
    }
    for name, weight in values(coded, kind).items():
        site = base.site(name.removesuffix(".weight"))
        # the same product of a code and a scale in fp32; bitsandbytes multiplies by 1/127 instead of dividing by it
        torch.testing.assert_close(site.weight(), weight.float(), rtol=1e-6, atol=1e-9)
        assert (site.weight() - plain.site(site.name).weight()).abs().max() < 0.2


@every
def test_what_is_merged_is_decoded_and_the_rest_stays_codes(coded: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "chat", coded, targets=["q_proj", "up_proj"])
    done = hubkit.merge(str(coded), str(adapter), tmp_path / "out")
    touched = {f"{n}.weight" for n in Base.from_folder(coded).sites if n.endswith(("q_proj", "up_proj"))}
    assert done.decoded == dict.fromkeys(touched, "float32")
    manifest = json.loads((tmp_path / "out" / "hubkit.json").read_text())
    assert manifest["composition"]["decoded"] == done.decoded
    before, after = load_file(coded / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    stems = {name.removesuffix("weight") for name in touched}
    kept = {n: t for n, t in before.items() if not n.startswith(tuple(stems))}
    assert after.keys() == kept.keys() | touched
    assert all(torch.equal(after[name].view(-1), tensor.view(-1)) for name, tensor in kept.items())
    assert all(after[name].dtype == torch.float32 for name in touched)
    sites, merged = Base.from_folder(coded).sites, Base.from_folder(tmp_path / "out").sites
    assert {name for name, site in merged.items() if site.coded} == {
        name for name, site in sites.items() if site.coded and f"{name}.weight" not in touched
    }


@every
def test_the_merged_model_computes_what_the_attached_one_does(
    coded: Path, tiny_llama: Path, tmp_path: Path, request: Any
) -> None:
    kind = request.node.callspec.params["coded"]
    if OLDER and kind != "int8":
        pytest.skip("this release computes with these codes on a GPU alone")
    adapter = make_adapter(tmp_path / "chat", coded, targets=["q_proj", "up_proj"])
    model = load_base(tiny_llama)
    model.load_state_dict(values(coded, kind), strict=False)
    live = logits(hubkit.attach(model, str(adapter), base=coded, allow_base_mismatch=True))
    if kind != "int8":  # bitsandbytes rounds what comes into a layer, too
        beside = logits(hubkit.attach(load_base(coded, "float32"), str(adapter), base=coded))
        assert (beside - live).abs().max() <= 1e-4 * live.abs().max()
    hubkit.merge(str(coded), str(adapter), tmp_path / "some")
    hubkit.merge(str(coded), str(adapter), tmp_path / "all", dtype="float32")
    assert "quantization_config" not in json.loads((tmp_path / "all" / "config.json").read_text())
    assert not any(site.coded for site in Base.from_folder(tmp_path / "all").sites.values())
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "all", dtype=torch.float32)
    assert (logits(whole) - live).abs().max() <= 1e-4 * live.abs().max()
    part = by_their_documents(tmp_path / "some", kind)
    for name, weight in whole.state_dict().items():
        if name.endswith(("q_proj.weight", "up_proj.weight")):
            assert torch.equal(part.state_dict()[name], weight)
    bound = 0.2 if kind == "int8" else 1e-4
    assert (logits(part) - live).abs().max() <= bound * live.abs().max()
    assert (logits(load_base(tiny_llama)) - live).abs().max() > 2 * bound * live.abs().max()


def by_their_documents(folder: Path, kind: str) -> Any:
    """The model as transformers' documents load it: not by hubkit."""
    how: dict[str, Any] = {}
    if kind.startswith("ct-") and COMPRESSED[kind][0] == "pack-quantized":
        how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    made = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **how
    )
    assert not {*made[1]["missing_keys"], *made[1]["mismatched_keys"]}
    return made[0]


@pytest.mark.parametrize("coded", ["ct-int4"], indirect=True)
def test_packed_weights_in_memory_are_named_for_what_they_are(coded: Path, tmp_path: Path) -> None:
    """Until their first forward the layers have no weight at all."""
    adapter = make_adapter(tmp_path / "chat", coded)
    model = transformers.AutoModelForCausalLM.from_pretrained(coded)
    error = refused("HK-BASE-FORMAT", hubkit.attach, model, str(adapter), base=coded)
    assert "dequantize=True" in error.fix
    logits(hubkit.attach(load_base(coded), str(adapter), base=coded))


@every
def test_beside_codes_it_trains_and_computes_as_in_peft(coded: Path, tmp_path: Path, request: Any) -> None:
    peft = pytest.importorskip("peft")
    kind, rows = request.node.callspec.params["coded"], rows_file(tmp_path / "rows.jsonl")
    if OLDER and kind != "int8":
        refused("HK-BASE-LOAD", hubkit.train, coded, rows, tmp_path / "a", **FAST)
        return
    hubkit.train(coded, rows, tmp_path / "a", **FAST)
    hubkit.verify(str(tmp_path / "a"), base=str(coded))

    plain = logits(by_their_documents(coded, kind))
    attached = hubkit.attach(by_their_documents(coded, kind), str(tmp_path / "a"), base=coded)
    judge = peft.PeftModel.from_pretrained(by_their_documents(coded, kind), tmp_path / "a")
    # the codes are the same and so are the products with them: what differs is how an addition is rounded; int8 codes
    # activations, too, where a last bit decides between a code and the next, half of 1/127 away
    largest, tolerance = logits(attached).abs().max(), 1 / 254 if kind == "int8" else 1e-4
    assert (logits(attached) - logits(judge)).abs().max() <= tolerance * largest
    assert (logits(attached) - plain).abs().max() > 1e-2 * largest


@pytest.mark.parametrize("coded", ["fp8", "int8", "ct-int4"], indirect=True)
def test_what_quantizes_again_is_refused(coded: Path, tmp_path: Path, request: Any) -> None:
    rows = rows_file(tmp_path / "rows.jsonl")
    kind = request.node.callspec.params["coded"]
    for method in ("dora", "qlora") if kind == "int8" else ("qlora",):
        refused("HK-BASE-FORMAT", hubkit.train, coded, rows, tmp_path / "no", method=method, **FAST)
        assert not (tmp_path / "no").exists()


def test_nothing_is_added_to_codes_in_memory(tiny_llama: Path, tmp_path: Path) -> None:
    base = base_in("int8", tiny_llama, tmp_path / "base")
    attached = hubkit.attach(load_base(base), str(make_adapter(tmp_path / "chat", base)), base=base)
    refused("HK-BASE-FORMAT", attached.merge)


def test_a_list_of_layers_without_codes_is_whole(tiny_llama: Path, tmp_path: Path) -> None:
    """Where there was none, transformers' own of one head no longer holds; where there was one, it stays."""
    base = base_in("fp8", tiny_llama, tmp_path / "base")
    hubkit.merge(str(base), str(make_adapter(tmp_path / "chat", base, targets=["v_proj"])), tmp_path / "once")
    touched = [f"model.layers.{n}.self_attn.v_proj" for n in (0, 1)]
    assert _excepted(tmp_path / "once") == ["lm_head", *touched]
    again = make_adapter(tmp_path / "more", tmp_path / "once", targets=["o_proj"])
    hubkit.merge(str(tmp_path / "once"), str(again), tmp_path / "twice")
    assert _excepted(tmp_path / "twice") == ["lm_head", *touched, *(n.replace("v_proj", "o_proj") for n in touched)]


def _excepted(folder: Path) -> list[str]:
    found = json.loads((folder / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    return [found[0], *sorted(found[1:], key=lambda name: ("v_proj" not in name, name))]


@pytest.mark.parametrize("why", ["text_config", "modelopt"])
def test_all_is_decoded_where_a_config_cannot_except_layers(why: str, tiny_llama: Path, tmp_path: Path) -> None:
    base = base_in("fp8", tiny_llama, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    if why == "modelopt":
        config["quantization_config"]["quant_method"] = why
    else:
        config[why] = {}
    (base / "config.json").write_text(json.dumps(config))
    adapter = make_adapter(tmp_path / "chat", base, targets=["v_proj"])
    done = hubkit.merge(str(base), str(adapter), tmp_path / "out")
    assert len(done.decoded) == 14
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_what_the_command_says_of_codes(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], registry: str
) -> None:
    base = base_in("fp8", tiny_llama, tmp_path / "base")
    adapter = make_adapter(tmp_path / "chat", base, targets=["v_proj"])
    said = say(capsys, "merge", adapter, "--base", base, "--out", tmp_path / "out")
    assert "2 weights that the base stores as codes are decoded, to float32" in said.out
    said = say(capsys, "inspect", tmp_path / "out")
    assert said.status == 0, said.err


def test_scales_that_do_not_fit_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    def wrong(weight: Tensor) -> dict[str, Tensor]:
        return {**fp8((8, 8))(weight), "weight_scale_inv": torch.ones(5, 7)}

    facts = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    base = with_tensors(tiny_llama, tmp_path / "base", wrong, quantization_config=facts)
    adapter = make_adapter(tmp_path / "chat", base)
    refused("HK-BASE-FORMAT", hubkit.merge, str(base), str(adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_block_is_as_large_as_the_config_says() -> None:
    """192 rows in blocks of 128 are 128 and 64, not twice 96."""
    weight = torch.randn(192, 8, generator=torch.Generator().manual_seed(1))
    tensors = {f"a.{name}": tensor for name, tensor in fp8((128, 128))(weight).items()}
    headers = {n: TensorInfo(n, DTYPE_NAMES[t.dtype], tuple(t.shape), 0, 0) for n, t in tensors.items()}
    config = {"quantization_config": {"weight_block_size": [128, 128]}}
    one = coded_weights(headers, config, lambda name, number=None: tensors[name], "here")["a.weight"]
    wide = torch.cat(
        [tensors["a.weight_scale_inv"][:1].expand(128, 8), tensors["a.weight_scale_inv"][1:].expand(64, 8)]
    )
    assert torch.equal(one.decoded(lambda name, number=None: tensors[name]), tensors["a.weight"].float() * wide)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_integers_are_those_that_were_packed(bits: int) -> None:
    """By the definition: integer i is bits i·b ... i·b + b - 1 of the row, lowest first, less half the range."""
    generator = torch.Generator().manual_seed(bits)
    numbers = torch.randint(0, 1 << bits, (3, 45), generator=generator)
    rows = [sum(int(number) << (at * bits) for at, number in enumerate(row)) for row in numbers.tolist()]
    count = -(-45 * bits // 32)
    words = torch.tensor([[(row >> (32 * at)) & 0xFFFFFFFF for at in range(count)] for row in rows])
    assert torch.equal(unpacked(words.to(torch.int32), bits, 45), (numbers - (1 << (bits - 1))).to(torch.int32))


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_packed_weights_are_named_for_what_they_are(kind: str, tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    def packed(weight: Tensor) -> dict[str, Tensor]:
        return {"qweight": torch.zeros(2, 4, dtype=torch.int32)}

    base = with_tensors(tiny_llama, tmp_path / kind, packed, quantization_config={"quant_method": kind, "bits": 4})
    rows = rows_file(tmp_path / "rows.jsonl")
    for call in (
        lambda: hubkit.train(base, rows, tmp_path / "out", steps=1),
        lambda: hubkit.merge(str(base), str(adapter), tmp_path / "out", allow_base_mismatch=True),
    ):
        error = refused("HK-BASE-FORMAT", call)
        assert kind in error.what
        assert "the 16-bit base that it was made from" in error.fix
        assert "--allow-base-mismatch" in error.fix
    assert not (tmp_path / "out").exists()


def test_what_counts_as_codes() -> None:
    coded = {torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32}
    assert {d for d in (*coded, torch.float16, torch.bfloat16, torch.float32, torch.float64) if is_coded(d)} == coded
    assert computed_in({"torch_dtype": "float16"}) == torch.float16
    assert computed_in({"dtype": "float8_e4m3fn"}) == computed_in({}) == torch.bfloat16


SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
"""The configuration of a tiny mixture of experts."""


def mxfp4(folder: Path, words: Path) -> Path:
    """A tiny gpt-oss whose experts are in MXFP4, as OpenAI publishes it: blocks of 32 codes and a power of two."""
    own = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "rope_scaling": None, "head_dim": 8}
    config = transformers.GptOssConfig(**{**SMALL, **own, "hidden_size": 32, "intermediate_size": 32})
    torch.manual_seed(0)
    transformers.GptOssForCausalLM(config).save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            shape = (tensor.shape[0], tensor.shape[2], tensor.shape[1] // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(122, 126, shape, dtype=torch.uint8)
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    own = json.loads((folder / "config.json").read_text())
    own["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(own))
    for path in words.glob("*token*"):
        shutil.copy(path, folder)
    return folder


def test_beside_experts_in_mxfp4_attention_is_trained_and_merged(tiny_llama: Path, tmp_path: Path) -> None:
    if OLDER:
        pytest.skip("this release decodes to bfloat16 alone")
    base = mxfp4(tmp_path / "base", tiny_llama)
    hubkit.train(base, rows_file(tmp_path / "rows.jsonl"), tmp_path / "a", **FAST)
    done = hubkit.merge(str(base), str(tmp_path / "a"), tmp_path / "out")
    assert (done.changed, done.decoded) == (4, {})
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if ".mlp." in name)
    attached = hubkit.attach(load_base(base, "float32"), str(tmp_path / "a"), base=base)
    live, plain = logits(attached), logits(load_base(base, "float32"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(merged) - live).abs().max() <= 1e-4 * live.abs().max()
    assert (plain - live).abs().max() > 1e-2 * live.abs().max()


def test_experts_in_mxfp4_are_no_targets_and_what_to_do_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    base, rows = mxfp4(tmp_path / "base", tiny_llama), rows_file(tmp_path / "rows.jsonl")
    for target in ("experts.down_proj", r".*\.experts\..*"):
        options = {**FAST, "config": {"targets": [target] if "*" not in target else target}}
        error = refused("HK-TARGET", hubkit.train, base, rows, tmp_path / "a", **options)
        assert "*" in target or "Mxfp4Config(dequantize=True)" in error.fix
    assert not (tmp_path / "a").exists()


def test_beside_experts_in_fp8_attention_is_trained_and_merged(tiny_llama: Path, tmp_path: Path) -> None:
    """transformers fuses the experts and decodes them in one operation: the map of names is that of the plain model."""
    config = transformers.MixtralConfig(**{**SMALL, "sliding_window": None})
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "plain")
    for path in tiny_llama.glob("*token*"):
        shutil.copy(path, tmp_path / "plain")
    facts = {"quant_method": "fp8", "weight_block_size": [8, 8], "modules_to_not_convert": ["lm_head", "gate"]}
    ends = ("_proj.weight", "w1.weight", "w2.weight", "w3.weight")
    base = with_tensors(tmp_path / "plain", tmp_path / "base", fp8((8, 8)), ends, quantization_config=facts)
    options = {**FAST, "config": {"targets": ["q_proj", "o_proj"]}}
    if OLDER:
        refused("HK-BASE-LOAD", hubkit.train, base, rows_file(tmp_path / "rows.jsonl"), tmp_path / "a", **options)
        return
    hubkit.train(base, rows_file(tmp_path / "rows.jsonl"), tmp_path / "a", **options)
    done = hubkit.merge(str(base), str(tmp_path / "a"), tmp_path / "out")
    assert len(done.decoded) == 4
    attached = hubkit.attach(load_base(base, "float32"), str(tmp_path / "a"), base=base)
    assert Base.from_model(attached.model).sites.keys() >= {"model.layers.0.self_attn.q_proj"}
    live, plain = logits(attached), logits(load_base(base, "float32"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(merged) - live).abs().max() <= 1e-4 * live.abs().max()
    assert (plain - live).abs().max() > 1e-2 * live.abs().max()
    from hubkit.tensors.live.loading import fingerprint_model

    names = {tensor.name for tensor in fingerprint_model(load_base(base)).tensors}
    assert names == set(load_file(tmp_path / "plain" / "model.safetensors"))


GOLDEN = Path(__file__).parents[2] / "golden" / "compressed_tensors" / "weights.safetensors"


def test_what_compressed_tensors_decoded_is_decoded_to_the_same_values() -> None:
    """Its own values, made by tests/golden/compressed_tensors/make.py."""
    tensors = load_file(GOLDEN)
    with safe_open(GOLDEN, "pt") as file:
        formats = {name: json.loads(text) for name, text in file.metadata().items()}
    assert len(formats) == 9
    for name, facts in formats.items():
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.a.")}
        headers = {key: TensorInfo(key, DTYPE_NAMES[t.dtype], tuple(t.shape), 0, 0) for key, t in own.items()}

        def read(key: str, number: int | None = None, /, own: dict[str, torch.Tensor] = own) -> torch.Tensor:
            return own[key]

        found = coded_weights(headers, {"quantization_config": facts}, read, name)
        assert torch.equal(found["a.weight"].decoded(read), tensors[f"{name}.decoded"]), name
