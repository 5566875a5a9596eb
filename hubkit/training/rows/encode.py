"""From records to token ids and targets: plain text, chat messages, prompt and completion.

Targets are all tokens of a text, and only what the assistant (or the completion) says otherwise, its end-of-turn
included, because that is what the model has to produce when it is used.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hubkit.errors import HubkitError
from hubkit.training.rows.data import Columns, Record, shorten

IGNORED = -100
"""The label of a token that is no target, as torch's cross-entropy has it."""

ROLES = {"human": "user", "gpt": "assistant"}
"""Role names of the from/value form of chats, where they differ from those of templates."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        """A mapping with "input_ids"."""

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """The conversation as one text."""


@dataclass(frozen=True, slots=True)
class Row:
    """One training row.

    Args:
        ids: token ids.
        labels: for each token itself if it is a target, else -100; the first is never a target (nothing precedes it).
        where: the record it came from, for messages.
    """

    ids: Sequence[int]
    labels: Sequence[int]
    where: str = ""

    def targets(self) -> int:
        """The number of targets."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    columns: Columns,
    *,
    max_length: int,
    truncate: bool = False,
    raw: bool = False,
    front: int = 0,
) -> list[Row]:
    """The rows to train on, one per record, in order.

    Messages go through the tokenizer's chat template; prompt and completion too, as user and assistant, when there
    is a template and not `raw`. Text and raw rows get the special tokens the tokenizer adds, the beginning token at
    most once, and the end token.

    Args:
        max_length: most tokens of a row.
        truncate: cut longer rows at their end.
        raw: prompt and completion without the chat template.
        front: virtual tokens that `max_length` has left room for; for messages.

    Raises:
        HubkitError: HK-DATA for a value of a wrong type; HK-TEMPLATE when the template is missing, fails, or renders
            a beginning of a conversation otherwise than the same messages within the whole; HK-ROW-TOO-LONG;
            HK-NO-TARGETS for rows on which nothing could be learnt; HK-NO-ROWS.
    """
    if not records:
        raise HubkitError("HK-NO-ROWS", "there are no rows to train on", want="at least one row")
    encode_one = _encoder(tokenizer, columns, raw)
    rows = [encode_one(record) for record in records]
    _require_words(records, columns)
    if truncate:
        rows = [Row(row.ids[:max_length], row.labels[:max_length], row.where) for row in rows]
    long = [f"{row.where}: {len(row.ids)} tokens" for row in rows if len(row.ids) > max_length]
    if long:
        raise HubkitError(
            "HK-ROW-TOO-LONG",
            f"{len(long)} of {len(rows)} rows are longer than the context",
            want=f"at most {max_length} tokens" + (f" beside {front} virtual ones" if front else ""),
            have=shorten(long),
            fix="--max-length TOKENS (up to the base's context), shorter rows, or --truncate",
        )
    require_targets(rows)
    return rows


def _require_words(records: Sequence[Record], columns: Columns) -> None:
    """Refuse rows that say nothing at all: what a template adds is no text to learn from."""
    names = (columns.text, columns.messages, columns.completion, *columns.prompt)
    empty = [record.where for record in records if not any(_says(record.values.get(name)) for name in names if name)]
    if empty:
        raise HubkitError(
            "HK-NO-TARGETS",
            f"{len(empty)} of {len(records)} rows are empty",
            want="text in a prompt or an answer",
            have=shorten(empty),
            fix="remove these rows",
        )


def _says(value: object) -> bool:
    if isinstance(value, list):
        texts = [item.get("content", item.get("value")) for item in value if isinstance(item, Mapping)]
        return len(texts) < len(value) or any(_says(text) for text in texts)
    return not isinstance(value, str | None) or bool(value and value.strip())


def require_targets(rows: Sequence[Row]) -> None:
    """Refuse rows without any target: HK-NO-TARGETS, naming them."""
    empty = [f"{row.where or f'row {n}'}: {len(row.ids)} tokens" for n, row in enumerate(rows, 1) if not row.targets()]
    if empty:
        raise HubkitError(
            "HK-NO-TARGETS",
            f"{len(empty)} of {len(rows)} rows have no token to learn",
            want="a completion or an assistant turn within the row's length",
            have=shorten(empty),
            fix="remove these rows, or raise --max-length where the target was cut off",
        )


def rows_digest(rows: Sequence[Row]) -> str:
    """ "sha256:<hex>" over ids and labels of `rows` in order: the same data gives the same digest everywhere."""
    digest = hashlib.sha256()
    for row in rows:
        for values in (row.ids, row.labels):
            digest.update(len(values).to_bytes(8, "little"))
            digest.update(b"".join(value.to_bytes(8, "little", signed=True) for value in values))
    return f"sha256:{digest.hexdigest()}"


def _encoder(tokenizer: Tokenizer, columns: Columns, raw: bool) -> Callable[[Record], Row]:
    if columns.text:
        name = columns.text
        return lambda record: _plain(tokenizer, "", _text(record, name), record.where)
    if columns.messages:
        chat = columns.messages
        _require_template(tokenizer)
        return lambda record: _chat(tokenizer, _messages(record, chat), record.where)
    completion = columns.completion or ""
    if raw or not tokenizer.chat_template:
        return lambda record: _plain(tokenizer, _prompt(record, columns), _text(record, completion), record.where)
    return lambda record: _chat(
        tokenizer,
        [
            {"role": "user", "content": _prompt(record, columns)},
            {"role": "assistant", "content": _text(record, completion)},
        ],
        record.where,
    )


