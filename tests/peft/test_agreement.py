"""Real PEFT as the judge: it computes what hubkit computes, from the files either of them wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from variants import logits, refused, rows_file, say

from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.export import export
from hubkit.verbs.pack import pack
from hubkit.verbs.train import train

peft = pytest.importorskip("peft")

FP32 = 1e-5
"""Largest difference of two fp32 logits that are computed in different orders."""

TRAINED: dict[str, dict[str, Any]] = {
    "q-v": {"targets": ["q_proj", "v_proj"], "rank": 4, "alpha": 8},
    "all-linear": {"rank": 4},
    "rslora": {"rank": 8, "rslora": True, "alpha": 4},
    "patterns": {
        "rank": 4,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"v_proj": 3, "o_proj": 40},
    },
    "patterns-rslora": {"rank": 4, "rslora": True, "rank_pattern": {"k_proj": 9}, "alpha_pattern": {"k_proj": 2.5}},
    "expression": {"targets": r".*layers\.0\..*_proj", "rank": 2},
    "embedding-head": {"targets": ["embed_tokens", "lm_head", "o_proj"], "rank": 4, "init": "gaussian"},
    "pissa": {"rank": 4, "init": "pissa", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "pissa-rslora": {"targets": ["q_proj", "embed_tokens"], "rank": 3, "init": "pissa", "rslora": True},
    "olora": {"rank": 4, "init": "olora", "layers": "1", "lora_plus_ratio": 4},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def trained(base: Path, tmp_path: Path, config: dict[str, Any], name: str = "mine") -> Path:
    train(
        str(base),
        rows_file(tmp_path / "rows.jsonl"),
        tmp_path / name,
        config=config,
        steps=4,
        learning_rate=0.02,
        dtype="float32",
    )
    return tmp_path / name


def near(have: Any, want: Any) -> None:
    assert (have - want).abs().max() <= FP32


@pytest.mark.parametrize("case", TRAINED)
def test_peft_loads_what_was_trained_here(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    folder = trained(tiny_llama, tmp_path, TRAINED[case])
    base = load_base(tiny_llama)
    plain = logits(base)
    attached = attach(base, str(folder), base=str(tiny_llama))
    mine = logits(attached)
    attached.detach()
    theirs = logits(peft.PeftModel.from_pretrained(load_base(tiny_llama), str(folder)))
    assert (mine - plain).abs().max() > 1e-3, "an adapter that does something"
    near(mine, theirs)


def test_peft_loads_what_was_trained_on_gpt2(tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = trained(tiny_gpt2, tmp_path, {"targets": ["c_attn", "c_fc", "wte"], "rank": 4})
    mine = logits(attach(load_base(tiny_gpt2), str(folder), base=str(tiny_gpt2)))
    near(mine, logits(peft.PeftModel.from_pretrained(load_base(tiny_gpt2), str(folder))))


def made_by_peft(base: Path, folder: Path, **options: Any) -> Any:
    """An adapter that PEFT made and saved, not identity; its logits."""
    torch.manual_seed(5)
    model = peft.get_peft_model(load_base(base), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.eval().save_pretrained(folder)
    return logits(model)


FOREIGN = {
    "q-v": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16},
    "all-linear": {"target_modules": "all-linear", "r": 3, "lora_dropout": 0.1},
    "rslora": {"target_modules": ["q_proj", "up_proj"], "r": 8, "lora_alpha": 4, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "r": 4,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.k_proj": 5},
        "alpha_pattern": {"down_proj": 32, r"layers\.0\.self_attn\.q_proj": 1},
    },
    "overlapping-patterns": {
        "target_modules": ["q_proj"],
        "r": 4,
        "alpha_pattern": {r".*\.0\.self_attn\.q_proj": 1, "q_proj": 32},
    },
    "one-layer": {"target_modules": ["q_proj", "v_proj"], "r": 4, "layers_to_transform": [1]},
    "one-layer-by-pattern": {
        "target_modules": ["q_proj"],
        "r": 4,
        "layers_to_transform": 0,
        "layers_pattern": "layers",
    },
    "excluded": {"target_modules": "all-linear", "r": 4, "exclude_modules": ["v_proj", "model.layers.0.mlp.up_proj"]},
    "expression": {"target_modules": r".*\.layers\.\d\.(mlp\.gate_proj|self_attn\.o_proj)", "r": 4},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "r": 4},
    "head": {"target_modules": ["lm_head", "v_proj"], "r": 4},
    "gaussian": {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": "gaussian"},
    "dora": {"target_modules": "all-linear", "r": 4, "use_dora": True, "lora_dropout": 0.1},
    "dora-patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "r": 4,
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"down_proj": 3},
        "layers_to_transform": [1],
    },
}


@pytest.mark.parametrize("case", FOREIGN)
def test_an_adapter_of_peft_is_adopted(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    if case == "one-layer-by-pattern" and peft.__version__ < "0.21":
        pytest.skip("PEFT before 0.21 takes the layer 0 for none")
    theirs = made_by_peft(tiny_llama, tmp_path / "theirs", **FOREIGN[case])
    done = pack(tmp_path / "theirs", base=str(tiny_llama), out=tmp_path / "mine")
    assert done.adopted
    near(logits(attach(load_base(tiny_llama), str(tmp_path / "mine"), base=str(tiny_llama))), theirs)
    near(logits(peft.PeftModel.from_pretrained(load_base(tiny_llama), str(tmp_path / "mine"))), theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "fan_in_fan_out": True},
        {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "use_rslora": True},
        {"r": 4, "target_modules": ["wte", "wpe"]},
        {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ],
)
def test_an_adapter_of_peft_on_gpt2_is_adopted(options: dict[str, Any], tiny_gpt2: Path, tmp_path: Path) -> None:
    theirs = made_by_peft(tiny_gpt2, tmp_path / "theirs", **options)
    pack(tmp_path / "theirs", base=str(tiny_gpt2))
    near(logits(attach(load_base(tiny_gpt2), str(tmp_path / "theirs"), base=str(tiny_gpt2))), theirs)


def test_adopted_and_exported_again_peft_computes_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    theirs = made_by_peft(tiny_llama, tmp_path / "theirs", **FOREIGN["patterns"])
    pack(tmp_path / "theirs", base=str(tiny_llama), out=tmp_path / "mine")
    export(str(tmp_path / "mine"), tmp_path / "again")
    assert (logits(peft.PeftModel.from_pretrained(load_base(tiny_llama), str(tmp_path / "again"))) == theirs).all()


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "dora-and-more": ({"use_dora": True, "bias": "lora_only"}, "bias"),
    "bias": ({"bias": "lora_only"}, "bias"),
    "lora-bias": ({"lora_bias": True}, "lora_bias"),
    "changed-base": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_would_compute_something_else_is_refused_by_name(
    case: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, named = UNSUPPORTED[case]
    made_by_peft(tiny_llama, tmp_path / "theirs", target_modules=["q_proj"], r=4, **options)
    error = refused("HK-OPTION", pack, tmp_path / "theirs", base=str(tiny_llama), out=tmp_path / "mine")
    assert any(line.startswith(f"{named}: ") for line in error.have)
    assert (
        say(capsys, "pack", tmp_path / "theirs", "--base", tiny_llama, "-o", tmp_path / "mine").refusal() == "HK-OPTION"
    )
    assert not (tmp_path / "mine").exists()


def test_a_changed_copy_of_a_base_weight_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """PEFT writes the embedding beside a part on it: a trained one would be lost."""
    from safetensors.torch import load_file, save_file

    made_by_peft(tiny_llama, tmp_path / "theirs", **FOREIGN["embedding"])
    weights = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(weights)
    copies = [name for name in tensors if "base_layer" in name]
    if not copies:
        pytest.skip("this release of PEFT writes no copy")
    tensors[copies[0]][5, 5] += 1
    save_file(tensors, weights)
    assert copies[0] in refused("HK-KEYS", pack, tmp_path / "theirs", base=str(tiny_llama)).where


def test_the_config_says_nothing_but_the_long_stable_keys(tiny_llama: Path, tmp_path: Path) -> None:
    folder = trained(tiny_llama, tmp_path, {"targets": ["v_proj", "q_proj"], "rank": 4})
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["target_modules"] == ["q_proj", "v_proj"]
    assert set(written) <= set(peft.LoraConfig().to_dict())
