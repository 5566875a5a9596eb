"""The model card, ``README.md``: people write it, hubkit keeps two things in it.

In the YAML front matter the keys by which the Hub finds adapters of a base; in the text one block between two comments
with the facts of the manifest. Every other byte stays as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hubkit.artifact.frontmatter import indexed, merge, split
from hubkit.artifact.results import results_of
from hubkit.artifact.task_types import loader_of, loading_options
from hubkit.documents.manifest import BASE_TAG, METHOD_TAG, FileEntry, Manifest, shareable
from hubkit.errors import HubkitError, escape

BEGIN = "<!-- hubkit:begin -->"
END = "<!-- hubkit:end -->"
MAX_CARD = 4 << 20
_MARK = re.compile(rf"^(?:{re.escape(BEGIN)}|{re.escape(END)})[ \t]*\r?$", re.MULTILINE)
_LONGEST = 200
_RELATIONS = {"adapter": "adapter", "mix": "adapter", "model": "merge"}
_PEFT_CONFIG = "adapter_config.json"


def render_card(manifest: Manifest, existing: str | None, *, repository: str | None = None) -> str:
    """The model card of an adapter.

    Args:
        manifest: as written; a base that is a folder of somebody's machine is named without its path.
        existing: the card there is, its line ends as they are in the file (read it as bytes and decode it).
        repository: where the adapter is published, ``org/name``, for the commands; a placeholder stands for it when
            that is not known.

    Returns:
        the card; rendering it again changes nothing.

    Raises:
        HubkitError: ``HK-CARD`` for front matter that is no YAML mapping, and for a block that is begun but not ended.
    """
    text = existing or ""
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    if len(text) > MAX_CARD:
        raise HubkitError("HK-CARD", "the model card is too large", where="README.md", want=f"{MAX_CARD} characters")
    newline = "\r\n" if 2 * text.count("\r\n") > text.count("\n") else "\n"
    head, body = split(text.removeprefix(mark))
    terms = {"license": manifest.license} if manifest.license else {}
    front = merge(head, _wanted(manifest), terms, _tags(manifest), newline, (BASE_TAG, METHOD_TAG))
    front = indexed(front, manifest.name, results_of(manifest.evaluation), newline)
    block = newline.join([BEGIN, *_block(manifest, repository or f"OWNER/{manifest.name}"), END])
    return mark + front + _place(body, block, manifest.name, newline)


def card_file(manifest: Manifest, names: Iterable[str], existing: str | None = None) -> bytes:
    """The bytes of ``README.md`` for an adapter about to be written with the files `names`; see `render_card`."""
    listed = tuple(FileEntry(name, 0, "") for name in sorted(names))
    return render_card(replace(manifest.shareable(), files=listed), existing).encode()


def _wanted(manifest: Manifest) -> dict[str, str]:
    """The keys that are ours, for the Hub's search and model tree."""
    wanted = {"base_model_relation": _RELATIONS[manifest.kind], "library_name": "hubkit"}
    if manifest.kind == "model":
        wanted["library_name"] = "transformers"
    elif any(entry.path == _PEFT_CONFIG for entry in manifest.files):
        wanted["library_name"] = "peft"
    source = _repository(manifest)
    return {"base_model": source, **wanted} if source else wanted


def _tags(manifest: Manifest) -> list[str]:
    """The tags that are ours: that it is hubkit's, on which weights it was made, by which method."""
    found = ["hubkit"]
    if manifest.kind != "model" and manifest.base is not None and manifest.base.weights:
        found.append(BASE_TAG + manifest.base.weights.removeprefix("sha256:")[:16])
    return [*found, f"{METHOD_TAG}{manifest.method}"] if manifest.kind != "model" and manifest.method else found


def _repository(manifest: Manifest) -> str | None:
    """The base's repository; None for a folder, which means nothing to anybody else."""
    source = (manifest.base.source if manifest.base else None) or ""
    return source if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source, re.ASCII) else None


