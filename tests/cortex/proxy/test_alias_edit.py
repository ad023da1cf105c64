"""An alias's parameters change a body as decoding, editing and encoding it would, but leave all other bytes alone."""

from __future__ import annotations

import contextlib
import json
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex.config.aliases import Alias, Rewrite
from cortex.proxy.body.alias_edit import rewritten
from cortex.proxy.body.json_scan import MAX_STEPS
from cortex.proxy.body.model_field import find_model
from shared.errors import InvalidRequest

JSON = "application/json"
FORM = "multipart/form-data; boundary=XX"


def edited(body: bytes, content_type: str = JSON, **parameters: Any) -> bytes:
    alias = Alias(model="m", **parameters)
    return rewritten(body, content_type, find_model(body, content_type), Rewrite("m", "m", alias.edits("m")))


# --- the same, done the usual way -------------------------------------------------------------------------------------


def merged(value: dict[str, Any], table: dict[str, Any], *, overrides: bool) -> None:
    for key, wanted in table.items():
        present = value.get(key)
        if isinstance(wanted, dict) and isinstance(present, dict):
            merged(present, wanted, overrides=overrides)
        elif overrides or key not in value:
            value[key] = json.loads(json.dumps(wanted))


def usual(body: bytes, alias: Alias) -> Any:
    value = json.loads(body)
    value["model"] = "m"
    for path in alias.drop:
        *tables, key = path.split(".")
        inner = value
        for name in tables:
            inner = inner.get(name) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner.pop(key, None)
    merged(value, alias.set, overrides=True)
    merged(value, alias.default, overrides=False)
    return value


KEYS = st.sampled_from(["a", "b", "ab", "temperature", "ü", "mod"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))
GIVEN = st.recursive(
    st.booleans() | st.integers() | st.text(max_size=3), lambda inner: st.dictionaries(KEYS, inner, max_size=3)
)
TABLES = st.dictionaries(KEYS, GIVEN, max_size=3)
PATHS = st.lists(st.lists(KEYS, min_size=1, max_size=3).map(".".join), max_size=3)


def written(value: Any, random: Random) -> str:
    """The value as JSON, with blanks anywhere, names escaped or not, and duplicates before the member that counts."""
    if isinstance(value, dict):
        members = [*value.items()]
        if members and random.random() < 0.3:
            members.insert(0, (random.choice(members)[0], random.choice([None, 1, "x", {"a": 1}])))
        texts = [
            f"{blank(random)}{written_name(name, random)}{blank(random)}:{blank(random)}{written(each, random)}"
            for name, each in members
        ]
        return "{" + (f"{blank(random)},".join(texts) or blank(random)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(f"{blank(random)}{written(each, random)}" for each in value) + "]"
    return json.dumps(value, ensure_ascii=random.random() < 0.5)


def blank(random: Random) -> str:
    return random.choice(["", "", " ", "\n\t"])


def written_name(name: str, random: Random) -> str:
    escaped = "".join(f"\\u{ord(character):04x}" for character in name)
    return random.choice([json.dumps(name), json.dumps(name, ensure_ascii=False), f'"{escaped}"'])


@st.composite
def aliases(draw: st.DrawFn) -> Alias:
    """One without a contradiction: what contradicts the rest is left out."""
    parameters: dict[str, Any] = {"set": draw(TABLES)}
    for kind, found in (("default", draw(TABLES)), ("drop", draw(PATHS))):
        with contextlib.suppress(ValueError):
            Alias(model="m", **{**parameters, kind: found})
            parameters[kind] = found
    return Alias(model="m", **parameters)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=5), aliases(), st.integers(0, 1 << 32))
def test_same_as_decoding_and_encoding(members: dict[str, Any], alias: Alias, seed: int) -> None:
    body = written({**members, "model": "alias"}, Random(seed)).encode()
    found = rewritten(body, JSON, find_model(body, JSON), Rewrite("m", "m", alias.edits("m")))
    assert json.loads(found) == usual(body, alias)


@settings(max_examples=100, deadline=None)
@given(aliases(), st.integers(0, 1 << 32))
def test_untouched_members_keep_their_bytes(alias: Alias, seed: int) -> None:
    """White space, spelling of numbers and duplicates included."""
    value = written({"z": 1.50, "y": [1, {"x": "q\\"}]}, Random(seed))
    members = f'"untouched"  :\t1.50e0, "untouched":{value}'
    body = f'{{"a": {{"b": 1}}, {members} , "model":"alias"}}'.encode()
    found = rewritten(body, JSON, find_model(body, JSON), Rewrite("m", "m", alias.edits("m")))
    assert found.count(members.encode()) == 1


