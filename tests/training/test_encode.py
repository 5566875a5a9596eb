"""Token ids and targets."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import pytest
from tiny import tokenizer

from hubkit.errors import HubkitError
from hubkit.training.rows.data import Columns, Record
from hubkit.training.rows.encode import Row, encode, rows_digest

TEXT, CHAT = Columns(text="text"), Columns(messages="messages")
PAIR = Columns(prompt=("p",), completion="c")


def words(tok: Any, row: Row) -> tuple[str, str]:
    """All tokens of a row, and those that are targets."""
    targets = [label for label in row.labels if label != -100]
    return " ".join(tok.convert_ids_to_tokens(list(row.ids))), " ".join(tok.convert_ids_to_tokens(targets))


def one(values: Mapping[str, object], columns: Columns, tok: Any, **options: Any) -> tuple[str, str]:
    return words(tok, encode([Record(values, "r:1")], tok, columns, **{"max_length": 64, **options})[0])


def refused(code: str, values: Mapping[str, object], columns: Columns, tok: Any, **options: Any) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        one(values, columns, tok, **options)
    assert caught.value.code == code
    return caught.value


def test_text_ends_with_eos_and_all_but_the_first_are_targets() -> None:
    tok = tokenizer()
    assert one({"text": "one two"}, TEXT, tok) == ("one two </s>", "two </s>")
    assert one({"text": "one two </s>"}, TEXT, tok) == ("one two </s>", "two </s>")


def test_bos_is_added_once() -> None:
    tok = tokenizer(bos=True)
    for text in ("one two", "<s> one two"):
        assert one({"text": text}, TEXT, tok) == ("<s> one two </s>", "one two </s>")
        assert one({"p": text, "c": " three"}, PAIR, tok, raw=True)[0] == "<s> one two three </s>"
    chat = tokenizer("<s> {% for m in messages %}{{ m.content }} {% endfor %}", bos=True)
    assert one({"p": "one", "c": "two"}, PAIR, chat) == ("<s> one two", "two")


def test_only_completions_are_targets() -> None:
    tok = tokenizer()
    raw = ("one two three </s>", "three </s>")
    assert one({"p": "one two", "c": " three"}, PAIR, tok, raw=True) == raw
    assert one({"p": "one two", "c": " three"}, PAIR, tokenizer(None)) == raw
    both = ("<|user|> one two <|end|> <|assistant|> three <|end|>", "three <|end|>")
    assert one({"p": "one two", "c": "three"}, PAIR, tok) == both


def test_prompts_of_several_columns_are_joined() -> None:
    columns = Columns(prompt=("p", "q"), completion="c")
    tok = tokenizer(None)
    assert one({"p": "one", "q": "two", "c": " three"}, columns, tok)[0] == "one two three </s>"
    for empty in ("", None):
        assert one({"p": "one", "q": empty, "c": " three"}, columns, tok)[0] == "one three </s>"


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_every_assistant_turn_is_a_target() -> None:
    talk = [
        message("system", "six"),
        message("user", "one"),
        message("assistant", "two"),
        message("user", "three"),
        message("assistant", "four five"),
    ]
    whole, targets = one({"messages": talk}, CHAT, tokenizer())
    assert whole.startswith("<|system|> six <|end|> <|user|> one <|end|> <|assistant|> two <|end|>")
    assert targets == "two <|end|> four five <|end|>"


def test_chats_of_other_forms() -> None:
    tok, expected = tokenizer(), ("<|user|> one <|end|> <|assistant|> two <|end|>", "two <|end|>")
    shared = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]
    assert one({"messages": shared}, CHAT, tok) == expected
    cell = '[{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]'
    assert one({"messages": cell}, CHAT, tok) == expected


@pytest.mark.parametrize("value", [None, 3, "no json", [], "{}", [1], [{"role": "user"}], [{"content": "x"}]])
def test_what_is_no_chat_is_refused(value: object) -> None:
    assert refused("HK-DATA", {"messages": value}, CHAT, tokenizer()).where == "r:1"


def test_what_is_no_text_is_refused() -> None:
    refused("HK-DATA", {"text": 3}, TEXT, tokenizer())
    refused("HK-DATA", {"p": "one", "c": None}, PAIR, tokenizer())


def test_a_template_that_does_not_show_the_assistants_tokens_is_refused() -> None:
    talk = [message("user", "one"), message("assistant", "two"), message("user", "three"), message("assistant", "four")]
    prompt = (
        "{% for m in messages %}<|{{m.role}}|> {{m.content}} {% endfor %}{% if add_generation_prompt %}six{% endif %}"
    )
    error = refused("HK-TEMPLATE", {"messages": talk}, CHAT, tokenizer(prompt))
    assert "generation prompt" in error.have[0]
    last = "{% for m in messages %}{{ 'six ' if loop.last }}{{m.content}} {% endfor %}"
    error = refused("HK-TEMPLATE", {"messages": talk}, CHAT, tokenizer(last))
    assert "otherwise when further messages follow" in " ".join(error.have)


def test_templates_that_fail_or_are_absent_are_refused() -> None:
    talk = {"messages": [message("user", "one")]}
    error = refused("HK-TEMPLATE", talk, CHAT, tokenizer("{{ raise_exception('no users') }}"))
    assert "no users" in error.have[0]
    refused("HK-TEMPLATE", talk, CHAT, tokenizer("{{ messages[0].content.absent.more }}"))
    refused("HK-TEMPLATE", talk, CHAT, tokenizer("{% broken"))
    refused("HK-TEMPLATE", talk, CHAT, tokenizer(None))


def test_long_rows_are_refused_or_cut() -> None:
    tok = tokenizer()
    error = refused("HK-ROW-TOO-LONG", {"text": "one two three"}, TEXT, tok, max_length=3)
    assert error.have == ["r:1: 4 tokens"]
    assert one({"text": "one two three"}, TEXT, tok, max_length=3, truncate=True) == ("one two three", "two three")
    long = {"p": "one two three", "c": " four"}
    refused("HK-NO-TARGETS", long, PAIR, tok, max_length=3, truncate=True, raw=True)


def test_rows_without_targets_are_refused() -> None:
    refused("HK-NO-TARGETS", {"messages": [message("user", "one")]}, CHAT, tokenizer())
    with pytest.raises(HubkitError, match="HK-NO-ROWS"):
        encode([], tokenizer(), TEXT, max_length=8)


def test_the_digest_is_of_ids_and_targets() -> None:
    tok = tokenizer()
    made = [
        encode([Record({"text": text}, where)], tok, TEXT, max_length=9)
        for text, where in (("one two", "a"), ("one two", "b"), ("one three", "a"))
    ]
    digests = [rows_digest(rows) for rows in made]
    assert digests[0] == digests[1] != digests[2]
    assert rows_digest(encode([Record({"p": "one", "c": " two"}, "")], tok, PAIR, max_length=9, raw=True)) == digests[0]
    # length and values of ids and labels, 8 bytes each: one two </s> are 7 8 2
    packed = struct.pack("<8q", 3, 7, 8, 2, 3, -100, 8, 2)
    assert digests[0] == f"sha256:{hashlib.sha256(packed).hexdigest()}"
