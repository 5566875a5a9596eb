"""The model card: ours is written, everybody else's stays byte for byte."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hubkit.artifact.card import BEGIN, END, MAX_CARD, render_card
from hubkit.documents.manifest import BaseFingerprint, FileEntry, Manifest, Parent, Plugin
from hubkit.documents.schema import sha256
from hubkit.errors import HubkitError

DIGEST = sha256(b"")
BASE = BaseFingerprint("org/base", "a" * 40, DIGEST, DIGEST, {}, {}, None, None)
MANIFEST = Manifest(
    kind="adapter",
    name="chat",
    version="1.2.3",
    method="some-method",
    plugin=Plugin("dist", "0.1"),
    config={"rank": 8, "alpha": 16.0, "targets": ["q", "v"], "flag": True},
    base=BASE,
    files=(FileEntry("adapter_config.json", 1, DIGEST),),
    training={"seed": 3, "metrics": {"loss": 1.25}},
    parents=(Parent("/home/ana/secret/parent", DIGEST, -0.5),),
    license="apache-2.0",
    overrides=("allow-base-mismatch",),
)
HANDWRITTEN = """---
# written by Ana
language: [en, de]   # two
tags:
- story
- 'x: y'

# the base
base_model: other/base   # old
datasets:
  - org/data
model-index:
- name: chat
  results: []
---

# My adapter

