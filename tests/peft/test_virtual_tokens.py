"""Prefix and prompt tuning with real PEFT as the judge: logits, padding, generation, gradients, files both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import logits, names, refused, rows_file, say

from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.export import export
from hubkit.verbs.generate import generate
from hubkit.verbs.pack import pack
from hubkit.verbs.train import train

peft = pytest.importorskip("peft")

FP32 = 1e-5
"""Largest difference of two fp32 values that are computed in different orders, relative to the largest."""

CONFIGS = {
    "prefix": lambda **more: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6, **more),
    "prompt": lambda **more: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6, **more),
}
BASES = ("tiny_llama", "tiny_gpt2")
pytestmark = pytest.mark.filterwarnings("ignore:Position ids are not supported")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def near(have: Tensor, want: Tensor, tolerance: float = FP32) -> None:
    assert have.shape == want.shape
    assert (have - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))


def of_peft(model: Any, method: str, folder: Path, **more: Any) -> Any:
    """PEFT's model with values that matter, saved into `folder`; in eval mode."""
    torch.manual_seed(5)
    made = peft.get_peft_model(model, CONFIGS[method](**more))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "prompt_encoder" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.5)
    made.eval().save_pretrained(folder)
    return made


def own(out: Tensor, length: int) -> Tensor:
    """The outputs of the text: PEFT's prompt has some of its own."""
    return out[:, -length:]


@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_of_peft_is_adopted_and_given_back(method: str, base: Path, tmp_path: Path) -> None:
    theirs = own(logits(of_peft(load_base(base), method, tmp_path / "theirs")), 24)
    assert (theirs - logits(load_base(base))).abs().max() > 1e-2
    assert pack(tmp_path / "theirs", base=str(base), out=tmp_path / "mine").adopted
    near(logits(attach(load_base(base), str(tmp_path / "mine"), base=str(base))), theirs)
    export(str(tmp_path / "mine"), tmp_path / "again")
    again = peft.PeftModel.from_pretrained(load_base(base), str(tmp_path / "again"))
    assert torch.equal(own(logits(again), 24), theirs)
    files = [(tmp_path / place / "adapter_model.safetensors").read_bytes() for place in ("mine", "again")]
    assert files[0] == files[1]


def test_a_projected_prefix_of_peft_is_adopted(tiny_llama: Path, tmp_path: Path) -> None:
    more = {"prefix_projection": True, "encoder_hidden_size": 9}
    theirs = logits(of_peft(load_base(tiny_llama), "prefix", tmp_path / "theirs", **more))
    pack(tmp_path / "theirs", base=str(tiny_llama), out=tmp_path / "mine")
    near(logits(attach(load_base(tiny_llama), str(tmp_path / "mine"), base=str(tiny_llama))), theirs)


@pytest.mark.parametrize("method", CONFIGS)
def test_left_padding_and_generation(method: str, base: Path, tmp_path: Path) -> None:
    model = of_peft(load_base(base), method, tmp_path / "theirs")
    pack(tmp_path / "theirs", base=str(base), out=tmp_path / "mine")
    attached = attach(load_base(base), str(tmp_path / "mine"), base=str(base))
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ways: list[dict[str, Any]] = [{"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True}]
    for way in ways:
        made = []
        for one in (model, attached):
            torch.manual_seed(0)
            made.append(one.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, pad_token_id=2, **way))
        assert torch.equal(*made), way
    mask[1, :4] = 0
    with torch.no_grad():
        padded = [one(input_ids=ids, attention_mask=mask).logits for one in (model, attached)]
    near(padded[1][mask.bool()], own(padded[0], 9)[mask.bool()])
    if method == "prefix":  # PEFT's prompt drops positions, so that padding moves the text away from it
        how: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 2, "do_sample": False}
        assert torch.equal(model.generate(input_ids=ids, **how), attached.generate(input_ids=ids, **how))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", CONFIGS)
def test_gradients(method: str, attention: str, base: Path, tmp_path: Path) -> None:
    def loaded() -> Any:
        model: Any = load_base(base)
        model.set_attn_implementation(attention)
        return model

    model = of_peft(loaded(), method, tmp_path / "theirs")
    pack(tmp_path / "theirs", base=str(base), out=tmp_path / "mine")
    attached = attach(loaded(), str(tmp_path / "mine"), base=str(base), trainable=True)
    ids = torch.randint(3, 300, (3, 10), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, 0] = -100  # PEFT's prompt predicts the first token, too
    mask = torch.ones_like(ids)
    mask[0, :3], labels[0, :4] = 0, -100
    (mine,) = [p for p in attached.parameters() if p.requires_grad]
    (theirs,) = [p for p in model.parameters() if p.requires_grad]
    losses = [one(input_ids=ids, attention_mask=mask, labels=labels).loss for one in (attached, model)]
    for loss in losses:
        loss.backward()
    near(losses[0].detach(), losses[1].detach())
    assert mine.grad is not None
    assert theirs.grad is not None
    near(mine.grad, theirs.grad)


