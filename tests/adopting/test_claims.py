"""What PEFT's configuration says of base and modules is held against both, as PEFT itself never does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from theirs import made_by_peft, rewrite, set_options, tensors_of
from variants import logits, refused, say

from hubkit.documents.manifest import Manifest
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.pack import pack

QV = ("q_proj", "v_proj")


@pytest.fixture(scope="session")
def deep_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as `tiny_llama`, of four layers."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(tiny_llama, num_hidden_layers=4)
    folder = tmp_path_factory.mktemp("deep") / "llama"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


def test_a_shallow_adapter_is_refused_with_what_is_missing(tiny_llama: Path, deep_llama: Path, tmp_path: Path) -> None:
    made_by_peft(tiny_llama, tmp_path / "theirs")
    error = refused("HK-KEYS", pack, tmp_path / "theirs", base=str(deep_llama))
    missing = [f"model.layers.{n}.self_attn.{name}" for n in (2, 3) for name in QV]
    assert error.want == [f"missing: {name}" for name in missing]


def test_allowed_it_is_recorded_and_computes_what_peft_does(
    tiny_llama: Path, deep_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_by_peft(tiny_llama, tmp_path / "theirs")
    line = ("pack", tmp_path / "theirs", "--base", deep_llama, "-o", tmp_path / "mine", "--allow-partial")
    assert "override: allow-partial" in say(capsys, *line).out
    assert Manifest.read(tmp_path / "mine").overrides == ("allow-partial",)
    theirs = logits(peft.PeftModel.from_pretrained(load_base(deep_llama), str(tmp_path / "theirs")))
    mine = logits(attach(load_base(deep_llama), str(tmp_path / "mine"), base=str(deep_llama)))
    assert (mine - theirs).abs().max() <= 1e-5


def test_an_override_that_was_not_needed_is_not_recorded(tiny_llama: Path, tmp_path: Path) -> None:
    made_by_peft(tiny_llama, tmp_path / "theirs")
    done = pack(tmp_path / "theirs", base=str(tiny_llama), allow_partial=True, allow_base_mismatch=True)
    assert done.manifest.overrides == ()


def test_half_of_a_file_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    made_by_peft(tiny_llama, tmp_path / "theirs")
    whole = tensors_of(tmp_path / "theirs")
    for lost in ("v_proj", "layers.1"):
        rewrite(tmp_path / "theirs", {key: value for key, value in whole.items() if f".{lost}." not in key})
        error = refused("HK-KEYS", pack, tmp_path / "theirs", base=str(tiny_llama))
        assert len(error.want) == 2
        assert all(f".{lost}" in line for line in error.want)


def test_a_target_that_matches_nothing_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    made_by_peft(tiny_llama, tmp_path / "theirs")
    set_options(tmp_path / "theirs", target_modules=[*QV, "FAKE_proj", "query"])
    error = refused("HK-TARGET", pack, tmp_path / "theirs", base=str(tiny_llama))
    assert error.have == ["FAKE_proj", "query"]
    done = pack(tmp_path / "theirs", base=str(tiny_llama), allow_partial=True)
    assert (done.manifest.overrides, done.manifest.config["targets"]) == (("allow-partial",), list(QV))


CHOICES: dict[str, dict[str, Any]] = {
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "one layer by its pattern": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "a layer in full": {"target_modules": ["model.layers.0.self_attn.q_proj", "o_proj"], "layers_to_transform": [1]},
    "without some": {"target_modules": "all-linear", "exclude_modules": ["v_proj", "model.layers.0.mlp.up_proj"]},
    "without an expression": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0.*"},
    "an expression": {"target_modules": r".*\.layers\.[02]\.(mlp\.gate_proj|self_attn\.o_proj)"},
    "beside a head": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "table and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
}


@pytest.mark.parametrize("case", CHOICES)
def test_what_peft_chooses_is_what_is_promised(case: str, deep_llama: Path, tmp_path: Path) -> None:
    made_by_peft(deep_llama, tmp_path / "theirs", **CHOICES[case])
    assert pack(tmp_path / "theirs", base=str(deep_llama), out=tmp_path / "mine").manifest.overrides == ()
    whole = tensors_of(tmp_path / "theirs")
    last = max(key.partition(".lora_")[0] for key in whole if ".lora_" in key)
    rewrite(tmp_path / "theirs", {key: value for key, value in whole.items() if not key.startswith(last)})
    if any(".lora_" in key for key in tensors_of(tmp_path / "theirs")):
        error = refused("HK-KEYS", pack, tmp_path / "theirs", base=str(deep_llama))
        assert error.want == [f"missing: {last.removeprefix('base_model.model.')}"]


COMMIT, OTHER = "0123456789" * 4, "9876543210" * 4
DECLARED: dict[str, tuple[dict[str, Any], bool]] = {
    "the same": ({"base_model_name_or_path": "ana/base"}, True),
    "in other letters": ({"base_model_name_or_path": "Ana/Base"}, True),
    "at a branch": ({"base_model_name_or_path": "ana/base", "revision": "main"}, True),
    "a path": ({"base_model_name_or_path": "/home/ana/models/other"}, True),
    "a path from here": ({"base_model_name_or_path": "./models/other"}, True),
    "a path of many steps": ({"base_model_name_or_path": "out/models/other"}, True),
    "one word": ({"base_model_name_or_path": "gpt2"}, True),
    "nothing": ({"base_model_name_or_path": None}, True),
    "another": ({"base_model_name_or_path": "ana/other"}, False),
    "another at a branch": ({"base_model_name_or_path": "ben/base@main"}, False),
    "another commit": ({"base_model_name_or_path": f"ana/base@{COMMIT}"}, False),
    "another commit apart": ({"base_model_name_or_path": "ana/base", "revision": COMMIT}, False),
}


@pytest.mark.parametrize("case", DECLARED)
def test_the_declared_base_is_compared_by_what_is_known(
    case: str, tiny_llama: Path, published_base: str, tmp_path: Path, registry: str
) -> None:
    from hubkit.registry.opening import open_registry

    commit = open_registry(None, registry).resolve(published_base, None)
    revision = commit if "commit" in case else None
    options, same = DECLARED[case]
    made_by_peft(tiny_llama, tmp_path / "theirs")
    set_options(tmp_path / "theirs", **options)
    assert pack(tmp_path / "theirs", base=str(tiny_llama), dry_run=True).manifest.overrides == (), (
        "a folder says nothing"
    )
    if same:
        assert pack(tmp_path / "theirs", base=published_base, revision=revision).manifest.overrides == ()
        return
    error = refused("HK-BASE-MISMATCH", pack, tmp_path / "theirs", base=published_base, revision=revision)
    assert error.want[0].partition("@")[0] == options["base_model_name_or_path"].partition("@")[0]
    done = pack(tmp_path / "theirs", base=published_base, revision=revision, allow_base_mismatch=True)
    assert done.manifest.overrides == ("allow-base-mismatch",)


def test_the_declared_revision_of_the_base_given_is_asked_for(
    tiny_llama: Path, published_base: str, tmp_path: Path
) -> None:
    made_by_peft(tiny_llama, tmp_path / "theirs")
    set_options(tmp_path / "theirs", base_model_name_or_path=published_base, revision=OTHER)
    assert OTHER in str(refused("HK-NO-REVISION", pack, tmp_path / "theirs", base=published_base))
