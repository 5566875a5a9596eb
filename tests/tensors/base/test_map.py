"""The map of names between a base's files and its live modules: what is wrong in it is found, what it lacks refused.

The law is that a live model is, tensor by tensor and site by site, what its files hold. It is only worth something if a
fault in the map breaks it, so faults are put in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers
from bases.architectures import save
from making import make_adapter
from torch import Tensor, nn
from variants import logits, refused, rows_file

import hubkit
from hubkit.artifact.identity.digest import fingerprint_folder
from hubkit.compat import transformers_names
from hubkit.tensors.base import base as base_module
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.blocks import Block
from hubkit.tensors.live import loading
from hubkit.tensors.live.loading import load_base

OLDER = transformers.__version__.startswith("4.")
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "mixtral"
    save("mixtral", folder)
    return folder


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its names begin otherwise in the files than in the model."""
    folder = tmp_path_factory.mktemp("bases") / "gemma3"
    save("gemma3", folder)
    return folder


def law(folder: Path) -> None:
    """The live model of `folder` is what its files hold."""
    model = load_base(folder)
    assert loading.fingerprint_model(model).tensors == fingerprint_folder(folder).tensors
    files, live = Base.from_folder(folder).sites, Base.from_model(model).sites
    experts = {name for name in files if ".experts." in name}
    assert {n: (s.kind, s.shape, s.tied, s.tensor) for n, s in files.items() if n not in experts} == {
        n: (s.kind, s.shape, s.tied, s.tensor) for n, s in live.items() if n not in experts
    }


def exchanged(state: State) -> State:
    one, other = (f"model.layers.0.block_sparse_moe.experts.{n}.w1.weight" for n in (0, 1))
    return {**state, one: state[other], other: state[one]}


def turned(state: State) -> State:
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    return {**state, name: state[name].t().contiguous()}


def moved(state: State) -> State:
    name = "model.layers.0.self_attn.q_proj.weight"
    return {**state, name: state[name.replace(".0.", ".1.")]}