# --- by example -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "parameters", "expected"),
    [
        # Members are replaced where they are, and added at the end.
        (
            b'{ "model":"x","temperature" : 1e0 }',
            {"set": {"temperature": 0.5, "n": 1}},
            b'{ "model":"m","temperature" : 0.5, "n": 1 }',
        ),
        (b'{"model":"x"}', {"default": {"stop": ["\u00fc"]}}, b'{"model":"m", "stop": ["\\u00fc"]}'),
        # null was given by the client.
        (b'{"model":"x","n":null}', {"default": {"n": 1}}, b'{"model":"m","n":null}'),
        # Tables are merged; what is not a table is replaced by `set` only.
        (
            b'{"model":"x","k":{"a":1}}',
            {"set": {"k": {"b": 2}}, "default": {"k": {"a": 3, "c": 4}}},
            b'{"model":"m","k":{"a":1, "b": 2, "c": 4}}',
        ),
        (b'{"model":"x","k":null}', {"set": {"k": {"b": 2}}}, b'{"model":"m","k":{"b": 2}}'),
        (b'{"model":"x","k":7}', {"default": {"k": {"b": 2}}}, b'{"model":"m","k":7}'),
        (b'{"model":"x","k":{}}', {"set": {"k": {"b": 2}}}, b'{"model":"m","k":{"b": 2}}'),
        # Commas of what is dropped go too, first, between and last, and all of its duplicates.
        (b'{"n":1,"model":"x","n":2 , "top_k":3}', {"drop": ["n", "top_k"]}, b'{"model":"m"}'),
        (b'{"n":1,"n":2,"model":"x"}', {"drop": ["n"], "set": {"k": 1}}, b'{"model":"m", "k": 1}'),
        (b'{"model":"x","k":{"a":1,"b":2}}', {"drop": ["k.a", "z.a"]}, b'{"model":"m","k":{"b":2}}'),
        # A name inside of a string or of another object is not a member.
        (
            b'{"messages":[{"temperature":9,"t":"\\"temperature\\":1,"}],"model":"x"}',
            {"set": {"temperature": 0}},
            b'{"messages":[{"temperature":9,"t":"\\"temperature\\":1,"}],"model":"m", "temperature": 0}',
        ),
        # What Python's parser accepts and the standard does not.
        (
            b'\xef\xbb\xbf{"a":NaN,"model":"x","b":"\\ud800"}',
            {"drop": ["b"], "set": {"c": True}},
            b'\xef\xbb\xbf{"a":NaN,"model":"m", "c": true}',
        ),
    ],
)
def test_edits(body: bytes, parameters: dict[str, Any], expected: bytes) -> None:
    assert edited(body, **parameters) == expected


def test_body_that_would_take_too_long_is_refused() -> None:
    """An alias's parameters cannot be left out, unlike with a mere name. The error says what to do."""
    body = b'{"a":[%b"z"],"model":"fast"}' % (b'"",' * MAX_STEPS)
    with pytest.raises(
        InvalidRequest, match=r"too complex for the parameters of the alias 'fast'.*Use the model's id: m"
    ):
        edited(body, set={"n": 1})


def part(name: str, value: str, more: str = "") -> bytes:
    return f'--XX\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{value}\r\n'.encode()


def test_fields_of_a_form() -> None:
    """Scalars as text, a field for each element of a list, a table as JSON; files stay, whatever their name."""
    file = part("prompt", "RIFF", '; filename="a.wav"')
    body = part("language", "de") + part("model", "x") + file + part("temperature", "1") + b"--XX--\r\n"
    found = edited(
        body,
        FORM,
        set={"language": "en", "prompt": 'say "ü"', "timestamp_granularities[]": ["word", "segment"], "vad": True},
        default={"temperature": 0, "options": {"beam": 5}},
        drop=["unknown"],
    )
    expected = [
        file,
        part("temperature", "1"),
        part("model", "m"),
        part("language", "en"),
        part("prompt", 'say "ü"'),
        part("timestamp_granularities[]", "word"),
        part("timestamp_granularities[]", "segment"),
        part("vad", "true"),
        part("options", '{"beam": 5}'),
        b"--XX--\r\n",
    ]
    assert found == b"".join(expected)
    assert edited(body, FORM, drop=["language", "temperature"]) == file + part("model", "m") + b"--XX--\r\n"
