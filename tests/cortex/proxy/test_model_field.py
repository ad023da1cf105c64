"""Finding and replacing `model`: bytes in, facts out."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from cortex.fleet.engine_url import reachable_url
from cortex.proxy.body.form_scan import MAX_PARTS
from cortex.proxy.body.json_scan import MAX_STEPS
from cortex.proxy.body.model_field import find_model, replaced
from shared.errors import InvalidRequest

JSON = "application/json"
FORM = "multipart/form-data; boundary=xx"
IMAGE = (
    b'{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,%s"}}]}]%s}'
)
LARGE_IMAGE = IMAGE % (b"iVBORw0KGgoAAAANSUhEUg" * 460_000, b',"model":"a"')


@pytest.mark.parametrize(
    ("body", "model"),
    [
        ('{"model": "a"}', "a"),
        (' \n{"x": [1, {"model": "no"}], "model":"a" }\r\n', "a"),
        ('{"messages": "\\"model\\": \\"no\\"", "model": "a"}', "a"),
        ('{"model": "first", "model": "a"}', "a"),  # as every engine's parser does
        ('{"mod\\u0065l": "\\u0061"}', "a"),
        ('{"ä": "€😀", "model": "ö/😀"}', "ö/😀"),
        ('{"big": 123456789012345678901234567890, "f": 1e400, "model": "a"}', "a"),
        ('{"model": 1, "model": {"model": "no"}, "model": "a"}', "a"),
        ('{"model": "a", "role": "model", "x": "\\"model"}', "a"),
        ('{"x": ["{", "]", "\\\\", {"y": "\\\\\\"]}"}], "\\\\": {}, "model": "a"}', "a"),
        (
            '{"temperature": NaN, "x": [Infinity, -Infinity, "NaN"], "model": "Ba/NaN-\\u00e4Infinity"}',
            "Ba/NaN-äInfinity",
        ),
        ('{"x": "\\ud800", "\\ud06dodel": "no", "model": "\\ud83d\\ude00"}', "😀"),
        ('\ufeff{"model": "a"}', "a"),
    ],
)
def test_model_is_found_and_replaced_in_place(body: str, model: str) -> None:
    """Nothing else changes: parsed, the two bodies differ only in `model`."""
    raw = body.encode()
    found = find_model(raw, JSON)
    assert found.model == model
    other = replaced(found, raw, "new/ü")
    # Compared as text: NaN is not equal to itself.
    assert repr(json.loads(other)) == repr({**json.loads(raw), "model": "new/ü"})
    same = next(at for at, (old, new) in enumerate(zip(raw, other, strict=False)) if old != new)
    written = json.dumps("new/ü").encode()
    assert any(
        other == raw[:start] + written + raw[end:]
        for start in range(max(0, same - 1), same + 1)
        for end in range(start, len(raw))
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b'"model"',
        b'[{"model": "a"}]',
        b"{}",
        b'{"x": {"model": "a"}, "y": [{"model": "a"}], "z": "\\"model\\": \\"a\\""}',
        b'{"x": NaN, "y": {"model": "a"}}',
        b'{"model": ""}',
        b'{"model": null}',
        b'{"model": "a", "model": ["a"]}',
        b'{"model": "a"} {"model": "b"}',
        b'{"model": "a",}',
        b'{"model": "a"',
        b'{"x": 1NaN, "model": "a"}',
        b'{"x": -NaN, "model": "a"}',
        b'{"model": "\\ud800"}',
        b'{"model": "\xed\xa0\x80"}',
        b'{"x": "\xff", "model": "a"}',
        b'{"x": "\n", "model": "a"}',
        b'{"x": "' + "€".encode() * 100_000 + b'\xe2", "model": "a"}',
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b', "model": "a"}',
        b'{"x": ' + b'{"y":' * 100_000 + b"1" + b"}" * 100_000 + b', "model": "a"}',
        b'{"model": ' * 100_000 + b'"a"' + b"}" * 100_000,
        '{"model": "a"}'.encode("utf-16"),
        b'{"x": [NaN' + b",[]" * MAX_STEPS + b'], "model": "a"}',
    ],
    ids=lambda body: repr(body[:40]),
)
def test_a_body_without_a_model_is_an_invalid_request(body: bytes) -> None:
    """The client gets a 400 for any fault at any depth; no other error is raised."""
    with pytest.raises(InvalidRequest):
        find_model(body, JSON)


def _document(chance: random.Random, depth: int = 0) -> Any:
    """A random JSON value with strings and names that could mislead a search for `model`."""
    text = chance.choice(
        ["", "model", '"model"', "a", "ä€😀", "\\", '\\"', "{", "]", "NaN", "\ud800", "\ud06dodel", "x" * 50]
    )
    scalars = [text, text, 0, -1.5e-7, 10**30, True, None, float("nan"), float("-inf")]
    kind = chance.randrange(4) if depth < 4 else 0
    if kind == 1:
        return [_document(chance, depth + 1) for _ in range(chance.randrange(4))]
    if kind >= 2 or depth == 0:
        names = ["model", "m", "mod", '"model"', "\\model", "ä", text]
        return {chance.choice(names): _document(chance, depth + 1) for _ in range(chance.randrange(5))}
    return chance.choice(scalars)


def _written(chance: random.Random) -> bytes:
    """A document as a client may write it: sometimes with the model's name escaped, often damaged."""
    text = json.dumps(
        _document(chance), ensure_ascii=chance.random() < 0.5, indent=chance.choice([None, None, 1]),
        separators=chance.choice([(",", ":"), (" , ", " : ")]),
    )  # fmt: skip
    if text != "{}" and chance.random() < 0.8:
        text = text[:1] + chance.choice(['"model":"a/b",', '"mod\\u0065l":"c",', '"model" : [],']) + text[1:]
    raw = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(chance.choice([0, 0, 1, 3])):
        at = chance.randrange(len(raw) + 1)
        piece = chance.choice(
            [b"", b'"', b"\\", b",", b"}", b"NaN", b"\\ud8", b"\xff", b"\xc3", b" ", b"0", b'"model":"z"']
        )
        raw[at : at + chance.randrange(2)] = piece
    return bytes(raw)


