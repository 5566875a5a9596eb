"""The conversation that a row is: its messages in the form of templates, which of them are learnt, and its tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hubkit.errors import HubkitError
from hubkit.training.rows.data import Columns, Record

ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""Role names of the from/value form of chats, where they differ from those of templates."""
CALL = "function_call"
"""The from/value form's role of an assistant that calls a tool; the value is the call as JSON."""
SPANS = ("train_detail", "training_detail")
"""Fields of other trainers that learn parts of a message."""


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Args:
        messages: role, content, and what else the row says of each.
        learnt: for each message whether it is learnt, if it is the assistant's.
        tools: what the template is given as such; None: none.
    """

    messages: list[dict[str, Any]]
    learnt: list[bool]
    tools: list[Any] | None = None


def chat_of(record: Record, columns: Columns) -> Chat:
    """The conversation of a row of messages, or of prompt and completion, with its system text, history and tools.

    Raises:
        HubkitError: HK-DATA for a value of a wrong type, a weight other than 0 and 1, parts that are no text, two
            system messages.
    """
    if columns.messages:
        turns = _messages(record, columns.messages)
    else:
        turns = _history(record, columns.history) + _prompt(record, columns)
        learnt = _turns(record, columns.completion or "", "assistant")
        turns += learnt
    system = _optional_text(record, columns.system)
    if system:
        begins = turns[0][0] if turns else {}
        if begins.get("role") != "system":
            turns.insert(0, ({"role": "system", "content": system}, False))
        elif begins.get("content") != system:
            have = [f"column {columns.system!r}", "the first message"]
            what = "the row has two system texts that differ"
            raise HubkitError("HK-DATA", what, where=record.where, want="one", have=have, fix="take one of them away")
    return Chat([message for message, _ in turns], [learn for _, learn in turns], _tools(record, columns.tools))


def has_chat(record: Record, columns: Columns) -> bool:
    """Whether a row of prompt and completion holds what plain text cannot say: messages, history, tools."""
    names = (columns.prompt[0] if columns.prompt else None, columns.completion)
    listed = any(name and isinstance(record.values.get(name), list) for name in names)
    return listed or any(
        record.values.get(n) not in (None, "", [], "[]") for n in (columns.history, columns.tools) if n
    )


Turn = tuple[dict[str, Any], bool]


def wrong(record: Record, name: str, want: str, why: str = "") -> HubkitError:
    """``HK-DATA``: a column holds something else than what is wanted, and why if that is not plain to see."""
    have = json.dumps(record.values.get(name), ensure_ascii=False, default=str)
    what = f"column {name!r} holds " + ("a message that cannot be used" if why else f"something else than {want}")
    return HubkitError("HK-DATA", what, where=record.where, want=want, have=[*([why] if why else []), have[:200]])


def text_of(record: Record, name: str) -> str:
    """The text of a column: HK-DATA for anything else."""
    value = record.values.get(name)
    if not isinstance(value, str):
        raise wrong(record, name, "text")
    return value


def prompt_text(record: Record, columns: Columns) -> str:
    """The prompt's columns, joined by blank lines; but for the first, empty and absent ones are left out."""
    first, *others = columns.prompt
    parts = [text_of(record, n) for n in (first, *(n for n in others if record.values.get(n) is not None))]
    return "\n\n".join([parts[0], *(part for part in parts[1:] if part)])


def system_text(record: Record, columns: Columns) -> str:
    """The system text of a row that is written without a template, a blank line behind it; or nothing."""
    text = _optional_text(record, columns.system)
    return f"{text}\n\n" if text else ""


def _optional_text(record: Record, name: str | None) -> str:
    return "" if name is None or record.values.get(name) is None else text_of(record, name)


def _prompt(record: Record, columns: Columns) -> list[Turn]:
    first, *others = columns.prompt
    if not isinstance(record.values.get(first), list):
        return [({"role": "user", "content": prompt_text(record, columns)}, False)]
    if filled := [name for name in others if record.values.get(name)]:
        raise wrong(record, first, f"text, which {' and '.join(filled)} could be added to")
    return [(message, False) for message, _ in _messages(record, first)]


