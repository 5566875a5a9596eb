"""What engines share that serve adapters beside their base: settings as flags, files of PEFT, the folder, a script.

A recipe's settings reach a command line and a manifest, so each has a kind, and one that is not of its kind is refused
by name before anything is written.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.folder import WEIGHTS_NAME
from hubkit.documents.probes import PROBES_NAME
from hubkit.engines.plan import Plan, copy, write_base
from hubkit.engines.served import Served, served
from hubkit.errors import HubkitError

if TYPE_CHECKING:
    from torch import Tensor

    from hubkit.tensors.parts.adapter import Adapter

Files = Callable[[Served, Path | None, Mapping[str, Any]], Mapping[str, bytes]]
"""`adapter_files` of an engine: a served adapter, the folder of its base, the settings -> the files of the adapter."""
DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}
"""What an adapter may be stored in, as a recipe names it -> as torch does."""


@dataclass(frozen=True)
class Kind:
    """What a setting may be.

    Args:
        want: in words.
        fits: whether a value of the recipe is that.
    """

    want: str
    fits: Callable[[Any], bool]


COUNT = Kind("a whole number, 1 or more", lambda value: type(value) is int and value >= 1)
PORT = Kind("a port, 1 to 65535", lambda value: type(value) is int and 1 <= value <= 65535)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
PART = Kind("a part of a whole, above 0 and at most 1", lambda value: type(value) in (int, float) and 0 < value <= 1)
WORD = Kind("one word", lambda value: isinstance(value, str) and value.isprintable() and value.split() == [value])


def one_of(values: Iterable[Any]) -> Kind:
    """One of a few values, of the same type."""
    known = tuple(values)
    return Kind(
        ", ".join(map(str, known)), lambda value: any(type(value) is type(one) and value == one for one in known)
    )


ADAPTER_DTYPE = {"adapter_dtype": one_of(DTYPES)}
"""In which an engine's adapter files store their values; float32 where a recipe does not say."""


def wrong_settings(engine: str, settings: Mapping[str, Any], kinds: Mapping[str, Kind]) -> list[str]:
    """Settings whose value is not of its kind, a line each."""
    return [
        f"targets.{engine}.{key}: want {kinds[key].want}, have {value!r}"
        for key, value in settings.items()
        if key in kinds and not kinds[key].fits(value)
    ]


def require(engine: str, served: Served, settings: Mapping[str, Any], more: list[str]) -> None:
    """Refuses settings and adapters that have no place in an engine's files: ``HK-EXPORT``.

    Args:
        engine: its name.
        settings: of the files.
        more: reasons of the engine's own.
    """
    wrong = [f"{key}: unknown; known: {', '.join(ADAPTER_DTYPE)}" for key in settings if key not in ADAPTER_DTYPE]
    wrong += wrong_settings(engine, settings, ADAPTER_DTYPE)
    if wrong:
        what, fix = f"the form {engine!r} has no such settings", "leave them out, or mend them"
        raise HubkitError("HK-EXPORT", what, have=wrong, fix=fix)
    if more:
        what, fix = f"{served.name!r} has no place in the form {engine!r}", "hubkit merge it, or leave this out of it"
        raise HubkitError("HK-EXPORT", what, have=more, fix=fix)


