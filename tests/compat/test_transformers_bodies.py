"""A class with a body as its one child is loaded and called as transformers' own classes are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hubkit.compat.transformers_bodies import Bodies, body_of


@pytest.mark.parametrize("saved", ["BertModel", "BertForMaskedLM", "LlamaForCausalLM", "GPT2LMHeadModel", "GPT2Model"])
def test_the_body_has_the_values_of_the_files(saved: str, tmp_path: Path) -> None:
    """Whether the files name the body or leave its name out; the names are those below a head."""
    import transformers

    kind = getattr(transformers, saved)
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    kind(kind.config_class(**sizes, intermediate_size=32)).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model, said = Bodies.from_pretrained(tmp_path, config=config, output_loading_info=True)
    theirs = transformers.AutoModel.from_pretrained(tmp_path)
    assert not said["missing_keys"]
    prefix, poolers = body_of(model)
    assert poolers == (("bert.pooler.dense",) if "Bert" in saved else ())
    want = {name: value for name, value in theirs.state_dict().items() if "pooler" not in name}
    have = model.state_dict()
    assert have.keys() == {prefix + name for name in want}
    assert all(torch.equal(have[prefix + name], value) for name, value in want.items())
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        ours = model.eval()(input_ids=ids).last_hidden_state
        assert torch.equal(ours, theirs.eval()(input_ids=ids).last_hidden_state)
    assert body_of(theirs) == ("", ())


def test_what_has_no_body_is_refused() -> None:
    import transformers

    with pytest.raises(ValueError, match="hidden states"):
        Bodies.from_config(transformers.PretrainedConfig())
