"""The identity of a base: what keeps it and what changes it; folders against listings; the cache of digests."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifact.bases import CONFIG, TOKENIZER, TOKENIZER_CONFIG, copy, tensors, write_base
from hypothesis import given, settings
from hypothesis import strategies as st
from nobody import as_nobody
from safetensors.numpy import save_file

from hubkit.artifact.identity import base_files, digest, digest_cache
from hubkit.artifact.identity.base_match import differences, proven
from hubkit.artifact.identity.digest import BaseRecord, fingerprint_folder, fingerprint_listing, hash_file
from hubkit.errors import HubkitError

SHORT = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(digest_cache, "_TICK_NS", 0)
    monkeypatch.setattr(digest, "_CACHED_FROM", 0)


def _differ(one: BaseRecord, other: BaseRecord) -> list[str]:
    return differences(one.fingerprint, other.fingerprint, one.tensors, other.tensors)


def _same_identity(one: BaseRecord, other: BaseRecord) -> None:
    assert proven(one.fingerprint, other.fingerprint) is True
    assert _differ(one, other) == []
    assert one.tensors == other.tensors


def test_resharded_renamed_other_metadata(tmp_path: Path) -> None:
    one = fingerprint_folder(write_base(tmp_path / "one"))
    three = fingerprint_folder(write_base(tmp_path / "three", shards=3))
    assert one.fingerprint.files.keys() == {"model.safetensors"}
    assert three.fingerprint.files.keys() == {f"part-{i}.safetensors" for i in range(3)}
    assert three.fingerprint.layout == one.fingerprint.layout
    _same_identity(one, three)


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
def test_lossless_copies_in_a_wider_dtype(tmp_path: Path, dtype: str) -> None:
    one = fingerprint_folder(write_base(tmp_path / "one"))
    wide = {name: array.astype(dtype) for name, array in tensors().items()}
    other = fingerprint_folder(write_base(tmp_path / "wide", wide, shards=2))
    assert other.fingerprint.layout != one.fingerprint.layout
    _same_identity(one, other)


def test_the_same_bits_in_another_dtype_are_another_base(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "one")
    one = fingerprint_folder(folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data.replace(b'"F16"', b'"I16"'))
    other = fingerprint_folder(folder)
    assert other.fingerprint.weights != one.fingerprint.weights
    assert _differ(one, other)[0].startswith("6 of 6 tensors differ: ")


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(tensors())), st.data())
def test_one_flipped_bit_is_named(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("flip")
    weights = tensors()
    bits = weights[name].view("<u2").reshape(-1)
    at = data.draw(st.integers(0, bits.size - 1))
    one = fingerprint_folder(write_base(folder / "one"))
    bits[at] ^= 1 << data.draw(st.integers(0, 15))
    other = fingerprint_folder(write_base(folder / "two", weights))
    assert _differ(one, other) == [f"1 of 6 tensors differ: {name}"]


def test_tied_alias_and_buffers_do_not_count(tmp_path: Path) -> None:
    one = fingerprint_folder(write_base(tmp_path / "one"))
    more = tensors()
    more["lm_head.weight"] = more["model.embed_tokens.weight"].copy()
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, "<f4")
    _same_identity(one, fingerprint_folder(write_base(tmp_path / "more", more)))
    more["lm_head.weight"][0, 0] += 1
    other = fingerprint_folder(write_base(tmp_path / "untied", more))
    assert _differ(one, other) == ["1 tensor more: lm_head.weight"]
    more["lm_head.weight"] = more["model.embed_tokens.weight"].copy()
    untied = fingerprint_folder(write_base(tmp_path / "says so", more, config={**CONFIG, "tie_word_embeddings": False}))
    assert len(untied.tensors) == 7


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"config": {**CONFIG, "rope_theta": 500000.0}}, "rope_theta"),
        ({"config": {**CONFIG, "sliding_window": 4}}, "sliding_window"),
        ({"tokenizer": {**TOKENIZER, "normalizer": {"type": "NFC"}}}, "the tokenizer"),
        ({"tokenizer_config": {**TOKENIZER_CONFIG, "pad_token": "a"}}, "the tokenizer"),
        ({"tokenizer_config": {**TOKENIZER_CONFIG, "chat_template": "x"}}, "the chat template"),
    ],
)
def test_what_else_belongs_to_a_base_is_named(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    one = fingerprint_folder(write_base(tmp_path / "one"))
    other = fingerprint_folder(write_base(tmp_path / "two", **changed))
    assert other.fingerprint.weights == one.fingerprint.weights
    assert [named in text for text in _differ(one, other)] == [True]


def test_templates_wherever_they_stand(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "one")
    one = fingerprint_folder(folder).fingerprint.template
    assert one == "sha256:" + hashlib.sha256(b"{{ messages }}").hexdigest()
    bare = write_base(tmp_path / "two", tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    assert fingerprint_folder(bare).fingerprint.template is None
    (bare / "chat_template.jinja").write_text("{{ messages }}")
    assert fingerprint_folder(bare).fingerprint.template == one
    named = [{"name": "default", "template": "{{ messages }}"}, {"name": "tools", "template": "t"}]
    listed = write_base(tmp_path / "three", tokenizer_config={"chat_template": named})
    (bare / "additional_chat_templates").mkdir()
    (bare / "additional_chat_templates" / "tools.jinja").write_text("t")
    assert fingerprint_folder(bare).fingerprint.template == fingerprint_folder(listed).fingerprint.template != one


def test_tokenizers_without_tokenizer_json(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "one", tokenizer=None)
    assert fingerprint_folder(folder).fingerprint.tokenizer is None
    (folder / "vocab.txt").write_text("a\nb\n")
    assert fingerprint_folder(folder).fingerprint.tokenizer is not None
    (folder / "tokenizer.model").write_bytes(b"\x0a\x00")
    want = "sha256:" + hashlib.sha256(b"\x0a\x00").hexdigest()
    assert fingerprint_folder(folder).fingerprint.tokenizer == want


def _listing(folder: Path, hashed: bool = True) -> tuple[dict[str, tuple[int, str | None]], Any, list[tuple[Any, ...]]]:
    files: dict[str, tuple[int, str | None]] = {
        p.name: (p.stat().st_size, hash_file(p) if hashed and p.suffix == ".safetensors" else None)
        for p in folder.iterdir()
    }
    asked = []

    def read(name: str, start: int, stop: int | None) -> bytes:
        asked.append((name, start, stop))
        return (folder / name).read_bytes()[start:stop]

    return files, read, asked


@pytest.mark.parametrize("shards", [1, 3])
def test_a_listing_says_what_the_folder_says(tmp_path: Path, shards: int) -> None:
    weights = tensors()
    weights["big"] = np.ones((300, 1000), "<f2")
    folder = write_base(tmp_path / "one", weights, shards=shards)
    files, read, asked = _listing(folder)
    there = fingerprint_listing(files, read, source="org/name", revision="a" * 40)
    here = fingerprint_folder(folder, source="org/name", revision="a" * 40)
    assert there.fingerprint.weights is None
    assert here.fingerprint == type(here.fingerprint)(
        **{**vars(there.fingerprint), "weights": here.fingerprint.weights}
    )
    assert [(t.name, t.shape, t.sha256) for t in there.tensors] == [(t.name, t.shape, "") for t in here.tensors]
    assert proven(there.fingerprint, here.fingerprint) is True
    weight_bytes = sum(stop - start for name, start, stop in asked if name.endswith(".safetensors"))
    assert weight_bytes <= shards * 128 * 1024  # headers only
    files, read, _ = _listing(folder, hashed=False)
    assert fingerprint_listing(files, read, source="org/name", revision="a" * 40) == there


def _code(folder: Path) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        fingerprint_folder(folder)
    return caught.value


def test_bases_that_are_none(tmp_path: Path) -> None:
    assert _code(tmp_path / "absent").code == "HK-BASE-MISSING"
    (tmp_path / "file").write_text("x")
    assert _code(tmp_path / "file").code == "HK-BASE-MISSING"
    (tmp_path / "empty").mkdir()
    assert _code(tmp_path / "empty").code == "HK-BASE-FILES"
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    assert "adapter" in _code(tmp_path / "empty").fix

    one = write_base(tmp_path / "no config", config=None)
    assert "config.json" in _code(one).what
    (one / "config.json").write_text('{"a": 1, "a": 2}')
    assert _code(one).code == "HK-JSON"

    one = write_base(tmp_path / "pickled")
    (one / "model.safetensors").rename(one / "pytorch_model.bin")
    error = _code(one)
    assert (error.code, error.have) == ("HK-PICKLE", ["pytorch_model.bin"])
    (one / "pytorch_model.bin").unlink()
    assert _code(one).code == "HK-BASE-FILES"

    for text in ("[]", '"x"', "null"):
        (one / "config.json").write_text(text)
        assert _code(one).code == "HK-JSON"
    one = write_base(tmp_path / "endless")
    os.truncate(one / "config.json", base_files.SMALL_BYTES + 1)
    error = _code(one)
    assert (error.code, error.have) == ("HK-BASE-FILES", [f"{base_files.SMALL_BYTES + 1} bytes"])
    one = write_base(tmp_path / "latin-1")
    (one / "chat_template.jinja").write_bytes("é".encode("latin-1"))
    error = _code(one)
    assert (error.code, error.where) == ("HK-BASE-FILES", str(one / "chat_template.jinja"))

    for shards in (1, 2):
        one = write_base(tmp_path / f"no tensors {shards}", shards=shards)
        for path in one.glob("*.safetensors"):
            save_file({}, path)
        error = _code(one)
        assert error.code == "HK-BASE-FILES"
        assert error.have == [f"{path.name}: no tensors" for path in sorted(one.glob("*.safetensors"))]
    one = write_base(tmp_path / "cut")
    (one / "model.safetensors").write_bytes((one / "model.safetensors").read_bytes()[:-1])
    assert _code(one).code == "HK-SAFETENSORS"
    one = write_base(tmp_path / "tokenizer", tokenizer={"model": 1})
    assert _code(one).code == "HK-TOKENIZER"


def test_an_index_that_disagrees(tmp_path: Path) -> None:
    whole = write_base(tmp_path / "one", shards=3)
    path = copy(whole, tmp_path / "absent")
    (path / "part-1.safetensors").unlink()
    (path / "part-2.safetensors").unlink()
    error = _code(path)
    assert error.code == "HK-BASE-FILES"
    assert [line.split(":")[0] for line in error.have] == ["part-1.safetensors", "part-2.safetensors"]

    path = copy(whole, tmp_path / "unnamed")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("model.norm.weight")
    index["weight_map"]["ghost"] = "part-0.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    error = _code(path)
    assert error.code == "HK-BASE-FILES"
    assert sorted(line.split(":")[0] for line in error.have) == ["ghost", "model.norm.weight"]

    for bad in ("../part-0.safetensors", "/etc/passwd"):
        index["weight_map"]["ghost"] = bad
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert _code(path).code == "HK-NAME"
    for weight_map in (None, {}, {"a": 1}, {"a": "x.bin"}):
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert _code(path).code == "HK-BASE-FILES"


def _hashes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    seen: list[Path] = []
    blocks = digest._blocks

    def counting(path: Path, start: int, stop: int) -> Any:
        seen.append(path)
        return blocks(path, start, stop)

    monkeypatch.setattr(digest, "_blocks", counting)
    return seen


def test_the_second_time_nothing_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_base(tmp_path / "one", shards=2)
    first = fingerprint_folder(folder)
    seen = _hashes(monkeypatch)
    assert fingerprint_folder(folder) == first
    assert hash_file(folder / "part-0.safetensors") == first.fingerprint.files["part-0.safetensors"]
    assert seen == []


@pytest.mark.parametrize("restore_times", [False, True])
def test_a_changed_file_is_hashed_again(tmp_path: Path, restore_times: bool) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"a" * 1000)
    before = path.stat()
    assert hash_file(path) == "sha256:" + hashlib.sha256(b"a" * 1000).hexdigest()
    path.write_bytes(b"b" * 1000)
    if restore_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hash_file(path) == "sha256:" + hashlib.sha256(b"b" * 1000).hexdigest()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "list", "folder"])
def test_a_damaged_cache_is_not_believed(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_base(tmp_path / "one")
    first = fingerprint_folder(folder)
    for entry in (tmp_path / "home" / "digests").iterdir():
        data = entry.read_bytes()
        entry.unlink()
        if damage == "folder":
            entry.mkdir()
        else:
            at = data.rindex(b"sha256:") + 10
            flipped = data[:at] + (b"0" if data[at : at + 1] != b"0" else b"1") + data[at + 1 :]
            bad = {"cut": data[:-9], "flip": flipped, "empty": b"", "text": b"x" * 99, "list": b"[]"}
            entry.write_bytes(bad[damage])
    seen = _hashes(monkeypatch)
    assert fingerprint_folder(folder) == first
    assert set(seen) == {folder / "model.safetensors"}
    if damage != "folder":
        seen.clear()
        assert fingerprint_folder(folder) == first
        assert seen == []


def test_without_a_home_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_base(tmp_path / "one")
    first = fingerprint_folder(folder)
    (tmp_path / "blocked").write_text("a file")
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "blocked"))
    assert fingerprint_folder(folder) == first
    assert (tmp_path / "blocked").read_text() == "a file"


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_cache, "_TICK_NS", 10**18)
    (tmp_path / "x").write_bytes(b"a")
    hash_file(tmp_path / "x")
    assert not (tmp_path / "home").exists()


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_cache, "ENTRIES", 8)
    for i in range(30):
        (tmp_path / f"x{i}").write_bytes(b"a")
        hash_file(tmp_path / f"x{i}")
    assert len(list((tmp_path / "home" / "digests").iterdir())) <= 8


def test_threads_and_processes_share_the_cache(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "one", shards=3)
    code = (
        "import sys; from pathlib import Path; from hubkit.artifact.identity.digest import fingerprint_folder as f\n"
        "print({f(Path(sys.argv[1])).fingerprint.weights for _ in range(20)})"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    with ThreadPoolExecutor(4) as pool:
        mine = set(pool.map(lambda _: fingerprint_folder(folder).fingerprint.weights, range(20)))
    assert {process.communicate(timeout=60)[0] for process in running} == {f"{mine}\n"}
    assert not [p for p in (tmp_path / "home" / "digests").iterdir() if p.name.startswith(".")]


def test_links_of_a_download_cache_are_followed(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "blobs")
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    one, other = fingerprint_folder(folder, source="x"), fingerprint_folder(linked, source="x")
    assert one == other


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(HubkitError) as caught:
        hash_file(tmp_path / "absent")
    assert caught.value.code == "HK-MISSING"
    with pytest.raises(HubkitError) as caught:
        hash_file(tmp_path)
    assert caught.value.code == "HK-IO"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(HubkitError) as caught:
        hash_file(tmp_path / "loop")
    assert caught.value.code == "HK-IO"


def test_files_that_may_not_be_read(common: Path) -> None:
    folder = write_base(common / "base")
    (folder / "model.safetensors").chmod(0o644)
    assert as_nobody(lambda: fingerprint_folder(folder)) == ""
    template = folder / "chat_template.jinja"
    template.write_text("{{ messages }}")
    template.chmod(0)
    assert as_nobody(lambda: fingerprint_folder(folder)) == "HK-BASE-FILES"
    assert as_nobody(lambda: hash_file(template)) == "HK-IO"


@pytest.mark.skipif(not SHORT.exists(), reason="needs Linux's sysfs")
def test_a_file_shorter_than_it_says_is_changing() -> None:
    """What sysfs holds is shorter than its size, like a file that is cut off between the two."""
    assert len(SHORT.read_bytes()) < SHORT.stat().st_size
    with pytest.raises(HubkitError, match="change") as caught:
        hash_file(SHORT)
    assert caught.value.code == "HK-IO"


def test_a_file_that_changes_while_it_is_hashed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    os.truncate(path, 64 << 20)
    done = threading.Event()

    def touch() -> None:
        while not done.is_set():
            os.utime(path)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(touch)
        try:
            with pytest.raises(HubkitError, match="change") as caught:
                hash_file(path)
        finally:
            done.set()
    assert caught.value.code == "HK-IO"


def test_without_any_home_digests_are_right_and_not_kept(common: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user of no name, as in a container: no HOME, and nobody knows where theirs would be."""
    if os.geteuid() != 0:
        pytest.skip("only root can become such a user")
    folder = write_base(common / "base")
    (folder / "model.safetensors").chmod(0o644)
    first = fingerprint_folder(folder)
    monkeypatch.delenv("HUBKIT_HOME")
    monkeypatch.delenv("HOME", raising=False)

    def nameless() -> None:
        with pytest.raises(RuntimeError):
            Path.home()
        assert fingerprint_folder(folder) == first

    assert as_nobody(nameless, user=54321) == ""
