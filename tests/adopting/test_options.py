"""Every field that PEFT's configurations have had: neutral, it passes; active, it is read or refused by its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
from theirs import CONFIG, made_by_peft, set_options
from variants import refused

from hubkit.verbs.pack import pack

CONFIGS: dict[str, Any] = {
    "lora": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
    "dora": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], use_dora=True),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}

EVERYWHERE: dict[str, tuple[Any, bool]] = {
    "auto_mapping": ({"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}, True),
    "base_model_name_or_path": ("/home/ana/llama", True),
    "inference_mode": (False, True),
    "peft_type": ("SHINY", False),
    "peft_version": ("0.4.0", True),
    "revision": ("main", True),
    "task_type": ("FEATURE_EXTRACTION", True),
}
LORA: dict[str, tuple[Any, bool]] = {
    **EVERYWHERE,
    "alora_invocation_tokens": ([5, 6], False),
    "alpha_pattern": ({"q_proj": 3}, True),
    "arrow_config": ({"top_k": 3}, False),
    "bias": ("all", False),
    "corda_config": ({"corda_method": "ipm"}, True),
    "ensure_weight_tying": (True, True),
    "eva_config": ({"rho": 2.0}, True),
    "exclude_modules": (["k_proj"], True),
    "fan_in_fan_out": (True, True),
    "init_lora_weights": ("pissa", False),
    "kasa_config": ({"lambda": 1}, False),
    "layer_replication": ([[0, 2], [1, 2]], False),
    "layers_pattern": ("layers", True),
    "layers_to_transform": ([0, 1], True),
    "loftq_config": ({"loftq_bits": 4}, True),
    "lora_alpha": (20, True),
    "lora_bias": (True, False),
    "lora_dropout": (0.3, True),
    "lora_ga_config": ({"direction": "ArB2r"}, False),
    "megatron_config": ({"tensor_parallel": 2}, False),
    "megatron_core": ("megatron.other", True),
    "modules_to_save": ([], True),
    "monteclora_config": ({"samples": 4}, False),
    "qalora_group_size": (32, True),
    "r": (8, True),
    "rank_pattern": ({"k_proj": 3}, True),
    "runtime_config": ({"ephemeral_gpu_offload": True}, True),
    "target_modules": (["v_proj", "q_proj"], True),
    "target_parameters": (["mlp.experts.gate_up_proj"], False),
    "trainable_token_indices": ([], True),
    "use_bdlora": ({"nblocks": 2}, False),
    "use_qalora": (True, False),
    "use_rslora": (True, True),
    "velora_config": ({"rank": 1}, False),
}
VIRTUAL: dict[str, tuple[Any, bool]] = {
    **EVERYWHERE,
    "modules_to_save": (["lm_head"], False),
    "num_attention_heads": (9, True),
    "num_layers": (9, True),
    "num_transformer_submodules": (2, False),
    "num_virtual_tokens": (3, True),
    "token_dim": (9, True),
}
ACTIVE: dict[str, dict[str, tuple[Any, bool]]] = {
    "lora": LORA,
    "dora": LORA,
    "prefix": {
        **VIRTUAL,
        "encoder_hidden_size": (9, True),
        "init_weights": ("text", True),
        "prefix_projection": (True, True),
    },
    "prompt": {
        **VIRTUAL,
        "prompt_tuning_init": ("TEXT", True),
        "prompt_tuning_init_text": ("be kind", True),
        "tokenizer_kwargs": ({"use_fast": False}, True),
        "tokenizer_name_or_path": ("ana/base", True),
    },
}
"""Field -> a value that is not its default, and whether an adapter with it is one that hubkit can read.

`use_dora` is not among them: it has a method, and a row of CONFIGS, of its own.
"""

NEUTRAL: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "ensure_weight_tying": False,
    "enable_lora": None,
    "init_lora_weights": False,
    "layer_replication": [],
    "layers_pattern": "",
    "layers_to_transform": [],
    "loftq_config": {},
    "lora_dtype": "AUTO",
    "lorap_emb_lr": 1e-06,
    "lorap_lr_ratio": 16.0,
    "merge_weights": False,
    "qalora_group_size": 16,
    "runtime_config": {"ephemeral_gpu_offload": False},
    "target_parameters": [],
    "use_qalora": False,
}
"""What PEFT and tools around it write where nothing is asked for; lora_dtype and lorap_* are ms-swift's."""

CASES = [(method, field) for method, fields in ACTIVE.items() for field in fields]


@pytest.fixture(scope="module")
def saved(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Method -> the folder that PEFT saved."""
    place = tmp_path_factory.mktemp("saved")
    for method, config in CONFIGS.items():
        made_by_peft(tiny_llama, place / method, config)
    return {method: place / method for method in CONFIGS}


@pytest.mark.parametrize("method", CONFIGS)
def test_every_field_at_its_default_passes(method: str, saved: dict[str, Path], tiny_llama: Path) -> None:
    document = json.loads((saved[method] / CONFIG).read_text())
    assert set(document) <= {*ACTIVE[method], "use_dora"}, "a field that the table does not know"
    assert pack(saved[method], base=str(tiny_llama), dry_run=True).manifest.method == method


@pytest.mark.parametrize(("method", "field"), CASES)
def test_an_active_field_is_read_or_named(
    method: str, field: str, saved: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    value, readable = ACTIVE[method][field]
    folder = shutil.copytree(saved[method], tmp_path / "theirs")
    set_options(folder, **{field: value})
    if readable:
        assert pack(folder, base=str(tiny_llama), dry_run=True).adopted
    elif field == "peft_type":
        assert refused("HK-METHOD-UNKNOWN", pack, folder, base=str(tiny_llama)).have == [value]
    elif field == "target_parameters":  # read where the base has experts: tests/peft/test_experts.py
        assert refused("HK-TARGET", pack, folder, base=str(tiny_llama)).have == value
    else:
        error = refused("HK-OPTION", pack, folder, base=str(tiny_llama))
        assert any(line.startswith(f"{field}: ") for line in error.have)


@pytest.mark.parametrize("field", NEUTRAL)
def test_a_neutral_value_of_any_release_passes(
    field: str, saved: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved["lora"], tmp_path / "theirs")
    set_options(folder, **{field: NEUTRAL[field]})
    assert pack(folder, base=str(tiny_llama), dry_run=True).adopted
