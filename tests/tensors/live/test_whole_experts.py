"""Experts whose matrices the files hold in one tensor: sites like any other, turned or not, merged in their place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bases.architectures import save
from bases.cells import loaded, logits
from safetensors.torch import load_file, save_file
from variants import refused, rows_file

import hubkit
from hubkit.artifact.identity.digest import fingerprint_folder
from hubkit.tensors.base import archfile
from hubkit.tensors.base.base import Base
from hubkit.tensors.experts import finding
from hubkit.tensors.experts.expert import expert_names, is_expert
from hubkit.tensors.live import loading

pytestmark = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="some are computed otherwise there")

KINDS = ["gpt_oss", "llama4_text", "granitemoe", "jetmoe"]
"""Turned, with biases and interleaved columns; turned, all tokens with all experts at once; renamed; single tensors."""
NAMES = {
    "gpt_oss": "model.layers.1.mlp.experts.3.gate_up_proj",
    "llama4_text": "model.layers.1.feed_forward.experts.3.down_proj",
    "granitemoe": "model.layers.1.block_sparse_moe.experts.3.output_linear",
    "jetmoe": "model.layers.1.self_attention.experts.3.input_linear",
}
EXPERTS = r".*\.experts\..*"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind in KINDS:
        found[kind] = tmp_path_factory.mktemp(kind)
        save(kind, found[kind])
        tensors = load_file(found[kind] / "model.safetensors")
        for name in tensors:
            if name.endswith("proj_bias"):  # zeros, so that one that is lost would not show
                tensors[name] = torch.randn(tensors[name].shape) * 0.3
        save_file(tensors, found[kind] / "model.safetensors", {"format": "pt"})
    return found


def trained(base: Path, work: Path, **options: Any) -> Path:
    method = options.get("method", "lora")
    config = {"targets": EXPERTS + "|.*(q|kv)_proj"} | ({} if method == "full" else {"rank": 2})
    options = {"steps": 2, "learning_rate": 0.05, "warmup": 0.0, "dtype": "float32", "config": config, **options}
    rows = rows_file(work / "rows.jsonl", 8)
    hubkit.train(base, rows, work / "a", **options)
    return work / "a"


def require_one_map(base: Path) -> None:
    """The law of the map: every site of the model is that of the files, with the same values."""
    live, files = Base.from_model(loaded(base)), Base.from_folder(base)
    assert live.sites.keys() == files.sites.keys()
    for name, site in live.sites.items():
        if site.kind != "block":
            assert torch.equal(site.weight(), files.sites[name].weight()), name
            assert (site.transposed, site.number) == (files.sites[name].transposed, files.sites[name].number), name


@pytest.mark.parametrize("kind", KINDS)
def test_each_matrix_of_the_tensor_is_a_site(kind: str, bases: dict[str, Path]) -> None:
    require_one_map(bases[kind])
    files, stored = Base.from_folder(bases[kind]), load_file(bases[kind] / "model.safetensors")
    experts = [site for site in files.sites.values() if site.number is not None]
    held = [tensor for name, tensor in stored.items() if tensor.dim() == 3]
    assert len(experts) == sum(len(tensor) for tensor in held) > 0
    assert NAMES[kind] in {site.name for site in experts}
    for site in experts:
        assert is_expert(site.name)
        assert site.name in expert_names(site.tensor, len(stored[site.tensor]))
        stays = stored[site.tensor][site.number]
        assert torch.equal(site.weight(), stays.t() if site.transposed else stays)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_recognised_and_its_digests_stay(kind: str, bases: dict[str, Path]) -> None:
    assert loading.fingerprint_model(loaded(bases[kind])).tensors == fingerprint_folder(bases[kind]).tensors


@pytest.mark.parametrize("fault", ["swapped experts", "swapped tensors", "turned", "not turned", "renamed", "missing"])
def test_a_fault_in_the_map_is_caught(fault: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some by their shapes, some by their values."""
    names, whole, multiplied = finding.expert_names, finding.whole_tensors, finding.multiplied

    def exchanged(tensor: str, count: int) -> list[str]:
        first, second, *rest = names(tensor, count)
        return [second, first, *rest] if fault == "swapped experts" else [f"{n}x" for n in (first, second, *rest)]

    def other(model: Any) -> dict[str, str]:
        found = dict(whole(model))
        one, two = [name for name in found if name.endswith(("gate_up_proj", "down_proj"))][:2]
        if fault == "missing":
            del found[one]
        else:
            found[one], found[two] = found[two], found[one]
        return found

    if fault in ("swapped experts", "renamed"):
        monkeypatch.setattr(finding, "expert_names", exchanged)
    elif "turned" in fault:
        turn = fault == "turned"
        monkeypatch.setattr(finding, "multiplied", lambda *given: dict.fromkeys(multiplied(*given) or {}, turn))
    else:
        monkeypatch.setattr(finding, "whole_tensors", other)
    with pytest.raises(AssertionError):
        require_one_map(bases["granitemoe" if fault == "turned" else "gpt_oss"])


