"""AdapterHub's folders: what its library computed is computed here, and what is exported is what it wrote.

The golden files and the script that made them are in ``tests/golden/adapterhub``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hubkit.artifact.folder import open_adapter
from hubkit.methods.reading import read_adapter
from hubkit.tensors.attach import Attached
from hubkit.tensors.mix import Stack
from hubkit.verbs.pack import pack

GOLDEN = Path(__file__).parent.parent / "golden" / "adapterhub"
FAMILIES, CASES = ("llama", "gpt2", "bert", "t5"), ("houlsby", "pfeiffer", "parallel", "learned", "channel")
AGREE = 1e-5
"""Two versions of transformers in fp32."""


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


def live(family: str) -> nn.Module:
    import transformers

    kind = {"bert": "BertForMaskedLM", "t5": "T5ForConditionalGeneration"}.get(family, "AutoModelForCausalLM")
    model: nn.Module = getattr(transformers, kind).from_pretrained(GOLDEN / family)
    return model.eval()


def logits(model: nn.Module, family: str) -> Tensor:
    ids = torch.randint(1, 24, (2, 5), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **({"decoder_input_ids": ids.flip(0)} if family == "t5" else {})).logits
    return found


def adopted(family: str, case: str, out: Path) -> Path:
    pack(GOLDEN / "adapters" / f"{family}-{case}", base=str(GOLDEN / family), out=out / case)
    return out / case


def attached(family: str, *folders: Path) -> Attached:
    model = Attached(live(family))
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