@pytest.mark.parametrize("fault", [exchanged, turned, moved])
def test_a_fault_among_the_tensors_is_found(
    fault: Callable[[State], State], mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    law(mixtral)
    right = transformers_names.as_in_files

    def wrong(model: nn.Module, state: Mapping[str, Tensor]) -> State:
        return fault({**right(model, state)})

    monkeypatch.setattr(loading, "as_in_files", wrong)
    with pytest.raises(AssertionError):
        law(mixtral)


def test_a_rename_that_is_missing_is_found(gemma3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the law, and by a user: what was trained would have no home."""
    law(gemma3)
    adapter = make_adapter(tmp_path / "a", gemma3, targets=["q_proj"])
    right = transformers_names.file_naming

    def wrong(model: nn.Module) -> Callable[[str], str | None]:
        naming = right(model)
        return lambda name: name if ".layers.1." in name else naming(name)

    monkeypatch.setattr(base_module, "file_naming", wrong)
    with pytest.raises(AssertionError):
        law(gemma3)
    refused("HK-KEYS", hubkit.attach, load_base(gemma3), str(adapter), base=gemma3)
    rows = rows_file(tmp_path / "rows.jsonl")
    refused("HK-BASE-MODULES", hubkit.train, gemma3, rows, tmp_path / "b", steps=1, config={"targets": ["q_proj"]})
    assert not (tmp_path / "b").exists()


@pytest.mark.skipif(OLDER, reason="the table of transformers 5")
def test_a_conversion_that_names_nothing_changes_nothing(tiny_llama: Path) -> None:
    from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming

    model: Any = load_base(tiny_llama)
    nothing = WeightConverter(["no.such.w1", "no.such.w2"], "no.such.both", operations=[Concatenate(0)])
    model._weight_conversions = [WeightRenaming("nothing.of.that.name", "nothing.else"), nothing]
    assert loading.fingerprint_model(model).tensors == fingerprint_folder(tiny_llama).tensors
    assert Base.from_model(model).sites.keys() == Base.from_folder(tiny_llama).sites.keys()


@pytest.mark.skipif(not OLDER, reason="the table of transformers 4")
def test_a_table_of_a_class_that_names_nothing_changes_nothing(tiny_llama: Path) -> None:
    model: Any = load_base(tiny_llama)
    type(model)._checkpoint_conversion_mapping = {"^nothing.of.that.name": "nothing.else"}
    try:
        assert loading.fingerprint_model(model).tensors == fingerprint_folder(tiny_llama).tensors
        assert Base.from_model(model).sites.keys() == Base.from_folder(tiny_llama).sites.keys()
    finally:
        del type(model)._checkpoint_conversion_mapping


@pytest.mark.parametrize("experts", [2, 8])
def test_a_config_that_lies_about_experts_is_refused(experts: int, mixtral: Path, tmp_path: Path) -> None:
    """The files hold four. With two, transformers leaves half of each out; with eight, it makes the others up."""
    base = changed(mixtral, tmp_path / "base", num_local_experts=experts)
    rows = rows_file(tmp_path / "rows.jsonl")
    for config in ({"targets": ["q_proj"]}, {}):
        error = refused("HK-BASE-INCOMPLETE", hubkit.train, base, rows, tmp_path / "a", steps=1, config=config)
        assert any(".gate" in have or ".experts." in have for have in error.have)
    assert not (tmp_path / "a").exists()


def test_an_unknown_architecture_is_merged_by_pattern_and_refused_where_a_model_is_needed(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Files alone say what is linear, a norm, a table; a model of it only transformers could make."""
    base = changed(tiny_llama, tmp_path / "base", model_type="frob", architectures=["FrobForCausalLM"])
    adapter = make_adapter(tmp_path / "a", base, targets="all-linear")
    hubkit.verify(str(adapter), base=str(base))
    hubkit.merge(str(base), str(adapter), tmp_path / "merged")
    rows = rows_file(tmp_path / "rows.jsonl")
    refused("HK-BASE-LOAD", hubkit.train, base, rows, tmp_path / "b", steps=1)
    refused("HK-BASE-LOAD", load_base, base)
    named = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "merged" / "config.json").write_text(json.dumps(named))
    attached = hubkit.attach(load_base(tiny_llama), str(adapter), base=tiny_llama, allow_base_mismatch=True)
    live = logits(attached)
    assert (logits(load_base(tmp_path / "merged")) - live).abs().max() <= 1e-4 * live.abs().max()
    assert not any(isinstance(site, Block) for site in Base.from_folder(base).sites.values())


def test_without_a_tokenizer_there_are_weights_alone(tiny_llama: Path, tmp_path: Path) -> None:
    """Rows need one and are refused before anything is made; to attach, to merge and to verify nothing does."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base, ignore=shutil.ignore_patterns("*token*", "chat_template*"))
    adapter = make_adapter(tmp_path / "a", base)
    refused("HK-TOKENIZER-LOAD", hubkit.train, base, rows_file(tmp_path / "rows.jsonl"), tmp_path / "b", steps=1)
    assert not (tmp_path / "b").exists()
    hubkit.verify(str(adapter), base=str(base))
    hubkit.merge(str(base), str(adapter), tmp_path / "merged")
    hubkit.attach(load_base(base), str(adapter), base=base)
    refused("HK-TOKENIZER-LOAD", hubkit.generate, "Hello", terms=str(adapter), base=base)


def test_a_model_that_sees_needs_no_processor_for_text(gemma3: Path, tmp_path: Path) -> None:
    """There is none in the folder; its language model is trained on text, and its tokenizer is enough."""
    assert not list(gemma3.glob("*processor*"))
    options: dict[str, Any] = {"steps": 1, "config": {"targets": ["q_proj"]}}
    hubkit.train(gemma3, rows_file(tmp_path / "rows.jsonl"), tmp_path / "a", **options)
    hubkit.verify(str(tmp_path / "a"), base=str(gemma3))


def changed(base: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(base, folder)
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**own, **config}))
    return folder
