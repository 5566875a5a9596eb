"""AdapterHub's folders: what its library computed is computed here, and what is exported is what it wrote.

The golden files and the script that made them are in ``tests/golden/adapterhub``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from making import make_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from variants import refused, tree
from zoo import model_of

from hubkit.artifact.adapterhub import to_adapterhub_config
from hubkit.artifact.folder import open_adapter
from hubkit.methods.config import config_document, parse_config
from hubkit.methods.host import host
from hubkit.methods.reading import read_adapter
from hubkit.methods.suite import randomize
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Stack
from hubkit.verbs.export import export
from hubkit.verbs.pack import pack

GOLDEN = Path(__file__).parent.parent / "golden" / "adapterhub"
FAMILIES, CASES = ("llama", "gpt2", "bert", "t5"), ("houlsby", "pfeiffer", "parallel", "learned", "channel")
OPTIONS: tuple[dict[str, Any], ...] = (
    {"placement": "houlsby", "reduction": 4, "activation": "silu"},
    {"placement": "pfeiffer", "width": 3, "activation": "gelu", "scaling": "channel"},
    {"placement": "parallel", "reduction": 0.5, "scaling": 4, "layers": [0], "activation": "gelu_tanh"},
    {"placement": "houlsby", "width": 5, "scaling": "learned", "activation": "mish", "dropout": 0.1},
)
AGREE = 1e-5
"""Two versions of transformers in fp32."""


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(GOLDEN / "expected.safetensors")
    return found


def live(base: Path) -> nn.Module:
    import transformers

    (kind,) = json.loads((base / "config.json").read_text())["architectures"]
    model: nn.Module = getattr(transformers, kind).from_pretrained(base)
    return model.eval()


def tiny_roberta(out: Path) -> Path:
    from transformers import RobertaConfig, RobertaForMaskedLM

    sizes = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    model = RobertaForMaskedLM(RobertaConfig(**sizes, num_attention_heads=4, max_position_embeddings=16))
    model.save_pretrained(out)
    return out


def logits(model: nn.Module, family: str) -> Tensor:
    ids = torch.randint(1, 24, (2, 5), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **({"decoder_input_ids": ids.flip(0)} if family == "t5" else {})).logits
    return found


def adopted(family: str, case: str, out: Path) -> Path:
    name = f"the_{case}"
    pack(GOLDEN / "adapters" / f"{family}-{case}", base=str(GOLDEN / family), out=out / case, name=name)
    return out / case


def attached(family: str, *folders: Path) -> Attached:
    model = Attached(live(GOLDEN / family))
    for folder in folders:
        model.add(folder.name, read_adapter(open_adapter(folder), model.sites))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_the_library_computes(family: str, expected: dict[str, Tensor], tmp_path: Path) -> None:
    model = attached(family, *(adopted(family, case, tmp_path) for case in CASES))
    for case in CASES:
        model.set_mix(case)
        want = expected[f"{family}/{case}"]
        assert (logits(model, family) - want).abs().max() <= AGREE, case
        assert (want - expected[f"{family}/base"]).abs().max() > 0.5, "or nothing is compared"
    model.set_mix(Stack(["pfeiffer", "learned"]))
    assert (logits(model, family) - expected[f"{family}/stack"]).abs().max() <= AGREE
    model.set_mix(Stack(["learned", "pfeiffer"]))
    assert (logits(model, family) - expected[f"{family}/stack"]).abs().max() > 1e-2, "order matters"
    assert (logits(model.detach(), family) - expected[f"{family}/base"]).abs().max() <= AGREE


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_exported_is_what_the_library_wrote(family: str, tmp_path: Path) -> None:
    for case in CASES:
        theirs = GOLDEN / "adapters" / f"{family}-{case}"
        out = tmp_path / "out" / case
        export(str(adopted(family, case, tmp_path)), out, to="adapterhub")
        have, want = (json.loads((folder / "adapter_config.json").read_text()) for folder in (out, theirs))
        assert have["version"] == want["version"]
        assert have["model_type"] == want["model_type"]
        inert = {"residual_before_ln", "original_ln_before"}  # of a parallel one, and after the attention
        for key, value in have["config"].items():
            if key not in inert and key != "reduction_factor":
                assert (value, key) == (want["config"][key], key)
        tensors = load_file(out / "adapter.safetensors")
        pickled = theirs / "pytorch_adapter.bin"
        wanted = torch.load(pickled) if pickled.exists() else load_file(theirs / "adapter.safetensors")
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "adapters" / "llama-pfeiffer", tmp_path / "theirs"))


def changed(folder: Path, **options: Any) -> None:
    document = json.loads((folder / "adapter_config.json").read_text())
    document["config"] |= options
    (folder / "adapter_config.json").write_text(json.dumps(document))


def refuse(code: str, folder: Path, base: str = "llama") -> str:
    before = tree(folder.parent)
    error = refused(code, pack, folder, base=str(GOLDEN / base))
    assert tree(folder.parent) == before
    return str(error)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"phm_layer": True}, "phm_layer: true"),
        ({"ln_before": True}, "ln_before: true"),
        ({"use_gating": True, "ln_after": True}, "use_gating: true"),
        ({"inv_adapter": "nice"}, 'inv_adapter: "nice"'),
        ({"cross_adapter": True}, "cross_adapter"),
        ({"stochastic_depth": 0.1}, "stochastic_depth: 0.1"),
        ({"mh_adapter": True}, "mh_adapter=true"),
        ({"residual_before_ln": "post_add"}, 'before_ln="post_add"'),
        ({"original_ln_after": False}, "original_ln_after: false"),
        ({"non_linearity": "rrelu"}, "non_linearity"),
        ({"non_linearity": None}, "non_linearity: null"),
        ({"is_new": 1}, "is_new: 1"),
        ({"architecture": "lora"}, "have:  lora"),
    ],
)
def test_an_option_that_is_not_supported_is_refused_by_name(folder: Path, options: dict[str, Any], named: str) -> None:
    changed(folder, **options)
    assert named in refuse("HK-OPTION", folder)


def test_other_values_of_options_are_faults_of_the_configuration(folder: Path) -> None:
    for options in ({"scaling": "wild"}, {"scaling": True, "dropout": 0}, {"scaling": 1.0, "dropout": "much"}):
        changed(folder, **options)
        refuse("HK-CONFIG", folder)


def test_a_preset_without_options_or_version_is_refused(folder: Path) -> None:
    document = json.loads((folder / "adapter_config.json").read_text())
    for other in ({**document, "config": "pfeiffer"}, {k: v for k, v in document.items() if k != "version"}):
        (folder / "adapter_config.json").write_text(json.dumps(other))
        refuse("HK-OPTION", folder)


def test_tensors_that_do_not_fit_are_refused(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    good = load_file(path)
    name = next(iter(good))
    wide = {k: torch.zeros(3, 8) if k.endswith("down.0.weight") else v for k, v in good.items()}
    for code, tensors in (
        ("HK-KEYS", {**good, "model.layers.0.output_adapters.adapters.other.adapter_up.bias": torch.zeros(16)}),
        ("HK-KEYS", {**good, "model.layers.9.output_adapters.adapters.the_pfeiffer.adapter_up.bias": torch.zeros(16)}),
        ("HK-KEYS", {k: v for k, v in good.items() if k != name}),
        ("HK-KEYS", {k.replace("output_", "attention_"): v for k, v in good.items()}),
        ("HK-NAN", {**good, name: torch.full_like(good[name], float("nan"))}),
        ("HK-SHAPE", wide),
    ):
        save_file(tensors, path)
        refuse(code, folder)
    path.write_bytes(b"garbage" * 10)
    refuse("HK-SAFETENSORS", folder)
    path.unlink()
    refuse("HK-MISSING", folder)


def test_another_base_is_refused(folder: Path) -> None:
    refuse("HK-BASE-MISMATCH", folder, "gpt2")


@pytest.mark.parametrize("named", ["", None])
def test_a_folder_that_names_no_base(folder: Path, named: str | None) -> None:
    document = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**document, "model_name": named}))
    assert refused("HK-BASE-NEEDED", pack, folder).where == str(folder / "adapter_config.json")
    pack(folder, base=str(GOLDEN / "llama"))


def test_a_base_that_the_library_does_not_build_in(tmp_path: Path) -> None:
    model_of("qwen2").save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "chat", tmp_path / "base", method=host().load("adapters"), width=4)
    assert refused("HK-EXPORT", export, str(adapter), tmp_path / "out", to="adapterhub").have == ["qwen2"]
    assert not (tmp_path / "out").exists()


def test_a_value_that_the_library_has_no_word_for() -> None:
    """Of a method whose form names fewer words than the method has."""
    method = host().load("adapters")
    form = method.adapterhub_form
    assert form is not None
    config = config_document(method.info.config()) | {"activation": "snake"}
    said = {"model_type": "llama", "model_class": "LlamaModel", "base_source": None}
    places: dict[str, Any] = {"hidden": 16, "width": 4, "left_out": []}
    assert "snake" in refused("HK-EXPORT", to_adapterhub_config, form, config, name="x", **said, **places).what


def test_layers_of_unequal_width_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    narrow = {k: v[:2] if "layers.0" in k and "down" in k else v for k, v in tensors.items()}
    save_file({k: v.clone() for k, v in narrow.items()}, folder / "adapter.safetensors")
    changed(folder, reduction_factor={"0": 8, "default": 5})
    assert "not equally wide" in refuse("HK-OPTION", folder)


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("open('ran', 'w')",))


@pytest.mark.parametrize("content", [Bomb(), {"x": Bomb()}, {"x": 1}, [torch.zeros(2)], {}, {1: torch.zeros(2)}])
def test_a_pickle_that_is_not_weights_is_refused_and_not_run(
    folder: Path, content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "adapter.safetensors").unlink()
    torch.save(content, folder / "pytorch_adapter.bin")
    assert "nothing in it was run" in refuse("HK-PICKLE", folder)
    (folder / "pytorch_adapter.bin").write_bytes(b"\x80\x02garbage")
    refuse("HK-PICKLE", folder)
    assert not (folder / "ran").exists()


def test_a_head_of_which_nothing_is_known(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "adapter.safetensors", folder / "model_head.safetensors")
    refuse("HK-HEAD", folder)
    error = refused("HK-EXTRA-FILES", pack, folder, base=str(GOLDEN / "llama"), without_head=True)
    assert error.have == ["model_head.safetensors"]
    done = pack(folder, base=str(GOLDEN / "llama"), out=tmp_path / "out", without_head=True)
    assert done.left_out == ("model_head.safetensors",)


@pytest.mark.oracle
@pytest.mark.parametrize("family", [*FAMILIES, "roberta"])
def test_the_library_loads_what_is_exported_and_computes_the_same(family: str, tmp_path: Path) -> None:
    """``HUBKIT_ADAPTERS_PYTHON`` is the interpreter of the environment that `make.py` describes."""
    python = os.environ.get("HUBKIT_ADAPTERS_PYTHON")
    if not python:
        pytest.skip("HUBKIT_ADAPTERS_PYTHON names no interpreter")
    base = GOLDEN / family
    if family == "roberta":
        base = tiny_roberta(tmp_path / "base")
    model = Attached(live(base))
    method, wanted, folders = host().load("adapters"), {}, []
    for number, options in enumerate(OPTIONS):
        adapter = Adapter.fresh("x", method, parse_config(method.info.config, options, "test"), model.sites, number)
        model.add(str(number), randomize(adapter, number))
        model.set_mix(str(number))
        wanted[str(number)] = logits(model, family)
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        for name, data in adapter.method.export(adapter, "adapterhub").items():
            (folders[-1] / name).write_bytes(data)
    out = tmp_path / "theirs.safetensors"
    arguments = [base, type(model.model).__name__, out, *folders]
    done = subprocess.run([python, GOLDEN / "oracle.py", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = load_file(out)
    for name, want in wanted.items():
        assert (theirs[name] - want).abs().max() <= AGREE, OPTIONS[int(name)]
