"""``hubkit.toml``: order kept, typos named."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubkit.documents.recipe import Policy, Recipe, RecipeAdapter, RecipeBase, parse_recipe, read_recipe
from hubkit.errors import HubkitError

FULL = """
mix = "stack"

[base]
source = "org/base"
revision = "main"

[adapters.sql]
source = "./sql"
weight = -0.5

[adapters.chat]
source = "ana/chat@^1.2"

[targets.vllm]
max_loras = 4
nested = { deep = [1, 2.5, "x", true] }
"""


def _refusal(text: str | bytes) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        parse_recipe(text if isinstance(text, bytes) else text.encode(), "hubkit.toml")
    return caught.value


def test_the_order_of_the_tables_is_the_order_of_the_mix() -> None:
    assert parse_recipe(FULL.encode(), "x") == Recipe(
        RecipeBase("org/base", "main"),
        (RecipeAdapter("sql", "./sql", -0.5), RecipeAdapter("chat", "ana/chat@^1.2", 1.0)),
        "stack",
        {"vllm": {"max_loras": 4, "nested": {"deep": [1, 2.5, "x", True]}}},
    )


def test_the_least_recipe() -> None:
    assert parse_recipe(b'[base]\nsource = "./b"\n', "x") == Recipe(RecipeBase("./b"))


def test_the_digest_is_that_of_the_content() -> None:
    made = parse_recipe(FULL.encode(), "x")
    same = FULL.replace("[adapters.chat]", "# said\n[adapters.chat]\nweight = 1").replace(
        "mix", 'schema="hubkit/recipe/1"\nmix'
    )
    assert parse_recipe(same.encode(), "x").digest == made.digest
    for old, new in (
        ("-0.5", "0.5"),
        ("stack", "sum"),
        ("main", "dev"),
        ("max_loras = 4", "max_loras = 5"),
        ("^1.2", "^1.3"),
    ):
        assert parse_recipe(FULL.replace(old, new).encode(), "x").digest != made.digest
    first, second = FULL.index("[adapters.sql]"), FULL.index("[adapters.chat]")
    end = FULL.index("[targets")
    turned = FULL[:first] + FULL[second:end] + FULL[first:second] + FULL[end:]
    assert parse_recipe(turned.encode(), "x").digest != made.digest


def test_every_typo_is_named_with_its_neighbour() -> None:
    text = FULL.replace("weight", "wieght").replace("revision", "revison").replace("mix =", "mixx =") + "[target.a]\n"
    error = _refusal(text)
    assert error.code == "HK-RECIPE"
    assert sorted(error.have) == [
        "adapters.sql.wieght: unknown key; did you mean 'weight'?",
        "base.revison: unknown key; did you mean 'revision'?",
        "mixx: unknown key; did you mean 'mix'?",
        "target: unknown key; did you mean 'targets'?",
    ]


def test_a_fault_of_toml_has_its_line() -> None:
    error = _refusal('[base]\nsource = "a"\n[adapters.x\n')
    assert error.code == "HK-RECIPE"
    assert error.where == "hubkit.toml:3:12"
    assert _refusal(b'[base]\nsource = "\xff"').where == "hubkit.toml:2"


@pytest.mark.parametrize(
    ("text", "say"),
    [
        ("", "'base' is a required property"),
        ("[base]\n", "base: 'source' is a required property"),
        ('base = "x"', "base: 'x' is not of type 'object'"),
        ("[base]\nsource = 1", "base.source: 1 is not of type 'string'"),
        ('[base]\nsource = ""', "base.source: '' should be non-empty"),
        ('mix = "add"\n[base]\nsource = "x"', "mix: 'add' is not one of"),
        ('[base]\nsource = "x"\n[adapters.a]\n', "adapters.a: 'source' is a required property"),
        ('[base]\nsource = "x"\n[adapters."a/b"]\nsource="x"', "adapters: 'a/b' does not match"),
        ('[base]\nsource = "x"\n[adapters.a]\nsource="x"\nweight=true', "adapters.a.weight: True is not"),
        ('[base]\nsource = "x"\n[adapters.a]\nsource="x"\nweight=nan', "adapters.a.weight: nan is not a finite number"),
        ('[base]\nsource = "x"\n[targets.e]\nday = 2024-01-01', "targets.e.day: a date or time"),
        ('[base]\nsource = "x"\n[targets.e]\nseed = 9007199254740993', "targets.e.seed: 9007199254740993 is beyond"),
        ('[base]\nsource = "x"\n[targets.e]\ndeep = ' + "[" * 70 + "]" * 70, "far too deeply nested"),
        ('[base]\nsource = "x"\n[targets.e]\ndeep = ' + "[" * 90_000, "recursion"),
        ('[base]\nsource = "x"\n[base]\n', "Cannot declare"),
        ("a = " + "9" * 5000, "4300"),
    ],
)
def test_wrong_recipes_are_refused(text: str, say: str) -> None:
    error = _refusal(text)
    assert error.code == "HK-RECIPE"
    assert say in str(error)


def test_a_policy_is_part_of_the_recipe_and_none_changes_no_digest() -> None:
    made = parse_recipe(FULL.encode(), "x")
    text = FULL + '[policy]\nlicenses = ["MIT", "Apache-2.0"]\nrequire-probes = true\n'
    assert parse_recipe(text.encode(), "x").policy == Policy(("MIT", "Apache-2.0"), True)
    assert parse_recipe(text.encode(), "x").digest != made.digest
    for nothing in ("[policy]\n", "[policy]\nrequire-probes = false\n"):
        assert parse_recipe((FULL + nothing).encode(), "x").digest == made.digest
    assert _refusal(FULL + "[policy]\nlicences = []\n").have == [
        "policy.licences: unknown key; did you mean 'licenses'?"
    ]
    assert _refusal(FULL + '[policy]\nrequire-probes = "yes"\n').code == "HK-RECIPE"


def test_a_merge_that_was_left_is_named_as_such() -> None:
    text = FULL.replace("weight = -0.5", "<<<<<<< HEAD\nweight = -0.5\n=======\nweight = 0.5\n>>>>>>> other")
    assert "merge conflicts" in _refusal(text).what


def test_a_newer_recipe_is_refused() -> None:
    assert _refusal('schema = "hubkit/recipe/2"\n[base]\nsource = "x"').code == "HK-NEWER"


def test_a_token_in_a_recipe_is_refused() -> None:
    assert _refusal('[base]\nsource = "https://ana:pw@host/a/b"').code == "HK-SECRET"


def test_read_takes_the_file_or_its_folder(tmp_path: Path) -> None:
    with pytest.raises(HubkitError, match="HK-MISSING"):
        read_recipe(tmp_path)
    (tmp_path / "hubkit.toml").write_text(FULL)
    assert read_recipe(tmp_path) == read_recipe(tmp_path / "hubkit.toml")
    with pytest.raises(HubkitError, match="HK-MISSING"):
        read_recipe(tmp_path / "other.toml")


@settings(deadline=None)
@given(st.text(max_size=80) | st.lists(st.sampled_from(FULL.split("\n")), max_size=12).map("\n".join))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(HubkitError):
        assert parse_recipe(text.encode("utf-8", "surrogatepass"), "x").digest.startswith("sha256:")