def _wrong(record: Record, name: str, want: str) -> HubkitError:
    have = json.dumps(record.values.get(name), ensure_ascii=False, default=str)
    what = f"column {name!r} holds something else than {want}"
    return HubkitError("HK-DATA", what, where=record.where, want=want, have=have[:200])


def _text(record: Record, name: str) -> str:
    value = record.values.get(name)
    if not isinstance(value, str):
        raise _wrong(record, name, "text")
    return value


def _prompt(record: Record, columns: Columns) -> str:
    first, *others = columns.prompt
    parts = [_text(record, first), *(_text(record, name) for name in others if record.values.get(name) is not None)]
    return "\n\n".join([parts[0], *(part for part in parts[1:] if part)])


def _messages(record: Record, name: str) -> list[dict[str, Any]]:
    want = 'a list of messages {"role": ..., "content": ...}'
    value = record.values.get(name)
    if isinstance(value, str):  # a CSV cell
        try:
            value = json.loads(value)
        except ValueError:
            raise _wrong(record, name, want) from None
    if not isinstance(value, list) or not value:
        raise _wrong(record, name, want)
    messages = [_message(item) for item in value]
    if None in messages:
        raise _wrong(record, name, want)
    return [message for message in messages if message is not None]


def _message(item: object) -> dict[str, Any] | None:
    """One message in the form of templates, or None if it is none."""
    if not isinstance(item, Mapping):
        return None
    if "role" not in item and isinstance(item.get("from"), str) and isinstance(item.get("value"), str):
        return {"role": ROLES.get(item["from"], item["from"]), "content": item["value"]}
    speaks = isinstance(item.get("content"), str) or (item.get("content") is None and item.get("tool_calls"))
    return dict(item) if isinstance(item.get("role"), str) and speaks else None


def _ids(tokenizer: Tokenizer, text: str, *, special: bool) -> list[int]:
    ids: list[int] = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    bos = tokenizer.bos_token_id
    # a text that spells the beginning token out gets a second one from the tokenizer
    return ids[1:] if special and bos is not None and ids[:2] == [bos, bos] else ids


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning of two sequences."""
    for position, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return position
    return min(len(left), len(right))


def _plain(tokenizer: Tokenizer, prompt: str, target: str, where: str) -> Row:
    # The whole is tokenized at once: some tokenizers put a space before every text they are given. A token that
    # straddles the boundary is a target.
    ids = _ids(tokenizer, prompt + target, special=True)
    eos = tokenizer.eos_token_id
    if eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
    start = _common(_ids(tokenizer, prompt, special=True), ids) if prompt else 0
    return _row(ids, [(start, len(ids))], where)


def _row(ids: Sequence[int], spans: Sequence[tuple[int, int]], where: str) -> Row:
    labels = [IGNORED] * len(ids)
    for start, stop in spans:
        labels[start:stop] = ids[start:stop]
    labels[:1] = [IGNORED] * min(1, len(ids))
    # 4 bytes a token instead of 36
    return Row(array("i", ids), array("i", labels), where)


def _require_template(tokenizer: Tokenizer) -> None:
    if not tokenizer.chat_template:
        raise HubkitError(
            "HK-TEMPLATE",
            "the base's tokenizer has no chat template",
            want="a chat template, to write messages as text",
            fix="use an instruction-tuned base, or prompt and completion columns",
        )


def _chat(tokenizer: Tokenizer, messages: list[dict[str, Any]], where: str) -> Row:
    whole = render(tokenizer, messages, False, where)
    ids = _ids(tokenizer, whole, special=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(tokenizer, messages[:index], True, where)
            after = render(tokenizer, messages[: index + 1], False, where)
            _require_prefix(before, after, whole, index, where)
            spans.append(tuple(_common(_ids(tokenizer, text, special=False), ids) for text in (before, after)))
    return _row(ids, [(start, stop) for start, stop in spans], where)


def render(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], prompt: bool, where: str, fix: str = "change the row"
) -> str:
    """The conversation as the chat template of the base writes it.

    Args:
        prompt: end with what the template lets the assistant's answer begin with.
        where: the row, or the base, for messages.
        fix: what a user can do when the template fails.

    Raises:
        HubkitError: ``HK-TEMPLATE``.
    """
    from hubkit.tensors.rendering import TemplateFailed, rendered

    try:
        return rendered(tokenizer, messages, prompt)
    except TemplateFailed as error:
        roles = ", ".join(str(message["role"]) for message in messages) or "no message"
        what, have = "the chat template refuses a conversation", [str(error), f"messages: {roles}"]
        raise HubkitError("HK-TEMPLATE", what, where=where, have=have, fix=fix) from None


def _require_prefix(before: str, after: str, whole: str, index: int, where: str) -> None:
    faults = []
    if not after.startswith(before):
        faults.append(f"message {index + 1} does not follow the template's generation prompt {before[-40:]!r}")
    if not whole.startswith(after):
        faults.append(f"messages 1 to {index + 1} are written otherwise when further messages follow")
    if faults:
        raise HubkitError(
            "HK-TEMPLATE",
            "the chat template does not show which tokens are the assistant's",
            where=where,
            want="a template that writes the beginning of a conversation like the whole",
            have=faults,
            fix="one row per assistant turn, as its last message; or prompt and completion with --raw",
        )
