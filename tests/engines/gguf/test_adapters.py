"""An adapter in GGUF says what it says in hubkit, tensor by tensor, on every architecture that is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from ggufs import (
    ARCHITECTURES,
    changes_of,
    config_of,
    converted,
    gguf_of,
    permuted,
    read_gguf,
    state_of,
    write_gguf,
)  # fmt: skip
from making import make_adapter
from zoo import model_of

from hubkit.artifact.folder import open_adapter
from hubkit.engines import form_named
from hubkit.engines.gguf.adapter import FILE
from hubkit.engines.lowered import lower
from hubkit.engines.served import Served
from hubkit.errors import HubkitError
from hubkit.methods.reading import read_adapter
from hubkit.tensors.base.base import Base
from hubkit.tensors.parts.part import LowRank

PATTERNED: dict[str, Any] = {
    "rank": 4, "alpha": 6.0, "rslora": True, "rank_pattern": {"k_proj": 3}, "alpha_pattern": {"o_proj": 9.0}
}  # fmt: skip
EXACT, HALF, BRAIN = 1e-6, 1e-3, 8e-3
"""Of a whole change: fp32, and what rounding both factors to 11 or 8 bits may do."""


@dataclass(frozen=True)
class Case:
    """A base in both forms, and an adapter.

    Args:
        base: the folder.
        gguf: the same in GGUF.
        served: the adapter, lowered.
        want: tensor of the GGUF -> what the adapter adds to it.
    """

    base: Path
    gguf: Path
    served: Served
    want: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


def base_of(kind: str, room: Path, /, **own: Any) -> Path:
    """A tiny random base of an architecture, made once."""
    folder = room / "-".join((kind, *(f"{name}-{value}" for name, value in own.items())))
    if not folder.exists():
        model_of(kind, "eager", **own).save_pretrained(folder)
    return folder


def case(base: Path, room: Path, kind: str = "F32", /, how: dict[str, Any] | None = None, **options: Any) -> Case:
    """An adapter made for `base`, and what it should add by the converters' own rules, which know of no adapters."""
    how = how or {}
    path = gguf_of(base, room / f"{base.name}-{kind}-{'-'.join(how)}.gguf", kind, **how)
    folder = open_adapter(make_adapter(room / "made", base, **options))
    sites = Base.from_folder(base)
    adapter = read_adapter(folder, sites, name="made", dtype="master")
    served = Served("made", folder.manifest.digest, lower("made", "made", {"made": adapter}, sites))
    state = {}
    for name, site in sites.sites.items():
        if site.kind not in ("linear", "embedding") or site.tied:
            continue
        change = adapter.delta(site)
        matrix = None if change is None else change.matrix()
        whole = torch.zeros(site.shape) if matrix is None else matrix.float()
        state[f"{name}.weight"] = whole.t() if site.kind == "embedding" else whole
    return Case(base, path, served, converted(state, config_of(base), shift=0.0, **how))


def written(one: Case, **settings: Any) -> bytes:
    return form_named("gguf")(one.served, one.base, {"gguf": str(one.gguf), **settings})[FILE]


def close(data: bytes, want: dict[str, torch.Tensor], room: Path, tolerance: float) -> None:
    """What a reader of alpha and rank alone finds in an adapter's file is `want`, wherever that is not zero."""
    path = room / "read.gguf"
    path.write_bytes(data)
    have = changes_of(path)
    assert have.keys() == {name for name, value in want.items() if value.abs().max() > 0}
    for name, value in have.items():
        wanted = want[name].double().numpy()
        assert value.shape == wanted.shape, name
        assert np.linalg.norm(value - wanted) <= tolerance * np.linalg.norm(wanted), name


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_change_is_found_again(kind: str, room: Path) -> None:
    one = case(base_of(kind, room), room, **PATTERNED)
    close(written(one), one.want, room, EXACT)
    close(written(one, dtype="f16"), one.want, room, HALF)
    close(written(one, dtype="bf16"), one.want, room, BRAIN)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral", "qwen3_moe"])
