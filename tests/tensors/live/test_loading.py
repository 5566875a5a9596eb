"""The identity of a live model is that of its files, and follows its values."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from variants import refused

from hubkit.artifact.identity.digest import fingerprint_folder
from hubkit.errors import HubkitError
from hubkit.methods.suite import tiny_model
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.tokenizer import load_tokenizer
from hubkit.tensors.live import loading as live
from hubkit.tensors.live.loading import fingerprint_model, load_base


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_equal_to_its_folder_in_stored_and_wider_dtype(family: str, stored: str, tmp_path: Path) -> None:
    tiny_model(family).to(getattr(torch, stored)).save_pretrained(tmp_path, max_shard_size="8KB")  # type: ignore[operator]
    want = fingerprint_folder(tmp_path)
    for dtype in (None, "float32"):
        have = fingerprint_model(load_base(tmp_path, dtype))
        assert have.fingerprint.weights == want.fingerprint.weights
        assert have.tensors == want.tensors
        assert have.fingerprint.config == want.fingerprint.config
        if dtype is None:
            assert have.fingerprint.layout == want.fingerprint.layout


def test_a_narrower_dtype_is_another_base(tiny_llama: Path) -> None:
    want = fingerprint_folder(tiny_llama).fingerprint.weights
    assert fingerprint_model(load_base(tiny_llama, "bfloat16")).fingerprint.weights != want


def test_tokenizer_and_template_are_compared_when_given(tiny_llama: Path) -> None:
    want = fingerprint_folder(tiny_llama).fingerprint
    model = load_base(tiny_llama)
    bare = fingerprint_model(model).fingerprint
    assert (bare.tokenizer, bare.template) == (None, None)
    full = fingerprint_model(model, load_tokenizer(tiny_llama)).fingerprint
    assert (full.tokenizer, full.template) == (want.tokenizer, want.template)
    assert full.source == str(tiny_llama)


def test_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    first = fingerprint_model(model)
    monkeypatch.setattr(live, "_digest", lambda item: pytest.fail("hashed again"))
    assert fingerprint_model(model) is first
    model.requires_grad_(False)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))
    assert fingerprint_model(model) is first


def add(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.add_(0.5)


def through_data(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data += 0.5


def replaced(model: Any) -> None:
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach() * 2)


def cast(model: Any) -> None:
    model.to(torch.bfloat16)


def merged_by_peft(model: Any) -> None:
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.merge_and_unload()


@pytest.mark.parametrize("change", [add, through_data, replaced, cast, merged_by_peft])
def test_a_change_in_place_is_noticed(change: Any) -> None:
    model = tiny_model("llama")
    before = fingerprint_model(model).fingerprint.weights
    change(model)
    assert fingerprint_model(model).fingerprint.weights != before


def test_a_model_made_in_inference_mode_has_an_identity_too() -> None:
    with torch.inference_mode():
        model = tiny_model("llama")
    assert fingerprint_model(model).fingerprint.weights == fingerprint_model(tiny_model("llama")).fingerprint.weights


def test_models_are_not_kept_alive() -> None:
    model = tiny_model("llama")
    fingerprint_model(model)
    before = len(live._KNOWN)
    del model
    gc.collect()
    assert len(live._KNOWN) < before


def test_loading_refuses_by_name(tmp_path: Path, tiny_llama: Path) -> None:
    for call, code in ((load_base, "HK-BASE-MISSING"), (load_tokenizer, "HK-TOKENIZER-LOAD")):
        with pytest.raises(HubkitError, match=code):
            call(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(HubkitError, match="HK-BASE-LOAD"):
        load_base(tmp_path)
    with pytest.raises(HubkitError, match="HK-DTYPE"):
        load_base(tiny_llama, "int8")
    model = load_base(tiny_llama)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_without_transformers(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (load_base, load_tokenizer):
        assert "hubkit-adapters[transformers]" in refused("HK-EXTRA", call, tiny_llama).fix


def test_a_folder_of_which_more_is_made_than_its_weights_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """transformers puts an adapter that lies beside the weights onto them, and runs the code that a config names."""
    beside = Path(shutil.copytree(tiny_llama, tmp_path / "beside"))
    peft = get_peft_model(load_base(tiny_llama), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    peft.save_pretrained(beside)
    error = refused("HK-BASE-UNSAFE", load_base, beside)
    assert "adapter_config.json" in str(error.have)
    for word in ("evil/kernel", {"": "evil/kernel"}):
        folder = Path(shutil.copytree(tiny_llama, tmp_path / f"kernel{len(str(word))}"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": word}))
        for codec in (None, "nf4/64/double"):
            assert "evil/kernel" in str(refused("HK-BASE-UNSAFE", load_base, folder, codec=codec).have)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_a_tied_head_in_front_of_its_table_is_known_by_its_files(kind: str, tmp_path: Path) -> None:
    """XLM-RoBERTa makes its head first; files hold the table all the same."""
    config = transformers.CONFIG_MAPPING[kind](
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert fingerprint_model(model).tensors == fingerprint_folder(tmp_path).tensors
    files, made = Base.from_folder(tmp_path).sites, Base.from_model(model).sites
    assert {n: (s.tensor, s.tied) for n, s in files.items()} == {n: (s.tensor, s.tied) for n, s in made.items()}
