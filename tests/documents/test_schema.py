"""Strict JSON in, canonical JSON out, the published schemas."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubkit.documents.schema import (
    KINDS,
    canonical,
    check,
    is_canonical,
    load_schema,
    parse,
    pointer,
    refuse_secrets,
    sha256,
)
from hubkit.errors import HubkitError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))
DOCUMENTS = st.dictionaries(TEXT, VALUES, max_size=5)


@settings(deadline=None)
@given(DOCUMENTS)
def test_canonical_bytes_read_back_as_the_document(document: dict[str, Any]) -> None:
    data = canonical(document)
    assert parse(data, "x") == document
    assert canonical(parse(data, "x")) == data


@settings(deadline=None)
@given(DOCUMENTS)
def test_canonical_agrees_with_the_standard_library_on_content(document: dict[str, Any]) -> None:
    assert json.loads(canonical(document), parse_int=float) == document


@settings(deadline=None)
@given(
    DOCUMENTS,
    st.sampled_from([(b"", b""), (b":", b": "), (b"}", b"}\n"), (b"0", b"0.0"), (b"1", b"1e0"), (b"{", b" {")]),
)
def test_is_canonical_agrees_with_canonical(document: dict[str, Any], change: tuple[bytes, bytes]) -> None:
    data = canonical(document).replace(*change, 1) if change[0] else canonical(document)
    assert is_canonical(data, document) == (data == canonical(document))


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1e-07}',
        b'{"a":1e-7}',
        b'{"a":1.0}',
        b'{"a":-0.0}',
        b'{"a":0.00001}',
        b'{"a":1e-05}',
        b'{"a":1e16}',
        b'{"a":10000000000000000}',
        b'{"a":1.50}',
        b'{"a":1.5}',
        b'{"a":"\\u0041"}',
        b'{"b":1,"a":2}',
        b'{"a":"\\/"}',
        '{"\uffff":1,"\U00010000":2}'.encode(),
        '{"\U00010000":2,"\uffff":1}'.encode(),
        b'{"a":123456789.12345679}',
        b'{"a":"\x7f"}',
        b'{"a":"\\u007f"}',
        b'{"a":"\\b"}',
        b'{"a":"\\u0008"}',
        b'{"a":"\\u00e9"}',
        '{"a":"é"}'.encode(),
        b'{"a":100000000000000000000}',
        b'{"a":-0}',
        b'{"a":[1e5,2.0]}',
    ],
)
def test_is_canonical_where_encoders_differ(data: bytes) -> None:
    document = parse(data, "x")
    assert is_canonical(data, document) == (data == canonical(document))


def test_canonical_is_rfc_8785() -> None:
    """The example of RFC 8785, section 3.2.2, and its result in 3.2.4."""
    document = {
        "numbers": [333333333.33333329, 1e30, 4.50, 2e-3, 0.000000000000000000000000001],
        "string": '€$\x0f\nA\'B"\\\\"/',
        "literals": [None, True, False],
    }
    want = (
        '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        '"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )
    assert canonical(document) == want.encode()


@pytest.mark.parametrize(
    ("data", "say"),
    [
        (b'{"a":1,"a":2}', "'a'"),
        (b'{"a":{"b":1,"b":1}}', "'b'"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":-Infinity}', "-Infinity"),
        (b'{"a":1e999}', "1e999"),
        (b'{"a":"\\ud800"}', "surrogate"),
        (b'{"a":"\xff"}', "byte 6"),
        (b"\xef\xbb\xbf{}", "column 1"),
        (b"[1]", "array"),
        (b"null", "null"),
        (b"", "line 1"),
        (b'{"a":1}x', "Extra data"),
        (b'{"a":' + b"9" * 5000 + b"}", "4300"),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "64 levels"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b"{" + b" " * (32 << 20) + b"}", "bytes"),
    ],
)
def test_parse_refuses_what_two_readers_could_understand_differently(data: bytes, say: str) -> None:
    with pytest.raises(HubkitError) as caught:
        parse(data, "here.json")
    assert caught.value.code == "HK-JSON"
    assert caught.value.where == "here.json"
    assert say in str(caught.value)


def test_sixty_four_levels_can_be_read_and_written() -> None:
    data = b'{"a":' + b"[" * 63 + b"]" * 63 + b"}"
    assert canonical(parse(data, "x")) == data


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | DOCUMENTS.map(canonical).map(lambda b: b[:-1]))
def test_parse_of_anything_gives_an_object_or_a_refusal(data: bytes) -> None:
    with suppress(HubkitError):
        assert isinstance(parse(data, "x"), dict)


def test_large_whole_numbers_of_other_programs_stay_as_they_are() -> None:
    assert parse(b'{"model_max_length":1000000000000000019884624838656}', "x") == {"model_max_length": int(1e30)}
    assert isinstance(parse(b'{"a":100000000000000000000}', "x")["a"], float)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 2**53, -(2**60), b"x", object(), "\ud800", {1: 2}, {"a": {None: 1}}]
)
def test_canonical_refuses_what_json_cannot_hold(value: object) -> None:
    with pytest.raises(HubkitError) as caught:
        canonical({"a": value})
    assert caught.value.code == "HK-JSON"


def test_canonical_refuses_endless_nesting() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(HubkitError, match="HK-JSON"):
        canonical({"a": endless})


def test_sha256_has_the_form_of_all_digests() -> None:
    assert sha256(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize("kind", KINDS)
def test_schemas_are_valid_and_describe_every_field(kind: str) -> None:
    from jsonschema import Draft202012Validator

    schema = load_schema(kind)
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    places = [schema, *schema.get("$defs", {}).values()]
    for place in places:
        assert place.get("description")
        for name, field in place.get("properties", {}).items():
            assert field.get("description") or "$ref" in field, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_newer_major_is_refused_before_anything_else_is_looked_at(kind: str) -> None:
    with pytest.raises(HubkitError) as caught:
        check({"schema": f"hubkit/{kind}/2", "name": 7}, kind, "f")
    assert caught.value.code == "HK-NEWER"
    assert caught.value.fix


@pytest.mark.parametrize(
    "schema", [None, 1, "", "hubkit/manifest", "hubkit/manifest/0", "hubkit/lock/1", "x/manifest/1"]
)
def test_a_foreign_schema_is_refused(schema: object) -> None:
    for document in ({"schema": schema}, {}):
        with pytest.raises(HubkitError) as caught:
            check(document, "manifest", "f")
        assert caught.value.code == "HK-SCHEMA"
        assert caught.value.where == "f#/schema"


def test_every_violation_is_shown_with_its_pointer() -> None:
    files = [{"path": "a", "size": -1, "sha256": "sha256:" + "A" * 64}, {"path": "b/~", "size": 1}]
    base = {"layout": "sha256:" + "0" * 64 + "\n", "files": {"a/b": "x"}}
    document = {"schema": "hubkit/manifest/1", "kind": "adapter", "name": "x y", "version": "1.0", "files": files}
    with pytest.raises(HubkitError) as caught:
        check({**document, "base": base}, "manifest", "f")
    pointers = {line.split(":")[0] for line in caught.value.have}
    assert pointers == {
        "#",
        "#/name",
        "#/version",
        "#/files/0/size",
        "#/files/0/sha256",
        "#/files/1",
        "#/base/layout",
        "#/base/files/a~1b",
    }


def test_a_flood_of_violations_is_cut() -> None:
    files = [{"path": "", "size": -1, "sha256": "x" * 10_000}] * 500
    with pytest.raises(HubkitError) as caught:
        check(
            {"schema": "hubkit/manifest/1", "kind": "x", "name": "x", "version": "1.0.0", "files": files},
            "manifest",
            "f",
        )
    assert len(caught.value.have) == 201
    assert max(map(len, caught.value.have)) < 400


@pytest.mark.parametrize("text", ["hf_" + "a" * 34, "see https://ana:s3cret@host/x", "http://:pw@h"])
def test_tokens_and_passwords_are_found_and_not_repeated(text: str) -> None:
    with pytest.raises(HubkitError) as caught:
        refuse_secrets({"a": [{"b/c": text}], "d": "fine"}, "lock")
    assert caught.value.code == "HK-SECRET"
    assert caught.value.have == ["#/a/0/b~1c"]
    assert text not in str(caught.value)


@pytest.mark.parametrize("text", ["org/name@v1.2.0", "https://host:80/a@rev", "hf_hub", "https://host/a:b@c"])
def test_references_are_no_secrets(text: str) -> None:
    refuse_secrets({"a": text}, "lock")


def test_pointer_escapes() -> None:
    assert pointer(["a/b", 0, "~"]) == "#/a~1b/0/~0"


def test_importing_the_documents_imports_no_library() -> None:
    code = (
        "import sys, hubkit.documents.deployment, hubkit.artifact.folder, hubkit.artifact.card\n"
        "print([m for m in ('jsonschema', 'rfc8785', 'yaml', 'numpy', 'torch', 'tomllib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