def test_a_gguf_that_holds_several_in_one(kind: str, room: Path) -> None:
    """``--fuse-qkv`` and ``--fuse-gate-up-exps``: what acts on one of them leaves the others alone."""
    base = base_of(kind, room)
    for targets in ("all-linear", "k_proj"):
        one = case(base, room, how={"fuse": True}, rank=2, targets=targets)
        assert any("attn_qkv" in name for name in one.want)
        close(written(one), one.want, room, EXACT)


def test_a_gguf_that_holds_apart_what_the_base_has_in_one(room: Path) -> None:
    base = base_of("phi3", room)
    one, config = case(base, room, rank=2), config_of(base)
    apart = write_gguf(room / "apart.gguf", "phi3", _apart(converted(state_of(base), config), config), config)
    close(written(one, gguf=str(apart)), _apart(one.want, config), room, EXACT)


def _apart(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Phi-3's q, k and v, gate and up, as tensors of their own."""
    size: int = config["hidden_size"] // config["num_attention_heads"]
    found: dict[str, torch.Tensor] = {}
    heads = [config["num_attention_heads"], config["num_key_value_heads"], config["num_key_value_heads"]]
    for name, value in tensors.items():
        if "attn_qkv" in name:
            parts = torch.split(value, [count * size for count in heads])
            found |= {name.replace("attn_qkv", f"attn_{end}"): part for end, part in zip("qkv", parts, strict=True)}
        elif "ffn_up" in name:
            found |= {
                name.replace("ffn_up", f"ffn_{end}"): part
                for end, part in zip(("gate", "up"), value.chunk(2), strict=True)
            }
        else:
            found[name] = value
    return found


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_the_order_of_rows_is_found_in_every_type(kind: str, room: Path) -> None:
    base = base_of("llama", room, hidden_size=64, intermediate_size=64, head_dim=16)
    one = case(base, room, kind, rank=2, targets="q_proj,k_proj,v_proj")
    close(written(one), one.want, room, EXACT)


def test_a_llama_that_was_not_permuted_gets_an_adapter_that_is_not(room: Path) -> None:
    one = case(base_of("llama", room), room, how={"permute": False}, rank=2)
    close(written(one), one.want, room, EXACT)


def test_an_untied_table_and_head(room: Path) -> None:
    base = base_of("llama", room, tie_word_embeddings=False)
    one = case(base, room, rank=2, targets="embed_tokens,lm_head,q_proj")
    close(written(one), one.want, room, EXACT)
    _, tensors = read_gguf(room / "read.gguf")
    assert tensors["token_embd.weight.lora_a"].shape == (48, 2)


def test_half_precision_holds_small_factors(room: Path) -> None:
    """Factors that are far apart in size would leave the normal range of float16 alone."""
    one = case(base_of("llama", room), room, rank=2)
    for part in one.served.lowered.adapter.parts.values():
        assert isinstance(part, LowRank)
        with torch.no_grad():
            part.A.mul_(2.0**14)
            part.B.mul_(2.0**-18)
    want = {name: value / 16 for name, value in one.want.items()}
    close(written(one, dtype="f16"), want, room, HALF)


def test_a_value_beyond_half_precision_is_refused(room: Path) -> None:
    one = case(base_of("llama", room), room, rank=2)
    part = next(iter(one.served.lowered.adapter.parts.values()))
    assert isinstance(part, LowRank)
    with torch.no_grad():
        part.A.mul_(1e12)
    with pytest.raises(HubkitError, match="leaves the range of f16") as caught:
        written(one, dtype="f16")
    assert caught.value.code == "HK-NAN"


def test_what_a_file_says_of_itself(room: Path) -> None:
    one = case(base_of("qwen3", room), room, rank=2)
    path = room / "facts.gguf"
    path.write_bytes(written(one, prompt_prefix="Say: ", alora_invocation_tokens=[7, 8]))
    metadata, _ = read_gguf(path)
    assert metadata == {
        "general.architecture": "qwen3",
        "general.type": "adapter",
        "general.name": "made",
        "hubkit.digest": one.served.digest,
        "adapter.type": "lora",
        "adapter.lora.alpha": 2.0,
        "adapter.lora.task_name": one.served.key,
        "adapter.lora.prompt_prefix": "Say: ",
        "adapter.alora.invocation_tokens": [7, 8],
    }
    fields = gguf.GGUFReader(path).fields
    assert fields["adapter.alora.invocation_tokens"].types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]


