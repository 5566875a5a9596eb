"""Foreign forms of an adapter as data, read in both directions.

A method says by its hook `foreign_form` how PEFT writes it: this module reads and writes that form for any of them.
Nothing is guessed and nothing dropped: an option or a tensor that has no place here is refused by name.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hubkit.errors import HubkitError, nearest

PEFT_PREFIX = "base_model.model."
COMMON = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)
"""Keys that PEFT writes for every method, or once wrote, and that change nothing in the mathematics."""


@dataclass(frozen=True)
class PeftForm:
    """How PEFT spells one method.

    Args:
        peft_type: the value of ``peft_type`` in ``adapter_config.json``.
        roles: site kind -> role -> suffix of the tensor key, e.g. ``{"linear": {"A": "lora_A.weight"}}``.
        options: key of ``adapter_config.json`` -> field of the method's configuration.
        defaults: what PEFT takes for an absent key of `options`, where that differs from the field's own default.
        targets: the key that lists target modules; it is written resolved against the base. Empty: the method has none.
        modules: further keys that list some of the target modules -> the field of the method's configuration that
            names them; written resolved against the adapted modules, for a reader that matches any end of a name.
        selection: keys that only narrow the choice of modules; the tensors present already say what they chose.
        allowed: further keys and the values under which the mathematics stays ours; the first value is written.
        requires: keys that must have exactly this value: what tells methods of one type apart.
        ignored: keys without influence on the mathematics, beside those that every method of PEFT has.
        transposed: the key saying that the base stores its weights (in, out), if there is one.
        base_copies: suffixes of tensors that repeat the base's own weights; they must equal them.
        whole: tensor key -> (site, role), of tensors whose key names no module.
        saved: the key that lists modules trained as a whole, whose tensors keep the names that the base gives them; the
            configuration has a field of that name. Empty: the method knows none.
        rows: the key that lists tokens whose rows are trained alone (``token_ids``), by module.
        parameters: the key that lists targets by their weight instead of their module, for layers that a reader would
            take for others by their module's name.
        tied: the key saying that an embedding table and the head tied to it change alike (``tied`` is ``keep``).
    """

    peft_type: str
    roles: Mapping[str, Mapping[str, str]]
    options: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    targets: str = "target_modules"
    modules: Mapping[str, str] = field(default_factory=dict)
    selection: frozenset[str] = frozenset()
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    requires: Mapping[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    transposed: str | None = None
    base_copies: tuple[str, ...] = ()
    whole: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    saved: str = ""
    tied: str = ""
    rows: str = ""
    parameters: str = ""


HELD = ("weight", "bias")
"""Last parts of the keys of a module trained as a whole; the roles of its part, too."""


def to_peft_config(
    form: PeftForm,
    config: Mapping[str, Any],
    *,
    targets: Iterable[str],
    excluded: str = "",
    parameters: Iterable[str] = (),
    modules: Mapping[str, Iterable[str]] | None = None,
    saved: Iterable[str] = (),
    rows: Mapping[str, Sequence[int]] | None = None,
    transposed: bool = False,
    base_source: str | None = None,
    revision: str | None = None,
    task_type: str | None = None,
) -> bytes:
    """The bytes of ``adapter_config.json``: indented by 2, keys and lists sorted, one line feed at the end.

    Args:
        config: the method's configuration as JSON values.
        targets: module names, resolved by the caller against the base.
        excluded: expression for modules that a reader must pass over, whatever the targets say.
        parameters: names of modules to list by their weight.
        modules: the same for each key of `PeftForm.modules`.
        saved: the same for `PeftForm.saved`.
        rows: module -> ids of the tokens whose rows are trained.
        transposed: whether the adapted weights are stored (in, out).
    """
    document: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base_source,
        "inference_mode": True,
        "peft_type": form.peft_type,
        "revision": revision,
        "task_type": task_type,
    }
    document |= {key: values[0] for key, values in form.allowed.items()} | dict(form.requires)
    document |= {key: _whole(config[name]) for key, name in form.options.items() if name in config}
    if form.targets:
        document[form.targets] = sorted(targets)
    document |= {key: sorted(names) for key, names in (modules or {}).items()}
    if form.saved:
        document[form.saved] = sorted(saved) or None
    if excluded:
        document["exclude_modules"] = excluded
    if form.parameters and (weights := sorted(f"{name}.weight" for name in parameters)):
        document[form.parameters] = weights
    if form.rows and rows:
        document[form.rows] = {name: list(ids) for name, ids in sorted(rows.items())}
    if form.tied and config.get("tied") == "keep":
        document[form.tied] = True
    if form.transposed:
        document[form.transposed] = transposed
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _whole(value: Any) -> Any:
    """32.0 as 32: readers of this file expect whole numbers where PEFT writes them."""
    if isinstance(value, Mapping):
        return {key: _whole(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def from_peft_config(form: PeftForm, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The method's configuration (JSON values) that `data`, an ``adapter_config.json``, describes.

    The targets come back as PEFT wrote them; the caller resolves them against base and tensors.

    Raises:
        HubkitError: ``HK-OPTION`` naming every active option that would change the mathematics and is not known here.
    """
    if data.get("peft_type") != form.peft_type:
        raise HubkitError(
            "HK-OPTION",
            "the adapter is of another type",
            where=f"{where}#/peft_type",
            want=form.peft_type,
            have=str(data.get("peft_type")),
            fix="name the method that reads this type; `hubkit methods` lists them",
        )
    config = dict(form.defaults)
    fields = {**form.options, **form.modules, **({form.saved: form.saved} if form.saved else {})}
    foreign = [f"{k}: {_json(data.get(k))}, not {_json(v)}" for k, v in form.requires.items() if data.get(k) != v]
    silent = COMMON | form.ignored | form.selection | form.requires.keys()
    silent |= {form.targets, form.transposed or "", form.tied, form.rows, form.parameters}
    if form.tied and data.get(form.tied):
        config["tied"] = "keep"
    if form.rows and data.get(form.rows):
        config["token_ids"] = _one_list(data[form.rows], f"{where}#/{form.rows}")
    for key, value in sorted(data.items()):
        if key == form.saved and value is not None and not _names(value):
            foreign.append(f"{key}: {_json(value)}")
        elif key in fields:
            if value is not None:
                lists = key in form.modules or key == form.saved
                config[fields[key]] = sorted(value) if lists and isinstance(value, list) else value
        elif key not in silent and not _inactive(value) and value not in form.allowed.get(key, ()):
            foreign.append(f"{key}: {_json(value)}")
    if foreign:
        raise HubkitError(
            "HK-OPTION",
            "the adapter uses options that are not supported: loading it without them would compute something else",
            where=where,
            have=foreign,
            fix="merge it with the tool that trained it, or retrain without these options",
        )
    return config