@pytest.mark.parametrize("method", CONFIGS)
def test_train_save_load_generate(method: str, base: Path, tmp_path: Path) -> None:
    data, losses = rows_file(tmp_path / "rows.jsonl"), []

    def report(event: Any) -> None:
        losses.extend([event.loss] if hasattr(event, "loss") else [])

    config = {"num_virtual_tokens": 6, "init_text": "Two and two are four."}
    how: dict[str, Any] = {"method": method, "config": config, "steps": 40, "learning_rate": 0.1}
    done = train(str(base), data, tmp_path / "mine", **how, report=report)
    assert done.method == method
    assert sum(losses[-12:]) < 0.99 * sum(losses[:12])
    folder = tmp_path / "mine"
    assert {"adapter_config.json", "adapter_model.safetensors", "hubkit.json", "README.md"} <= names(folder)
    mine = logits(attach(load_base(base), str(folder), base=str(base)))
    near(mine, own(logits(peft.PeftModel.from_pretrained(load_base(base), str(folder))), 24))
    plain = generate("What is 3 and 3?", base=str(base), max_new_tokens=8)
    tuned = generate("What is 3 and 3?", base=str(base), terms=str(folder), max_new_tokens=8)
    assert tuned.text != plain.text
    train(str(base), data, tmp_path / "again", **how)
    first, second = (tmp_path / place / "adapter_model.safetensors" for place in ("mine", "again"))
    assert first.read_bytes() == second.read_bytes()
    written = json.loads((folder / "adapter_config.json").read_text())
    assert set(written) <= set(CONFIGS[method]().to_dict())
    for trainable in (False, True):
        attached = attach(load_base(base), str(folder), base=str(base), trainable=trainable)
        loss = attached(input_ids=torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss
        assert loss.requires_grad == trainable


@pytest.mark.parametrize("method", CONFIGS)
def test_what_it_cannot_be_is_refused(
    method: str, tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merged, weighted, on another base, of another shape, too long, damaged."""
    from safetensors.torch import load_file, save_file

    of_peft(load_base(tiny_llama), method, tmp_path / "theirs")
    folder = tmp_path / "mine"
    pack(tmp_path / "theirs", base=str(tiny_llama), out=folder)
    merged = say(capsys, "merge", folder, "--base", tiny_llama, "-o", tmp_path / "merged")
    assert merged.refusal() == "HK-NOT-MERGEABLE"
    assert "no weight of the base" in merged.err
    assert not (tmp_path / "merged").exists()
    refused("HK-MIX", attach, load_base(tiny_llama), f"0.5*{folder}", base=str(tiny_llama))
    refused("HK-BASE-MISMATCH", attach, load_base(tiny_gpt2), str(folder), base=str(tiny_gpt2))
    weights = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(weights)
    (rows,) = tensors.values()
    for damaged, code in (
        ({"prompt_embeddings": rows[:, :-8].contiguous()}, "HK-SHAPE"),
        ({"prompt_embeddings": rows[:-1].contiguous()}, "HK-SHAPE"),
        ({"prompt_embeddings": rows * float("nan")}, "HK-NAN"),
        ({"prompt_embeddings": rows, "base_model.model.lm_head.weight": rows.clone()}, "HK-KEYS"),
        ({"prompts": rows}, "HK-KEYS"),
    ):
        save_file(damaged, weights)
        refused(code, pack, tmp_path / "theirs", base=str(tiny_llama), out=tmp_path / "no")
        refused(code, pack, tmp_path / "theirs", base=str(tiny_llama), out=tmp_path / "no")
    more = {"method": method, "config": {"num_virtual_tokens": 300}}
    data = rows_file(tmp_path / "rows.jsonl")
    refused("HK-CONFIG", train, str(tiny_llama), data, tmp_path / "no", **more)
    assert not (tmp_path / "no").exists()


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("method", CONFIGS)
def test_the_real_model(method: str, smol: Path, tmp_path: Path) -> None:
    model = of_peft(load_base(smol, "float32"), method, tmp_path / "theirs")
    pack(tmp_path / "theirs", base=str(smol), out=tmp_path / "mine")
    attached = attach(load_base(smol, "float32"), str(tmp_path / "mine"), base=str(smol))
    ids = torch.randint(3, 40000, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        near(attached(input_ids=ids).logits, own(model(input_ids=ids).logits, 40))
    how: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(attached.generate(input_ids=ids, **how), model.generate(input_ids=ids, **how))
