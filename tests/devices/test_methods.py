"""Every method off the CPU: trained, attached, answered with, routed, merged live and resumed, as on the CPU.

On the stand-in the kernels are the CPU's, so what differs is a fault; on CUDA fp32 differs by rounding.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from every_method import METHODS, ROUTE, random_adapters
from variants import refused, rows_file
from zoo import ids, model_of, near

from hubkit.errors import HubkitError
from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Mix, Sum
from hubkit.training.events import Started, Stepped
from hubkit.verbs.attach import attach
from hubkit.verbs.generate import generate
from hubkit.verbs.offer import offer
from hubkit.verbs.train import train

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def trained(base: Path, name: str, out: Path, where: str, **more: Any) -> tuple[list[float], list[Any]]:
    """The losses of a training on `where`, and all events."""
    method, config = METHODS[name]
    events: list[Any] = []
    options = {"steps": 4, "learning_rate": 0.01, "seed": 3, "dtype": "float32", **more}
    rows = rows_file(out.parent / "rows.jsonl", 12)
    train(str(base), rows, out, method=method, config=config, device=where, report=events.append, **options)
    return [event.loss for event in events if isinstance(event, Stepped)], events


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_and_answers_there_as_on_the_cpu(
    name: str, device: torch.device, tiny_llama: Path, tmp_path: Path
) -> None:
    want, _ = trained(tiny_llama, name, tmp_path / "cpu", "cpu")
    have, events = trained(tiny_llama, name, tmp_path / "there", str(device))
    assert have == pytest.approx(want, rel=1e-4)
    begun = next(event for event in events if isinstance(event, Started))
    assert begun.device.startswith(str(device))
    assert not [line for line in json.dumps(_manifest(tmp_path / "there")) if str(device) in line]
    said = [
        generate("What is 3 and 3?", base=str(tiny_llama), terms=str(tmp_path / "there"), max_new_tokens=6, device=at)
        for at in (str(device), "cpu")
    ]
    assert said[0].text == said[1].text
    assert said[0].device.startswith(str(device))


def _manifest(folder: Path) -> Any:
    return json.loads((folder / "hubkit.json").read_text())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["lora", "qlora", "prompt"])
def test_a_run_goes_on_on_another_device(
    name: str, checkpointing: bool, device: torch.device, tiny_llama: Path, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def until_two(event: Any) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            raise Killed

    want, _ = trained(tiny_llama, name, tmp_path / "whole", "cpu")
    method, config = METHODS[name]
    rows = rows_file(tmp_path / "rows.jsonl", 12)
    options: dict[str, Any] = {"steps": 4, "learning_rate": 0.01, "seed": 3, "dtype": "float32", "save_every": 2}
    how: dict[str, Any] = {"method": method, "config": config, **options}
    with pytest.raises(Killed):
        train(str(tiny_llama), rows, tmp_path / "out", device="cpu", report=until_two, **how)
    have, events = trained(
        tiny_llama, name, tmp_path / "out", str(device), resume=True, save_every=2, checkpointing=checkpointing
    )
    assert have == pytest.approx(want[2:], rel=1e-4)
    begun = next(event for event in events if isinstance(event, Started))
    assert any("device: then cpu" in change for change in begun.machine_changes)


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])])
def test_qlora_beside_bitsandbytes(where: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Trained and answered with here, or through PEFT on layers that bitsandbytes packed: one model.

    In training mode, because in eval mode bitsandbytes rearranges a CPU's weights for a kernel of its own, in bf16.
    Rows are whole blocks of 64: elsewhere its decoding on a CPU takes the statistics of other blocks.
    """
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    torch.manual_seed(0)
    shape = AutoConfig.from_pretrained(tiny_llama, hidden_size=64, intermediate_size=128, head_dim=16)
    AutoModelForCausalLM.from_config(shape).save_pretrained(base)
    trained(base, "qlora", tmp_path / "out", where, learning_rate=0.1)
    rows = ids(3, 7).to(where)
    ours = attach(load_base(base, "float32", "nf4/64/double", device=where), tmp_path / "out", base=base)
    packed = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=packed, dtype=torch.float32, device_map={"": where}
    )
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "out")).train()
    with torch.no_grad():
        want = theirs(input_ids=rows).logits
        near(ours(rows).logits.cpu(), want.cpu())
        with theirs.disable_adapter():
            plain = theirs(input_ids=rows).logits
    assert (want - plain).abs().max() > 0.1 * want.abs().max(), "an adapter that does something"


def moved(attached: Attached, device: torch.device, how: str) -> Attached:
    """As people move models: the whole, the base alone, or before anything is attached."""
    if how == "whole":
        return attached.to(device)
    attached.model.to(device)
    return attached


