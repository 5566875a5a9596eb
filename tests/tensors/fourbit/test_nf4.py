"""The 4-bit codec against bitsandbytes, bit for bit; packed layers against plain ones; loading and writing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.methods.suite import batch, tiny_model
from hubkit.tensors.base.base import Base
from hubkit.tensors.fourbit.decode import dequantize
from hubkit.tensors.fourbit.linear import QuantLinear, Swap, packed_of
from hubkit.tensors.fourbit.nf4 import CODEC, absmax_of, quantize, unpacked
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import fingerprint_model, load_base

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((64, 64), (100, 36), (24, 16), (7, 9), (5, 130), (1, 2), (1, 1), (300, 256), (128, 194))


def weights(shape: tuple[int, ...], dtype: torch.dtype, kind: str = "normal") -> Tensor:
    generator = torch.Generator().manual_seed(3)
    made = torch.randn(shape, generator=generator)
    kinds: dict[str, Callable[[], Tensor]] = {
        "normal": lambda: made,
        "small": lambda: made * 1e-3,
        "rows of zeros": lambda: made * (torch.arange(shape[0]) % 3 > 0).unsqueeze(1),
        "ones": lambda: torch.ones(shape),
        "zeros": lambda: torch.zeros(shape),
        "outliers": lambda: made.sign() * (made.abs().exp() ** 3).clamp(max=6e4),
    }
    return kinds[kind]().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "small", "rows of zeros", "ones", "zeros", "outliers"])
def test_every_bit_is_that_of_bitsandbytes(dtype: torch.dtype, kind: str) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    for shape in SHAPES:
        weight = weights(shape, dtype, kind)
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        have, want = quantize(weight).tensors(), {"": codes, **state.as_dict(packed=True)}
        assert have.keys() == want.keys()
        for key, tensor in want.items():
            assert have[key].dtype == tensor.dtype, key
            assert torch.equal(have[key], tensor), (key, shape)
        if shape[-1] >= 32 and shape[-1] % 2 == 0:  # its kernel returns other blocks' values where rows are shorter
            assert torch.equal(dequantize(quantize(weight)), functional.dequantize_4bit(codes, state)), shape


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 256])
@pytest.mark.parametrize("nested", [True, False])
def test_whatever_bitsandbytes_wrote_is_decoded(kind: str, block: int, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = weights((130, 256), torch.bfloat16)
    codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=block)
    packed = unpacked({"": codes, **state.as_dict(packed=True)}, "w")
    assert packed.codec == f"{kind}/{block}/{'double' if nested else 'single'}"
    assert torch.equal(dequantize(packed), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_value_is_off_by_half_a_step_at_most(shape: tuple[int, int]) -> None:
    """The widest gap between levels is 0.31 of absmax; absmax itself is off by what its 8 bits leave out."""
    weight, packed = weights(shape, torch.float32), quantize(weights(shape, torch.float32))
    scales = absmax_of(packed).repeat_interleave(64)[: weight.numel()].view(shape)
    error = (dequantize(packed) - weight).abs()
    blocks = nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64).abs().amax(1)
    slack = (absmax_of(packed) - blocks).abs().repeat_interleave(64)[: weight.numel()].view(shape)
    assert (error <= 0.16 * scales + slack + 1e-6).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    weight = weights((65, 3), torch.float32)
    weight[64, 2] = value
    with pytest.raises(HubkitError, match="HK-NAN"):
        quantize(weight)
    with pytest.raises(HubkitError, match="HK-DTYPE"):
        quantize(torch.ones(4, 4, dtype=torch.int8))


def layer(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[QuantLinear, nn.Linear]:
    """A packed layer, and a plain one that holds the decoded weight."""
    torch.manual_seed(0)
    plain = nn.Linear(40, 24, bias=bias, dtype=dtype)
    made = QuantLinear(40, 24, None if plain.bias is None else nn.Parameter(plain.bias.detach().clone()))
    made.fill(quantize(plain.weight))
    plain.weight.data = made.decode()
    return made, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_is_a_plain_one_with_the_decoded_weight(dtype: torch.dtype, bias: bool) -> None:
    made, plain = layer(dtype, bias)
    x = torch.randn(3, 5, 40, dtype=dtype, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y, want = made(x), plain(twin)
    assert torch.equal(y, want)
    y.sum().backward()
    want.sum().backward()
    assert x.grad is not None
    assert twin.grad is not None
    assert torch.equal(x.grad, twin.grad)
    if bias:
        assert made.bias is not None
        assert made.bias.grad is not None
        assert plain.bias.grad is not None
        assert torch.allclose(made.bias.grad, plain.bias.grad)


def test_no_decoded_weight_is_kept_for_backward() -> None:
    made, _ = layer()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        made(torch.randn(3, 40, requires_grad=True))
    assert not kept


def test_casting_a_layer_leaves_its_statistics() -> None:
    made, _ = layer()
    before = {k: v.clone() for k, v in made.state_dict().items() if "quant_state" not in k and k != "bias"}
    made.to(torch.bfloat16)
    assert made(torch.ones(2, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16
    after = made.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    copy = QuantLinear(40, 24, nn.Parameter(torch.zeros(24, dtype=torch.bfloat16)))
    copy.load_state_dict(after)
    assert torch.equal(copy.decode(), made.decode())
    with pytest.raises(RuntimeError, match="weight"):
        copy.load_state_dict({"bias": after["bias"]})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_swapping_and_back(family: str) -> None:
    model = tiny_model(family)
    want, state, order = model(batch()).logits, {**model.state_dict()}, [n for n, _ in model.named_modules()]
    base = Base.from_model(model)
    sites = base.to_quantize()
    assert not [s.name for s in sites if base.arch.is_head(s.name)]
    objects = [site.module for site in sites]
    for _ in range(2):
        decoded = [dequantize(quantize(site.weight())) for site in sites]
        swaps = [Swap(module) for module in objects if module is not None]
        assert not torch.equal(model(batch()).logits, want)
        assert [n for n, _ in model.named_modules()] == order
        assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items()), "checkpoints see the original"
        assert Base.from_model(model).sites.keys() == base.sites.keys()
        for site, weight in zip(sites, decoded, strict=True):
            assert torch.equal(site.weight(), weight)
        for swap in swaps:
            swap.undo()
        assert torch.equal(model(batch()).logits, want)
        assert list(model.state_dict()) == list(state)


@pytest.mark.parametrize("family", ["llama", "gpt2-float32"])
def test_what_is_swapped_follows_its_layer(family: str) -> None:
    """To another dtype; what is worked out of a weight, and kept, is worked out again."""
    model = tiny_model(family)
    site = next(iter(Base.from_model(model).to_quantize()))
    module, shape = site.module, site.shape
    assert module is not None
    own, plain = module.get_parameter("weight"), site.version()
    swap = Swap(module)
    again = Base.from_model(model).sites[site.name]
    assert (again.packed, again.shape, again.transposed) == (True, shape, site.transposed)
    assert module.get_parameter("weight") is own
    packed = site.version()
    assert packed != plain
    assert site.version() == packed
    before = site.weight()
    model.to(torch.bfloat16)
    assert site.weight().dtype == torch.bfloat16
    assert torch.equal(site.weight(), before.to(torch.bfloat16))
    assert module(torch.ones(2, shape[1], dtype=torch.bfloat16)).dtype == torch.bfloat16
    model.float()
    assert torch.equal(site.weight(), before)
    x = torch.randn(3, shape[1])
    bias = site.bias()
    torch.testing.assert_close(module(x), x @ before.view(shape).t() + (0 if bias is None else bias))
    swap.undo()
    assert "forward" not in vars(module)


def test_a_weight_that_cannot_be_quantized_leaves_the_model_alone() -> None:
    from hubkit.methods.config import parse_config
    from hubkit.methods.host import host
    from hubkit.tensors.parts.adapter import Adapter

    model = tiny_model("llama")
    last = list(Base.from_model(model).to_quantize())[-1]
    assert last.module is not None
    last.module.get_parameter("weight").data[0, 0] = float("nan")
    attached, method = Attached(model), host().load("qlora")
    adapter = Adapter.fresh("a", method, parse_config(method.info.config, {"rank": 2}, ""), attached.sites, 0)
    with pytest.raises(HubkitError, match="HK-NAN") as caught:
        attached.add("a", adapter)
    assert caught.value.where == last.name
    assert not [m for m in model.modules() if packed_of(m) is not None]
    assert not attached.adapters


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quantized_while_loading_is_quantized_after(family: str, tmp_path: Path) -> None:
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="8KB")  # type: ignore[operator]
    model, after = load_base(tmp_path, codec=CODEC), load_base(tmp_path)
    assert type(model) is type(after)
    for site in Base.from_model(after).to_quantize():
        assert site.module is not None
        Swap(site.module)
    assert torch.equal(model(batch()).logits, after(batch()).logits)
    assert all(not p.requires_grad for p in model.parameters())
    assert fingerprint_model(model).fingerprint.weights == fingerprint_model(after).fingerprint.weights
    assert [s.shape for s in Base.from_model(model).sites.values()] == [
        s.shape for s in Base.from_model(after).sites.values()
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_written_here_is_read_here_and_by_bitsandbytes(family: str, tmp_path: Path) -> None:
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    model = load_base(tmp_path / "base", codec=CODEC)
    want = model(batch()).logits
    model.save_pretrained(tmp_path / "packed")  # type: ignore[operator]
    again = load_base(tmp_path / "packed")
    assert torch.equal(again(batch()).logits, want)
    live, files = Base.from_model(again), Base.from_folder(tmp_path / "packed")
    assert live.sites == files.sites
    for name in (name for name, site in files.sites.items() if site.kind != "block"):
        site = files.sites[name]
        assert torch.equal(site.weight(), live.sites[name].weight())
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto")
    mine = Base.from_model(again).sites
    for name, site in Base.from_model(theirs).sites.items():
        assert site.shape == mine[name].shape
        assert site.kind == "block" or torch.equal(site.weight(), mine[name].weight()), name


@pytest.mark.parametrize("double", [True, False])
def test_what_bitsandbytes_wrote_is_read_and_its_live_layers_are_sites(double: bool, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings, dtype="auto")
    theirs.save_pretrained(tmp_path / "packed")
    mine = load_base(tmp_path / "packed")
    live, sites = Base.from_model(theirs), Base.from_model(mine).sites
    assert [*live.sites] == [*sites]
    for name, site in live.sites.items():
        assert (site.shape, site.packed) == (sites[name].shape, sites[name].packed)
        assert site.kind == "block" or torch.equal(site.weight(), sites[name].weight()), name
    assert (
        fingerprint_model(mine).fingerprint.weights
        == fingerprint_model(load_base(tmp_path / "packed")).fingerprint.weights
    )
    theirs.train()  # in training it multiplies by the decoded weight, as here
    assert torch.allclose(mine(batch()).logits.float(), theirs(batch()).logits.float(), atol=0.05)


def broken(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


NAME = "model.layers.1.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def said(**facts: Any) -> Callable[[dict[str, Any]], None]:
    """The checkpoint says other facts of its packed weight."""

    def change(tensors: dict[str, Any]) -> None:
        document = json.loads(bytes(tensors[STATE].tolist())) | facts
        tensors[STATE] = torch.tensor(list(json.dumps(document).encode()), dtype=torch.uint8)

    return change


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no absmax": (lambda t: t.pop(f"{NAME}.absmax"), "absmax"),
    "no nested absmax": (lambda t: t.pop(f"{NAME}.nested_absmax"), "nested_absmax"),
    "no map": (lambda t: t.pop(f"{NAME}.nested_quant_map"), "nested_quant_map"),
    "no state": (lambda t: t.pop(f"{NAME}.quant_state.bitsandbytes__nf4"), "quant_state"),
    "short codes": (lambda t: t.update({NAME: t[NAME][:-1].clone()}), "codes"),
    "other dtype": (lambda t: t.update({f"{NAME}.absmax": t[f"{NAME}.absmax"].float()}), "absmax"),
    "garbage": (
        lambda t: t.update({f"{NAME}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}),
        "how",
    ),
    "one dimension": (said(shape=[24 * 16]), "not a matrix"),
    "three dimensions": (said(shape=[24, 4, 4]), "not a matrix"),
    "below nothing": (said(shape=[-24, 16]), "how"),
    "another kind": (said(quant_type="nf5"), "how"),
    "an odd block": (said(blocksize=63), "how"),
    "no block": (said(blocksize=0), "how"),
    "no nested block": (said(nested_blocksize=0), "how"),
    "an endless offset": (said(nested_offset=float("inf")), "how"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_is_not_whole_is_one_clear_error(fault: str, tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    load_base(tmp_path / "base", codec=CODEC).save_pretrained(tmp_path / "packed")  # type: ignore[operator]
    change, words = FAULTS[fault]
    with pytest.raises(HubkitError) as caught:
        load_base(broken(tmp_path / "packed", change))
    assert caught.value.code == "HK-QUANT-STATE"
    assert NAME in caught.value.where
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.norm"])
def test_only_linear_layers_can_be_packed(name: str, tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    load_base(tmp_path / "base", codec=CODEC).save_pretrained(tmp_path / "packed")  # type: ignore[operator]

    def pack(tensors: dict[str, Any]) -> None:
        packed = quantize(tensors.pop(f"{name}.weight").view(-1, 16)).tensors()
        tensors.update({f"{name}.weight.{key}".rstrip("."): value.clone() for key, value in packed.items()})

    with pytest.raises(HubkitError) as caught:
        load_base(broken(tmp_path / "packed", pack))
    assert caught.value.code == "HK-BASE-LOAD"
    if not transformers.__version__.startswith("4."):  # an older one fails by itself, before hubkit can say why
        assert "not linear" in caught.value.what
        assert caught.value.where == name


def test_a_weight_of_another_shape_is_not_taken_over() -> None:
    made, _ = layer()
    want = made.decode()
    other = QuantLinear(24, 40)
    other.fill(quantize(torch.randn(40, 24)))
    with pytest.raises(HubkitError, match="HK-SHAPE"):
        made.fill(quantize(torch.randn(40, 24)))
    with pytest.raises(HubkitError, match="HK-SHAPE"):
        made.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(made.decode(), want)


def test_the_weight_of_a_layer_of_bitsandbytes_is_read_as_it_was_loaded() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model: Any = tiny_model("llama")
    own = model.model.layers[0].self_attn.q_proj.weight
    layer = bitsandbytes.nn.Linear4bit(own.shape[1], own.shape[0], bias=False, quant_type="nf4")
    model.model.layers[0].self_attn.q_proj = layer
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(HubkitError, match="not quantized yet") as caught:
        Base.from_model(model).site(name).weight()
    assert caught.value.code == "HK-QUANT-STATE"
    layer.to("cpu")
    assert Base.from_model(model).site(name).weight().shape == own.shape
    layer.weight.quant_state.packing_format_for_cpu = True  # what its kernel for some CPUs does at the first call
    with pytest.raises(HubkitError, match="rearranged") as caught:
        Base.from_model(model).site(name).weight()
    assert caught.value.code == "HK-QUANT-STATE"


def test_unknown_codecs_are_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    for call in (lambda: load_base(tmp_path, codec="int3"), lambda: Base.from_folder(tmp_path).quantize("int3")):
        with pytest.raises(HubkitError, match="HK-CODEC"):
            call()


def test_checkpointing_recomputes_the_same(tmp_path: Path) -> None:
    from torch.utils.checkpoint import checkpoint

    made, plain = layer()
    x = torch.randn(3, 40, requires_grad=True)
    checkpoint(made, x, use_reentrant=False).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, plain.weight.sum(0).expand(3, -1), atol=1e-5)
    assert json.loads(bytes(made.state_dict()["weight.quant_state.bitsandbytes__nf4"].tolist()))["shape"] == [24, 40]
