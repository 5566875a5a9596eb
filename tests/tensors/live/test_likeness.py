"""An attached model in its base's place: what others ask it, and what it refuses instead of doing half of it."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hubkit.errors import HubkitError
from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.suite import batch, randomize, tiny_model
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.parts.adapter import Adapter


def make(attached: Attached, name: str, values: dict[str, Any], seed: int) -> Adapter:
    method = host().load("lora")
    config = parse_config(method.info.config, values, "x")
    return randomize(Adapter.fresh(name, method, config, attached.sites, seed), seed)


@pytest.fixture(params=["llama", "gpt2"])
def attached(request: pytest.FixtureRequest) -> Attached:
    """A tiny model with a LoRA adapter a, active."""
    made = Attached(tiny_model(request.param))
    made.add("a", make(made, "a", {"targets": "all-linear", "rank": 3}, 1))
    made.set_mix("a")
    return made


def test_what_it_does_not_have_is_the_bases(attached: Attached) -> None:
    base: Any = attached.model
    for name in ("device", "dtype", "config", "generation_config", "main_input_name", "base_model", "loss_type"):
        assert getattr(attached, name) == getattr(base, name), name
    assert attached.can_generate()
    assert attached.get_input_embeddings() is base.get_input_embeddings()
    assert attached.get_output_embeddings() is base.get_output_embeddings()
    assert attached.num_parameters() == base.num_parameters()
    assert attached._no_split_modules == base._no_split_modules
    attached.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    attached.gradient_checkpointing_disable()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def test_what_is_set_is_set_on_the_base(attached: Attached) -> None:
    base: Any = attached.model
    given = copy.deepcopy(attached.generation_config)
    attached.generation_config = given
    assert base.generation_config is given
    config = copy.deepcopy(attached.config)
    attached.config = config
    assert base.config is config


def test_notes_about_the_base_itself_stay_its_own(attached: Attached) -> None:
    """accelerate writes such ones on the module it changes, and takes them off it again."""
    base: Any = attached.model
    for name in ("_hf_hook", "_old_forward", "_is_accelerate_prepared"):
        setattr(base, name, True)
        assert not hasattr(attached, name)
    base.hf_device_map = {"": "cpu"}
    assert attached.hf_device_map == {"": "cpu"}
    for name in ("peft_config", "is_loaded_in_4bit", "nowhere"):
        assert not hasattr(attached, name)
    with pytest.raises(AttributeError, match="nowhere"):
        _ = attached.nowhere


def test_its_class_has_the_bases_name_and_signature(attached: Attached) -> None:
    base = type(attached.model)
    assert isinstance(attached, Attached)
    assert type(attached).__name__ == base.__name__
    assert type(attached) is type(Attached(tiny_model("llama" if "Llama" in base.__name__ else "gpt2")))
    for forward in (attached.forward, type(attached).forward):
        names = list(inspect.signature(forward).parameters)
        want = list(inspect.signature(base.forward if "self" in names else attached.model.forward).parameters)
        assert [name for name in names if name != "route"] == want
        assert inspect.signature(forward).parameters["route"].kind is inspect.Parameter.KEYWORD_ONLY
    assert torch.equal(attached(batch()).logits, attached.forward(input_ids=batch()).logits)


REFUSED: dict[str, Callable[[Any], object]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": pickle.dumps,
    "torch.save": lambda model: torch.save(model, io.BytesIO()),
    "deepcopy of its base": lambda model: copy.deepcopy(model.model),
    "torch.save of its base": lambda model: torch.save(model.model, io.BytesIO()),
    "DataParallel": lambda model: model._replicate_for_data_parallel(),
    "save_pretrained": lambda model: model.save_pretrained("x"),
    "push_to_hub": lambda model: model.push_to_hub("x"),
    "add_adapter": lambda model: model.add_adapter("x"),
    "resize_token_embeddings": lambda model: model.resize_token_embeddings(500),
}


@pytest.mark.parametrize("how", REFUSED)
def test_copying_storing_and_changing_are_refused(how: str, attached: Attached) -> None:
    want = attached(batch()).logits
    with pytest.raises(HubkitError) as caught:
        REFUSED[how](attached)
    assert caught.value.code == "HK-ATTACHED"
    assert caught.value.fix
    assert torch.equal(attached(batch()).logits, want)


def test_once_detached_the_base_can_be_copied(attached: Attached) -> None:
    base = attached.detach()
    assert torch.equal(copy.deepcopy(base)(batch()).logits, base(batch()).logits)


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config"])
def test_peft_cannot_take_it_over(kind: str, attached: Attached) -> None:
    peft = pytest.importorskip("peft")
    target = "q_proj" if "Llama" in type(attached.model).__name__ else "c_attn"
    options: dict[str, list[str]] = {"feedforward_modules": []} if kind == "IA3Config" else {}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", target_modules=[target], **options)
    with pytest.raises(HubkitError, match="PEFT cannot take over") as caught:
        peft.get_peft_model(attached, config)
    assert caught.value.code == "HK-ATTACHED"


def test_a_head_that_an_adapter_acts_at_is_not_shown() -> None:
    """TRL's trainers multiply by its weight: what is attached there would not be trained, without a word."""
    made = Attached(tiny_model("llama"))
    made.add("a", make(made, "a", {"targets": ["lm_head"], "rank": 3}, 1))
    with pytest.raises(HubkitError, match="acts at the output head"):
        made.get_output_embeddings()
    assert made.model.get_output_embeddings() is not None  # type: ignore[operator]


def test_its_state_is_its_adapters(attached: Attached) -> None:
    attached.add("b", make(attached, "b", {"targets": "all-linear", "rank": 2}, 2))
    state = {key: value.clone() for key, value in attached.state_dict().items()}
    assert {key.partition(".")[0] for key in state} == {"a", "b"}
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in attached.parts.parameters())
    assert set(attached.state_dict(prefix="x.")) == {f"x.{key}" for key in state}
    want = attached(batch()).logits
    with torch.no_grad():
        for parameter in attached.parts.parameters():
            parameter.add_(1.0)
    assert not torch.equal(attached(batch()).logits, want)
    result = attached.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(attached(batch()).logits, want)


def test_another_state_is_refused_and_changes_nothing(attached: Attached) -> None:
    state = {key: value.clone() for key, value in attached.state_dict().items()}
    first = next(iter(state))
    rest = {key: value for key, value in state.items() if key != first}
    for given, code in (
        (rest, "HK-KEYS"),
        ({**state, "a.x": torch.zeros(1)}, "HK-KEYS"),
        ({key: value[:1] + 1.0 for key, value in state.items()}, "HK-SHAPE"),
        (attached.model.state_dict(), "HK-KEYS"),
    ):
        with pytest.raises(HubkitError) as caught:
            attached.load_state_dict(given)
        assert caught.value.code == code
    assert all(torch.equal(state[key], value) for key, value in attached.state_dict().items())
    assert attached.load_state_dict(rest, strict=False).missing_keys == [first]
    with pytest.raises(HubkitError, match="HK-KEYS"):
        attached.load_state_dict({"other": torch.zeros(1)}, strict=False)


def test_only_a_model_as_it_was_loaded_is_taken() -> None:
    with pytest.raises(HubkitError, match="name of a model"):
        Attached("gpt2")  # type: ignore[arg-type]
    with pytest.raises(HubkitError, match="class, not a model"):
        Attached(type(tiny_model("llama")))  # type: ignore[arg-type]