Text with trailing blanks\t
"""


def _front(card: str) -> dict[str, Any]:
    front: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return front


def _without_block(text: str) -> str:
    return re.sub(rf"(?s){BEGIN}.*?{END}", "", text)


def test_a_new_card_says_what_the_hub_and_a_reader_need() -> None:
    card = render_card(MANIFEST, None)
    assert _front(card) == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "tags": ["hubkit", f"hubkit:base:{DIGEST[7:23]}", "hubkit:method:some-method"],
    }
    for fact in ("some-method", "1.2.3", "`rank` | `8`", "`alpha` | `16`", "`targets` | `q, v`", "a" * 40, DIGEST):
        assert fact in card
    for fact in ("metrics.loss` | `1.25", "allow-base-mismatch", "`parent` | `-0.5`", "hubkit pull OWNER/chat"):
        assert fact in card
    assert "/home" not in card


def test_the_real_client_reads_it() -> None:
    data = ModelCard(render_card(MANIFEST, HANDWRITTEN)).data.to_dict()
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "adapter"
    assert data["tags"][:3] == ["story", "x: y", "hubkit"]


def test_handwritten_lines_survive() -> None:
    card = render_card(MANIFEST, HANDWRITTEN)
    kept = [line for line in HANDWRITTEN.splitlines(keepends=True) if not line.startswith(("base_model", "- 'x: y'"))]
    position = 0
    for line in kept:
        position = card.index(line, position) + len(line)
    assert _front(card)["language"] == ["en", "de"]


@pytest.mark.parametrize(
    "existing",
    [None, "", "\n", "text", "text\n\n", HANDWRITTEN, "---\n---\n", "---\n---", "\ufeff" + HANDWRITTEN, "\ufeffx"],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_rendering_again_changes_nothing(existing: str | None, newline: str) -> None:
    existing = existing and existing.replace("\n", newline)
    card = render_card(MANIFEST, existing)
    assert render_card(MANIFEST, card) == card
    if existing and "\r\n" in existing:
        assert "\n" not in card.replace("\r\n", "")
    assert card.startswith("\ufeff") == (existing or "").startswith("\ufeff")
    assert card.count("\ufeff") <= 1


def test_a_manifest_read_back_gives_the_same_card() -> None:
    assert render_card(Manifest.from_bytes(MANIFEST.to_bytes()), None) == render_card(MANIFEST, None)


def test_a_new_manifest_rewrites_the_block_alone() -> None:
    card = render_card(MANIFEST, HANDWRITTEN) + "\nafter the block\n"
    newer = render_card(dataclasses.replace(MANIFEST, version="2.0.0", config={"rank": 4}), card)
    assert "2.0.0" in newer
    assert "1.2.3" not in newer
    assert _without_block(newer) == _without_block(card)


@given(st.text(st.sampled_from("ab #-\n\r\t`<!>*\u2028é"), max_size=40), st.sampled_from(["", HANDWRITTEN]))
@settings(deadline=None, max_examples=25)
def test_any_text_survives(body: str, head: str) -> None:
    assume(not body.startswith("---"))
    card = render_card(MANIFEST, head + body)
    assert body in card
    assert render_card(MANIFEST, card) == card


KEYS = st.sampled_from(["base_model", "library_name", "tags", "license", "language", "x-key"])
YAML_VALUES = st.recursive(
    st.text(max_size=6) | st.integers() | st.booleans() | st.none() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(KEYS, YAML_VALUES, min_size=1))
@settings(deadline=None, max_examples=40)
def test_any_front_matter_keeps_its_other_keys(front: dict[str, Any]) -> None:
    text = yaml.safe_dump(front, default_flow_style=False, sort_keys=False, allow_unicode=True)
    card = render_card(MANIFEST, f"---\n{text}---\nbody\n")
    after, before = _front(card.replace("\n---\nbody", "\n---\n", 1)), yaml.safe_load(text)
    for key in ("language", "x-key"):
        assert (key in after, after.get(key)) == (key in before, before.get(key))
    assert after["base_model"] == "org/base"
    assert "hubkit" in after["tags"]
    assert render_card(MANIFEST, card) == card


@pytest.mark.parametrize(
    "front",
    [
        "a: [1",
        "- a\n- b",
        "just text",
        "a: b: c",
        "? [a]\n: b",
        "{base_model: x, tags: [y]}",
        "base_model: &x y\nother: *x",
        "a: &a [x]\n" + "b: [" + "*a, " * 20 + "]",
        "a: " + "[" * 5000,
        "a: " + "x" * 300_000,
        "a: \x01",
        "a: " + "[" * 100_000,
        "a: " + "- " * 50_000,
    ],
)
def test_front_matter_that_cannot_be_edited_is_refused(front: str) -> None:
    with pytest.raises(HubkitError) as caught:
        render_card(MANIFEST, f"---\n{front}\n---\n")
    assert caught.value.code == "HK-CARD"


def test_a_card_that_is_too_long_is_refused() -> None:
    text = "x" * MAX_CARD
    assert text in render_card(MANIFEST, text)
    with pytest.raises(HubkitError, match="HK-CARD"):
        render_card(MANIFEST, text + "x")


@pytest.mark.parametrize("body", [f"{BEGIN}\n", f"{END}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"])
def test_a_damaged_block_is_refused(body: str) -> None:
    with pytest.raises(HubkitError, match="HK-CARD"):
        render_card(MANIFEST, body)


def test_markers_inside_a_line_are_text() -> None:
    body = f"see `{BEGIN}` and `{END}`\n"
    assert body in render_card(MANIFEST, body)


@pytest.mark.parametrize("source", [None, "/home/ana/base", "./base", "base"])
def test_a_local_base_leaks_no_path_and_is_no_repository(source: str | None) -> None:
    card = render_card(dataclasses.replace(MANIFEST, base=dataclasses.replace(BASE, source=source)), None)
    assert "base_model" not in _front(card) or "base_model_relation" in _front(card)
    assert "base_model" not in {key for key in _front(card) if key == "base_model"}
    assert "/home" not in card
    assert "from_pretrained" not in card


def test_a_card_of_a_task_says_its_labels_and_the_class_to_load() -> None:
    task = {"kind": "classification", "labels": ["bad", "good"], "pad": 2}
    files = (FileEntry("adapter_config.json", 0, ""),)
    card = render_card(dataclasses.replace(MANIFEST, task=task, files=files), None)
    assert "| labels, in the order of the outputs | `bad, good` |" in card
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    assert ", num_labels=2, pad_token_id=2)" in card
    assert "AutoModelForCausalLM" in render_card(dataclasses.replace(MANIFEST, files=files), None)


def test_library_and_relation_follow_the_kind() -> None:
    plain = dataclasses.replace(MANIFEST, files=())
    assert _front(render_card(plain, None))["library_name"] == "hubkit"
    model = _front(render_card(dataclasses.replace(plain, kind="model"), None))
    assert (model["library_name"], model["base_model_relation"]) == ("transformers", "merge")


def test_a_users_licence_stays() -> None:
    assert _front(render_card(MANIFEST, "---\nlicense: mit\n---\n"))["license"] == "mit"


def test_hostile_values_stay_in_their_cell() -> None:
    evil = f"a`|b\n{END}\n# Heading <script>\u202e" + "x" * 1000
    card = render_card(dataclasses.replace(MANIFEST, config={evil: evil}), None)
    row = next(line for line in card.splitlines() if "Heading" in line)
    assert row.startswith("| `")
    assert row.count("`") == 4
    assert len(row) < 1000
    assert render_card(MANIFEST, card).count(END) == 1


def test_the_repository_is_named_when_known() -> None:
    card = render_card(MANIFEST, None, repository="ana/chat")
    assert "hubkit pull ana/chat" in card
    assert "OWNER" not in card


def test_a_card_names_one_base_and_one_method() -> None:
    """By tags that the Hub finds it by; after a change the old ones are gone, other people's stay."""
    before = render_card(MANIFEST, HANDWRITTEN)
    other = dataclasses.replace(BASE, weights=sha256(b"other"))
    after = render_card(dataclasses.replace(MANIFEST, base=other, method="another"), before)
    assert _front(after)["tags"] == [
        *("story", "x: y", "hubkit"),
        *(f"hubkit:base:{sha256(b'other')[7:23]}", "hubkit:method:another"),
    ]
    unknown = dataclasses.replace(MANIFEST, base=dataclasses.replace(BASE, weights=None), method=None)
    assert _front(render_card(unknown, before))["tags"] == ["story", "x: y", "hubkit"]
