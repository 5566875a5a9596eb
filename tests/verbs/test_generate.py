"""generate: the answer of a base with its adapters, after proving that they belong together."""

from __future__ import annotations

from pathlib import Path

import pytest
from making import make_adapter
from variants import OTHERS, resharded, say

from hubkit.tensors.base.tokenizer import load_tokenizer
from hubkit.tensors.live.loading import load_base
from hubkit.verbs.attach import attach
from hubkit.verbs.generate import generate

PROMPT = "What is the capital of France?"


def by_hand(base: Path, terms: str, mix: str, tokens: int) -> str:
    tokenizer = load_tokenizer(base)
    model = attach(load_base(base), terms, mix=mix) if terms else load_base(base)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    made = model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("mix", ["sum", "stack"])
def test_it_is_greedy_decoding_under_the_mix(mix: str, tiny_llama: Path, tmp_path: Path) -> None:
    a, b = (make_adapter(tmp_path / name, tiny_llama, seed=n) for n, name in enumerate("ab"))
    terms = f"{a} + -0.5*{b}"
    done = generate(PROMPT, base=str(tiny_llama), terms=terms, mix=mix, max_new_tokens=12)
    assert done.text == by_hand(tiny_llama, terms, mix, 12)
    assert done.adapters == ((str(a), 1.0), (str(b), -0.5))
    assert done.text != generate(PROMPT, base=str(tiny_llama), max_new_tokens=12).text


def test_the_base_alone(tiny_llama: Path) -> None:
    assert generate(PROMPT, base=str(tiny_llama), max_new_tokens=5).text == by_hand(tiny_llama, "", "sum", 5)


def test_sampling_is_seeded(tiny_llama: Path) -> None:
    import torch

    before = torch.random.get_rng_state()
    texts = [generate(PROMPT, base=str(tiny_llama), temperature=1.5, seed=s, max_new_tokens=16).text for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("what", OTHERS)
def test_another_base(
    what: str, adapter: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, said = OTHERS[what]
    other = make(tiny_llama, tmp_path / "other")
    done = say(capsys, "generate", PROMPT, "--base", other, "--adapter", adapter)
    assert done.refusal() == "HK-BASE-MISMATCH"
    assert said in done.err
    assert str(other) in done.err
    answer = generate(PROMPT, base=str(other), terms=str(adapter), allow_base_mismatch=True, max_new_tokens=2)
    assert answer.overrides == ("allow-base-mismatch",)


def test_the_same_base_in_other_files(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    other = resharded(tiny_llama, tmp_path / "other")
    one, two = (generate(PROMPT, base=str(b), terms=str(adapter), max_new_tokens=8) for b in (tiny_llama, other))
    assert (one.text, one.overrides) == (two.text, ())


def test_refusals(adapter: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, status, code in (
        ((PROMPT,), 2, "HK-BASE-NEEDED"),
        ((PROMPT, "-b", tmp_path / "nope"), 1, "HK-BASE-MISSING"),
        ((PROMPT, "-b", tiny_llama, "-a", tmp_path / "nope"), 1, "HK-NOT-ADAPTER"),
        ((PROMPT, "-b", tiny_llama, "--max-new-tokens", 0), 2, "HK-OPTIONS"),
        ((PROMPT, "-b", tiny_llama, "--max-new-tokens", 300), 1, "HK-ROW-TOO-LONG"),
        (("word " * 300, "-b", tiny_llama), 1, "HK-ROW-TOO-LONG"),
        (("", "-b", tiny_llama, "--raw"), 1, "HK-ROW-TOO-LONG"),
        ((PROMPT, "-b", tiny_llama, "--temperature", -1), 2, "HK-OPTIONS"),
        ((PROMPT, "-b", tiny_llama, "-a", adapter, "--mix", "heap"), 2, "HK-USAGE"),
    ):
        assert say(capsys, "generate", *line).refusal(status) == code


def test_a_chat_template_that_fails(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    (other / "chat_template.jinja").write_text("{{ raise_exception('system turns only') }}")
    done = say(capsys, "generate", PROMPT, "--base", other)
    assert done.refusal() == "HK-TEMPLATE"
    assert "system turns only" in done.err
    assert say(capsys, "generate", PROMPT, "--base", other, "--raw", "--max-new-tokens", 2).status == 0
