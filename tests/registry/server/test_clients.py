"""The server under the clients people have: `hf`, huggingface_hub, transformers, PEFT; each in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hubkit.registry.directory.directory import DirectoryRegistry

if TYPE_CHECKING:
    from registry.conftest import HubServer

REPOS = "repo" if version("huggingface_hub").startswith("0.") else "repos"  # its name before 1.0
HF = str(Path(sys.executable).with_name("hf"))
Client = Callable[..., str]


@pytest.fixture
def client(hub_server: HubServer, tmp_path: Path) -> Client:
    """Runs `hf <arguments>`, or Python `code`, against the server as a user; what it printed."""

    def run(*arguments: str, code: str | None = None, user: str | None = "ana", fails: bool = False, **env: str) -> str:
        command = [HF, *arguments] if code is None else [sys.executable, "-c", code, *arguments]
        environment = hub_server.environment(tmp_path / f"home-{user}".replace(":", "-"), user) | env
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=180)
        assert (done.returncode != 0) is fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "folder"
    (made / "sub dir ü").mkdir(parents=True)
    (made / "big.safetensors").write_bytes(os.urandom(6_000_000) + bytes(3_000_000) + b"words " * 500_000)
    (made / "long.txt").write_bytes(b"line of text\n" * 900_000)
    (made / "sub dir ü" / "a b#c%d.json").write_text('{"a": 1}')
    (made / "README.md").write_text("---\nlicense: mit\nbase_model: x/y\n---\n# Title\n")
    (made / "empty.txt").touch()
    return made


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    found = {str(p.relative_to(folder)): p.read_bytes() for p in files}
    return {k: v for k, v in found.items() if not k.startswith(".cache/")}


def test_hf_uploads_tags_and_downloads_a_folder(
    client: Client, hub_server: HubServer, folder: Path, tmp_path: Path
) -> None:
    """With stock settings: a client that has hf_xet sends large files by Xet and nothing else."""
    repo = "ana/folder-xet"
    client("upload", repo, str(folder), ".")
    client(REPOS, "tag", "create", repo, "v1.0.0")
    tagged = contents(folder)
    weights = bytearray(tagged["big.safetensors"])
    weights[4_000_000:4_000_010] = b"0123456789"
    (folder / "big.safetensors").write_bytes(weights)
    (folder / "empty.txt").unlink()
    client("upload", repo, str(folder), ".", "--delete", "empty.txt")
    client("download", repo, "--local-dir", str(tmp_path / "now"), user="bob")
    assert contents(tmp_path / "now") == contents(folder)
    client("download", repo, "--revision", "v1.0.0", "--local-dir", str(tmp_path / "then"), user="bob")
    assert contents(tmp_path / "then") == tagged
    registry = DirectoryRegistry(hub_server.root)
    tip = registry.resolve(repo)
    assert {path for path, entry in registry.tree(repo, tip).items() if entry.large} == {"big.safetensors", "long.txt"}
    assert len(registry.history(repo, tip)) == 3
    client("upload", repo, str(folder), ".")
    assert registry.resolve(repo) == tip, "nothing changed, no commit"


def test_hf_without_xet(client: Client, folder: Path, tmp_path: Path) -> None:
    """Clients before 1.20, those without hf_xet, and those told so use LFS."""
    client("upload", "ana/folder-lfs", str(folder), ".", HF_HUB_DISABLE_XET="1")
    client("download", "ana/folder-lfs", "--local-dir", str(tmp_path / "now"), user=None, HF_HUB_DISABLE_XET="1")
    assert contents(tmp_path / "now") == contents(folder)


USERS = """
import json, sys
from huggingface_hub import HfApi, hf_hub_download
tokens, out = json.loads(sys.argv[1]), {}
def outcome(f, *a, **k):
    try: f(*a, **k)
    except Exception as e: return type(e).__name__
    return "fine"
def fetch(user):
    token = tokens.get(user, False)
    return outcome(hf_hub_download, "ana/private", "README.md", token=token, cache_dir=f"cache-{user}")