@pytest.mark.parametrize("how", ["whole", "base"])
def test_what_is_attached_follows_the_model(how: str, device: torch.device) -> None:
    attached, rows = random_adapters(model_of("llama")), ids(len(ROUTE), 7)
    mixes: list[Mix | None] = [*(name for name in attached.adapters), ROUTE[-1], None]
    with torch.no_grad():
        want = []
        for mix in mixes:
            attached.set_mix(mix)
            want.append(attached(rows).logits)
        routed = attached(rows, route=ROUTE).logits
        moved(attached, device, how)
        for mix, logits in zip(mixes, want, strict=True):
            attached.set_mix(mix)
            have = attached(rows.to(device)).logits
            assert have.device == device
            near(have.cpu(), logits)
        near(attached(rows.to(device), route=ROUTE).logits.cpu(), routed)
        answers = attached.generate(rows.to(device), route=ROUTE, max_new_tokens=4, eos_token_id=None)
        moved(attached, torch.device("cpu"), how)
        near(attached(rows, route=ROUTE).logits, routed)
        assert torch.equal(answers.cpu(), attached.generate(rows, route=ROUTE, max_new_tokens=4, eos_token_id=None))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_route_there(checkpointing: bool, device: torch.device) -> None:
    found = []
    for at in (torch.device("cpu"), device):
        attached = random_adapters(model_of("llama").to(at)).train()
        if checkpointing:
            attached.gradient_checkpointing_enable({"use_reentrant": False})
        rows = ids(len(ROUTE), 6).to(at)
        attached(rows, labels=rows, route=ROUTE).loss.backward()
        named = {f"{n}.{k}": p for n, a in attached.adapters.items() for k, p in a.parameters().items()}
        found.append({key: p.grad.cpu() for key, p in named.items() if p.grad is not None})
    assert set(found[0]) == set(found[1])
    for name, grad in found[0].items():
        near(found[1][name], grad)


@pytest.mark.parametrize("name", ["lora", "dora", "selective", "full"])
def test_merged_live_and_taken_out_again(name: str, device: torch.device) -> None:
    attached, rows = random_adapters(model_of("llama").to(device), (name,)), ids(2, 6).to(device)
    before = {key: value.clone() for key, value in attached.model.state_dict().items()}
    attached.set_mix(name)
    with torch.no_grad():
        want = attached(rows).logits
        with attached.merge():
            near(attached(rows).logits.cpu(), want.cpu())
    assert all(torch.equal(value, before[key]) for key, value in attached.model.state_dict().items())


