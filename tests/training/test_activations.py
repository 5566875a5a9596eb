"""What a forward pass keeps, counted without values, against what autograd keeps of one: on every architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bases.architectures import ARCHITECTURES, MASKED, SEQ2SEQ, known, save, sized
from torch import Tensor

from hubkit.errors import HubkitError
from hubkit.methods.host import host
from hubkit.tensors.base.agreement import outline
from hubkit.tensors.base.base import Base
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.parts.adapter import Adapter
from hubkit.training.advice import activations
from hubkit.training.advice.activations import Pass, Saved, saved_by
from hubkit.training.advice.depths import depths

ONE = Pass(2, 24, torch.float32)
CAUSAL = [name for name, one in ARCHITECTURES.items() if one.saved not in (MASKED, SEQ2SEQ)]
ODD = [
    "gptj", "gpt_neo", "gpt2", "gemma2", "mixtral", "deepseek_v3", "gpt_oss", "jetmoe", "jamba", "mamba2", "falcon_h1",
    "qwen3_next", "modernbert-decoder",
]  # fmt: skip
"""Those that look at values, attend by products, or have layers of several kinds."""


def kept_by(attached: Attached, ids: Tensor) -> int:
    """Bytes that autograd keeps of a real forward pass."""
    own = {value.untyped_storage().data_ptr() for value in (*attached.parameters(), *attached.buffers())}
    kept: dict[int, Any] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        output = attached(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    del output
    return sum(storage.nbytes() for storage in kept.values())


def really(folder: Path, name: str, one: Pass = ONE) -> int:
    model, method = load_base(folder, "float32", device="cpu"), host().load(name)
    attached = Attached(model)
    attached.add("x", Adapter.fresh("x", method, method.info.config(), Base.from_model(model), 0))
    attached.set_mix("x")
    attached.train()
    ids = torch.randint(3, 300, (one.rows, one.tokens), generator=torch.Generator().manual_seed(0))
    return kept_by(attached, ids)


def counted(folder: Path, name: str, one: Pass = ONE) -> Saved:
    method, model = host().load(name), outline(folder)
    config = method.info.config()
    with torch.device("meta"):
        parts = method.inject(Base.from_model(model), config)
    return saved_by(method, config, model, parts, one)


@pytest.mark.parametrize("name", ["lora", "dora", "adapters", "selective", "full", "qlora"])
def test_what_is_counted_on_the_meta_device_is_what_autograd_keeps(name: str, tiny_llama: Path) -> None:
    assert counted(tiny_llama, name).all == pytest.approx(really(tiny_llama, name), rel=0.02)


@pytest.mark.parametrize("kind", ODD)
def test_of_bases_that_look_at_values(kind: str, tmp_path: Path) -> None:
    if kind not in known():
        pytest.skip("this release of transformers has no such architecture")
    save(kind, tmp_path)
    assert counted(tmp_path, "lora").all == pytest.approx(really(tmp_path, "lora"), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "full"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_of_every_architecture(kind: str, name: str, tmp_path: Path) -> None:
    if kind not in known():
        pytest.skip("this release of transformers has no such architecture")
    save(kind, tmp_path)
    try:
        have = really(tmp_path, name)
    except HubkitError as error:
        pytest.skip(f"it is not trained: {error.code}")
    assert counted(tmp_path, name).all == pytest.approx(have, rel=0.02)


@pytest.mark.parametrize(
    ("kinds", "want"),
    [
        ("aaaaaaaa", (2, 4)),
        ("aaaa", None),
        ("baaaaaaa", (2, 3)),
        ("aaabaaabaaab", (4, 8)),
        ("aabaaabaaab", None),
        ("caabaabaab", (4, 7)),
        ("abcdefgh", None),
    ],
)
def test_how_many_layers_say_it_of_all(kinds: str, want: tuple[int, int] | None) -> None:
    assert depths(kinds) == want


DEEP: dict[str, dict[str, Any]] = {
    "llama": {},
    "deepseek_v3": {"first_k_dense_replace": 2},
    "gemma3_text": {"layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 3},
    "qwen3_next": {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 3},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
}


@pytest.mark.parametrize("kind", DEEP)
def test_a_few_layers_say_it_of_twelve(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CONFIG_MAPPING

    own = {**ARCHITECTURES[kind].own, "num_hidden_layers": 12, **DEEP[kind]}
    sized(CONFIG_MAPPING[kind](), own).save_pretrained(tmp_path)
    ran: list[int] = []
    count: Callable[..., Any] = activations._counted

    def noting(*args: Any) -> Any:
        found = count(*args)
        ran.append(len(found.kept) - 1)
        return found

    monkeypatch.setattr(activations, "_counted", noting)
    few = counted(tmp_path, "lora")

    def none(kinds: Sequence[Any]) -> None:
        return None

    monkeypatch.setattr(activations, "depths", none)
    whole = counted(tmp_path, "lora")
    assert len(ran) == 3
    assert max(ran[:2]) < ran[2] == 12
    assert few.all == pytest.approx(whole.all, rel=1e-3)
    assert few.checkpointed == pytest.approx(whole.checkpointed, rel=0.02)


def test_layers_that_are_not_all_trained(tiny_llama: Path) -> None:
    """Those at which something is trained are of another kind than the others."""
    method, model = host().load("lora"), outline(tiny_llama)
    config = method.info.config(targets=r"model\.layers\.1\..*_proj")
    with torch.device("meta"):
        parts = method.inject(Base.from_model(model), config)
    assert 0 < saved_by(method, config, model, parts, ONE).all < counted(tiny_llama, "lora").all
