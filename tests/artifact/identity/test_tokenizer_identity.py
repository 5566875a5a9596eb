"""The tokenizer's digest: forms of one tokenizer agree, another tokenizer differs; the real library as a witness."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from hubkit.artifact.identity.tokenizer_identity import (
    _canonical,
    template_digest,
    token_id,
    tokenizer_digest,
    unknown_token,
)
from hubkit.errors import HubkitError

SPECIAL = {"bos": 0, "eos": 1, "pad": None, "unk": None}
BASE: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": i, "content": c, "single_word": False, "lstrip": False, "special": True}
        for i, c in enumerate(("<s>", "</s>"))
    ],
    "normalizer": {"type": "BertNormalizer", "lowercase": True, "strip_accents": None},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False}]},
    "post_processor": None,
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}, "merges": ["a b"]},
}


def _after(change: Callable[[dict[str, Any]], object]) -> str:
    document = copy.deepcopy(BASE)
    change(document)
    return tokenizer_digest(document, SPECIAL)


SAME: list[Callable[[dict[str, Any]], object]] = [
    lambda d: d["model"].update(merges=[["a", "b"]]),
    lambda d: d["model"].update(dropout=None, unk_token=None, fuse_unk=False, byte_fallback=False, ignore_merges=False),
    lambda d: d["model"].update(unk_token="", continuing_subword_prefix="", end_of_word_suffix=""),
    lambda d: d["model"].pop("type"),
    lambda d: d.update(truncation={"max_length": 5}, padding={"length": 5}, decoder=None, version="2"),
    lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(use_regex=True),
    lambda d: d["normalizer"].pop("strip_accents"),
    lambda d: d["added_tokens"].reverse(),
    lambda d: d.pop("post_processor"),
]
OTHER: list[Callable[[dict[str, Any]], object]] = [
    lambda d: d["model"].update(merges=[]),
    lambda d: d["model"].update(byte_fallback=True),
    lambda d: d["model"]["vocab"].update(c=5),
    lambda d: d["model"]["vocab"].update(a=3, b=2),
    lambda d: d.update(normalizer=None),
    lambda d: d["normalizer"].update(lowercase=False),
    lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(use_regex=False),
    lambda d: d.update(post_processor={"type": "ByteLevel"}),
    lambda d: d["added_tokens"].pop(),
    lambda d: d["added_tokens"][0].update(lstrip=True),
]


@pytest.mark.parametrize("change", SAME)
def test_forms_of_one_tokenizer(change: Callable[[dict[str, Any]], object]) -> None:
    assert _after(change) == tokenizer_digest(BASE, SPECIAL)


def test_other_tokenizers_all_differ() -> None:
    seen = [tokenizer_digest(BASE, SPECIAL), *map(_after, OTHER)]
    seen += [tokenizer_digest(BASE, {**SPECIAL, "pad": 1}), tokenizer_digest(BASE, {**SPECIAL, "eos": 0})]
    assert len(set(seen)) == len(seen)


def test_bytes_and_objects_are_one() -> None:
    assert tokenizer_digest(json.dumps(BASE, indent=2).encode(), SPECIAL) == tokenizer_digest(BASE, SPECIAL)


def test_merges_with_spaces_stay_pairs() -> None:
    one, other = [["a b", "c"]], [["a", "b c"]]
    assert _after(lambda d: d["model"].update(merges=one)) != _after(lambda d: d["model"].update(merges=other))


def test_old_and_new_forms_of_metaspace() -> None:
    old = _after(lambda d: d.update(pre_tokenizer={"type": "Metaspace", "replacement": "_", "add_prefix_space": True}))
    new = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
    assert old == _after(lambda d: d.update(pre_tokenizer=new))
    assert old != _after(lambda d: d.update(pre_tokenizer={**new, "prepend_scheme": "first"}))


def test_an_unknown_token_counts_where_the_model_has_one() -> None:
    assert tokenizer_digest(BASE, {**SPECIAL, "unk": 0}) == tokenizer_digest(BASE, SPECIAL)
    words = {**BASE, "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}}
    assert tokenizer_digest(words, {**SPECIAL, "unk": 0}) != tokenizer_digest(words, SPECIAL)
    assert unknown_token(words) == 0
    unigram = {**BASE, "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5]]}}
    assert unknown_token(unigram) == 0
    assert token_id(unigram, "a") == 1
    assert tokenizer_digest(unigram, SPECIAL) != tokenizer_digest(
        {**unigram, "model": {**unigram["model"], "unk_id": None}}, SPECIAL
    )


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"[]",
        b"{}",
        b'{"model": []}',
        b'{"model": {"vocab": {"\\ud800": 1}}}',
        b'{"model": {"merges": [[1, 2]]}}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_what_is_no_tokenizer(bad: bytes) -> None:
    with pytest.raises(HubkitError) as caught:
        tokenizer_digest(bad, SPECIAL)
    assert caught.value.code == "HK-TOKENIZER"


def test_the_real_library_round_trips() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    made.train_from_iterator(["hello world, hello there"] * 3, trainer)
    first = tokenizer_digest(made.to_str().encode(), SPECIAL)
    again = tokenizers.Tokenizer.from_str(made.to_str())
    again.enable_truncation(5)
    again.enable_padding()
    assert tokenizer_digest(again.to_str().encode(), SPECIAL) == first
    old = json.loads(made.to_str())
    old["model"]["merges"] = [" ".join(pair) for pair in old["model"]["merges"]]
    assert tokenizer_digest(tokenizers.Tokenizer.from_str(json.dumps(old)).to_str().encode(), SPECIAL) == first
    assert tokenizer_digest(old, SPECIAL) == first
    again.add_tokens(["new"])
    assert tokenizer_digest(again.to_str().encode(), SPECIAL) != first


text = st.text(st.characters(codec="utf-8"), max_size=5) | st.sampled_from(
    ["\x00", "\x7f", "\u2028", "\ufb01", "😀", '"\\/']
)


@given(st.dictionaries(text, st.integers(-3, 2**60), max_size=6), st.lists(text, max_size=3), st.floats(0, 1) | text)
def test_the_fast_encoder_writes_rfc_8785(vocab: dict[str, int], merges: list[str], other: float | str) -> None:
    body = {"model": {"vocab": vocab, "merges": merges, "x": other}, "special": {}}
    try:
        want = rfc8785.dumps(body)
    except rfc8785.CanonicalizationError:
        with pytest.raises(HubkitError):
            _canonical(body)
        return
    assert _canonical(body) == want


def test_templates() -> None:
    assert template_digest(None) is None
    assert template_digest({}) is None
    assert template_digest("a\r\nb") == template_digest("a\nb") == template_digest({"default": "a\nb"})
    assert template_digest("a\nb\n") != template_digest("a\nb")
    assert template_digest({"default": "a", "tools": "b"}) != template_digest("a")