def _as_an_engine_reads(raw: bytes) -> str | None:
    """The model as json.loads finds it; None if that, or a documented difference of this project, refuses the body."""
    try:
        document = json.loads(raw)
        model = document.get("model") if isinstance(document, dict) else None
        if not isinstance(model, str) or json.detect_encoding(raw) not in {"utf-8", "utf-8-sig"}:
            return None
        model.encode()
    except (ValueError, RecursionError):
        return None
    return model or None


@pytest.mark.parametrize("seed", range(8))
def test_every_document_is_read_as_an_engine_reads_it(seed: int) -> None:
    """Random and damaged documents against json.loads: the same model or refusal; replacing changes `model` alone."""
    chance, models = random.Random(seed), 0
    for _ in range(2500):
        raw = _written(chance)
        expected = _as_an_engine_reads(raw)
        try:
            found = find_model(raw, JSON)
        except InvalidRequest:
            assert expected is None, raw
            continue
        assert found.model == expected, raw
        other = replaced(found, raw, "new")
        assert repr(json.loads(other)) == repr({**json.loads(raw), "model": "new"}), raw
        assert len(other) <= len(raw) + len('"new"'), raw
        models += 1
    assert models > 250  # both branches are covered


def _peak(action: Callable[[], object]) -> int:
    """Peak of the bytes allocated while it runs."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (LARGE_IMAGE, JSON),
        (b'{"model":"a","messages":"' + "你好".encode() * 1_700_000 + b'"}', JSON),
        (b'{"input":[' + b"12345," * 1_700_000 + b'1],"model":"a"}', JSON),
        (b'{"input":[' + b"[]," * 3_400_000 + b'1],"model":"a"}', JSON),
        (b'--xx\r\ncontent-disposition: form-data; name="file"\r\n\r\n' + bytes(10_000_000)
         + b'\r\n--xx\r\ncontent-disposition: form-data; name="model"\r\n\r\na\r\n--xx--\r\n', FORM),
    ],
    ids=["image", "chinese", "tokens", "brackets", "audio"],
)  # fmt: skip
def test_ten_megabytes_are_neither_built_nor_copied(body: bytes, content_type: str) -> None:
    """Finding takes hardly any memory; replacing allocates only the new body."""
    assert len(body) > 9_900_000
    found = find_model(body, content_type)
    assert found.model == "a"
    assert _peak(lambda: find_model(body, content_type)) < 100_000
    assert _peak(lambda: replaced(found, body, "b")) < len(body) + 100_000
    assert find_model(replaced(found, body, "b"), content_type).model == "b"


def test_a_body_too_intricate_to_search_gets_a_second_model() -> None:
    """The last one counts, so the engine sees the right one, and the event loop is not blocked."""
    body = b'{"model": "a", "x": [1' + b",[]" * MAX_STEPS + b"]} "
    assert replaced(find_model(body, JSON), body, "b") == body[:-2] + b',"model":"b"} '


def _form(*fields: tuple[str, str]) -> bytes:
    parts = (f'--xx\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields)
    return ("".join(parts) + "--xx--\r\n").encode()


def test_the_model_of_a_form_is_found_and_replaced() -> None:
    """The last of several counts, as in vLLM's framework; a part that merely contains the word does not."""
    body = _form(("file", 'name="model"'), ("model", "first"), ("model", " a "), ("x", "y"))
    found = find_model(body, FORM)
    assert found.model == "a"
    assert replaced(found, body, "ö") == _form(("file", 'name="model"'), ("model", "first"), ("model", "ö"), ("x", "y"))


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", FORM),
        (_form(("x", "model")), FORM),
        (_form(("model", " ")), FORM),
        (_form(("model", "a")), "multipart/form-data"),
        (_form(("model", "a")), FORM.replace("xx", "yy")),
        (_form(("model", "a")).replace(b"\r\na\r\n", b"\r\n\xff\r\n"), FORM),
        (_form(("model", "a"), *[("x", "")] * MAX_PARTS), FORM),
    ],
    ids=["empty", "none", "blank", "no boundary", "other boundary", "not utf-8", "too many parts"],
)
def test_a_form_without_a_model_is_an_invalid_request(body: bytes, content_type: str) -> None:
    """Forms get the same 400 as JSON."""
    with pytest.raises(InvalidRequest):
        find_model(body, content_type)


