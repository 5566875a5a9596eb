"""`methods`: what is installed, from package metadata alone; one described, by its plugin; a new one, written."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from hubkit.documents.arguments import checked
from hubkit.documents.shown import Shown, Table
from hubkit.errors import HubkitError
from hubkit.methods.host import Method, host


@dataclass(frozen=True)
class InstalledMethod:
    """A method some installed distribution offers; nothing of it is imported.

    Args:
        name: what ``--method`` takes.
        distribution: who offers it; several names when they conflict.
        version: the distribution's version; several, too.
        default: taken when no method is named.
    """

    name: str
    distribution: str
    version: str
    default: bool


@dataclass(frozen=True)
class Option:
    """One option of a method's configuration: its default as a JSON value, its type as written, its meaning."""

    name: str
    default: Any
    type: str
    help: str


@dataclass(frozen=True, repr=False)
class DescribedMethod(Shown):
    """What a method says of itself.

    Args:
        summary: one line.
        paper: where its formulas come from.
        identity: a fresh adapter changes nothing.
        mergeable: empty when it can be merged into the base's weights, else the reason why not.
        peft: PEFT's name of the type, None when PEFT does not know it.
        kinds: kinds of sites it acts at.
        options: its configuration.
        recipe: its training defaults.
        sources: where they come from.
    """

    name: str
    summary: str
    distribution: str
    version: str
    paper: str
    identity: bool
    unmergeable: str
    peft: str | None
    kinds: tuple[str, ...]
    options: tuple[Option, ...]
    recipe: Mapping[str, Any]
    sources: str


@dataclass(frozen=True, repr=False)
class NewMethod(Shown):
    """The package of a new method, as it was written.

    Args:
        name: the method.
        distribution: what to install.
        path: its folder.
        files: what is in it.
    """

    name: str
    distribution: str
    path: Path
    files: tuple[str, ...]


@overload
def methods(name: None = None) -> tuple[InstalledMethod, ...]: ...
@overload
def methods(name: str) -> DescribedMethod: ...
@overload
def methods(name: str, new: Path | str) -> NewMethod: ...
@checked
def methods(
    name: str | None = None, new: Path | str | None = None
) -> tuple[InstalledMethod, ...] | DescribedMethod | NewMethod:
    """All installed methods, or one of them described, or the package of a new one written.

    Args:
        name: a method; it alone is imported.
        new: folder to write a complete package for a new method `name` into; it must be empty, or not exist yet.

    Raises:
        HubkitError: ``HK-METHOD-UNKNOWN``, ``HK-METHOD-CONFLICT``, ``HK-PLUGIN`` for a named method; for a new one
            ``HK-NAME``, ``HK-NAME-TAKEN``, ``HK-EXISTS``, ``HK-DISK``, ``HK-IO``.
    """
    if new is not None:
        return _new(name or "", Path(new))
    if name is not None:
        return _describe(host().load(name))
    offers = host().offers()
    default = host().default() if offers else ""
    return Table(
        InstalledMethod(
            name=name,
            distribution=", ".join(claim.distribution for claim in claims),
            version=", ".join(claim.version for claim in claims),
            default=name == default,
        )
        for name, claims in offers.items()
    )


def _describe(method: Method) -> DescribedMethod:
    from hubkit.methods.config import every_option

    info = method.info
    defaults = every_option(info.config())
    meanings: dict[str, str] = {}
    for ancestor in reversed(info.config.__mro__):  # options can be inherited, and are explained where they are
        meanings |= _meanings(inspect.getdoc(ancestor) or "")
    return DescribedMethod(
        name=method.name,
        summary=info.summary,
        distribution=method.offer.distribution,
        version=method.offer.version,
        paper=info.paper,
        identity=info.identity,
        unmergeable=method.unmergeable,
        peft=method.peft_form.peft_type if method.peft_form else None,
        kinds=tuple(info.kinds),
        options=tuple(
            Option(field.name, defaults[field.name], str(field.type), meanings.get(field.name, ""))
            for field in dataclasses.fields(info.config)
        ),
        recipe=dict(info.recipe),
        sources=info.sources,
    )


def _new(name: str, path: Path) -> NewMethod:
    from hubkit import __version__
    from hubkit.artifact.folder import staged
    from hubkit.documents.files import refusing
    from hubkit.methods.template import distribution_name, package_files, require_method_name

    require_method_name(name)
    claims = host().offers().get(name, ())
    if claims:
        raise HubkitError(
            "HK-NAME-TAKEN",
            f"an installed package offers a method {name!r} already",
            have=[f"{c.distribution} {c.version} ({c.entry.value})" for c in claims],
            fix="another name",
        )
    with refusing(path):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            fix = "another folder: a package is written into a new or an empty one"
            raise HubkitError("HK-EXISTS", f"{path.name!r} exists already", where=str(path), fix=fix)
    files = package_files(name, __version__)
    with staged(path, replace=True) as stage:
        for file, text in files.items():
            (stage / file).parent.mkdir(exist_ok=True)
            (stage / file).write_bytes(text.encode())
    return NewMethod(name, distribution_name(name), path, tuple(sorted(files)))


def _meanings(docstring: str) -> dict[str, str]:
    """Option name -> text, from the ``Args:`` section of a configuration's docstring."""
    _, _, section = docstring.partition("Args:\n")
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.replace("``", "").split()) for name, text in found}
