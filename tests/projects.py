"""Projects of recipes and locks, on the golden artifacts: published, versioned and locked without any training."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from hubkit.documents.manifest import Manifest
from hubkit.registry.opening import open_registry
from hubkit.verbs.push import push

GOLDEN = Path(__file__).parent / "golden" / "artifacts"
BASE = GOLDEN / "base"
RECIPE = """\
# what runs in production
mix = "sum"

[base]
source = "ana/base"   # ours

# talks to people
[adapters.chat]
source = "ana/chat@^1"

# the queries; weight found by trying
[adapters.sql]
source = "./sql"
weight = -0.5

[targets.vllm]
max_loras = 4
"""


def put(name: str, folder: Path, **fields: Any) -> Path:
    """A copy of a golden artifact in `folder`, with other fields in its manifest: ``version``, ``license``, ..."""
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    manifest = replace(Manifest.read(folder), **fields)
    (folder / "hubkit.json").write_bytes(manifest.to_bytes())
    return folder


def ship(name: str, repo: str, folder: Path, **fields: Any) -> str:
    """Publish a golden artifact so changed; its commit."""
    commit = push(put(name, folder, **fields), repo).commit
    assert commit is not None
    return commit


def publish_base(repo: str = "ana/base", registry: str | None = None) -> str:
    """The golden base as a repository; its commit."""
    place = open_registry(None, registry)
    place.create(repo)
    files = {path.name: path for path in BASE.iterdir()}
    return place.commit(repo, files, [], message="base", parent=None)


def make_project(folder: Path) -> Path:
    """A recipe of a published base, of a published adapter by its range, and of a folder; with what it names.

    ana/chat has the versions 1.0.0 and 1.1.0.
    """
    publish_base()
    for version in ("1.0.0", "1.1.0"):
        ship("lora", "ana/chat", folder.parent / "chat", version=version)
    put("dora", folder / "sql")
    (folder / "hubkit.toml").write_text(RECIPE)
    return folder
