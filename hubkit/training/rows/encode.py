"""From records to token ids and targets: plain text, chat messages, prompt and completion.

Targets are all tokens of a text, and only what the assistant (or the completion) says otherwise, its end-of-turn
included, because that is what the model has to produce when it is used.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from hubkit.errors import HubkitError
from hubkit.training.rows.chat import Chat, chat_of, has_chat, joined, prompt_text, system_text, text_of
from hubkit.training.rows.data import Columns, Record, shorten

IGNORED = -100
"""The label of a token that is no target, as torch's cross-entropy has it."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        """A mapping with "input_ids"."""

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **more: Any
    ) -> Any:
        """The conversation as one text."""


@dataclass(frozen=True, slots=True)
class Row:
    """One training row.

    Args:
        ids: token ids.
        labels: for each token itself if it is a target, else -100; the first is never a target (nothing precedes it).
        where: the record it came from, for messages.
        cut: tokens that were cut off at its end.
    """

    ids: Sequence[int]
    labels: Sequence[int]
    where: str = ""
    cut: int = 0

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

    Messages go through the tokenizer's chat template, with the row's tools; prompt and completion too, as user and
    assistant, when there is a template and not `raw`. Text and raw rows get the special tokens the tokenizer adds, the
    beginning token at most once, and the end token.

    Args:
        max_length: most tokens of a row.
        truncate: cut longer rows at their end.
        raw: prompt and completion without the chat template.
        front: virtual tokens that `max_length` has left room for; for messages.

    Raises:
        HubkitError: HK-DATA for a value of a wrong type; HK-TEMPLATE when the template is missing, fails, leaves out
            what the row says, or renders a beginning of a conversation otherwise than the same messages within the
            whole; HK-ROW-TOO-LONG;
            HK-NO-TARGETS for rows on which nothing could be learnt; HK-NO-ROWS.
    """
    if not records:
        raise HubkitError("HK-NO-ROWS", "there are no rows to train on", want="at least one row")
    encode_one = _encoder(tokenizer, columns, raw)
    rows = [encode_one(record) for record in records]
    _require_words(records, columns)
    if truncate:
        rows = [_cut(row, max_length) if len(row.ids) > max_length else row for row in rows]
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


def _cut(row: Row, length: int) -> Row:
    return Row(row.ids[:length], row.labels[:length], row.where, len(row.ids) - length)


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
        texts = [m.get("content", m.get("value", m.get("text"))) for m in value if isinstance(m, Mapping)]
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
        return lambda record: _plain(tokenizer, "", text_of(record, name), record.where)
    parts = cache(lambda: _takes_parts(tokenizer))
    if columns.messages:
        _require_template(tokenizer)

    def encode_chat(record: Record) -> Row:
        return _chat(tokenizer, chat_of(record, columns), record.where, parts)

    def encode_plain(record: Record) -> Row:
        if has_chat(record, columns):
            _require_template(tokenizer)
            what = "messages, history and tools cannot be written without the chat template"
            raise HubkitError("HK-TEMPLATE", what, where=record.where, fix="leave --raw out")
        prompt = system_text(record, columns) + prompt_text(record, columns)
        return _plain(tokenizer, prompt, text_of(record, columns.completion or ""), record.where)

    plain = not columns.messages and (raw or not tokenizer.chat_template)
    return encode_plain if plain else encode_chat


def _takes_parts(tokenizer: Tokenizer) -> bool:
    """Whether the template writes content in parts, ``[{"type": "text", "text": ...}]``, as the text that it is."""
    from hubkit.tensors.rendering import TemplateFailed, rendered

    word = "hubkit"
    try:
        made, plain = (
            rendered(tokenizer, [{"role": "user", "content": content}], False)
            for content in ([{"type": "text", "text": word}], word)
        )
    except TemplateFailed:
        return False
    return word in made and made == plain


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


def _chat(tokenizer: Tokenizer, chat: Chat, where: str, parts: Callable[[], bool]) -> Row:
    messages, tools = chat.messages, chat.tools
    if any(isinstance(message.get("content"), list) for message in messages) and not parts():
        messages = joined(messages)
    whole = render(tokenizer, messages, False, where, tools=tools)
    _require_kept(tokenizer, messages, tools, whole, where)
    ids, spans = _ids(tokenizer, whole, special=False), []
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and chat.learnt[index]:
            before = render(tokenizer, messages[:index], True, where, tools=tools)
            after = render(tokenizer, messages[: index + 1], False, where, tools=tools)
            _require_prefix(before, after, whole, index, where)
            spans.append(tuple(_common(_ids(tokenizer, text, special=False), ids) for text in (before, after)))
    return _row(ids, [(start, stop) for start, stop in spans], where)


def _require_kept(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[Any] | None, whole: str, where: str
) -> None:
    """Refuse a template that leaves out what the row says: HK-TEMPLATE.

    What cannot be seen in the text is left out on trial: where the text stays the same, it was not in it.
    """
    from hubkit.tensors.rendering import TemplateFailed, rendered

    trials: list[tuple[str, list[dict[str, Any]], list[Any] | None]] = [("tools", messages, None)] if tools else []
    for index, message in enumerate(messages):
        name, content = f"message {index + 1} ({message['role']})", message.get("content")
        if message["role"] == "system" and isinstance(content, str) and content.strip() not in whole:
            trials.append((name, [*messages[:index], *messages[index + 1 :]], tools))
        for field in ("tool_calls", "reasoning_content", "thinking"):
            if message.get(field):
                less = {key: value for key, value in message.items() if key != field}
                trials.append((f"{field} of {name}", [*messages[:index], less, *messages[index + 1 :]], tools))
    lost = []
    for name, fewer, given in trials:
        try:
            lost += [name] if rendered(tokenizer, fewer, False, given) == whole else []
        except TemplateFailed:
            continue  # without it the template fails: so it is read
    if lost:
        what, fix = "the chat template leaves out what the row says", "take it out of the row, or another base"
        want = "a template that writes all of the row"
        raise HubkitError("HK-TEMPLATE", what, where=where, want=want, have=[f"left out: {n}" for n in lost], fix=fix)


def render(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    prompt: bool,
    where: str,
    fix: str = "change the row",
    tools: list[Any] | None = None,
) -> str:
    """The conversation as the chat template of the base writes it.

    Args:
        prompt: end with what the template lets the assistant's answer begin with.
        where: the row, or the base, for messages.
        fix: what a user can do when the template fails.
        tools: what the assistant may call, as JSON schemas.

    Raises:
        HubkitError: ``HK-TEMPLATE``.
    """
    from hubkit.tensors.rendering import TemplateFailed, rendered

    try:
        return rendered(tokenizer, messages, prompt, tools)
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
