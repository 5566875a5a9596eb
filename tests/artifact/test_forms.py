"""PEFT's form as data: options accounted for, keys strict, targets exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubkit.artifact.forms import (
    PeftForm,
    from_peft_config,
    require_all,
    short_targets,
    split_keys,
    to_key,
    to_peft_config,
)
from hubkit.errors import HubkitError
from hubkit.methods.host import host

FORM = PeftForm(
    peft_type="LORA",
    roles={"linear": {"A": "lora_A.weight", "B": "lora_B.weight"}, "embedding": {"A": "lora_embedding_A"}},
    options={"r": "rank", "lora_alpha": "alpha"},
    defaults={"rank": 8, "alpha": 8.0},
    modules={"inner_modules": "inner"},
    selection=frozenset({"exclude_modules"}),
    allowed={"bias": ("none",), "use_dora": (False,), "init": (True, "gaussian")},
    ignored=frozenset({"note"}),
    transposed="fan_in_fan_out",
    base_copies=("base_layer.weight",),
)
P = "base_model.model."


def refused(code: str, call: Any, *arguments: Any) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        call(*arguments)
    assert caught.value.code == code
    return caught.value


def test_every_active_option_that_is_not_known_is_named() -> None:
    data = {"peft_type": "LORA", "r": 4, "use_dora": True, "bias": "all", "new_option": 0.5, "init": "pissa"}
    error = refused("HK-OPTION", from_peft_config, FORM, data, "here")
    assert error.have == ['bias: "all"', 'init: "pissa"', "new_option: 0.5", "use_dora: true"]
    assert error.where == "here"


@pytest.mark.parametrize("value", [None, False, "", "none", {}, []])
def test_an_unknown_option_that_is_off_is_let_through(value: Any) -> None:
    assert from_peft_config(FORM, {"peft_type": "LORA", "new_option": value}, "x") == {"rank": 8, "alpha": 8.0}


@pytest.mark.parametrize("value", [0, 0.0, True, "x", [None], 1])
def test_an_unknown_option_that_may_be_on_is_not(value: Any) -> None:
    refused("HK-OPTION", from_peft_config, FORM, {"peft_type": "LORA", "new_option": value}, "x")


def test_another_type_is_refused() -> None:
    assert refused("HK-OPTION", from_peft_config, FORM, {"peft_type": "VERA"}, "x").have == ["VERA"]
    assert refused("HK-OPTION", from_peft_config, FORM, {}, "x").want == ["LORA"]


def test_absent_and_null_options_are_pefts_defaults() -> None:
    """Against PEFT's own defaults, for the method that is installed."""
    form = host().load("lora").peft_form
    assert form is not None
    plain = peft.LoraConfig()
    read = from_peft_config(form, {"peft_type": "LORA"}, "x")
    assert read == {form.options[key]: getattr(plain, key) for key in form.options if form.options[key] in read}
    assert from_peft_config(form, {"peft_type": "LORA", "r": None}, "x")["rank"] == plain.r
    everything = json.loads(json.dumps(plain.to_dict(), default=sorted))
    assert from_peft_config(form, everything, "x")["rank"] == 8


def test_written_and_read_back() -> None:
    config = {"rank": 4, "alpha": 2.5, "other": 1}
    data = json.loads(
        to_peft_config(FORM, config, targets=["b", "a"], modules={"inner_modules": ["b"]}, transposed=True)
    )
    assert from_peft_config(FORM, data, "x") == {"rank": 4, "alpha": 2.5, "inner": ["b"]}
    assert (data["target_modules"], data["fan_in_fan_out"], data["use_dora"]) == (["a", "b"], True, False)


def test_sets_in_any_order_give_the_same_bytes() -> None:
    names = [f"layer{n}" for n in range(20)]
    one = to_peft_config(FORM, {"rank": 4}, targets=set(names), modules={"inner_modules": set(names[:9])})
    two = to_peft_config(FORM, {"rank": 4}, targets=names[::-1], modules={"inner_modules": names[8::-1]})
    assert one == two
    assert one.endswith(b"}\n")
    read = [
        from_peft_config(FORM, {"peft_type": "LORA", "inner_modules": v}, "x")["inner"]
        for v in (["b", "a"], ["a", "b"])
    ]
    assert read == [["a", "b"], ["a", "b"]]


def test_whole_numbers_are_written_as_such() -> None:
    data = to_peft_config(FORM, {"alpha": 32.0, "rank": {"q": 2.0}}, targets=[])
    assert b'"lora_alpha": 32,' in data
    assert json.loads(data)["r"] == {"q": 2}


NAME = st.lists(st.sampled_from(["a", "b", "ab", "ba", "0"]), min_size=1, max_size=4).map(".".join)


