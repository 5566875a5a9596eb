"""Training rows as people have them, from files and data sets, and which of their columns are meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hubkit.errors import HubkitError, nearest
from hubkit.training.rows.files import SUFFIXES as SUFFIXES
from hubkit.training.rows.files import Record as Record
from hubkit.training.rows.files import kind_of, read_file
from hubkit.training.rows.sets import PREFIX, is_saved, read_set

TEXTS = ("text",)
CHATS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "instruction", "question", "query", "input")
FURTHER = ("context",)
"""What a prompt is about; it stands behind the prompt."""
COMPLETIONS = ("completion", "response", "answer", "output", "target")
SYSTEMS = ("system", "system_prompt")
TOOLS, HISTORIES = ("tools",), ("history",)
PREFERRED, MEDIA = ("chosen", "rejected"), ("image", "images", "audio", "audios", "video", "videos")
OTHERS = ("answers", "functions", "label", "reasoning", "thinking", "source", "summary", "title", "document")
CONTENT: tuple[str, ...] = (
    *TEXTS, *CHATS, *PROMPTS, *FURTHER, *COMPLETIONS, *SYSTEMS, *TOOLS, *HISTORIES, *PREFERRED, *MEDIA, *OTHERS
)  # fmt: skip
"""Names of columns that usually hold something to learn from: where one is not used, that is said."""
SHOWN = 10
"""Faults of one kind that a refusal spells out; the rest are counted."""

_NAME_THEM = "name them: --text COLUMN, or --messages COLUMN, or --prompt COLUMN --completion COLUMN"


@dataclass(frozen=True)
class Columns:
    """The columns to train on: `text`, or `messages`, or `prompt` (joined by blank lines) with `completion`.

    `prompt` and `completion` may hold lists of messages as well. Empty fields are found from the data by
    `choose_columns`, where none is given. A row may lack what follows:

    Args:
        system: text that becomes the system message.
        tools: what the assistant may call, a list of JSON schemas or its JSON text.
        history: earlier turns of prompt and completion, a list of pairs.
    """

    text: str | None = None
    messages: str | None = None
    prompt: tuple[str, ...] = ()
    completion: str | None = None
    system: str | None = None
    tools: str | None = None
    history: str | None = None

    def names(self) -> list[str]:
        """All columns named, in a fixed order."""
        return [n for n in (self.text, self.messages, *self.prompt, self.completion, *self.beside()) if n]

    def roles(self) -> dict[str, tuple[str, ...]]:
        """Field -> the columns that were taken as it, for those that name any."""
        named = {"text": self.text, "messages": self.messages, "prompt": self.prompt, "completion": self.completion}
        named |= {"system": self.system, "tools": self.tools, "history": self.history}
        return {role: (names,) if isinstance(names, str) else names for role, names in named.items() if names}

    def beside(self) -> tuple[str, ...]:
        """The columns that a row may lack."""
        return tuple(name for name in (self.system, self.tools, self.history) if name)

    def shape(self) -> tuple[str | None, ...]:
        """What two rows of one shape have in common."""
        return (self.text, self.messages, *self.prompt[:1], self.completion)


def read_rows(data: Path | str, offline: bool = False) -> list[Record]:
    """The rows of a file or a data set, in its order; see `read_data`."""
    return read_data(data, offline)[0]


def read_data(data: Path | str, offline: bool = False) -> tuple[list[Record], dict[str, str]]:
    """The rows of a file or a data set, in its order, and of a data set where it came from.

    Args:
        data: a file (`read_file` says which), a folder of ``save_to_disk``, or ``datasets:...`` (`read_set`).
        offline: fetch nothing.

    Raises:
        HubkitError: what `read_file` and `read_set` raise.
    """
    if str(data).startswith(PREFIX) or is_saved(Path(data)):
        return read_set(str(data), offline)
    return read_file(Path(data)), {}


def holds_rows(path: Path) -> bool:
    """Whether a file's name says that it has rows with columns, rather than plain lines."""
    return kind_of(path) in SUFFIXES


def choose_columns(records: Sequence[Record], asked: Columns | None = None) -> Columns:
    """The columns to train on: those asked for, or the one usual choice that the rows offer.

    Raises:
        HubkitError: HK-NO-ROWS; HK-COLUMNS when a named column is absent from any row, when nothing usual is
            there, when two choices are, when rows are of several shapes or preferences, or when `asked` is no complete
            choice; HK-DATA for rows with pictures or sounds.
    """
    if not records:
        raise HubkitError("HK-NO-ROWS", "there are no rows to train on", want="at least one row")
    if asked is not None and asked.names():
        columns, wanted = asked, [n for n in asked.names() if n not in asked.beside()]
        _check_choice(columns)
        _require_somewhere(records, columns.beside())
    else:
        columns = _found(records)
        wanted = [name for name in columns.shape() if name]
    faults = [
        f"{record.where}: no column {name!r}" + _hint(name, record.values)
        for record in records
        for name in wanted
        if name not in record.values
    ]
    if faults:
        where = records[0].where.partition(":")[0]
        raise HubkitError(
            "HK-COLUMNS",
            "rows lack a column that is to be trained on",
            where=where,
            want=f"{', '.join(wanted)} in every row",
            have=shorten(faults),
            fix=_NAME_THEM,
        )
    return columns


def unused(records: Sequence[Record], used: Iterable[str]) -> tuple[str, ...]:
    """Columns that usually hold something to learn from, are there, and are not among those `used`."""
    present = {name for record in _kinds(records) for name in record.values} - set(used)
    return tuple(name for name in CONTENT if name in present)


