"""What a repository's model card says of it: front matter of README.md, and the tags the Hub derives from it."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from hubkit.errors import HubkitError
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.directory.history import FileTree

MAX_CARD = 1 << 20
MAX_FRONT = 64 << 10
REMEMBERED = 2 << 10
"""Characters of metadata up to which what was parsed is kept."""


def front_matter(text: str) -> str | None:
    """The YAML between the leading ``---`` lines of a card; None when there is none."""
    lines = text.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    for number, line in enumerate(lines[1:], 1):
        if line.strip() == "---":
            return "\n".join(lines[1:number])
    return None


def read_front(text: str) -> tuple[dict[str, Any], str | None]:
    """The metadata of a card and, when it cannot be read, why. Plain data only; aliases are refused (bombs)."""
    import yaml

    front = front_matter(text)
    if front is None:
        return {}, None
    if len(front) > MAX_FRONT:
        return {}, f"metadata is longer than {MAX_FRONT} characters"
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(front, yaml.SafeLoader)):
            return {}, "aliases are not allowed in metadata"
        data = yaml.safe_load(front)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return {}, f"metadata is not YAML: {error}"[:500]
    if data is None:
        return {}, None
    if not isinstance(data, dict):
        return {}, "metadata must be a mapping"
    try:
        plain = json.loads(json.dumps(data, default=str, allow_nan=False))
    except (TypeError, ValueError):
        return {}, "metadata must be plain values"
    return plain, None


def card_of(registry: DirectoryRegistry, repo: str, tree: FileTree) -> dict[str, Any]:
    """The metadata of a commit's README.md; empty when there is none or it cannot be read."""
    entry = tree.get("README.md")
    if entry is None or entry.size > MAX_CARD:
        return {}
    try:
        text = registry.object(repo, entry.sha256).read_text("utf-8", errors="replace")
    except (OSError, HubkitError):
        return {}
    front = front_matter(text)
    if front is None or len(front) > REMEMBERED:
        return read_front(text)[0]
    return _remembered(front)


@lru_cache(maxsize=1 << 15)
def _remembered(front: str) -> dict[str, Any]:
    """The metadata of a card that was parsed before: a list of models reads all of them each time."""
    return read_front(f"---\n{front}\n---\n")[0]


def _strings(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, str)]


def tags_of(card: dict[str, Any], tree: FileTree) -> list[str]:
    """The tags by which the Hub finds a repository: its own, library, licence, and its base with the relation."""
    tags = [*_strings(card.get("library_name")), *_strings(card.get("tags"))]
    tags += ["peft"] if "adapter_config.json" in tree else []  # the Hub knows a library by its files
    suffixes = {path.rsplit(".", 1)[-1] for path in tree if "." in path}
    tags += [kind for kind in ("safetensors", "gguf") if kind in suffixes]
    bases = _strings(card.get("base_model"))
    relation = card.get("base_model_relation")
    if not isinstance(relation, str):
        relation = "adapter" if "adapter_config.json" in tree else "finetune"
    for base in bases:
        tags += [f"base_model:{base}", f"base_model:{relation}:{base}"]
    for key, name in (("license", "license"), ("datasets", "dataset"), ("language", "")):
        tags += [f"{name}:{v}" if name else v for v in _strings(card.get(key))]
    return list(dict.fromkeys(tags))
