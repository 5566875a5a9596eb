"""Nothing of a base is made up: its files hold each weight of the model once, in its shape, or loading is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from variants import refused, rows_file

from hubkit.artifact.folder import open_adapter
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.generate import generate
from hubkit.verbs.train import train

UP, HEAD = "model.layers.0.mlp.up_proj.weight", "lm_head.weight"


@pytest.fixture
def changed(tiny_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the tiny Llama with other tensors, and other fields in its config."""

    def make(change: Callable[[dict[str, Tensor]], object], **config: object) -> Path:
        folder = tmp_path / "base"
        shutil.copytree(tiny_llama, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        own = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**own, **config}))
        return folder

    return make


def without(*names: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def classifier(tensors: dict[str, Tensor]) -> None:
    tensors["score.weight"] = tensors.pop(HEAD)[:3].clone()


LIES: dict[str, tuple[Callable[[dict[str, Tensor]], object], dict[str, object], list[str]]] = {
    "a weight is missing": (without(UP), {}, [f"{UP}: not in"]),
    "no head": (without(HEAD), {"architectures": ["LlamaModel"]}, [f"{HEAD}: not in"]),
    "a classifier": (
        classifier,
        {"architectures": ["LlamaForSequenceClassification"]},
        [f"{HEAD}: not in", "score.weight: in"],
    ),
    "one too many": (lambda t: t.update({"model.extra.weight": torch.ones(2)}), {}, ["model.extra.weight: in"]),
    "another shape": (lambda t: t.update({UP: torch.ones(20, 16)}), {}, [f"{UP}: "]),
    "fewer layers promised": (
        lambda t: None,
        {"num_hidden_layers": 1},
        ["model.layers.1.input_layernorm", *(8 * ["model.layers.1."])],
    ),
}


@pytest.mark.parametrize("case", LIES)
@pytest.mark.parametrize("codec", [None, "nf4/64/double"])
def test_each_lie_is_refused_by_name(case: str, codec: str | None, changed: Callable[..., Path]) -> None:
    change, config, want = LIES[case]
    error = refused("HK-BASE-INCOMPLETE", load_base, changed(change, **config), None, codec)
    assert len(error.have) == len(want)
    assert all(have.startswith(start) for have, start in zip(error.have, want, strict=True))


def test_more_layers_than_the_files_hold(changed: Callable[..., Path]) -> None:
    error = refused("HK-BASE-INCOMPLETE", load_base, changed(lambda t: None, num_hidden_layers=3))
    assert len(error.have) == 9
    assert all(have.startswith("model.layers.2.") for have in error.have)


def test_buffers_that_models_compute_count_on_neither_side(changed: Callable[..., Path]) -> None:
    def old(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)

    load_base(changed(old))


def test_a_tied_head_is_not_missing(changed: Callable[..., Path]) -> None:
    load_base(changed(without(HEAD), tie_word_embeddings=True))


def test_the_override_goes_on_and_is_recorded(changed: Callable[..., Path], tmp_path: Path) -> None:
    base, rows = changed(without(UP)), rows_file(tmp_path / "rows.jsonl")
    how: dict[str, Any] = {"steps": 1, "config": {"targets": "q_proj"}}
    refused("HK-BASE-INCOMPLETE", train, base, rows, tmp_path / "a", **how)
    assert not (tmp_path / "a").exists()
    train(base, rows, tmp_path / "a", **how, allow_incomplete_base=True)
    assert open_adapter(tmp_path / "a").manifest.overrides == ("allow-incomplete-base",)
    refused("HK-BASE-INCOMPLETE", generate, "hello", base=base)
    assert generate("hello", base=base, max_new_tokens=1, allow_incomplete_base=True).overrides == (
        "allow-incomplete-base",
    )