def _turns(record: Record, name: str, role: str) -> list[Turn]:
    if isinstance(record.values.get(name), list):
        return _messages(record, name)
    return [({"role": role, "content": text_of(record, name)}, True)]


def _history(record: Record, name: str | None) -> list[Turn]:
    value = _json(record, name) if name else None
    if name is None or value in (None, "", []):
        return []
    want = "a list of pairs of texts [prompt, answer]"
    turns: list[Turn] = []
    for pair in value if isinstance(value, list) else [value]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise wrong(record, name, want)
        turns += [({"role": "user", "content": pair[0]}, False), ({"role": "assistant", "content": pair[1]}, True)]
    return turns


def _tools(record: Record, name: str | None) -> list[Any] | None:
    value = _json(record, name) if name else None
    if name is None or value in (None, "", []):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise wrong(record, name, "a list of tools, each a JSON schema")
    return value


def _json(record: Record, name: str) -> Any:
    """A column's value; one written as JSON text, as CSV needs it, is read."""
    value = record.values.get(name)
    if not isinstance(value, str) or not value.strip():
        return value if not isinstance(value, str) else ""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise wrong(record, name, "JSON") from None


def _messages(record: Record, name: str) -> list[Turn]:
    want = 'a list of messages {"role": ..., "content": ...}'
    value = record.values.get(name)
    if isinstance(value, str):  # a CSV cell
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise wrong(record, name, want) from None
    if not isinstance(value, list) or not value:
        raise wrong(record, name, want)
    turns: list[Turn] = []
    for number, item in enumerate(value, start=1):
        try:
            turns.append(_turn(item))
        except _Unusable as error:
            raise wrong(record, name, error.want or want, f"message {number}: {error}") from None
    return turns


class _Unusable(Exception):
    """Why something is no message, and what it should be where that is not plain."""

    def __init__(self, why: str, want: str = "") -> None:
        super().__init__(why)
        self.want = want


def _turn(item: object) -> Turn:
    """One message in the form of templates, and whether it is learnt if it is the assistant's."""
    if not isinstance(item, Mapping):
        raise _Unusable("no object")
    message = {key: value for key, value in item.items() if key not in ("weight", "train", *SPANS)}
    if "role" not in item and isinstance(item.get("from"), str) and isinstance(item.get("value"), str):
        message = _from_value(item["from"], item["value"])
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise _Unusable("it has no role")
    if isinstance(content, list):
        message["content"] = [_part(part) for part in content]
        if not content:
            raise _Unusable("its content is an empty list")
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        old = " (function_call is the old form of tool_calls)" if message.get("function_call") else ""
        raise _Unusable(f"its content is no text{old}")
    return message, _learnt(item, role)


def _from_value(role: str, value: str) -> dict[str, Any]:
    if role != CALL:
        return {"role": ROLES.get(role, role), "content": value}
    try:
        calls = json.loads(value)
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise _Unusable(f"a {CALL} is not read", 'a call as JSON, {"name": ..., "arguments": ...}')
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": c} for c in calls]}


def _part(part: object) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
        raise _Unusable(f"a part of its content is {kind!r}", 'text alone: {"type": "text", "text": ...}')
    return {"type": "text", "text": part["text"]}


def _learnt(item: Mapping[str, Any], role: str) -> bool:
    """Whether ``weight`` and ``train`` let a message be learnt: absent and null say nothing, 0 and false say no."""
    given = {name: item[name] for name in ("weight", "train") if item.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise _Unusable(f"its {name} is {value!r}", f"a {name} of 0 or 1: a message is learnt or not")
        if value and role != "assistant":
            raise _Unusable(f"its {name} is {value!r} and its role {role!r}", "only assistant messages to be learnt")
    if spans := [name for name in SPANS if item.get(name)]:
        raise _Unusable(f"it has {spans[0]}", "messages that are learnt whole, or not")
    return all(given.values())


def joined(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with content in parts as one text each, a line for each part."""
    texts = [
        "\n".join(part["text"] for part in m["content"]) if isinstance(m.get("content"), list) else m.get("content")
        for m in messages
    ]
    return [dict(m) | ({"content": t} if "content" in m else {}) for m, t in zip(messages, texts, strict=True)]
