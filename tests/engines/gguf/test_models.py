"""A merged model in GGUF is the merged model, converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ggufs import ARCHITECTURES, config_of, converted, gguf_of, read_gguf, state_of, write_gguf
from making import make_adapter
from zoo import model_of

from hubkit.artifact.folder import open_adapter
from hubkit.engines.gguf.base import open_gguf
from hubkit.engines.gguf.model import CONVERTER, convert, plan_into, write_into
from hubkit.engines.gguf.proof import Proof
from hubkit.errors import HubkitError
from hubkit.methods.host import host
from hubkit.methods.reading import read_adapter
from hubkit.tensors.base.base import Base
from hubkit.tensors.files.shards import open_shards
from hubkit.tensors.weights.merging import MergePlan, plan_merge, write_merged


def base_of(kind: str, folder: Path, /, **own: Any) -> Path:
    model_of(kind, "eager", **own).save_pretrained(folder)
    return folder


def merge_of(base: Path, room: Path, name: str = "", /, **options: Any) -> tuple[MergePlan, Base]:
    """A merge of one random adapter, and its base."""
    sites = Base.from_folder(base)
    made = make_adapter(room / "made", base, method=host().load(name) if name else None, **options)
    adapter = read_adapter(open_adapter(made), sites, name="made")
    return plan_merge(sites, "made", {"made": adapter}), sites


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_merging_and_converting_go_in_either_order(kind: str, tmp_path: Path) -> None:
    """To the byte, in fp32: weights, biases, norms change; q and k are permuted, experts stacked, norms shifted."""
    base = base_of(kind, tmp_path / "base")
    gguf = open_gguf(gguf_of(base, tmp_path / "base.gguf"), kind)
    merge, sites = merge_of(base, tmp_path, "full")
    write_into(merge, plan_into(merge, sites, gguf), gguf, tmp_path / "into.gguf")
    (tmp_path / "merged").mkdir()
    write_merged(merge, open_shards(base), tmp_path / "merged")
    wanted = gguf_of(tmp_path / "merged", tmp_path / "wanted.gguf")
    (_, have), (_, want), (_, before) = map(read_gguf, (tmp_path / "into.gguf", wanted, gguf.path))
    assert [key for key in have if not (have[key] == want[key]).all()] == []
    assert [key for key in have if (have[key] == before[key]).all() and "gate_inp" not in key] == []
    assert (tmp_path / "into.gguf").read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_sums_are_cast_once(kind: str, tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    gguf = open_gguf(gguf_of(base, tmp_path / "base.gguf", kind), "llama")
    merge, sites = merge_of(base, tmp_path, rank=2, targets="q_proj,down_proj")
    write_into(merge, plan_into(merge, sites, gguf), gguf, tmp_path / "into.gguf")
    (tmp_path / "merged").mkdir()
    write_merged(merge, open_shards(base), tmp_path / "merged")
    assert (tmp_path / "into.gguf").read_bytes() == gguf_of(tmp_path / "merged", tmp_path / "w.gguf", kind).read_bytes()


def refusal(merge: MergePlan, sites: Base, path: Path) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        plan_into(merge, sites, open_gguf(path, "llama"))
    assert caught.value.code == "HK-GGUF"
    return caught.value


def test_codes_are_not_merged_into(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base", intermediate_size=64)
    path = gguf_of(base, tmp_path / "base.gguf", "Q8_0")
    merge, sites = merge_of(base, tmp_path, rank=2, targets="q_proj")
    error = refusal(merge, sites, path)
    assert error.have == ["blk.0.attn_q.weight: it is in Q8_0", "blk.1.attn_q.weight: it is in Q8_0"]
    assert "llama-cpp = DIR" in error.fix


def test_a_pair_that_is_no_longer_tied(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base", tie_word_embeddings=True)
    path = gguf_of(base, tmp_path / "base.gguf")
    merge, sites = merge_of(base, tmp_path, "full", targets="lm_head", tied="break")
    assert "no longer tied" in refusal(merge, sites, path).have[0]
    merge, sites = merge_of(base, tmp_path, "full", targets="lm_head", tied="keep")
    assert len(plan_into(merge, sites, open_gguf(path, "llama"))) == 1
    config, tensors = config_of(base), converted(state_of(base), config_of(base))
    apart = write_gguf(
        tmp_path / "apart.gguf", "llama", {**tensors, "output.weight": tensors["token_embd.weight"]}, config
    )
    assert "holds the two apart" in refusal(merge, sites, apart).have[0]


def test_a_gguf_that_lacks_what_changes(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    tensors = converted(state_of(base), config_of(base))
    del tensors["blk.1.ffn_up.weight"]
    path = write_gguf(tmp_path / "less.gguf", "llama", tensors, config_of(base))
    merge, sites = merge_of(base, tmp_path, rank=2)
    assert refusal(merge, sites, path).have == ["model.layers.1.mlp.up_proj: the GGUF has no tensor for it"]


def test_a_value_that_leaves_the_range(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    gguf = open_gguf(gguf_of(base, tmp_path / "base.gguf", "F16"), "llama")
    merge, sites = merge_of(base, tmp_path, rank=2, targets="q_proj")
    with torch.no_grad():
        next(iter(merge.adapters["made"].parts.values())).A.mul_(1e9)  # type: ignore[operator]
    with pytest.raises(HubkitError) as caught:
        write_into(merge, plan_into(merge, sites, gguf), gguf, tmp_path / "into.gguf")
    assert caught.value.code == "HK-NAN"


def test_a_converter_is_run_and_its_last_words_are_passed_on(tmp_path: Path) -> None:
    """Stands in for llama.cpp's: takes its arguments, and says what it was given. The real one: see the oracle."""
    (tmp_path / "tools").mkdir()
    script = "import sys, pathlib\nprint(sys.argv[1:])\npathlib.Path(sys.argv[3]).write_text(' '.join(sys.argv[1:]))\n"
    (tmp_path / "tools" / CONVERTER).write_text(script)
    out = tmp_path / "made.gguf"
    convert(tmp_path / "model", out, tmp_path / "tools", "f16", "tiny")
    assert out.read_text().split()[1:] == ["--outfile", str(out), "--outtype", "f16", "--model-name", "tiny"]
    (tmp_path / "tools" / CONVERTER).write_text("import sys\nsys.exit('Model FooForCausalLM is not supported')\n")
    with pytest.raises(HubkitError) as caught:
        convert(tmp_path / "model", tmp_path / "other.gguf", tmp_path / "tools", "f16", "tiny")
    assert (caught.value.code, caught.value.have) == ("HK-GGUF", ["Model FooForCausalLM is not supported"])
    with pytest.raises(HubkitError, match="no converter"):
        convert(tmp_path / "model", out, tmp_path, "f16", "tiny")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_tensor_is_proven(kind: str, tmp_path: Path) -> None:
    """Whichever one is another than the base's, or is not the base's at all, the GGUF is refused."""
    base = base_of(kind, tmp_path / "base")
    tensors, config, arch = converted(state_of(base), config_of(base)), config_of(base), ARCHITECTURES[kind]

    def prove(changed: dict[str, torch.Tensor]) -> None:
        gguf = open_gguf(write_gguf(tmp_path / "x.gguf", arch, changed, config), kind)
        Proof(gguf, Base.from_folder(base)).everything(open_shards(base))

    prove({**tensors, "rope_freqs.weight": torch.ones(4)})
    for name in [name for name in tensors if name.startswith(("blk.1.", "output", "token"))]:
        other = tensors[name].clone()
        other.view(-1, other.shape[-1])[-1] *= 1.01
        with pytest.raises(HubkitError, match="not made of this base") as caught:
            prove({**tensors, name: other})
        assert name in str(caught.value)
    with pytest.raises(HubkitError, match=r"first blk\.0\.attn_q\.scale"):
        prove({**tensors, "blk.0.attn_q.scale": torch.ones(1)})