users = [*tokens, "nobody"]
out["private"] = {u: fetch(u) for u in users}
HfApi(token=tokens["ana"]).update_repo_settings("ana/private", private=False)
out["public"] = {u: fetch(u) for u in users}
out["write"] = {u: outcome(HfApi(token=tokens.get(u, False)).upload_file, path_or_fileobj=b"x", path_in_repo=u[:3],
                           repo_id="ana/private") for u in users}
print("RESULT" + json.dumps(out))
"""


def test_who_may_see_and_write(client: Client, hub_server: HubServer, folder: Path) -> None:
    client("upload", "ana/private", str(folder / "README.md"), "README.md", "--private")
    assert "403" in client("upload", "ana/private", str(folder / "README.md"), "x.md", user="ana:read", fails=True)
    out = json.loads(client(json.dumps(dict(hub_server.tokens)), code=USERS).rpartition("RESULT")[2].splitlines()[0])
    hidden = "RepositoryNotFoundError"
    mine = {"ana": "fine", "ana:read": "fine", "root:admin": "fine"}
    assert out["private"] == {**mine, "bob": hidden, "nobody": hidden}
    assert set(out["public"].values()) == {"fine"}
    assert {u for u, result in out["write"].items() if result == "fine"} == {"ana", "root:admin"}


API = """
import json, sys, threading
from huggingface_hub import *
from huggingface_hub.errors import *
api = HfApi()
out = {}
def refused(f, *a, **k):
    try: f(*a, **k)
    except Exception as e: return type(e).__name__, getattr(getattr(e, "response", None), "status_code", None)
repo = "ana/api"
out["url"] = [str(api.create_repo(repo, exist_ok=True)) for _ in range(2)]
out["exists"] = refused(api.create_repo, repo)
add = CommitOperationAdd
first = api.create_commit(repo, [add("a ü/b.txt", b"text"), add("w.bin", b"\\0" * 100), add("k.txt", b"k")],
                          commit_message="one", commit_description="more", parent_commit=api.model_info(repo).sha).oid
info = api.model_info(repo, files_metadata=True)
out["siblings"] = {s.rfilename: [s.size, s.lfs is not None] for s in info.siblings}
out["copy"] = api.create_commit(repo, [CommitOperationCopy("w.bin", "c/w.bin"), CommitOperationCopy("k.txt", "c/k.txt"),
                                CommitOperationDelete("a ü/")], commit_message="two", parent_commit=first[:10]).oid
out["files"] = api.list_repo_files(repo)
out["stale"] = refused(api.create_commit, repo, [add("z", b"z")], commit_message="x", parent_commit=first)
parent, results = api.model_info(repo).sha, []
def race(n):
    r = refused(api.create_commit, repo, [add("race.txt", str(n).encode())], commit_message="r", parent_commit=parent)
    results.append(r[1] if r else 200)
threads = [threading.Thread(target=race, args=(n,)) for n in range(6)]
[t.start() for t in threads]; [t.join() for t in threads]
out["race"] = sorted(results)
api.create_branch(repo, branch="dev/x"); api.create_tag(repo, tag="v1", revision=first)
out["tag again"] = refused(api.create_tag, repo, tag="v1"); api.create_tag(repo, tag="v1", exist_ok=True)
refs = api.list_repo_refs(repo)
out["refs"] = [sorted(b.name for b in refs.branches), {t.name: t.target_commit == first for t in refs.tags}]
api.upload_file(path_or_fileobj=b"on branch", path_in_repo="b.txt", repo_id=repo, revision="dev/x")
out["branch file"] = open(hf_hub_download(repo, "b.txt", revision="dev/x")).read()
out["log"] = [[c.title, c.message, c.authors] for c in api.list_repo_commits(repo, revision="v1")]
tree = api.list_repo_tree(repo, recursive=True, expand=True, revision="v1")
out["tree"] = {t.path: t.last_commit.title for t in tree}
out["paths"] = [p.path for p in api.get_paths_info(repo, ["a ü/b.txt", "none", "a ü"], revision="v1")]
out["missing"] = [refused(hf_hub_download, repo, "none.txt")[0],
                  refused(hf_hub_download, repo, "k.txt", revision="no")[0],
                  refused(api.model_info, "ana/none")[0], refused(api.delete_tag, repo, tag="no")[0]]
