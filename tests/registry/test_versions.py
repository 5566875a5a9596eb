"""Versions: precedence by semver.org, ranges by npm's documented examples, and laws between them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubkit.errors import HubkitError
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.versions import (
    Version,
    is_range,
    parse_range,
    parse_version,
    pick_version,
    resolve_revision,
    sorted_versions,
)

# the example of semver.org §11, and the valid and invalid versions of its regular expression's test page
ORDER = """1.0.0-alpha 1.0.0-alpha.1 1.0.0-alpha.beta 1.0.0-beta 1.0.0-beta.2 1.0.0-beta.11 1.0.0-rc.1
 1.0.0 2.0.0 2.1.0 2.1.1"""
VALID = """0.0.4 1.2.3 10.20.30 1.1.2-prerelease+meta 1.1.2+meta 1.1.2+meta-valid 1.0.0-alpha 1.0.0-alpha.beta.1
 1.0.0-alpha0.valid 1.0.0-alpha.0valid 1.0.0-alpha-a.b-c-somethinglong+build.1-aef.1-its-okay 1.0.0-rc.1+build.1
 2.0.0+build.1848 2.0.1-alpha.1227 1.0.0-alpha+beta 1.2.3----RC-SNAPSHOT.12.9.1--.12+788 1.2.3----R-S.12.9.1--.12+meta
 1.0.0+0.build.1-rc.10000aaa-kk-0.1 99999999999999999999999.999999999999999999.99999999999999999 1.0.0-0A.is.legal"""
INVALID = """1 1.2 1.2.3-0123 1.2.3-0123.0123 1.1.2+.123 +invalid -invalid alpha 1.0.0-alpha_beta 1.0.0-alpha..
 1.0.0-alpha..1 01.1.1 1.01.1 1.1.01 1.2.3.DEV 1.2-SNAPSHOT 1.2.31.2.3----RC-SNAPSHOT.12.09.1--..12+788
 -1.0.3-gamma+b7718 +justmeta 9.8.7+meta+meta 9.8.7-whatever+meta+meta v1.2.3 1.2.3- 1.2.3+ 1.٢.3"""

labels = st.lists(st.from_regex(r"(0|[1-9][0-9]{0,3}|[a-z-][a-z0-9-]{0,3})", fullmatch=True), max_size=3).map(tuple)
small = st.integers(0, 3)
versions = st.builds(Version, small, small, small, labels)


def test_semver_org_order() -> None:
    order = [parse_version(text) for text in ORDER.split()]
    assert None not in order
    for first, second in itertools.combinations([v for v in order if v], 2):
        assert first.precedence < second.precedence


@pytest.mark.parametrize("text", VALID.split())
def test_valid_versions_read_back(text: str) -> None:
    assert str(parse_version(text)) == text


@pytest.mark.parametrize("text", [*INVALID.split(), "", "1.2.3 ", "1.2.3\n", "1." + "1" * 300 + ".1"])
def test_invalid_versions(text: str) -> None:
    assert parse_version(text) is None


@given(versions)
def test_text_round_trip(version: Version) -> None:
    assert parse_version(str(version)) == version


def version(text: str) -> Version:
    """The version that a text is."""
    found = parse_version(text)
    assert found is not None
    return found


def _by_definition(first: Version, second: Version) -> int:
    """semver.org §11, word for word."""
    for one, two in zip(first.core, second.core, strict=True):
        if one != two:
            return -1 if one < two else 1
    if not first.pre or not second.pre:
        return bool(second.pre) - bool(first.pre)
    for one_label, two_label in zip(first.pre, second.pre, strict=False):
        if one_label == two_label:
            continue
        if one_label.isdigit() and two_label.isdigit():
            return -1 if int(one_label) < int(two_label) else 1
        if one_label.isdigit() != two_label.isdigit():
            return -1 if one_label.isdigit() else 1
        return -1 if one_label < two_label else 1
    return (len(first.pre) > len(second.pre)) - (len(first.pre) < len(second.pre))


@given(versions, versions)
def test_precedence_is_the_specification(first: Version, second: Version) -> None:
    found = (first.precedence > second.precedence) - (first.precedence < second.precedence)
    assert found == _by_definition(first, second)


# npm's semver documentation, "Advanced Range Syntax"
SUGAR = [
    ("^1.2.3", ">=1.2.3,<2.0.0"),
    ("^0.2.3", ">=0.2.3,<0.3.0"),
    ("^0.0.3", ">=0.0.3,<0.0.4"),
    ("^1.2.x", ">=1.2.0,<2.0.0"),
    ("^0.0.x", ">=0.0.0,<0.1.0"),
    ("^0.0", ">=0.0.0,<0.1.0"),
    ("^1.x", ">=1.0.0,<2.0.0"),
    ("^0.x", ">=0.0.0,<1.0.0"),
    ("^1", ">=1.0.0,<2.0.0"),
    ("^0", ">=0.0.0,<1.0.0"),
    ("~1.2.3", ">=1.2.3,<1.3.0"),
    ("~1.2", ">=1.2.0,<1.3.0"),
    ("~1", ">=1.0.0,<2.0.0"),
    ("~0.2.3", ">=0.2.3,<0.3.0"),
    ("~0", ">=0.0.0,<1.0.0"),
    ("1.2.x", ">=1.2.0,<1.3.0"),
    ("1.x", ">=1.0.0,<2.0.0"),
    ("1.2", ">=1.2.0,<1.3.0"),
    ("*", ">=0.0.0"),
    (">1.2", ">=1.3.0"),
    ("<=1.2", "<1.3.0"),
    ("<1.2", "<1.2.0"),
    (">=1.2", ">=1.2.0"),
    ("=1.2.3", "1.2.3"),
    ("v1.2.3", "1.2.3"),
    ("^v1.2.3", "^1.2.3"),
    (">= 1.2 , < 2", ">=1.2.0,<2.0.0"),
    ("1.X.*", "1.x"),
]


PAIRS = [(text, parse_range(text), parse_range(same)) for text, same in SUGAR]


@given(versions)
def test_ranges_mean_what_npm_says(version: Version) -> None:
    release = Version(*version.core)
    assert [text for text, found, same in PAIRS if (release in found) != (release in same)] == []


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("^1.2.3-beta.2", "1.2.3-beta.2 1.2.3-beta.4 1.2.3 1.9.0", "1.2.3-beta.1 1.2.4-beta.2 2.0.0-alpha 2.0.0"),
        ("~1.2.3-beta.2", "1.2.3-beta.4 1.2.9", "1.2.4-beta.2 1.3.0"),
        (">1.2.3-alpha.3", "1.2.3-alpha.7 3.4.5", "3.4.5-alpha.9 1.2.3-alpha.3"),
        ("^1", "1.0.0 1.0.0+build", "1.0.0-rc.1 2.0.0-rc.1 1.5.0-rc.1"),
        ("*", "0.0.0 9.9.9", "1.0.0-rc.1"),
        ("1.0.0-rc.1", "1.0.0-rc.1 1.0.0-rc.1+b", "1.0.0 1.0.0-rc.2"),
        (">=1.0.0-0,<1.0.0", "1.0.0-0 1.0.0-rc.1", "1.0.0 1.0.1-rc.1"),
        ("<*", "", "0.0.0 1.0.0"),
    ],
)
def test_pre_releases_only_where_named(text: str, inside: str, outside: str) -> None:
    wanted = parse_range(text)
    assert [v for v in inside.split() if version(v) not in wanted] == []
    assert [v for v in outside.split() if version(v) in wanted] == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "^",
        "1.2.3.4",
        ">=1,,<2",
        "1.x.3",
        "^1.2.3 || ^2",
        "~>1",
        "latest",
        "^01",
        "1.2.x-rc",
        "^1,",
        ">1.x.2",
    ],
)
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(HubkitError) as caught:
        parse_range(text)
    assert caught.value.code == "HK-VERSION"
    assert caught.value.status == 2


@given(versions, st.sampled_from(["^", "~", ">=", "<=", "=", ""]))
def test_every_range_with_equality_holds_its_own_version(version: Version, op: str) -> None:
    assert version in parse_range(f"{op}{version}")


@given(st.lists(versions, max_size=8), versions, st.sampled_from(["^", "~", ">=", "<", ""]))
def test_pick_is_the_highest_that_fits_in_any_order(found: list[Version], bound: Version, op: str) -> None:
    wanted = parse_range(f"{op}{bound}")
    tags = [f"v{version}" for version in found]
    picked = pick_version(f"{op}{bound}", [*tags, "latest", "1.0.0", "v1", "vx"])
    assert picked == pick_version(f"{op}{bound}", reversed(tags))
    fitting = [version for version in found if version in wanted]
    if picked is None:
        assert fitting == []
    else:
        best = parse_version(picked[1:])
        assert best in fitting
        assert all(version.precedence <= best.precedence for version in fitting)


def test_pick() -> None:
    tags = ["v1.2.0", "v1.10.0", "v1.9.9", "v2.0.0-rc.1", "main", "1.99.0"]
    assert pick_version("^1.2", tags) == "v1.10.0"
    assert pick_version("1.2.0", tags) == "v1.2.0"
    assert pick_version(">=2.0.0-0", tags) == "v2.0.0-rc.1"
    assert pick_version("^3", tags) is None
    assert sorted_versions(tags) == ["v1.2.0", "v1.9.9", "v1.10.0", "v2.0.0-rc.1"]


@pytest.mark.parametrize("text", ["main", "v1.2.0", "1.2.0", "1.2", "a" * 40, "refs/pr/1", "x", "feature-x"])
def test_names_are_no_ranges(text: str) -> None:
    assert not is_range(text)


@pytest.mark.parametrize("text", ["^1", "~1.2", ">=1,<2", "<2", "=1.2.3", "*", "1.x", "1.2.*", "v1.x"])
def test_ranges_are_ranges(text: str) -> None:
    assert is_range(text)


def test_resolve_revision(tmp_path: Path) -> None:
    registry = DirectoryRegistry(tmp_path)
    registry.create("ana/chat")
    commits = []
    for number in range(3):
        commits.append(registry.commit("ana/chat", {"a.json": b"%d" % number}, [], message="m", parent=None))
        registry.tag("ana/chat", f"v1.{number}.0", commits[-1])
    registry.tag("ana/chat", "9.9.9", commits[0])
    for revision, commit, name in (
        ("^1.1", commits[2], "v1.2.0"),
        ("1.1.0", commits[1], "v1.1.0"),
        ("v1.0.0", commits[0], "v1.0.0"),
        (None, commits[2], None),
        ("main", commits[2], "main"),
        (commits[1], commits[1], None),
        (commits[1][:9], commits[1], None),
        ("9.9.9", commits[0], "9.9.9"),
        ("~1.0", commits[0], "v1.0.0"),
    ):
        found = resolve_revision(registry, "ana/chat", revision)
        assert (found.commit, found.name) == (commit, name)
    for revision in ("^2", "v1.3.0", "8.8.8", "mian"):
        with pytest.raises(HubkitError) as caught:
            resolve_revision(registry, "ana/chat", revision)
        assert caught.value.code == "HK-NO-REVISION"
        assert caught.value.have
        assert "ana/chat@" in caught.value.fix
    with pytest.raises(HubkitError) as caught:
        resolve_revision(registry, "ana/nobody", "main")
    assert caught.value.code == "HK-NOT-FOUND"