@given(st.sets(NAME, min_size=1, max_size=12), st.data())
def test_short_targets_choose_exactly_the_chosen(everything: set[str], data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.sampled_from(sorted(everything))))
    hidden = {name for name in chosen if any(other.endswith(f".{name}") for other in everything - chosen)}
    if hidden:
        assert set(refused("HK-TARGET", short_targets, chosen, everything).have) <= hidden
        return
    targets = short_targets(chosen, everything)
    assert {n for n in everything if any(n == t or n.endswith("." + t) for t in targets)} == chosen
    assert targets == sorted(set(targets))


@given(st.sets(NAME, min_size=2, max_size=12), st.data())
def test_short_targets_keep_apart_what_ends_alike(everything: set[str], data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.sampled_from(sorted(everything))))
    try:
        targets = short_targets(chosen, everything, everything - chosen)
    except HubkitError:
        return
    assert {n for n in everything if any(n.endswith(t) for t in targets)} == chosen


def test_short_targets_are_short() -> None:
    layers = [f"model.layers.{n}.{m}" for n in range(12) for m in ("attn.q_proj", "attn.o_proj", "mlp.o_proj")]
    assert short_targets([n for n in layers if n.endswith("q_proj")], layers) == ["q_proj"]
    assert short_targets(layers, layers) == ["o_proj", "q_proj"]
    full = [n for n in layers if n.endswith("mlp.o_proj")]
    assert short_targets(full, layers) == sorted(full)


def test_keys_are_sorted_by_meaning() -> None:
    keys = [f"{P}m.q.lora_A.weight", f"{P}m.q.lora_B.weight", f"{P}m.e.lora_embedding_A", f"{P}m.e.base_layer.weight"]
    read = split_keys(FORM, keys, "x")
    assert read.parts == {"m.q": {"A": keys[0], "B": keys[1]}, "m.e": {"A": keys[2]}}
    assert read.copies == {"m.e.weight": keys[3]}
    assert [to_key(FORM, "m.q", "linear", r) for r in "AB"] == keys[:2]
    assert split_keys(None, ["m.q.l", "a.b.c"], "x").parts == {"m.q": {"l": "m.q.l"}, "a.b": {"c": "a.b.c"}}
    assert to_key(None, "m.q", "linear", "l") == "m.q.l"


@pytest.mark.parametrize(
    "key",
    [
        "m.q.lora_A.weight",
        f"{P}lora_A.weight",
        f"{P}m.q.lora_A",
        f"{P}m.q.lora_A.default.weight",
        f"{P}m.q.weight",
        f"{P}m.qlora_A.weight",
        "",
        P,
        f"{P}m.q.lora_magnitude_vector",
        f"{P}m.q.LORA_A.weight",
        "base_layer.weight",
    ],
)
def test_a_key_without_meaning_is_named(key: str) -> None:
    good = f"{P}m.q.lora_B.weight"
    assert refused("HK-KEYS", split_keys, FORM, [good, key], "x").have == ([key] if key else [""])


def test_two_keys_of_one_meaning_are_refused() -> None:
    keys = [f"{P}m.e.lora_embedding_A", f"{P}m.e.lora_A.weight"]
    assert refused("HK-KEYS", split_keys, FORM, keys, "x").have == [keys[0]]
    refused("HK-KEYS", split_keys, None, ["l", "a.b"], "x")


def test_accounting_lists_both_sides() -> None:
    require_all({"a", "b"}, ["b", "a"], "x")
    error = refused("HK-KEYS", require_all, {"a", "b", "c"}, {"a", "d"}, "x")
    assert error.want == ["missing: b", "missing: c"]
    assert error.have == ["no home: d"]


@pytest.mark.parametrize("changed", [False, True])
def test_a_copy_of_the_bases_embedding_must_be_the_bases(changed: bool, tmp_path: Path) -> None:
    """PEFT writes the embedding table beside a part on it."""
    from safetensors.torch import load_file, save_file

    from hubkit.methods.config import parse_config
    from hubkit.methods.suite import tiny_model
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.parts.adapter import Adapter

    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny_model("llama"), config).save_pretrained(str(tmp_path))
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    copies = [key for key in tensors if key.endswith("base_layer.weight")]
    assert copies == [f"{P}model.embed_tokens.base_layer.weight"]
    if changed:
        tensors[copies[0]][3, 3] += 0.01
        save_file(tensors, weights)
    method = host().load("lora")
    settings = parse_config(method.info.config, {"targets": ["embed_tokens", "q_proj"], "rank": 2}, "x")
    base = Base.from_model(tiny_model("llama"))
    if changed:
        error = refused("HK-KEYS", Adapter.read, "a", method, settings, base, weights, None)
        assert "changed copy of a base weight" in error.what
        return
    read = Adapter.read("a", method, settings, base, weights, None)
    assert set(read.tensors()) == set(tensors) - set(copies)