api.delete_branch(repo, branch="dev/x"); api.delete_tag(repo, tag="v1")
api.move_repo(repo, "ana/api2"); out["moved"] = [api.repo_exists(repo), api.repo_exists("ana/api2")]
api.super_squash_history("ana/api2"); out["squashed"] = len(api.list_repo_commits("ana/api2"))
out["snapshot"] = snapshot_download("ana/api2", revision=api.model_info("ana/api2").sha)
out["bad name"] = refused(api.create_commit, "ana/api2", [add("con.txt", b"x")], commit_message="x")
out["who"] = [api.whoami()["name"], [m.id for m in api.list_models(author="ana", search="api2")]]
api.delete_repo("ana/api2"); api.delete_repo("ana/api2", missing_ok=True)
print("RESULT" + json.dumps(out))
"""


def test_the_python_client_finds_all_it_asks_for(client: Client, hub_server: HubServer) -> None:
    out = json.loads(client(code=API).rpartition("RESULT")[2].splitlines()[0])
    assert out["url"] == [f"{hub_server.url}/ana/api"] * 2
    assert out["exists"] == ["HfHubHTTPError", 409]
    assert out["siblings"] == {"a ü/b.txt": [4, False], "k.txt": [1, False], "w.bin": [100, True]}
    assert out["files"] == ["c/k.txt", "c/w.bin", "k.txt", "w.bin"]
    assert out["stale"] == ["HfHubHTTPError", 412]
    assert out["race"] == [200, *[412] * 5]
    assert out["tag again"] == ["HfHubHTTPError", 409]
    assert out["refs"] == [["dev/x", "main"], {"v1": True}]
    assert out["branch file"] == "on branch"
    assert out["log"] == [["one", "more", ["ana"]], ["initial commit", "", ["local"]]]
    assert out["tree"] == {"a ü": "one", "a ü/b.txt": "one", "k.txt": "one", "w.bin": "one"}
    assert out["paths"] == ["a ü/b.txt", "a ü"]
    assert out["missing"] == [
        "EntryNotFoundError" if "Remote" not in out["missing"][0] else "RemoteEntryNotFoundError",
        "RevisionNotFoundError",
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
    ]
    assert out["moved"] == [True, True], "the old name leads to the new one"
    assert out["squashed"] == 1
    assert Path(out["snapshot"]).is_dir()
    assert out["bad name"] == ["BadRequestError", 400]
    assert out["who"] == ["ana", ["ana/api2"]]


MODELS = """
import sys, torch
torch.set_num_threads(1)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from peft import LoraConfig, PeftModel, get_peft_model
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=64)
model = LlamaForCausalLM(config).eval()
words = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
ids = torch.arange(8)[None]
model.push_to_hub("ana/tiny-llama"); tokenizer.push_to_hub("ana/tiny-llama")
again = AutoModelForCausalLM.from_pretrained("ana/tiny-llama").eval()
assert torch.equal(model(ids).logits, again(ids).logits)
assert AutoTokenizer.from_pretrained("ana/tiny-llama")("hello world").input_ids == [1, 2]
tuned = get_peft_model(again, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])).eval()
want = tuned(ids).logits
tuned.push_to_hub("ana/tiny-lora")
base = AutoModelForCausalLM.from_pretrained("ana/tiny-llama")
assert torch.equal(PeftModel.from_pretrained(base, "ana/tiny-lora").eval()(ids).logits, want)
print("RESULT ok")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_transformers_and_peft_push_and_load(client: Client, hub_server: HubServer) -> None:
    assert "RESULT ok" in client(code=MODELS, OMP_NUM_THREADS="1")
    registry = DirectoryRegistry(hub_server.root)
    assert registry.entry("ana/tiny-lora", registry.resolve("ana/tiny-lora"), "adapter_model.safetensors").large
