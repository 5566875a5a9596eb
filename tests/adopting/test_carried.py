"""PEFT's other types: bound to their base, verified, published and read by PEFT again, where no method can run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from theirs import CONFIG, WEIGHTS, made_by_peft, rewrite, set_options, tensors_of
from variants import logits, other_weights, refused, say

from hubkit.artifact.carried import types
from hubkit.documents.manifest import Manifest
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.compose import compose
from hubkit.verbs.merge import merge
from hubkit.verbs.pack import pack
from hubkit.verbs.pull import pull
from hubkit.verbs.push import push
from hubkit.verbs.verify import verify

RUN_HERE = {"LORA", "PREFIX_TUNING", "PROMPT_TUNING"}
REFUSED = {"XLORA"}
Q: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {**Q, "total_step": 10},
    "ADAPTION_PROMPT": {"task_type": "CAUSAL_LM", "adapter_len": 2, "adapter_layers": 1},
    "BEFT": Q,
    "BOFT": {**Q, "boft_block_size": 2},
    "C3A": {**Q, "block_size": 2},
    "CARTRIDGE": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    "CPT": {
        "task_type": "CAUSAL_LM",
        "cpt_token_ids": [5, 6],
        "cpt_mask": [1, 1],
        "cpt_tokens_type_mask": [1, 1],
    },
    "DELORA": Q,
    "FOURIERFT": {**Q, "n_frequency": 5},
    "FROD": Q,
    "GRALORA": Q,
    "HIRA": Q,
    "HRA": Q,
    "IA3": {**Q, "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"task_type": "CAUSAL_LM", "target_modules": ["input_layernorm"]},
    "LOHA": Q,
    "LOKR": Q,
    "MISS": {**Q, "r": 2},
    "MULTITASK_PROMPT_TUNING": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "num_tasks": 2},
    "OFT": {**Q, "oft_block_size": 2, "modules_to_save": ["lm_head"]},
    "POLY": {**Q, "n_tasks": 1},
    "P_TUNING": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    "RANDLORA": Q,
    "SHIRA": {**Q, "r": 2},
    "SUPERTUNING": Q,
    "TRAINABLE_TOKENS": {"task_type": "CAUSAL_LM", "token_indices": [3, 7]},
    "UNILORA": Q,
    "VBLORA": {**Q, "vector_length": 4, "num_vectors": 8},
    "VERA": Q,
}
CONFIGS = {kind.value: made for kind, made in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
CASES = [kind for kind in OPTIONS if kind in CONFIGS]
RUN = [kind for kind in CASES if kind not in ("MULTITASK_PROMPT_TUNING", "POLY")]  # those ask for task_ids


def made(kind: str, base: Path, folder: Path) -> Any:
    return made_by_peft(base, folder, CONFIGS[kind](**OPTIONS[kind]))


def test_every_type_of_the_installed_peft_is_known() -> None:
    assert {kind.value for kind in peft.PeftType} - RUN_HERE - REFUSED <= set(types())


@pytest.mark.parametrize("kind", CASES)
def test_a_type_is_packed_verified_and_given_back_as_it_is(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    made(kind, tiny_llama, tmp_path / "theirs")
    done = pack(tmp_path / "theirs", base=str(tiny_llama), out=tmp_path / "mine")
    assert (done.manifest.method, done.manifest.overrides, done.renamed) == (f"peft:{kind}", (), ())
    assert (tmp_path / "mine" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    theirs, mine = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("theirs", "mine"))
    assert {key for key in theirs if theirs[key] != mine[key]} <= {"base_model_name_or_path"}
    assert str(tiny_llama.parent) not in (tmp_path / "mine" / CONFIG).read_text()
    assert verify(tmp_path / "mine", base=tiny_llama).base
    assert pack(tmp_path / "mine").digest == done.digest
    if kind in RUN:
        one, two = (
            peft.PeftModel.from_pretrained(load_base(tiny_llama), str(tmp_path / n)) for n in ("theirs", "mine")
        )
        assert torch.equal(logits(one.eval()), logits(two.eval()))


@pytest.fixture
def carried(tiny_llama: Path, tmp_path: Path) -> Path:
    made("LOHA", tiny_llama, tmp_path / "theirs")
    pack(tmp_path / "theirs", base=str(tiny_llama), out=tmp_path / "mine")
    return tmp_path / "mine"


def test_it_is_published_and_pulled(carried: Path, registry: str, tmp_path: Path) -> None:
    push(carried, "ana/loha", registry=registry)
    pulled = pull("ana/loha", registry=registry)
    assert Manifest.read(pulled.path).method == "peft:LOHA"


def test_what_would_run_it_says_why_not(
    carried: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    for call in (
        lambda: attach(load_base(tiny_llama), carried, base=tiny_llama),
        lambda: merge(tiny_llama, carried, new),
        lambda: compose(carried, new),
    ):
        assert "PEFT's type LOHA" in refused("HK-METHOD-UNKNOWN", call).what
    for line in (
        ("merge", carried, "--base", tiny_llama, "-o", new),
        ("generate", "hi", "--base", tiny_llama, "--adapter", carried),
        ("export", carried, "-o", new),
    ):
        assert say(capsys, *line).refusal() == "HK-METHOD-UNKNOWN", line
    assert not new.exists()


def test_it_is_bound_to_its_base(carried: Path, tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    other = other_weights(tiny_llama, tmp_path / "other")
    refused("HK-BASE-MISMATCH", verify, carried, base=other)
    refused("HK-BASE-MISMATCH", pack, carried, base=str(other))
    error = refused("HK-KEYS", pack, tmp_path / "theirs", base=str(tiny_gpt2))
    assert error.have == sorted(tensors_of(tmp_path / "theirs"))


def test_its_tensors_are_looked_at(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    made("LOHA", tiny_llama, folder)
    whole = tensors_of(folder)
    key = min(whole)
    for changed, code, named in (
        ({**whole, key: whole[key] * float("nan")}, "HK-NAN", key),
        ({**whole, key: whole[key].to(torch.float8_e5m2)}, "HK-DTYPE", key),
        ({**whole, "step": torch.ones(1)}, "HK-KEYS", "step"),
        ({}, "HK-KEYS", ""),
    ):
        rewrite(folder, changed)
        assert named in "".join(refused(code, pack, folder, base=str(tiny_llama)).have)
    rewrite(folder, {key: value for key, value in whole.items() if ".layers.1." not in key})
    assert "missing: model.layers.1.self_attn.q_proj" in refused("HK-KEYS", pack, folder, base=str(tiny_llama)).want
    rewrite(folder, whole)
    set_options(folder, target_modules=["q_proj", "down_proj", "FAKE_proj"])
    assert refused("HK-TARGET", pack, folder, base=str(tiny_llama)).have == ["FAKE_proj"]
