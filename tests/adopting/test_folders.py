"""Folders as people have them: several adapters, Trainer's checkpoints, what MLX, torchtune, kohya, diffusers write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from theirs import CONFIG, WEIGHTS, made_by_peft, rewrite
from variants import refused, say, tree

from hubkit.tensors.live.loading import load_base
from hubkit.verbs.pack import pack


def adapters_in(folder: Path, base: Path, *names: str) -> None:
    """Several adapters of one model, as PEFT saves them."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    model = peft.get_peft_model(load_base(base), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.save_pretrained(folder)


def test_adapters_in_folders_of_their_own_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    adapters_in(tmp_path / "out", tiny_llama, "chat", "sql")
    assert not (tmp_path / "out" / CONFIG).exists(), "as PEFT does it"
    error = refused("HK-NOT-ADAPTER", pack, tmp_path / "out", base=str(tiny_llama))
    assert error.have == [str(tmp_path / "out" / "chat"), str(tmp_path / "out" / "sql")]
    assert pack(tmp_path / "out" / "chat", base=str(tiny_llama)).manifest.name == "chat"


def test_the_default_adapter_leaves_the_others_behind(tiny_llama: Path, tmp_path: Path) -> None:
    adapters_in(tmp_path / "out", tiny_llama, "default", "sql")
    before = tree(tmp_path / "out")
    assert refused("HK-EXTRA-FILES", pack, tmp_path / "out", base=str(tiny_llama)).have == ["sql/"]
    done = pack(tmp_path / "out", base=str(tiny_llama), out=tmp_path / "mine")
    assert done.left_out == ("sql/",)
    assert not (tmp_path / "mine" / "sql").exists()
    assert tree(tmp_path / "out") == before


def trained(base: Path, folder: Path) -> None:
    """A run of transformers' own Trainer on a model of PEFT, one checkpoint after each of two steps."""
    from transformers import Trainer, TrainingArguments

    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    model = peft.get_peft_model(load_base(base), config)
    rows = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)}] * 2
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model()


def test_a_checkpoint_of_trainer_leaves_its_states_behind(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tiny_llama, tmp_path / "run")
    folder, states = tmp_path / "run" / "checkpoint-2", ["optimizer.pt", "rng_state.pth", "scheduler.pt"]
    states += ["trainer_state.json", "training_args.bin"]
    assert set(states) <= set(tree(folder)), "as Trainer writes them"
    assert refused("HK-EXTRA-FILES", pack, folder, base=str(tiny_llama)).have == states
    done = say(capsys, "pack", folder, "--base", tiny_llama, "-o", tmp_path / "mine")
    assert [line for line in done.out.splitlines() if line.startswith("left out")] == [f"left out: {s}" for s in states]
    assert set(tree(tmp_path / "mine")) == {CONFIG, WEIGHTS, "README.md", "hubkit.json", "tensors.json"}
    run = pack(tmp_path / "run", base=str(tiny_llama), out=tmp_path / "whole")
    assert {"checkpoint-1/", "checkpoint-2/"} <= set(run.left_out)
    assert set(tree(tmp_path / "whole")) == set(tree(tmp_path / "mine"))


def test_checkpoints_alone_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        made_by_peft(tiny_llama, tmp_path / "run" / f"checkpoint-{step}")
    error = refused("HK-NOT-ADAPTER", pack, tmp_path / "run", base=str(tiny_llama))
    assert error.have == [str(tmp_path / "run" / f"checkpoint-{step}") for step in (1, 2)]
    assert error.fix == f"hubkit pack {tmp_path / 'run' / 'checkpoint-1'}"


MLX_CONFIG = {
    "fine_tune_type": "lora",
    "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0},
    "num_layers": 16,
}
TORCHTUNE_CONFIG = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "peft_type": "LORA"}
KOHYA_KEY = "lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight"
DIFFUSERS_KEY = "unet.down_blocks.1.attentions.0.to_q.lora.down.weight"
FOREIGN: dict[str, tuple[Mapping[str, Any] | None, str, str, str]] = {
    "MLX": (MLX_CONFIG, "adapters.safetensors", "model.layers.0.self_attn.q_proj.lora_a", "mlx_lm.fuse"),
    "MLX without a configuration": (None, "adapters.safetensors", "layers.0.lora_a", "mlx_lm.fuse"),
    "torchtune": (None, "adapter_0.pt", "", "FullModelHFCheckpointer"),
    "torchtune and its configuration": (TORCHTUNE_CONFIG, "adapter_model.pt", "", "FullModelHFCheckpointer"),
    "kohya": (None, "my-style.safetensors", KOHYA_KEY, "merge_lora.py"),
    "kohya, the text": (None, "style.safetensors", "lora_te_text_model_mlp_fc1.lora_up.weight", "merge_lora.py"),
    "diffusers": (None, "pytorch_lora_weights.safetensors", DIFFUSERS_KEY, "load_lora_weights"),
}
"""Configuration, file, name of a tensor in it (a pickle without one), and what the way to convert says."""


@pytest.mark.parametrize("case", FOREIGN)
def test_another_tools_folder_is_called_what_it_is(
    case: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, name, key, way = FOREIGN[case]
    folder = tmp_path / "theirs"
    folder.mkdir()
    if config is not None:
        (folder / CONFIG).write_text(json.dumps(config))
    if key:
        rewrite(folder, {key: torch.ones(2, 2)})
        (folder / WEIGHTS).rename(folder / name)
    else:
        torch.save({"a": torch.ones(2)}, folder / name)
    before = tree(folder)
    error = refused("HK-FOREIGN", pack, folder, base=str(tiny_llama))
    assert case.partition(" ")[0].rstrip(",") in error.what
    assert way in error.fix
    assert say(capsys, "pack", folder, "--base", tiny_llama).refusal() == "HK-FOREIGN"
    assert tree(folder) == before


def test_peft_beside_another_tools_files_is_adopted(tiny_llama: Path, tmp_path: Path) -> None:
    """torchtune writes PEFT's form beside its own."""
    made_by_peft(tiny_llama, tmp_path / "theirs")
    torch.save({"a": torch.ones(2)}, tmp_path / "theirs" / "adapter_model.pt")
    shutil.copy(tmp_path / "theirs" / "adapter_model.pt", tmp_path / "theirs" / "adapter_0.pt")
    done = pack(tmp_path / "theirs", base=str(tiny_llama), out=tmp_path / "mine")
    assert done.left_out == ("adapter_0.pt", "adapter_model.pt")