@pytest.mark.parametrize(
    ("engine", "neuron", "expected"),
    [
        ("http://127.0.0.1:20000", "http://beast.internal:13131", "http://beast.internal:20000"),
        ("http://localhost:20000/", "http://10.0.0.1:13131", "http://10.0.0.1:20000"),
        ("http://0.0.0.0:20000/base", "http://10.0.0.1:13131", "http://10.0.0.1:20000/base"),
        ("http://[::1]:20000", "http://[fd00::1]:13131", "http://[fd00::1]:20000"),
        ("http://127.0.0.1:20000", "http://localhost:13131", "http://127.0.0.1:20000"),
        ("http://127.0.0.1:20000", "http://127.0.0.2:13131", "http://127.0.0.2:20000"),
        ("http://localhost:20000", "http://127.0.0.2:13131", "http://127.0.0.2:20000"),
        ("http://127.0.0.1:20000", "http://[::1]:13131", "http://127.0.0.1:20000"),
        ("http://0.0.0.0:20000", "http://127.0.0.1:13131", "http://127.0.0.1:20000"),
        ("http://other.host:20000", "http://10.0.0.1:13131", "http://other.host:20000"),
    ],
)
def test_loopback_of_a_neuron_is_the_neurons_host(engine: str, neuron: str, expected: str) -> None:
    """A neuron gives addresses from its own point of view."""
    assert reachable_url(engine, neuron) == expected
