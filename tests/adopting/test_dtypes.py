"""Adapters in every dtype that a file can hold: read as they are, or refused by the names of their tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from theirs import made_by_peft, rewrite, tensors_of
from variants import logits, refused, say
from zoo import FP32, near

from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.pack import pack

READ: dict[str, tuple[torch.dtype, ...]] = {
    "float64": (torch.float64,),
    "float32": (torch.float32,),
    "float16": (torch.float16,),
    "bfloat16": (torch.bfloat16,),
    "mixed": (torch.bfloat16, torch.float32, torch.float16, torch.float64),
}


def in_dtypes(folder: Path, *dtypes: torch.dtype) -> dict[str, torch.Tensor]:
    """The saved tensors in these dtypes, in turn; the copies of base weights among them, too."""
    tensors = {k: v.to(dtypes[n % len(dtypes)]) for n, (k, v) in enumerate(sorted(tensors_of(folder).items()))}
    rewrite(folder, tensors)
    return tensors


@pytest.mark.parametrize("case", READ)
@pytest.mark.parametrize("options", [{"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_what_computes_is_read_as_it_is(case: str, options: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    made_by_peft(tiny_llama, tmp_path / "theirs", **options)
    stored = in_dtypes(tmp_path / "theirs", *READ[case])
    pack(tmp_path / "theirs", base=str(tiny_llama), out=tmp_path / "mine")
    kept = tensors_of(tmp_path / "mine")
    assert kept.keys() == {key for key in stored if "base_layer" not in key}
    rewrite(
        tmp_path / "theirs", {key: stored[key] for key in kept}
    )  # PEFT puts copies into the base, rounded as they are
    assert all(torch.equal(kept[key], stored[key]) and kept[key].dtype == stored[key].dtype for key in kept)
    theirs = peft.PeftModel.from_pretrained(load_base(tiny_llama), str(tmp_path / "theirs"))
    mine = attach(load_base(tiny_llama), str(tmp_path / "mine"), base=str(tiny_llama))
    near(logits(mine), logits(theirs).to(torch.float32), FP32)


OTHERS = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "bool": torch.bool,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
    "complex64": torch.complex64,
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_does_not_is_refused(
    case: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_by_peft(tiny_llama, tmp_path / "theirs")
    tensors = tensors_of(tmp_path / "theirs")
    key = max(tensors)
    rewrite(tmp_path / "theirs", {**tensors, key: tensors[key].to(OTHERS[case])})
    assert say(capsys, "pack", tmp_path / "theirs", "--base", tiny_llama).refusal() == "HK-DTYPE"
    assert key in "".join(refused("HK-DTYPE", pack, tmp_path / "theirs", base=str(tiny_llama)).have)


def test_a_rounded_copy_must_be_the_bases_own_rounded(tiny_llama: Path, tmp_path: Path) -> None:
    made_by_peft(tiny_llama, tmp_path / "theirs", target_modules=["embed_tokens"])
    tensors = in_dtypes(tmp_path / "theirs", torch.bfloat16)
    (copy,) = (key for key in tensors if "base_layer" in key)
    tensors[copy].view(torch.int16)[3, 3] += 1
    rewrite(tmp_path / "theirs", tensors)
    assert copy in refused("HK-KEYS", pack, tmp_path / "theirs", base=str(tiny_llama)).where


def test_an_adapter_of_ours_in_float8_is_refused_wherever_it_is_read(adapter: Path, tiny_llama: Path) -> None:
    """Its manifest does not vouch for the dtype."""
    in_dtypes(adapter, torch.float8_e4m3fn)
    error = refused("HK-DTYPE", pack, adapter)
    assert len(error.have) == len(tensors_of(adapter))