def test_the_same_adapter_is_the_same_bytes(room: Path) -> None:
    assert written(case(base_of("qwen3_moe", room), room, rank=2)) == written(
        case(base_of("qwen3_moe", room), room, rank=2)
    )


def refused(one: Case, base: Path | None = None, /, **settings: Any) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        form_named("gguf")(one.served, base or one.base, {"gguf": str(one.gguf), **settings})
    return caught.value


def test_another_base_of_the_same_shapes_is_refused(room: Path) -> None:
    base = base_of("llama", room)
    one = case(base, room, rank=2)
    model = model_of("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3] += 0.05
    model.save_pretrained(room / "other")
    error = refused(one, gguf=str(gguf_of(room / "other", room / "other.gguf")))
    assert (error.code, error.what) == ("HK-GGUF", "the GGUF was not made of this base")
    assert "blk.1.attn_k.weight" in error.have[0]


def test_rows_in_an_order_that_is_neither_are_refused(room: Path) -> None:
    base = base_of("llama", room)
    one, config = case(base, room, rank=2), config_of(base)
    tensors = converted(state_of(base), config)
    tensors["blk.0.attn_q.weight"] = permuted(tensors["blk.0.attn_q.weight"], config["num_attention_heads"])
    error = refused(one, gguf=str(write_gguf(room / "twice.gguf", "llama", tensors, config)))
    assert (error.code, error.what) == ("HK-GGUF", "the GGUF was not made of this base")
    assert "blk.0.attn_q.weight" in error.have[0]


def test_another_architecture_is_refused_by_name(room: Path) -> None:
    one = case(base_of("llama", room), room, rank=2)
    error = refused(one, gguf=str(gguf_of(base_of("qwen3", room), room / "qwen3.gguf")))
    assert (error.code, error.have) == ("HK-GGUF", ["'qwen3'"])


def test_an_architecture_that_is_not_known_is_refused_by_name(room: Path) -> None:
    base = base_of("olmo2", room)
    sites = Base.from_folder(base)
    folder = open_adapter(make_adapter(room / "olmo", base, rank=2))
    adapter = read_adapter(folder, sites, name="olmo", dtype="master")
    served = Served("olmo", folder.manifest.digest, lower("olmo", "olmo", {"olmo": adapter}, sites))
    with pytest.raises(HubkitError, match="olmo2") as caught:
        form_named("gguf")(served, base, {"gguf": "none.gguf"})
    assert caught.value.code == "HK-GGUF"


@pytest.mark.parametrize("targets", ["lm_head", "embed_tokens"])
def test_a_tied_pair_is_refused(targets: str, room: Path) -> None:
    """llama.cpp multiplies by the one tensor where it looks up and where it answers, and stops at an adapter there."""
    base = base_of("llama", room, tie_word_embeddings=True)
    error = refused(case(base, room, rank=2, targets=targets))
    assert error.code == "HK-GGUF"
    assert "tied" in error.have[0]


def test_settings_that_are_none(room: Path) -> None:
    one = case(base_of("llama", room), room, rank=2)
    error = refused(one, dtpye="f16", adapter_dtype="q8_0", alora_invocation_tokens=[-1])
    assert error.code == "HK-OPTIONS"
    assert [line.split(":")[0] for line in error.have] == ["dtpye", "adapter_dtype", "alora_invocation_tokens"]
    with pytest.raises(HubkitError, match="needs its base in GGUF"):
        form_named("gguf")(one.served, one.base, {})
    assert refused(one, gguf=str(room / "nowhere.gguf")).code == "HK-MISSING"