def flags(settings: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """The options of a command line that settings stand for; a switch that is off is none.

    Args:
        names: setting -> option, in their order on the line.
    """
    words: list[str] = []
    for key, option in names.items():
        value = settings.get(key)
        if value is not None and value is not False:
            words += [option] if value is True else [option, str(value)]
    return words


def factors(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Site -> A (r, in), B (out, r) of a plain LoRA."""
    from hubkit.tensors.parts.part import LowRank

    low = {site: part for site, part in adapter.parts.items() if isinstance(part, LowRank)}
    return {site: (part.A.detach(), part.B.detach()) for site, part in low.items()}


def with_partners(adapter: Adapter, groups: Iterable[Sequence[str]]) -> Adapter:
    """The adapter with zeros at sites that an engine expects beside those it has.

    Args:
        groups: last names of modules that the engine holds as one: where one of them has factors, all of them get some.
    """
    import torch

    from hubkit.methods.composed import low_rank_adapter

    have, base = factors(adapter), adapter.base
    rank = max(int(a.shape[0]) for a, _ in have.values())
    missing = {
        partner: base.sites[partner].shape
        for group in groups
        for site in have
        for last in group
        if site.rpartition(".")[2] in group
        and (partner := f"{site.rpartition('.')[0]}.{last}") not in have
        and partner in base.sites
    }
    if not missing:
        return adapter
    more = {site: (torch.zeros(out, rank), torch.zeros(rank, inner)) for site, (out, inner) in missing.items()}
    every = {**{site: (b, a) for site, (a, b) in have.items()}, **more}
    made = low_rank_adapter(adapter.name, every, rank, {}, base)
    made.source, made.revision = adapter.source, adapter.revision
    return made


def peft_files(adapter: Adapter, settings: Mapping[str, Any]) -> dict[str, bytes]:
    """A plain LoRA as PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``, alpha = r.

    Args:
        settings: ``adapter_dtype``: what the values are stored in.

    Raises:
        HubkitError: ``HK-NAN`` where float16 is too small for a value.
    """
    files = dict(adapter.method.export(adapter, "peft"))
    dtype = settings.get("adapter_dtype", "float32")
    if dtype != "float32":
        from safetensors.torch import load

        files[WEIGHTS_NAME] = stored(load(files[WEIGHTS_NAME]), dtype, adapter.name)
    return files


def stored(tensors: Mapping[str, Any], dtype: str, name: str) -> bytes:
    """Tensors as a safetensors file, in one dtype.

    Args:
        name: of the adapter, for messages.

    Raises:
        HubkitError: ``HK-NAN`` where a value does not fit.
    """
    import torch
    from safetensors.torch import save

    from hubkit.tensors.parts.values import require_finite

    made = {key: value.to(getattr(torch, DTYPES[dtype])).contiguous() for key, value in sorted(tensors.items())}
    require_finite(made.items(), f"{name}, in {dtype}")
    data: bytes = save(made, metadata={"format": "pt"})
    return data


def write_beside(plan: Plan, out: Path, files: Files) -> tuple[Served, ...]:
    """Write ``base/`` and ``adapters/NAME-DIGEST12/`` of a deployment, with their probes; what is served there."""
    write_base(plan, out / "base")
    found = served(plan)
    own = {key: value for key, value in plan.settings.items() if key in ADAPTER_DTYPE}
    for one in found:
        folder = out / "adapters" / one.folder
        folder.mkdir(parents=True)
        for name, data in files(one, plan.base, own).items():
            (folder / name).write_bytes(data)
        for member in plan.members:  # where a readiness probe looks first
            probes = member.folder.path / PROBES_NAME
            if member.folder.manifest.digest == one.digest and probes.is_file():
                copy(probes, folder / PROBES_NAME)
    return found


def script(engine: str, version: str, names: Sequence[str], groups: Iterable[Sequence[str]]) -> bytes:
    """``serve.sh``: a server started in the deployment's own folder, with whatever options follow.

    Args:
        engine: and its version, for whoever reads the file.
        names: under which models are served.
        groups: the words of its command, one line each.
    """
    lines = [" ".join(shlex.quote(word) for word in group) for group in groups if group]
    return "\n".join(
        [
            "#!/bin/sh",
            f"# Written by hubkit deploy, for {engine} {version}. More options may follow: sh serve.sh --port 8001",
            "# Models, by the names that requests give:",
            *(f"#   {name}" for name in names),
            "set -eu",
            'cd "$(dirname "$0")"',
            "export HF_HUB_OFFLINE=1  # only what is here",
            "exec " + " \\\n  ".join([*lines, '"$@"']),
            "",
        ]
    ).encode()
