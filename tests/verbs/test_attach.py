"""attach: adapters on a live model, proven to be their base; a refusal leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from making import make_adapter
from variants import OTHERS, logits, other_tokenizer, other_weights, refused, resharded

import hubkit
from hubkit.tensors.base.tokenizer import load_tokenizer
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach


def state(model: Any) -> tuple[Any, ...]:
    """What attaching may not change when it is refused: hooks, modes, what requires grad, the logits."""
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    return hooks, [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return load_base(tiny_llama).requires_grad_(True)


def test_the_weights_in_memory_are_the_proof(adapter: Path, model: Any) -> None:
    before = logits(model)
    attached = attach(model, str(adapter))
    assert (logits(attached) - before).abs().max() > 1e-3
    assert attached.detach() is model
    assert torch.equal(logits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_it_is_a_function_of_the_package(adapter: Path, model: Any) -> None:
    assert hubkit.attach(model, {str(adapter): 0.5}).mix == hubkit.Sum({"chat": 0.5})


def test_the_same_base_from_other_files(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    other = resharded(tiny_llama, tmp_path / "other")
    want = logits(attach(load_base(tiny_llama), str(adapter)))
    for base in (None, str(other)):
        assert torch.equal(logits(attach(load_base(other), str(adapter), base=base)), want)


def test_a_wider_copy_of_the_base_matches(tiny_llama: Path, tmp_path: Path) -> None:
    narrow = tmp_path / "narrow"
    load_base(tiny_llama, "bfloat16").save_pretrained(narrow)  # type: ignore[operator]
    adapter = make_adapter(tmp_path / "chat", narrow)
    attach(load_base(narrow, "float32"), str(adapter))


def test_other_weights_in_memory(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    model = load_base(other_weights(tiny_llama, tmp_path / "other"))
    before = state(model), logits(model)
    error = refused("HK-BASE-MISMATCH", attach, model, str(adapter))
    assert error.status == 1
    assert "model.layers.1" in "\n".join(error.have)
    assert state(model) == before[0]
    assert torch.equal(logits(model), before[1])
    assert logits(attach(model, str(adapter), allow_base_mismatch=True)).isfinite().all()


def test_another_tokenizer(adapter: Path, model: Any, tiny_llama: Path, tmp_path: Path) -> None:
    other = load_tokenizer(other_tokenizer(tiny_llama, tmp_path / "other"))
    before = state(model)
    error = refused("HK-BASE-MISMATCH", attach, model, str(adapter), tokenizer=other)
    assert "the tokenizer differs" in error.have[0]
    assert state(model) == before
    attach(model, str(adapter), tokenizer=load_tokenizer(tiny_llama))


@pytest.mark.parametrize("what", OTHERS)
def test_another_base_by_name(what: str, adapter: Path, model: Any, tiny_llama: Path, tmp_path: Path) -> None:
    make, said = OTHERS[what]
    before = state(model)
    error = refused("HK-BASE-MISMATCH", attach, model, str(adapter), base=str(make(tiny_llama, tmp_path / "other")))
    assert said in error.have[0]
    assert state(model) == before


def _broken(adapter: Path) -> None:
    """A tensor is gone, and the manifest agrees."""
    from safetensors.torch import load_file, save_file

    from hubkit.artifact.folder import write_adapter
    from hubkit.documents.manifest import Manifest

    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, weights)
    files = {path.name: path for path in adapter.iterdir() if path.name != "hubkit.json"}
    write_adapter(adapter, Manifest.read(adapter), files, replace=True)


@pytest.mark.parametrize("fault", ["mix", "keys", "files"])
def test_nothing_is_attached_when_one_of_two_is_refused(
    fault: str, adapter: Path, model: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    other = make_adapter(tmp_path / "other", tiny_llama, seed=3)
    faults: dict[str, tuple[str, Callable[[], object]]] = {
        "mix": ("HK-MIX", lambda: None),
        "keys": ("HK-KEYS", lambda: _broken(other)),
        "files": ("HK-FILES", lambda: (other / "tensors.json").write_text("{}")),
    }
    code, spoil = faults[fault]
    spoil()
    mix = "heap" if fault == "mix" else "sum"
    before = state(model)
    refused(code, attach, model, f"{adapter} + {other}", mix=mix)
    assert state(model) == before
    attached = attach(model, str(adapter))
    want = logits(attached)
    refused(code, attach, attached, str(other), mix=mix)
    assert list(attached.adapters) == ["chat"]
    assert torch.equal(logits(attached), want)


def test_one_more_beside_those_attached(adapter: Path, model: Any) -> None:
    attached = attach(model, str(adapter))
    want = logits(attached)
    assert attach(attached, str(adapter)) is attached
    assert list(attached.adapters) == ["chat", "chat-2"]
    assert torch.equal(logits(attached), want), "the one just attached is the mix now"


def test_trainable_parts_are_masters(tiny_llama: Path, tmp_path: Path) -> None:
    base = load_base(tiny_llama, "bfloat16")
    base.save_pretrained(tmp_path / "narrow")  # type: ignore[operator]
    adapter = make_adapter(tmp_path / "chat", tmp_path / "narrow")
    attached = attach(load_base(tmp_path / "narrow"), str(adapter), trainable=True)
    parts = [p for p in attached.parameters() if p.requires_grad]
    assert parts
    assert {p.dtype for p in parts} == {torch.float32}
    frozen = attach(load_base(tmp_path / "narrow"), str(adapter))
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}


def test_paths_are_taken_wherever_names_are(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (make_adapter(tmp_path / name, tiny_llama, seed=seed) for seed, name in enumerate(("one", "two")))
    two = two.rename(tmp_path / "two words")
    want = logits(attach(load_base(tiny_llama), {str(one): 1.0, str(two): 0.5}))
    mixed: Any = {str(one): 1.0, two: 0.5}  # paths beside names: more than the type of terms speaks of
    for terms in ({one: 1.0, two: 0.5}, mixed):
        assert torch.equal(logits(attach(load_base(tiny_llama), terms, base=tiny_llama)), want)
    both = logits(attach(load_base(tiny_llama), [str(one), str(two)]))
    less = logits(attach(load_base(tiny_llama), {one: 1, two: -1}))
    lists: list[tuple[Sequence[Path | str], Any]] = [
        ([one, two], both),
        ([str(one), two], both),
        ((one, "-", two), less),
    ]
    for pieces, expected in lists:
        assert torch.equal(logits(attach(load_base(tiny_llama), pieces)), expected)
    alone = logits(attach(load_base(tiny_llama), str(one)))
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(attach(load_base(tiny_llama), Path("one"))), alone)
    offered = hubkit.offer(load_base(tiny_llama), {"first": one}, base=tiny_llama)
    ids = torch.randint(3, 300, (1, 5))
    attached = attach(load_base(tiny_llama), one)
    assert torch.equal(offered(ids, route=["first"]).logits, attached(ids, route=["one"]).logits)


@pytest.mark.parametrize("terms", [None, 3, [None], ["./a", 0.5], {"./a": "much"}, {None: 1.0}, [], {}])
def test_what_names_no_adapter(terms: Any, model: Any) -> None:
    before = state(model)
    refused("HK-TERMS", attach, model, terms)
    assert state(model) == before


def test_what_is_no_live_model(adapter: Path, tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    for given, said in (
        (str(tiny_llama), "the name of a model"),
        (tiny_llama, "the name of a model"),
        (type(load_base(tiny_llama)), "a class"),
        (tokenizer, "a tokenizer"),
        (None, "no model"),
    ):
        error = refused("HK-NOT-LIVE", attach, given, str(adapter))
        assert said in error.what
        assert error.fix
    assert "name of a model" in refused("HK-NOT-LIVE", hubkit.offer, "org/base", {"chat": str(adapter)}).what


def test_a_model_that_peft_has_changed(adapter: Path, model: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config)
    for given in (theirs, theirs.model, model):
        assert "unload" in refused("HK-NOT-LIVE", attach, given, str(adapter)).fix
    base = theirs.unload()
    assert logits(attach(base, str(adapter))).isfinite().all()


def test_a_compiled_model(adapter: Path, model: Any) -> None:
    compiled = torch.compile(model)
    assert "attach first" in refused("HK-COMPILED", attach, compiled, str(adapter)).fix
