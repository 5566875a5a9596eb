"""Tensors named as training scripts save them: the adapter's name and wrappers are taken off, and it is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from theirs import made_by_peft, rewrite, tensors_of
from variants import logits, refused, say
from zoo import near

from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.pack import pack

P = "base_model.model."
NAMED = {
    "lora_A.weight": "lora_A.{}.weight",
    "lora_B.weight": "lora_B.{}.weight",
    "lora_embedding_A": "lora_embedding_A.{}",
    "lora_embedding_B": "lora_embedding_B.{}",
    "lora_magnitude_vector": "lora_magnitude_vector.{}.weight",
    "trainable_tokens_delta": "trainable_tokens_delta.{}",
    "lm_head.weight": "lm_head.modules_to_save.{}.weight",
}
"""Ends of the names in a file -> what PEFT calls the same tensor in a live model whose adapter has a name."""
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "rows": {"trainable_token_indices": {"embed_tokens": [3, 7]}},
}


def named(key: str, name: str) -> str:
    """`key` as the live model has it."""
    for end, live in NAMED.items():
        if key.endswith("." + end):
            return key.removesuffix(end) + live.format(name)
    return key


@pytest.mark.parametrize("name", ["default", "chat"])
@pytest.mark.parametrize("case", CONFIGS)
def test_the_adapters_name_is_taken_off(case: str, name: str, tiny_llama: Path, tmp_path: Path) -> None:
    model = made_by_peft(tiny_llama, tmp_path / "theirs", **CONFIGS[case])
    live = set(model.state_dict())
    files = tensors_of(tmp_path / "theirs")
    renamed = {named(key, name): value for key, value in files.items()}
    assert {named(key, "default") for key in files} <= live, "as PEFT names them"
    rewrite(tmp_path / "theirs", renamed)
    done = pack(tmp_path / "theirs", base=str(tiny_llama), out=tmp_path / "mine")
    count = len(renamed.keys() - files.keys())
    assert done.renamed == (f"{count} names of tensors held that of the adapter, {name!r}",)
    assert not any(name in key.split(".") for key in tensors_of(tmp_path / "mine"))
    near(logits(attach(load_base(tiny_llama), str(tmp_path / "mine"), base=str(tiny_llama))), logits(model))


WRAPPED: dict[str, tuple[Callable[[str], str], str]] = {
    "module": (lambda key: "module." + key, "held 'module.'"),
    "module twice": (lambda key: "module.module." + key, "held 'module.'"),
    "compiled": (lambda key: "_orig_mod." + key, "held '_orig_mod.'"),
    "compiled inside": (lambda key: key.replace(P, P + "_orig_mod."), "held '_orig_mod.'"),
    "sharded": (
        lambda key: "_fsdp_wrapped_module." + key.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
        "held '_fsdp_wrapped_module.'",
    ),
    "checkpointed": (
        lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
        "held '_checkpoint_wrapped_module.'",
    ),
    "no prefix": (lambda key: key.removeprefix(P), f"lacked {P!r}"),
    "two prefixes": (lambda key: P + key, f"held {P!r} more than once"),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_wrappers_are_taken_off(
    case: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrap, said = WRAPPED[case]
    model = made_by_peft(tiny_llama, tmp_path / "theirs")
    files = tensors_of(tmp_path / "theirs")
    rewrite(tmp_path / "theirs", {wrap(key): value for key, value in files.items()})
    done = say(capsys, "pack", tmp_path / "theirs", "--base", tiny_llama, "-o", tmp_path / "mine")
    assert f"renamed: {len(files)} names of tensors {said}" in done.out.splitlines()
    assert set(tensors_of(tmp_path / "mine")) == set(files)
    near(logits(attach(load_base(tiny_llama), str(tmp_path / "mine"), base=str(tiny_llama))), logits(model))


def test_all_of_it_at_once(tiny_llama: Path, tmp_path: Path) -> None:
    made_by_peft(tiny_llama, tmp_path / "theirs", modules_to_save=["lm_head"])
    files = tensors_of(tmp_path / "theirs")
    rewrite(tmp_path / "theirs", {"module._orig_mod." + named(key, "chat"): value for key, value in files.items()})
    done = pack(tmp_path / "theirs", base=str(tiny_llama))
    assert [line.rpartition(" ")[2] for line in done.renamed] == ["'_orig_mod.'", "'module.'", "'chat'"]
    assert set(tensors_of(tmp_path / "theirs")) == set(files)


def test_what_peft_wrote_is_not_renamed(tiny_llama: Path, tmp_path: Path) -> None:
    made_by_peft(tiny_llama, tmp_path / "theirs")
    assert pack(tmp_path / "theirs", base=str(tiny_llama)).renamed == ()


def test_two_adapters_in_one_file_are_refused_with_both_names(tiny_llama: Path, tmp_path: Path) -> None:
    model = made_by_peft(tiny_llama, tmp_path / "theirs")
    model.add_adapter("chat", peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    live = {key: value.contiguous() for key, value in model.state_dict().items() if ".lora_" in key}
    rewrite(tmp_path / "theirs", live)
    error = refused("HK-KEYS", pack, tmp_path / "theirs", base=str(tiny_llama))
    assert error.have == ["chat: 8 tensors", "default: 8 tensors"]


def test_two_tensors_of_one_meaning_are_refused_with_both_names(tiny_llama: Path, tmp_path: Path) -> None:
    made_by_peft(tiny_llama, tmp_path / "theirs")
    files = tensors_of(tmp_path / "theirs")
    key = min(files)
    rewrite(tmp_path / "theirs", {**files, f"module.{key}": files[key].clone()})
    assert refused("HK-KEYS", pack, tmp_path / "theirs", base=str(tiny_llama)).have == [key, f"module.{key}"]


def test_a_tensor_without_meaning_keeps_its_name_in_the_refusal(tiny_llama: Path, tmp_path: Path) -> None:
    made_by_peft(tiny_llama, tmp_path / "theirs")
    files = tensors_of(tmp_path / "theirs")
    rewrite(tmp_path / "theirs", {**files, "module.step": files[min(files)].clone()})
    assert refused("HK-KEYS", pack, tmp_path / "theirs", base=str(tiny_llama)).have == ["module.step"]
