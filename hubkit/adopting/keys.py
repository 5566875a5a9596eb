"""Names of an adapter's tensors as training scripts save them, made those that PEFT writes.

``save_pretrained`` takes the adapter's name off, and is called on the bare model; who saves ``state_dict()`` keeps the
name (``lora_A.default.weight``), and the names of whatever was wrapped around the model. What was taken off is said:
nothing is guessed, for without it each name is PEFT's own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubkit.artifact.forms import HELD, PEFT_PREFIX
from hubkit.errors import HubkitError

if TYPE_CHECKING:
    from hubkit.artifact.forms import PeftForm

WRAPPERS = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")
"""Attributes under which torch keeps a module that it wraps, at any depth: activation checkpointing, FSDP, compile."""
PARALLEL = "module"
"""The same of DataParallel, DistributedDataParallel and DeepSpeed; at the front only: a base may have one inside."""
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<name>[^.]+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class PlainKeys:
    """The names of a file's tensors as PEFT writes them.

    Args:
        names: name in the file -> PEFT's.
        renamed: what differed, a line for each kind.
    """

    names: Mapping[str, str]
    renamed: tuple[str, ...]


def plain_keys(form: PeftForm, keys: Iterable[str], where: str) -> PlainKeys:
    """What PEFT would call the tensors of a file; one that has no meaning in `form` keeps its name.

    Args:
        keys: names of tensors in the file.
        where: the file, for messages.

    Raises:
        HubkitError: ``HK-KEYS`` for the tensors of several adapters, or two that are one.
    """
    names: dict[str, str] = {}
    adapters: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for key in sorted(keys):
        path, wrappers = _unwrapped(key)
        plain, adapter = (key, None) if key in form.whole else _unnamed(form, path)
        names[key] = plain or key
        if plain and key not in form.whole:
            kinds.update(wrappers)
        if adapter is not None:
            adapters[adapter] += 1
    if len(adapters) > 1:
        raise HubkitError(
            "HK-KEYS",
            f"the file holds the tensors of {len(adapters)} adapters",
            where=where,
            want="those of one",
            have=[f"{name or '(without a name)'}: {count} tensors" for name, count in sorted(adapters.items())],
            fix="save each into a folder of its own: model.save_pretrained(DIR, selected_adapters=[NAME])",
        )
    places = Counter(names.values())
    twice = [key for key, plain in names.items() if places[plain] > 1]
    if twice:
        raise HubkitError("HK-KEYS", "tensors of the file are one, under several names", where=where, have=twice)
    kinds.update({f"held that of the adapter, {name!r}": count for name, count in adapters.items() if name})
    return PlainKeys(names, tuple(f"{count} names of tensors {kind}" for kind, count in sorted(kinds.items())))


def _unwrapped(key: str) -> tuple[str, set[str]]:
    """`key` below PEFT's own prefix, which the wrappers may stand before or behind; and what was found around it."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    found = {f"held {part + '.'!r}" for part in set(key.split(".")) - set(parts)}
    while parts[0] == PARALLEL and len(parts) > 1:
        parts = parts[1:]
        found.add(f"held {PARALLEL + '.'!r}")
    path, depth = ".".join(parts), 0
    while path.startswith(PEFT_PREFIX):
        path, depth = path.removeprefix(PEFT_PREFIX), depth + 1
    if depth != 1:
        found.add(f"held {PEFT_PREFIX!r} more than once" if depth else f"lacked {PEFT_PREFIX!r}")
    return path, found


def _unnamed(form: PeftForm, path: str) -> tuple[str | None, str | None]:
    """PEFT's name for the tensor at `path`, None for one without a meaning; and the adapter's, where one belongs."""
    for suffix in {suffix for roles in form.roles.values() for suffix in roles.values()}:
        head, end = suffix.removesuffix(".weight"), ".weight" if suffix.endswith(".weight") else r"(?:\.weight)?"
        found = re.fullmatch(rf"(.+)\.{re.escape(head)}(?:\.(?!weight$)([^.]+))?{end}", path)
        if found:
            return f"{PEFT_PREFIX}{found[1]}.{suffix}", found[2] or ""
    if saved := _SAVED.fullmatch(path) if form.saved else None:
        return f"{PEFT_PREFIX}{saved['module']}.{saved['rest']}", saved["name"]
    copied = any(path.endswith(f".{suffix}") for suffix in form.base_copies)
    return (PEFT_PREFIX + path if copied or path.rpartition(".")[2] in HELD else None), None
