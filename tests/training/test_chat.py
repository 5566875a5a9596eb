"""Rows of all shapes as conversations: what is learnt of them, what the template is given, what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from tiny import tokenizer

from hubkit.errors import HubkitError
from hubkit.training.rows.data import Columns, Record, choose_columns
from hubkit.training.rows.encode import encode

MARKED = (
    "{% if tools %}<|system|> {{ tools[0].function.name }} <|end|> {% endif %}"
    "{% for m in messages %}<|{{ m.role }}|> {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %} <|end|>"
    "{% endgeneration %} {% else %}{{ m.content }} <|end|> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
"""A template that says itself what the assistant's tokens are: transformers then gives a mask of them."""
TOOL = {"type": "function", "function": {"name": "six", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "five", "arguments": {}}}


def said(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def made(
    row: Mapping[str, object], tok: Any, columns: Columns | None = None, **options: Any
) -> tuple[list[int], list[int]]:
    """Token ids of a row, and the places of those that are learnt."""
    records = [Record(row, "r:1")]
    found = encode(records, tok, choose_columns(records, columns), max_length=64, **options)[0]
    return list(found.ids), [place for place, label in enumerate(found.labels) if label != -100]


def wanted(tok: Any, messages: list[Any], tools: list[Any] | None = None) -> tuple[list[int], list[int]]:
    """The same by transformers alone."""
    told = {"return_dict": True, "return_assistant_tokens_mask": True}
    found = tok.apply_chat_template(messages, tools=tools, **told)
    return found["input_ids"], [place for place, learnt in enumerate(found["assistant_masks"]) if learnt]


def refused(row: Mapping[str, object], code: str, tok: Any | None = None, **options: Any) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        made(row, tok or tokenizer(), **options)
    assert caught.value.code == code, str(caught.value)
    return caught.value


USER, ANSWER = said("user", "one two"), said("assistant", "three")
SYSTEM = said("system", "four")
PARTS = said("user", [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])
SHAPES: dict[str, tuple[dict[str, object], list[dict[str, object]]]] = {
    "messages": ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "a CSV cell": ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
    "OpenAI's parts": ({"messages": [PARTS, ANSWER]}, [USER, ANSWER]),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "three"}], "system": "four"},
        [SYSTEM, USER, ANSWER],
    ),
    "ShareGPT with tools": (
        {
            "conversations": [
                {"from": "human", "value": "one two"},
                {"from": "function_call", "value": '{"name": "five", "arguments": {}}'},
                {"from": "observation", "value": "six"},
                {"from": "gpt", "value": "three"},
            ]
        },
        [USER, said("assistant", "", tool_calls=[CALL]), said("tool", "six"), ANSWER],
    ),
    "ShareGPT without system": (
        {"conversations": [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "three"}], "system": None},
        [USER, ANSWER],
    ),
    "Alpaca": (
        {
            "instruction": "one",
            "input": "two",
            "output": "three",
            "system": "four",
            "history": [["five", "six"], ["six", "five"]],
        },
        [
            SYSTEM,
            said("user", "five"),
            said("assistant", "six"),
            said("user", "six"),
            said("assistant", "five"),
            USER,
            ANSWER,
        ],
    ),
    "Alpaca with nothing": (
        {"instruction": "one two", "input": "", "output": "three", "system": "", "history": []},
        [USER, ANSWER],
    ),
    "Dolly": ({"instruction": "one", "context": "two", "response": "three", "category": "x"}, [USER, ANSWER]),
    "OpenOrca": (
        {"id": "1", "system_prompt": "four", "question": "one two", "response": "three"},
        [SYSTEM, USER, ANSWER],
    ),
    "TRL": ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
    "TRL, a list and a text": ({"prompt": [SYSTEM, USER], "completion": "three"}, [SYSTEM, USER, ANSWER]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_conversation_that_it_says(shape: str) -> None:
    tok, (row, messages) = tokenizer(MARKED), SHAPES[shape]
    assert made(row, tok) == wanted(tok, messages)


def test_a_message_without_weight_is_read_and_not_learnt() -> None:
    tok, talk = tokenizer(MARKED), [USER, ANSWER, USER, said("assistant", "five six")]
    ids, learnt = wanted(tok, talk)
    middle = ids.index(tok.convert_tokens_to_ids("five"))
    for off in ({"weight": 0}, {"weight": 0.0}, {"train": False}, {"train": 0}, {"weight": 1, "train": False}):
        first = made({"messages": [USER, said("assistant", "three", **off), *talk[2:]]}, tok)
        assert first == (ids, [place for place in learnt if place >= middle]), off
    for on in ({"weight": 1}, {"train": True}, {"weight": None, "train": None}, {"weight": 1.0}):
        assert made({"messages": [USER, said("assistant", "three", **on), *talk[2:]]}, tok) == (ids, learnt), on
    user = said("user", "one two", weight=0)
    assert made({"messages": [user, *talk[1:]]}, tok) == (ids, learnt)
    refused({"messages": [USER, said("assistant", "three", weight=0)]}, "HK-NO-TARGETS")


@pytest.mark.parametrize(
    ("message", "word"),
    [
        (said("assistant", "three", weight=0.5), "weight is 0.5"),
        (said("assistant", "three", weight=float("nan")), "weight is nan"),
        (said("assistant", "three", train="yes"), "train is 'yes'"),
        (said("user", "three", train=True), "role 'user'"),
        (said("assistant", "three", train_detail=[{"begin_offset": 0}]), "train_detail"),
        (said("user", [{"type": "image_url", "image_url": {"url": "x"}}]), "'image_url'"),
        (said("user", [{"type": "input_audio", "input_audio": {}}]), "'input_audio'"),
        (said("user", []), "empty list"),
        (said("assistant", None, function_call={"name": "x"}), "tool_calls"),
        ({"from": "function_call", "value": "three"}, "function_call"),
    ],
)
def test_what_a_message_asks_and_does_not_get_is_refused_by_name(message: dict[str, object], word: str) -> None:
    error = refused({"messages": [USER, ANSWER, message]}, "HK-DATA")
    assert error.where == "r:1"
    assert "message 3" in error.have[0]
    assert word in error.have[0]


def test_tools_reach_the_template() -> None:
    tok = tokenizer(MARKED)
    call = said("assistant", None, tool_calls=[CALL])
    talk = [USER, call, said("tool", "six"), ANSWER]
    for tools in ([TOOL], json.dumps([TOOL])):
        assert made({"messages": talk, "tools": tools}, tok) == wanted(tok, talk, [TOOL])
        assert made({"prompt": "one two", "completion": "three", "tools": tools}, tok) == wanted(tok, talk[::3], [TOOL])
    nothings: tuple[object, ...] = (None, "", [], "[]")
    for nothing in nothings:
        assert made({"messages": talk, "tools": nothing}, tok) == wanted(tok, talk)
    for wrong in ("no json", {"a": 1}, ["six"], 3):
        refused({"messages": talk, "tools": wrong}, "HK-DATA", tok)


def test_what_the_template_leaves_out_is_refused() -> None:
    error = refused({"messages": [USER, ANSWER], "tools": [TOOL]}, "HK-TEMPLATE")
    assert error.have == ["left out: tools"]
    called = said("assistant", "three", tool_calls=[CALL])
    assert "tool_calls of message 2" in refused({"messages": [USER, called]}, "HK-TEMPLATE").have[0]
    thought = said("assistant", "three", reasoning_content="six")
    assert "reasoning_content" in refused({"messages": [USER, thought]}, "HK-TEMPLATE").have[0]
    silent = tokenizer("{% for m in messages if m.role != 'system' %}<|{{m.role}}|> {{m.content}} {% endfor %}")
    assert "message 1 (system)" in refused({"messages": [SYSTEM, USER, ANSWER]}, "HK-TEMPLATE", silent).have[0]


def test_a_role_that_the_template_refuses_is_named_with_its_row() -> None:
    strict = tokenizer(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<|{{m.role}}|> {{m.content}} {% endfor %}"
    )
    error = refused({"question": "one", "answer": "two", "system": "four"}, "HK-TEMPLATE", strict)
    assert error.where == "r:1"
    assert "no system role" in error.have[0]
    assert "system" in error.have[1]


def test_parts_are_given_to_templates_that_take_them() -> None:
    takes = tokenizer(
        "{% for m in messages %}<|{{m.role}}|> {% if m.content is string %}{{m.content}}{% else %}"
        "{% for p in m.content %}{{p.text}} {% endfor %}{% endif %} <|end|> {% endfor %}"
    )
    assert made({"messages": [PARTS, ANSWER]}, takes)[0] == made({"messages": [USER, ANSWER]}, takes)[0]


def test_two_system_texts_are_one_or_refused() -> None:
    tok = tokenizer(MARKED)
    assert made({"messages": [SYSTEM, USER, ANSWER], "system": "four"}, tok) == wanted(tok, [SYSTEM, USER, ANSWER])
    refused({"messages": [SYSTEM, USER, ANSWER], "system": "five"}, "HK-DATA", tok)


def test_without_a_template_nothing_is_lost_either() -> None:
    tok = tokenizer(None)
    row = {"question": "one", "context": "two", "answer": " three", "system": "four"}
    assert tok.decode(made(row, tok)[0]) == "four one two three </s>"
    tools = {"question": "one", "answer": " three", "tools": [TOOL]}
    pairs = {"instruction": "one", "output": "two", "history": [["three", "four"]]}
    for unsayable in (tools, pairs, {"prompt": [USER], "completion": [ANSWER]}):
        refused(unsayable, "HK-TEMPLATE", tok)
        refused(unsayable, "HK-TEMPLATE", tokenizer(), raw=True)


@pytest.mark.parametrize("history", [[["one"]], ["one"], {"a": 1}, [[1, 2]], "no json"])
def test_a_history_of_another_form_is_refused(history: object) -> None:
    refused({"instruction": "one", "output": "two", "history": history}, "HK-DATA")
