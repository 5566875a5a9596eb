"""Clients of other versions and of another language: an adapter goes up with each, and comes down, to the byte.

In the environments that ``scripts/clients DIR`` makes (HUBKIT_CLIENTS, or ``.cache/clients``); the installed
huggingface_hub needs none. By LFS and by Xet; what the JavaScript client would send by Xet is answered by LFS.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from making import make_adapter

from hubkit.verbs.pack import pack
from hubkit.verbs.pull import pull
from hubkit.verbs.push import push
from hubkit.verbs.verify import verify

if TYPE_CHECKING:
    from registry.conftest import HubServer

pytestmark = [pytest.mark.oracle, pytest.mark.slow]
PLACE = Path(os.environ.get("HUBKIT_CLIENTS") or Path(__file__).parents[3] / ".cache" / "clients").absolute()

PYTHON = """
import sys
from huggingface_hub import HfApi, constants, snapshot_download
verb, repo, folder, sends = sys.argv[1:]
assert constants.HF_HUB_DISABLE_XET == (sends == "lfs")
api = HfApi()
if verb == "up":
    api.create_repo(repo, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder)
    api.create_tag(repo, tag="v1.0.0")
else:
    assert sorted(api.list_repo_files(repo, revision="v1.0.0"))
    snapshot_download(repo, revision="v1.0.0", local_dir=folder)
"""
NODE = """
import { createRepo, downloadFile, listFiles, uploadFiles } from "@huggingface/hub";
import { mkdir, readdir, readFile, writeFile } from "node:fs/promises";
const [verb, name, folder, sends] = process.argv.slice(2);
const hub = { hubUrl: process.env.HF_ENDPOINT, accessToken: process.env.HF_TOKEN };
const repo = { type: "model", name };
if (verb === "up") {
  await createRepo({ repo, ...hub });
  const files = [];
  for (const path of await readdir(folder)) {
    files.push({ path, content: new Blob([await readFile(`${folder}/${path}`)]) });
  }
  await uploadFiles({ repo, files, useXet: sends === "xet", ...hub });
} else {
  await mkdir(folder, { recursive: true });
  for await (const file of listFiles({ repo, recursive: true, ...hub })) {
    const blob = await downloadFile({ repo, path: file.path, xet: sends === "xet", ...hub });
    await writeFile(`${folder}/${file.path}`, Buffer.from(await blob.arrayBuffer()));
  }
}
"""


def command(client: str) -> list[str]:
    """What runs a client's script; skips by name where it is not there."""
    if client == "installed":
        return [sys.executable, "-c", PYTHON]
    if client == "js":
        node = shutil.which("node")
        if node is None or not (PLACE / "js" / "node_modules").is_dir():
            pytest.skip(f"no @huggingface/hub here: scripts/clients {PLACE}, with node and npm")
        (PLACE / "js" / "try.mjs").write_text(NODE, "utf-8")
        return [node, str(PLACE / "js" / "try.mjs")]
    python = PLACE / client / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {client} here: scripts/clients {PLACE}")
    return [str(python), "-c", PYTHON]


@pytest.fixture(scope="module")
def hub(
    start_server: Callable[[Path, Mapping[str, str] | None], HubServer], tmp_path_factory: pytest.TempPathFactory
) -> HubServer:
    """A server with a token such as the JavaScript client takes."""
    return start_server(tmp_path_factory.mktemp("hub") / "registry", {f"hf_{'a' * 64}": "ana"})


@pytest.mark.parametrize("sends", ["lfs", "xet"])
@pytest.mark.parametrize("client", ["hub-0", "hub-1", "installed", "js"])
def test_up_with_it_and_down_with_hubkit_and_the_other_way(
    client: str, sends: str, hub: HubServer, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = command(client)
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HUBKIT_REGISTRY", hub.url)
    monkeypatch.setenv("HUBKIT_TOKEN", hub.tokens["ana"])

    def run(verb: str, repo: str, folder: Path) -> None:
        environment = hub.environment(tmp_path / "theirs")
        environment |= {"HF_HUB_DISABLE_XET": "1"} if sends == "lfs" else {}
        done = subprocess.run(
            [*line, verb, repo, str(folder), sends], env=environment, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stdout + done.stderr

    made = tmp_path / "made"
    make_adapter(made, tiny_llama, seed=1)
    pack(made, version="1.0.0", license="mit")
    repo = f"ana/{client}-{sends}"
    run("up", repo, made)
    pulled = pull(repo if client == "js" else f"{repo}@v1.0.0")
    assert {path.name for path in verify(pulled.path, base=tiny_llama).path.iterdir()} >= {"hubkit.json"}
    stored = {path.name: path.read_bytes() for path in pulled.path.iterdir() if path.is_file()}
    assert stored == {path.name: path.read_bytes() for path in made.iterdir() if path.name in stored}
    push(made, f"{repo}-ours")
    run("down", f"{repo}-ours", tmp_path / "back")
    have = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir() if path.is_file()}
    stored.pop("README.md", None)  # a push writes the card anew, with the repository's name
    assert {name: data for name, data in have.items() if name in stored} == stored
    refs = json.loads((hub.root / "repos" / "ana" / f"{client}-{sends}-ours" / "refs.json").read_text())
    assert "v1.0.0" in refs["tags"]