def test_offered_adapters_and_slots_live_there(device: torch.device, tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("lora", "dora"):
        trained(tiny_llama, name, tmp_path / name, "cpu", steps=1)
    model = load_base(tiny_llama, "float32", device=device)
    attached = offer(model, {name: str(tmp_path / name) for name in ("lora", "dora")}, base=str(tiny_llama))
    rows = ids(3, 5).to(device)
    with torch.no_grad():
        attached(rows, route=["lora", None, "dora"])
        assert {p.device for p in attached.parts.parameters()} == {device}
        alone = attach(load_base(tiny_llama, "float32", device="cpu"), str(tmp_path / "lora"), base=str(tiny_llama))
        want = alone(rows.cpu()).logits
        compiled = attach(load_base(tiny_llama, "float32", device="cpu"), str(tmp_path / "lora"), base=str(tiny_llama))
        run = compiled.compiled(slots=2, rank=2, backend="eager")
        compiled.to(device)
        near(run(rows, route=["lora", None, "lora"]).logits[0].cpu(), want[0])


@pytest.mark.parametrize("codec", [None, "nf4/64/double"])
def test_a_base_is_loaded_there_and_is_the_same_base(codec: str | None, device: torch.device, tiny_llama: Path) -> None:
    here, there = (load_base(tiny_llama, codec=codec, device=at) for at in ("cpu", device))
    tensors = {**dict(there.named_parameters()), **dict(there.named_buffers())}
    words = [name for name in tensors if name.endswith("quant_state")]  # JSON, which only the host reads
    assert {tensor.device for name, tensor in tensors.items() if tensor.numel() and name not in words} == {device}
    for name, tensor in here.state_dict().items():
        assert torch.equal(there.state_dict()[name].cpu(), tensor), name


def test_layers_on_several_devices(device: torch.device) -> None:
    """As accelerate's `device_map` leaves a model: each part is beside its layer, and inputs are moved on the way."""
    from accelerate import dispatch_model

    attached, rows = random_adapters(model_of("llama")), ids(len(ROUTE) + 2, 7)
    route: list[Mix | None] = [*ROUTE, "prompt", Sum(["prompt", "prefix"])]
    with torch.no_grad():
        want = attached(rows, route=route).logits
        alone = attached(rows, route=["prompt"] * len(route)).logits
        second = torch.device(device.type, 1) if device.type == "standin" or torch.cuda.device_count() > 1 else device
        places = {"model.embed_tokens": device, "model.layers.0": device, "model.rotary_emb": device}
        places |= {"model.layers.1": second, "model.norm": second, "lm_head": device}
        dispatch_model(
            attached.model,
            {name: str(place) for name, place in places.items()},
            main_device=str(device),
            force_hooks=True,
        )
        near(attached(rows.to(device), route=route).logits.cpu(), want)
        near(attached(rows.to(device), route=["prompt"] * len(route)).logits.cpu(), alone)
        fresh = METHODS["prefix"][1] | {"init": "vocabulary"}
        method = host().load("prefix")
        Adapter.fresh("y", method, parse_config(method.info.config, fresh, "t"), attached.sites, 0)
    assert attached.sites.site("model.layers.1.mlp.up_proj").device == second
    assert next(attached.adapters["lora"].parts["model.layers.1.mlp.up_proj"].parameters()).device == second


def test_a_layer_in_the_middle_is_moved(device: torch.device) -> None:
    from accelerate import dispatch_model

    attached, rows = random_adapters(model_of("llama", num_hidden_layers=3), ("lora", "dora")).to(device), ids(3, 5)
    second = torch.device(device.type, 1) if device.type == "standin" or torch.cuda.device_count() > 1 else device
    with torch.no_grad():
        want = attached(rows.to(device), route=["lora", "dora", None]).logits.cpu()
        others = ("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "model.rotary_emb", "lm_head")
        places = {**dict.fromkeys(others, str(device)), "model.layers.1": str(second)}
        dispatch_model(attached.model, places, main_device=str(device), force_hooks=True)
        near(attached(rows.to(device), route=["lora", "dora", None]).logits.cpu(), want)


def test_moved_and_cast_while_merged_it_is_one_model_again(device: torch.device) -> None:
    attached, rows = random_adapters(model_of("llama"), ("lora",)), ids(2, 5)
    attached.set_mix("lora")
    with torch.no_grad():
        want = attached(rows).logits
        with attached.merge():
            attached.to(device)
        near(attached(rows.to(device)).logits.cpu(), want)
        with attached.merge():
            attached.to(torch.bfloat16)
        assert {p.dtype for p in attached.model.parameters()} == {torch.bfloat16}
        assert attached(rows.to(device)).logits.isfinite().all()


def test_an_adapter_made_before_a_move_comes_along_when_it_is_added(device: torch.device) -> None:
    attached, rows = random_adapters(model_of("llama"), ("lora", "dora")), ids(2, 5)
    with torch.no_grad():
        want = attached(rows, route=["dora", "lora"]).logits
        kept = attached.adapters["dora"]
        attached.remove("dora")
        attached.to(device)
        attached.add("dora", kept)
        near(attached(rows.to(device), route=["dora", "lora"]).logits.cpu(), want)


def test_slots_follow_a_base_that_is_moved_alone(device: torch.device) -> None:
    attached, rows = random_adapters(model_of("llama"), ("lora",)), ids(2, 5)
    run = attached.compiled(slots=2, rank=2, backend="eager")
    with torch.no_grad():
        want = run(rows, route=["lora", None]).logits
        attached.model.to(device)
        near(run(rows.to(device), route=["lora", None]).logits.cpu(), want)


def test_a_base_whose_weights_are_elsewhere_is_refused() -> None:
    model = model_of("llama")
    model.model.layers[1].to("meta")
    attached = Attached(model)
    loaded = host().load("lora")
    adapter = Adapter.fresh("x", loaded, parse_config(loaded.info.config, {"rank": 2}, "t"), attached.sites, 0)
    with pytest.raises(HubkitError, match="HK-DEVICE"):
        attached.add("x", adapter)


def test_the_manifest_does_not_say_where_it_was_trained(device: torch.device, tiny_llama: Path, tmp_path: Path) -> None:
    for name, at in (("here", "cpu"), ("there", str(device))):
        trained(tiny_llama, "lora", tmp_path / name, at)
    here, there = (_manifest(tmp_path / name) for name in ("here", "there"))
    for one in (here, there):
        one["training"].pop("metrics")
        one.pop("files")
    assert {**here, "name": ""} == {**there, "name": ""}


def test_loading_needs_accelerate(device: torch.device, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert "hubkit-adapters[transformers]" in refused("HK-EXTRA", load_base, tiny_llama, device=str(device)).fix
    load_base(tiny_llama, device="cpu")