def _one_list(value: Any, where: str) -> list[int]:
    """Ids of tokens, given once or for each of several modules alike.

    Raises:
        HubkitError: ``HK-VOCABULARY``.
    """
    lists = list(value.values()) if isinstance(value, Mapping) else [value]
    usable = all(isinstance(ids, list) and all(type(i) is int for i in ids) for ids in lists)
    if not usable or any(ids != lists[0] for ids in lists):
        raise HubkitError(
            "HK-VOCABULARY",
            "the rows trained are not those of the same tokens everywhere",
            where=where,
            want="one list of ids for embeddings and head",
            have=_json(value)[:200],
        )
    return list(lists[0])


def _names(value: Any) -> bool:
    """Whether `value` is a list of names, none of them empty."""
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _inactive(value: Any) -> bool:
    """An option that is off in every release of PEFT: null, false, empty, zero-like or the word none."""
    return value is None or value is False or value in ("", "none", {}, [])


def to_key(form: PeftForm | None, site: str, kind: str, role: str) -> str:
    """The name of a part's tensor in the file: PEFT's own where PEFT knows the method, else ``<site>.<role>``."""
    if form is None:
        return f"{site}.{role}"
    whole = next((key for key, at in form.whole.items() if at == (site, role)), None)
    return whole or f"{PEFT_PREFIX}{site}.{role if role in HELD else form.roles[kind][role]}"


@dataclass(frozen=True)
class Keys:
    """Tensor names of a file sorted by meaning: `parts[site][role]` and, apart, copies of base tensors by base name."""

    parts: Mapping[str, Mapping[str, str]]
    copies: Mapping[str, str]