def _place(body: str, block: str, name: str, newline: str) -> str:
    marks = [(match.group().strip(), match.start(), match.end()) for match in _MARK.finditer(body)]
    if [mark for mark, _, _ in marks] == [BEGIN, END]:
        stop = marks[1][2] - (1 if body[: marks[1][2]].endswith("\r") else 0)
        return body[: marks[0][1]] + block + body[stop:]
    if marks:
        want, have = f"{BEGIN}, then {END}, once each", ", ".join(mark for mark, _, _ in marks)
        fix = "take these lines out of README.md; they are written anew"
        raise HubkitError("HK-CARD", "the block of hubkit is damaged", where="README.md", want=want, have=have, fix=fix)
    if not body.strip():
        return body + (newline if not body else "") + f"# {name}{newline}{newline}{block}{newline}"
    gap = newline * (2 if not body.endswith("\n") else 1 if not body.endswith(newline * 2) else 0)
    return f"{body}{gap}{block}{newline}"


def _block(manifest: Manifest, repository: str) -> Iterator[str]:
    yield "<!-- Written by hubkit: changes between these two comments are lost. -->"
    yield ""
    yield from _table(("", ""), list(_facts(manifest)))
    documents = {
        "Configuration": manifest.config,
        "Training": manifest.training,
        "Evaluation": manifest.evaluation,
        "Composition": manifest.composition,
        "Extraction": manifest.extraction,
        "Rebase": manifest.rebase,
    }
    for title, values in documents.items():
        if values:
            yield from ["", f"### {title}", ""]
            yield from _table(("", ""), [(_code(name), _code(value)) for name, value in _flat(values)])
    if manifest.kind == "mix":
        yield from ["", "### How they act together", "", _code(manifest.mixed().tree)]
    if manifest.parents:
        yield from ["", "### Made from", ""]
        rows = [(_code(shareable(one.reference)), _code(one.weight), _code(one.digest)) for one in manifest.parents]
        yield from _table(("adapter", "weight", "manifest"), rows)
    yield from ["", "### Use", "", "```sh"]
    yield f"hubkit pull {repository}      # fetched, checked against its digests, kept"
    yield f"hubkit verify {repository}    # is it what its manifest says, is the base the right one"
    yield "```"
    source = _repository(manifest)
    if source and any(entry.path == _PEFT_CONFIG for entry in manifest.files):
        yield from _loading(source, manifest.base.revision if manifest.base else None, repository, manifest.task or {})


def _loading(source: str, revision: str | None, repository: str, task: Mapping[str, Any]) -> Iterator[str]:
    pin = f', revision="{revision}"' if revision else ""
    loader = loader_of(task)
    yield from ["", "```python", "from peft import PeftModel", f"from transformers import {loader}", ""]
    yield f'base = {loader}.from_pretrained("{source}"{pin}{"".join(f", {one}" for one in loading_options(task))})'
    yield f'model = PeftModel.from_pretrained(base, "{repository}")'
    yield "```"


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield "kind", _code(manifest.kind)
    yield "version", _code(manifest.version)
    if manifest.method:
        yield "method", _code(manifest.method)
    if manifest.plugin:
        yield "plugin", _code(f"{manifest.plugin.distribution} {manifest.plugin.version}")
    task, base = manifest.task or {}, manifest.base
    if task.get("kind"):
        yield "task", _code(task["kind"])
    if task.get("labels"):
        yield "labels, in the order of the outputs", _code(task["labels"])
    if base:
        yield "base", _code(shareable(base.source)) if base.source else "a local folder"
        if base.revision:
            yield "base revision", _code(base.revision)
        yield ("base weights", _code(base.weights)) if base.weights else ("base layout", _code(base.layout))
        if base.codec:
            yield "base quantized as", _code(base.codec)
    if manifest.overrides:
        yield "overrides", ", ".join(map(_code, manifest.overrides))


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values one level of tables deep; None is left out."""
    for name in sorted(values):
        value = values[name]
        if isinstance(value, Mapping) and not above:
            yield from _flat(value, f"{name}.")
        elif value is not None:
            yield above + name, value


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _code(value: Any) -> str:
    """A value as a code span: whatever a stranger wrote in it, it stays one cell of one table."""
    text = ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else _plain(value)
    text = escape(text[:_LONGEST] + (" ..." if len(text) > _LONGEST else ""))
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"


def _plain(value: Any) -> str:
    """A value as text; 1.0 is 1, as in canonical JSON, so that a manifest read back gives the same card."""
    if isinstance(value, bool | None):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)