def _kinds(records: Sequence[Record]) -> list[Record]:
    """The first row with each set of columns."""
    kinds: dict[frozenset[str], Record] = {}
    for record in records:
        kinds.setdefault(frozenset(record.values), record)
    return list(kinds.values())


def _found(records: Sequence[Record]) -> Columns:
    """The choice that the first row offers, with what further rows of that shape have beside it."""
    first, *others = _kinds(records)
    columns = _detect(first)
    mixed = []
    for other in others:
        try:
            found = _detect(other)
        except HubkitError:
            continue  # it may have the columns all the same
        if found.shape() == columns.shape() and found.system in (None, columns.system or found.system):
            columns = _together(columns, found)
        elif found.system != columns.system or any(name not in other.values for name in columns.shape() if name):
            mixed.append(f"{other.where}: {', '.join(found.names())}")
    if mixed:
        raise HubkitError(
            "HK-COLUMNS",
            "the rows are of several shapes",
            where=first.where,
            want="the same shape in every row",
            have=[f"{first.where}: {', '.join(columns.names())}", *shorten(mixed)],
            fix="write them all as messages, or train on one shape at a time",
        )
    _require_text_alone(records)
    return columns


def _together(one: Columns, two: Columns) -> Columns:
    order = (*PROMPTS, *FURTHER)
    prompt = tuple(sorted({*one.prompt[1:], *two.prompt[1:]}, key=order.index))
    tools, history = one.tools or two.tools, one.history or two.history
    return replace(one, prompt=one.prompt[:1] + prompt, system=one.system or two.system, tools=tools, history=history)


def _detect(record: Record) -> Columns:
    present, where = list(record.values), record.where
    prompts: list[tuple[str, ...]] = [(name,) for name in PROMPTS if name in present]
    if prompts == [("instruction",), ("input",)]:  # the Alpaca form: a task and what it is applied to
        prompts = [("instruction", "input")]
    if len(prompts) == 1:
        prompts = [(*prompts[0], *(name for name in FURTHER if name in present))]
    systems: list[str | None] = [name for name in SYSTEMS if name in present] or [None]
    tools = next((name for name in TOOLS if name in present), None)
    history = next((name for name in HISTORIES if name in present), None)
    found: list[Columns] = [Columns(text=name) for name in TEXTS if name in present]
    found += [Columns(messages=name, system=s, tools=tools) for name in CHATS if name in present for s in systems]
    found += [
        Columns(prompt=prompt, completion=name, system=s, tools=tools, history=history)
        for prompt in prompts
        for name in COMPLETIONS
        if name in present
        for s in systems
    ]
    if not found and set(PREFERRED) <= set(present):
        raise _preferences(present, where, "--messages chosen, or --prompt prompt --completion chosen")
    if len(found) == 1 and found[0].completion and isinstance(record.values.get("label"), bool):
        raise _preferences(present, where, "keep the rows that are labelled true, and take the column away")
    if len(found) == 1:
        return found[0]
    have = [f"columns {', '.join(present) or 'none'}"]
    have += [f"could be: {', '.join(choice.names())}" for choice in found]
    raise _no_columns("text, or messages, or prompt and completion", have, where)


def _preferences(present: Sequence[str], where: str, fix: str) -> HubkitError:
    want, have = "answers to learn: text, messages, or prompt and completion", f"columns {', '.join(present)}"
    what = "these rows are preferences between answers, on which no method here trains"
    return HubkitError("HK-COLUMNS", what, where=where, want=want, have=have, fix=fix)


def _require_text_alone(records: Sequence[Record]) -> None:
    """Refuse rows with pictures or sounds beside their text, which the text speaks of: HK-DATA."""
    seen = [f"{one.where}: {n}" for one in records for n in MEDIA if one.values.get(n)]
    if seen:
        what, fix = "the rows have more than text", f"to train on the text alone, {_NAME_THEM}"
        raise HubkitError("HK-DATA", what, where=records[0].where, want="text", have=shorten(seen), fix=fix)


def _check_choice(columns: Columns) -> None:
    kinds = [bool(columns.text), bool(columns.messages), bool(columns.prompt or columns.completion)]
    whole = sum(kinds) == 1 and bool(columns.prompt) == bool(columns.completion)
    if not whole or (columns.text and columns.beside()) or (columns.history and not columns.prompt):
        raise _no_columns("text, or messages, or prompt and completion", ", ".join(columns.names()), "flags")


def _require_somewhere(records: Sequence[Record], names: Sequence[str]) -> None:
    present = {name for record in _kinds(records) for name in record.values}
    absent = [f"no row has a column {name!r}" + _hint(name, present) for name in names if name not in present]
    if absent:
        raise _no_columns(", ".join(names), absent, records[0].where.partition(":")[0])


def _no_columns(want: str, have: str | Sequence[str], where: str) -> HubkitError:
    return HubkitError(
        "HK-COLUMNS", "the columns to train on are not clear", where=where, want=want, have=have, fix=_NAME_THEM
    )


def _hint(name: str, present: Iterable[str]) -> str:
    near = nearest(name, present)
    return f" (near: {', '.join(near)})" if near else f" (there are: {', '.join(present) or 'none'})"


def shorten(faults: Sequence[str]) -> list[str]:
    """`faults` as a refusal shows them: `SHOWN` lines, the last of them saying how many more there are."""
    if len(faults) <= SHOWN:
        return [*faults]
    return [*faults[: SHOWN - 1], f"and {len(faults) - SHOWN + 1} more"]
