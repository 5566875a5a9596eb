"""verify: everything is hashed again, held against method and base; what cannot be decided is status 3."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from making import make_adapter

from hubkit.documents.manifest import Manifest
from hubkit.errors import HubkitError
from hubkit.verbs.merge import merge
from hubkit.verbs.pull import pull
from hubkit.verbs.push import push
from hubkit.verbs.verify import verify


def refused(*args: str, **options: Any) -> HubkitError:
    with pytest.raises(HubkitError) as refusal:
        verify(*args, **options)
    return refusal.value


def test_a_whole_adapter_on_its_base(adapter: Path, tiny_llama: Path) -> None:
    done = verify(str(adapter), base=str(tiny_llama))
    assert [check.name for check in done.checks] == ["files", "base", "tensors"]
    assert done.digest == Manifest.read(adapter).digest
    assert (done.unlisted, done.overrides) == ((), ())


def test_the_base_that_the_manifest_names_is_asked(adapter: Path, published_base: str) -> None:
    push(adapter, "ana/chat")
    done = verify("ana/chat")
    assert done.base == published_base
    assert "weight files" in done.checks[1].detail  # by its listing: nothing of it was downloaded


def test_one_changed_byte_with_the_same_times(adapter: Path, tiny_llama: Path) -> None:
    """A digest remembered from before is not believed."""
    verify(str(adapter), base=str(tiny_llama))
    weights = adapter / "adapter_model.safetensors"
    times, data = weights.stat(), bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    error = refused(str(adapter), base=str(tiny_llama))
    assert error.code == "HK-FILES"
    assert error.have[0].startswith("adapter_model.safetensors: sha256:")


def test_another_base_of_the_same_shapes(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    error = refused(str(adapter), base=str(other))
    assert (error.code, error.status) == ("HK-BASE-MISMATCH", 1)
    assert any("model.norm.weight" in line for line in error.have)
    assert verify(str(adapter), base=str(other), allow_base_mismatch=True).overrides == ("allow-base-mismatch",)


def test_the_same_weights_in_other_files(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "sharded"
    shutil.copytree(tiny_llama, other, ignore=shutil.ignore_patterns("model.safetensors"))
    tensors = sorted(load_file(tiny_llama / "model.safetensors").items())
    index: dict[str, str] = {}
    for number in range(3):
        part = dict(tensors[number::3])
        save_file(part, other / f"part-{number}.safetensors", {"format": "pt", "note": str(number)})
        index |= dict.fromkeys(part, f"part-{number}.safetensors")
    (other / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert "values" in verify(str(adapter), base=str(other)).checks[1].detail


def test_another_architecture(adapter: Path, tiny_gpt2: Path) -> None:
    assert refused(str(adapter), base=str(tiny_gpt2)).code == "HK-BASE-MISMATCH"


def test_the_folder_that_a_manifest_of_ones_own_names_is_looked_at(
    adapter: Path, tiny_llama: Path, registry: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As `generate` does; of an adapter that was pulled, the folder would be one of somebody else's machine."""
    (tmp_path / "tiny").symlink_to(tiny_llama)
    monkeypatch.chdir(tmp_path)
    manifest = Manifest.read(adapter)
    assert manifest.base is not None
    manifest = replace(manifest, base=replace(manifest.base, source="./tiny"))
    (adapter / "hubkit.json").write_bytes(manifest.to_bytes())
    assert verify(str(adapter)).base == "./tiny"
    push(adapter, "ana/chat")
    assert refused("ana/chat").code == "HK-BASE-UNPROVEN"


def test_offline_a_stored_base_is_compared_and_a_missing_one_is_named(
    adapter: Path, registry: str, published_base: str
) -> None:
    manifest = Manifest.read(adapter)
    assert manifest.base is not None
    error = refused(str(adapter), offline=True)
    assert (error.code, error.status) == ("HK-BASE-UNPROVEN", 3)
    assert error.want[0].startswith(manifest.base.weights or "-")
    assert "hubkit pull --base " in error.fix
    pull(published_base, base=True)
    assert "values" in verify(str(adapter), offline=True).checks[1].detail


@pytest.mark.parametrize("offline", [False, True])
def test_a_base_out_of_reach_is_undecided(adapter: Path, registry: str, offline: bool) -> None:
    error = refused(str(adapter), offline=offline)
    assert (error.code, error.status) == ("HK-BASE-UNPROVEN", 3)


@pytest.mark.parametrize("source", [None, "base", "./base", "/nowhere/base", "a name"])
def test_a_base_that_nobody_can_find_is_undecided(
    adapter: Path, tiny_llama: Path, registry: str, source: str | None
) -> None:
    manifest = Manifest.read(adapter)
    assert manifest.base is not None
    manifest = replace(manifest, base=replace(manifest.base, source=source))
    (adapter / "hubkit.json").write_bytes(manifest.to_bytes())
    error = refused(str(adapter))
    assert (error.code, error.status) == ("HK-BASE-UNPROVEN", 3)
    assert error.have == [source or "no source"]
    verify(str(adapter), base=str(tiny_llama))


def test_a_checkpoint_without_a_base_is_undecided(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    merge(str(tiny_llama), str(adapter), tmp_path / "merged")
    manifest = replace(Manifest.read(tmp_path / "merged"), base=None)
    (tmp_path / "merged" / "hubkit.json").write_bytes(manifest.to_bytes())
    error = refused(str(tmp_path / "merged"), base=str(tiny_llama))
    assert (error.code, error.status) == ("HK-BASE-UNPROVEN", 3)
    assert error.have[0] == "kind model"


def test_a_method_that_is_not_installed_is_undecided(tmp_path: Path, tiny_llama: Path) -> None:
    from hubkit.artifact.folder import write_adapter
    from hubkit.documents.manifest import Plugin

    folder = make_adapter(tmp_path / "strange", tiny_llama)
    manifest = replace(Manifest.read(folder), method="strange", plugin=Plugin("hubkit-strange", "1.0"))
    files: dict[str, bytes | Path] = {entry.path: (folder / entry.path).read_bytes() for entry in manifest.files}
    write_adapter(folder, manifest, files, replace=True)
    error = refused(str(folder), base=str(tiny_llama))
    assert (error.code, error.status) == ("HK-METHOD-UNKNOWN", 3)
    assert error.fix == "pip install hubkit-strange==1.0"


def test_a_missing_tensor(tmp_path: Path, tiny_llama: Path) -> None:
    from safetensors.torch import load_file, save

    from hubkit.artifact.folder import write_adapter

    folder = make_adapter(tmp_path / "less", tiny_llama)
    manifest = Manifest.read(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    del tensors[name]
    files: dict[str, bytes | Path] = {entry.path: (folder / entry.path).read_bytes() for entry in manifest.files}
    files["adapter_model.safetensors"] = save(tensors, {"format": "pt"})
    write_adapter(folder, manifest, files, replace=True)
    assert refused(str(folder), base=str(tiny_llama)).code == "HK-KEYS"


def test_what_lies_beside_it_is_named(adapter: Path, tiny_llama: Path) -> None:
    (adapter / "notes.txt").write_text("mine")
    assert verify(str(adapter), base=str(tiny_llama)).unlisted == ("notes.txt",)