def split_keys(form: PeftForm | None, keys: Iterable[str], where: str, saved: Collection[str] = ()) -> Keys:
    """Reads what each tensor of a file is.

    Args:
        saved: names of modules trained as a whole, or ends of them, as `PeftForm.saved` lists them.

    Raises:
        HubkitError: ``HK-KEYS`` listing every key that has no meaning in this form, or one that another has already.
    """
    parts: dict[str, dict[str, str]] = {}
    copies: dict[str, str] = {}
    unknown: list[str] = []
    suffixes = {} if form is None else {s: role for kind in form.roles.values() for role, s in kind.items()}
    for key in sorted(keys):
        if form is None:
            site, _, role = key.rpartition(".")
        elif key in form.whole:
            site, role = form.whole[key]
        else:
            site, role = _site_and_role(key, suffixes)
            copy = next((c for c in form.base_copies if key.startswith(PEFT_PREFIX) and key.endswith("." + c)), None)
            if not role and copy:
                copies[key[len(PEFT_PREFIX) : -len(copy) - 1] + "." + copy.rpartition(".")[2]] = key
                continue
            if not role:
                site, role = _held(key, saved)
        if not site or not role or role in parts.get(site, {}):
            unknown.append(key)
        else:
            parts.setdefault(site, {})[role] = key
    if unknown:
        shapes = [f"{PEFT_PREFIX}<module>.{s}" for s in sorted(suffixes)] + sorted(form.whole if form else ())
        known = ", ".join(shapes) or "<site>.<role>"
        raise HubkitError(
            "HK-KEYS",
            f"{len(unknown)} tensors have no meaning in this kind of adapter",
            where=where,
            want=known,
            have=unknown,
            fix="remove them, or name the method and base that they belong to",
        )
    return Keys(parts, copies)


def _site_and_role(key: str, suffixes: Mapping[str, str]) -> tuple[str, str]:
    if key.startswith(PEFT_PREFIX):
        for suffix, role in suffixes.items():
            if key.endswith("." + suffix):
                return key[len(PEFT_PREFIX) : -len(suffix) - 1], role
    return "", ""


def _held(key: str, saved: Collection[str]) -> tuple[str, str]:
    """Site and role of a tensor of a module trained as a whole, or of one inside such a module."""
    path, _, last = key.removeprefix(PEFT_PREFIX).rpartition(".")
    inside = [path, *(path[:dot] for dot, sign in enumerate(path) if sign == ".")]
    known = key.startswith(PEFT_PREFIX) and last in HELD
    return (path, last) if known and any(p.endswith(name) for p in inside for name in saved) else ("", "")


def short_targets(chosen: Iterable[str], everything: Iterable[str], apart: Iterable[str] = ()) -> list[str]:
    """The shortest list of names that, matched as module suffixes, choose exactly `chosen` among `everything`.

    Last names where they suffice (``q_proj``), full names for the rest: what serving engines read most easily.

    Args:
        apart: modules that must not end in a name of the list at all, for a reader to whom ``q_proj`` matches ``proj``.

    Raises:
        HubkitError: ``HK-TARGET`` where no such list exists: ``head`` without ``mtp.head``.
    """
    wanted, others = set(chosen), set(apart)
    rest = [name for name in everything if name not in wanted]
    tails = {name.split(".", n)[-1] for name in rest for n in range(name.count(".") + 1)}
    lasts = {name.rpartition(".")[2] for name in wanted}
    free = {last for last in lasts - tails if not any(name.endswith(last) for name in others)}
    names = {last if (last := name.rpartition(".")[2]) in free else name for name in wanted}
    lost = [n for n in names - free if n in tails or any(name.endswith(n) for name in others)]
    if lost:
        raise HubkitError(
            "HK-TARGET",
            "no list of module names can choose these modules without others",
            have=sorted(lost),
            fix="choose those whose names end alike, too, or leave these out",
        )
    return sorted(names)


def require_all(want: Iterable[str], have: Iterable[str], where: str) -> None:
    """Strict accounting: the parts of the file are exactly the parts of the adapter.

    Raises:
        HubkitError: ``HK-KEYS`` with both lists in full.
    """
    wanted, found = set(want), set(have)
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing or extra:
        near = [n for e in extra[:3] for n in nearest(e, missing, 1)]
        raise HubkitError(
            "HK-KEYS",
            f"{len(extra)} tensors have no home in this base and {len(missing)} are missing",
            where=where,
            want=[f"missing: {name}" for name in missing] or "",
            have=[f"no home: {name}" for name in extra] or "",
            fix=f"use the base it was trained on{'; near: ' + ', '.join(near) if near else ''}",
        )