def test_a_table_that_turns_them_wrongly_is_refused(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As wide as the stream is, so that only what the model multiplies by says so."""
    (tmp_path / "arch.json").write_text(json.dumps({"gpt_oss": {"experts_turned": False}}))
    config = transformers.AutoConfig.from_pretrained(bases["gpt_oss"])
    config.intermediate_size = config.hidden_size
    transformers.GptOssForCausalLM(config).save_pretrained(tmp_path / "base")
    for path in bases["gpt_oss"].glob("*token*"):
        shutil.copy(path, tmp_path / "base")
    monkeypatch.setenv(archfile.VARIABLE, str(tmp_path / "arch.json"))
    rows = rows_file(tmp_path / "rows.jsonl")
    config = {"targets": ["experts.down_proj"], "rank": 2}
    error = refused("HK-BASE-MODULES", hubkit.train, tmp_path / "base", rows, tmp_path / "a", config=config, steps=1)
    assert "stored (in, out) in the model" in error.have[0]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_live_it_has_the_bits_of_the_merged_files(
    kind: str, method: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[kind]
    folder = trained(base, tmp_path, method=method)
    hubkit.merge(base, folder, tmp_path / "merged")
    hubkit.verify(tmp_path / "merged", base=base)
    model, files = loaded(base), loaded(tmp_path / "merged")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain, attached = logits(model), hubkit.attach(model, folder)
    live = logits(attached)
    assert (live - plain).abs().max() > 1e-2 * plain.abs().max()
    torch.testing.assert_close(live, logits(files), rtol=0, atol=1e-4 * float(live.abs().max()))
    with attached.merge():
        merged = model.state_dict()
        assert all(torch.equal(value, merged[name]) for name, value in files.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    attached.detach()
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_experts_that_do_not_change_keep_their_bytes(dtype: str | None, bases: dict[str, Path], tmp_path: Path) -> None:
    """In the tensor that they share with one that does."""
    base, name = bases["gpt_oss"], NAMES["gpt_oss"].replace(".3.", ".2.")
    folder = trained(base, tmp_path, config={"targets": [name], "rank": 2})
    done = hubkit.merge(base, folder, tmp_path / "merged", dtype=dtype)
    assert dtype or done.changed == 1
    stored, merged = (load_file(at / "model.safetensors") for at in (base, tmp_path / "merged"))
    tensor = "model.layers.1.mlp.experts.gate_up_proj"
    delta = hubkit.attach(loaded(base), folder).adapters["a"].delta(Base.from_folder(base).sites[name])
    for number, (before, after) in enumerate(zip(stored[tensor], merged[tensor], strict=True)):
        assert torch.equal(before.to(after.dtype), after) == (number != 2)
    assert delta is not None
    change = delta.matrix()
    assert change is not None
    want, have = stored[tensor][2] + change.t(), merged[tensor][2]
    torch.testing.assert_close(have, want.to(have.dtype), rtol=1e-2 if dtype else 1e-5, atol=1e-6)


def test_they_are_chosen_by_what_says_experts(bases: dict[str, Path]) -> None:
    """Nothing that named a module before there were such sites names one of them."""
    base = Base.from_folder(bases["llama4_text"])
    whole = {site.name for site in base.sites.values() if site.number is not None}

    def chosen(targets: Any) -> set[str]:
        return {site.name for site in base.match(targets)} & whole

    downs = {name for name in whole if name.endswith("down_proj")}
    assert chosen("all-linear") == chosen(".*") == chosen(["down_proj"]) == chosen(".*down_proj") == set()
    assert chosen(["experts.down_proj"]) == chosen("experts.down_proj") == chosen(r".*experts\..*down_proj") == downs
    assert chosen(["experts.2.down_proj"]) == {name for name in downs if ".2." in name}
    assert chosen(["feed_forward.experts.down_proj", "q_proj"]) == downs
    assert chosen([NAMES["llama4_text"]]) == {NAMES["llama4_text"]}
    error = refused("HK-TARGET", base.match, ["experts.up_down_proj"])
    assert "experts.gate_up_proj (4)" in error.want[0]


def test_what_is_left_alone_is_said(bases: dict[str, Path], tmp_path: Path) -> None:
    base, rows = bases["gpt_oss"], rows_file(tmp_path / "rows.jsonl", 8)
    done = hubkit.train(base, rows, tmp_path / "a", steps=1)
    names = {line.partition(":")[0].rpartition(".mlp.")[2] for line in done.untrained}
    experts = {"experts.gate_up_proj", "experts.down_proj"}
    assert names == experts | {f"{name}_bias" for name in experts} | {"router.weight"}


def test_beside_experts_that_stay_in_16_bits_a_base_is_quantized(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = trained(bases["gpt_oss"], tmp_path, method="qlora")
    live = logits(hubkit.attach(loading.load_base(bases["gpt_oss"], dtype="float32", codec="nf4/64/double"), folder))
    hubkit.merge(bases["gpt_oss"], folder, tmp_path / "merged")
    torch.testing.assert_close(live, logits(loaded(tmp_path / "merged")), rtol=0, atol=1e-4 * float(live.abs().max()))


def test_what_changed_in_them_is_extracted(bases: dict[str, Path], tmp_path: Path) -> None:
    base, folder = bases["granitemoe"], trained(bases["granitemoe"], tmp_path)
    hubkit.merge(base, folder, tmp_path / "merged")
    want = logits(loaded(tmp_path / "merged"))
    hubkit.extract(base, tmp_path / "merged", tmp_path / "low", rank=2)
    near = logits(hubkit.attach(loaded(base), tmp_path / "low"))
    torch.testing.assert_close(near, want, rtol=0, atol=1e-3 * float(want.abs().max()))
    hubkit.extract(base, tmp_path / "merged", tmp_path / "exact", exact=True)
    # live, the products are those of single experts, whose sums may run in another order; the bits are those of files
    live = logits(hubkit.attach(loaded(base), tmp_path / "exact"))
    torch.testing.assert_close(live, want, rtol=0, atol=1e-4 * float(want.abs().max()))
    hubkit.merge(base, tmp_path / "exact", tmp_path / "again")
    again, merged = (load_file(tmp_path / at / "model.safetensors") for at in ("again", "merged"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in merged.items())


def test_an_expert_is_trained_as_a_whole(bases: dict[str, Path], tmp_path: Path) -> None:
    config = {"targets": ["q_proj"], "rank": 2, "modules_to_save": [NAMES["gpt_oss"]]}
    folder = trained(bases["gpt_oss"], tmp_path, config=config)
    live = logits(hubkit.attach(loaded(bases["gpt_oss"]), folder))
    hubkit.merge(bases["gpt_oss"], folder, tmp_path / "merged")
    torch.testing.assert_close(live, logits(loaded(tmp_path / "merged")), rtol=0, atol=1e-4 * float(live.abs().max()))


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text"])
def test_sums_are_composed_and_written(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        trained(bases[kind], tmp_path / name, seed=len(name) + (name == "two"))
    one, two = tmp_path / "one" / "a", tmp_path / "two" / "a"
    hubkit.compose(f"{one} + -0.5*{two}", tmp_path / "sum", base=bases[kind])
    written = json.loads((tmp_path / "sum" / "hubkit.json").read_text())["config"]["targets"]
    assert {"experts.down_proj", "experts.gate_up_proj"} <= set(written)
    live = logits(hubkit.attach(loaded(bases[kind]), f"{one} + -0.5*{two}"))
    made = logits(hubkit.attach(loaded(bases[kind]), tmp_path / "sum"))
    torch.testing.assert_close(made, live, rtol=0, atol=1e-4 * float(live.abs().max()))
