"""Whatever a neuron sends beyond protocol v1 leaves it usable, and protocol v1 itself is read liberally."""

from __future__ import annotations

import copy
import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from shared.protocol import Discovery, EndpointReply, LoadReply, ModelStatus, ModelView, NeuronHealth, read_answer
from shared.tasks import timeout
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import Received, Script, plain
from tests.cortex.raw_http import Wire, chunked, until
from tests.cortex.raw_neuron import RawNeuron

ID = "org/m"
DEVICE = {"index": 0, "name": "GPU", "vram_total_mb": 24000, "compute_capability": "8.9"}
FIGURES = {"index": 0, "vram_used_mb": 1, "vram_free_mb": 23999, "utilization_pct": 5.0, "temp_c": 40.0}
ENTRY = {"id": ID, "harness": "vllm", "status": "loaded", "devices": [0], "vram_used_mb": 1}

ANSWERS: dict[str, tuple[Any, Any]] = {
    "/discovery": (
        Discovery,
        {
            **{"hostname": "h", "os": "Linux", "kernel": "6", "cuda_version": "13.0", "driver_version": "580"},
            "devices": [DEVICE],
            "harnesses": ["vllm"],
        },
    ),
    "/health": (NeuronHealth, {"uptime_secs": 5.0, "devices": [FIGURES]}),
    "/models": (list[ModelView], [ENTRY]),
    "/models/load": (LoadReply, {"status": "loaded"}),
    "/models/unload": (LoadReply, {"status": "unloaded"}),
    "/models/{model_id}/endpoint": (EndpointReply, {"url": "http://127.0.0.1:1"}),
}
"""By request: the model, and an answer with the fields of protocol v1."""

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["\ud800", "0", "1e999", "-0", "true", "null", 10**400, -(10**30), float("nan"), float("inf")])
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def objects(data: Any) -> Iterator[dict[str, Any]]:
    """Every object in an answer."""
    if isinstance(data, dict):
        yield data
    for inner in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from objects(inner)


def names() -> list[str]:
    """Every field that cortex may read anywhere, and some that it does not know."""
    found = {"x-unknown", ""}
    todo: list[type[BaseModel]] = [Discovery, NeuronHealth, ModelView, LoadReply, EndpointReply]
    while todo:
        model = todo.pop()
        found |= model.model_fields.keys()
        todo += [inner for field in model.model_fields.values() for inner in models_in(field.annotation)]
    return sorted(found)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in models_in(part)]


NAMES = names()


@pytest.mark.parametrize("path", ANSWERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_further_field_may_hold_anything(path: str, data: st.DataObject) -> None:
    """At every level; the fields of protocol v1 read as before."""
    wanted, base = ANSWERS[path]
    answer = copy.deepcopy(base)
    plain_answer, left_out = read_answer(wanted, base)
    assert not left_out
    for target in list(objects(answer)):
        more = data.draw(st.dictionaries(st.sampled_from(NAMES), json_values, max_size=4))
        for name, value in more.items():
            target.setdefault(name, value)
    read, _ = read_answer(wanted, answer)
    same = zip(_parts(plain_answer), _parts(read), strict=True)
    for (expected, fields), (got, _) in same:
        assert {name: getattr(got, name) for name in fields} == {name: getattr(expected, name) for name in fields}
    json.dumps([each.model_dump(mode="json") for each, _ in _parts(read)])


def _parts(answer: Any) -> list[tuple[BaseModel, set[str]]]:
    """The objects of protocol v1 in an answer, each with its fields."""
    listed = answer if isinstance(answer, list) else [answer]
    found: list[tuple[BaseModel, set[str]]] = []
    for each in listed:
        devices = each.devices if isinstance(each, Discovery | NeuronHealth) else []
        found += [(device, set(DEVICE if isinstance(each, Discovery) else FIGURES)) for device in devices]
        base = (
            ENTRY
            if isinstance(each, ModelView)
            else next(base for wanted, base in ANSWERS.values() if wanted is type(each))
        )
        own = set(base) - ({"devices"} if devices else set())
        found.append((each, own))
    return found


NUMBERS = ["uptime_secs", "index", "vram_total_mb", "vram_used_mb", "vram_free_mb", "utilization_pct", "temp_c"]
REQUIRED = {"index", "id", "status", "url"}


@pytest.mark.parametrize("spell", [str, float, lambda n: f"{n}.0", lambda n: f" {n} ", lambda n: n + 0.25])
def test_numbers_in_other_spellings(spell: Callable[[Any], Any]) -> None:
    """Strings and floats for whole numbers; memory may have fractions."""
    for wanted, base in ANSWERS.values():
        answer = copy.deepcopy(base)
        for target in objects(answer):
            for name in NUMBERS:
                if name in target and not (name == "index" and spell(0) not in (0, "0", "0.0", " 0 ")):
                    target[name] = spell(int(target[name]))
        read, left_out = read_answer(wanted, answer)
        assert not left_out
        expected, _ = read_answer(wanted, base)
        if spell(0) != 0.25:
            assert read == expected


@pytest.mark.parametrize("path", ANSWERS)
@pytest.mark.parametrize("mark", ["missing", "null"])
def test_optional_fields_of_protocol_v1_may_be_missing_or_null(path: str, mark: str) -> None:
    wanted, base = ANSWERS[path]
    for place, target in enumerate(objects(base)):
        for name in target.keys() - REQUIRED:
            answer = copy.deepcopy(base)
            there = list(objects(answer))[place]
            if mark == "null":
                there[name] = None
            else:
                del there[name]
            _, left_out = read_answer(wanted, answer)
            assert not left_out


@pytest.mark.parametrize(
    ("status", "known"),
    [("Loaded", "loaded"), (" LOADING ", "loading"), ("poisoned", None), ("", None), (7, None), ("загружена", None)],
)
def test_statuses_in_other_spellings(status: Any, known: str | None) -> None:
    """A status that is not known makes its model unusable, not its neuron."""
    (view,), left_out = read_answer(list[ModelView], [{**ENTRY, "status": status}])
    assert view.known_status is (None if known is None else ModelStatus(known))
    assert not left_out


def test_numbers_for_text() -> None:
    read, left_out = read_answer(
        Discovery, {"hostname": 7, "cuda_version": 13.0, "devices": [{**DEVICE, "name": 1, "compute_capability": 8.9}]}
    )
    assert not left_out
    assert (read.hostname, read.cuda_version, read.devices[0].compute_capability) == ("7", "13.0", "8.9")


def anything(choose: random.Random, depth: int = 0) -> Any:
    """A JSON value."""
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: choose.choice([True, False]),
        lambda: choose.choice([0, -1, 1, 2**31, 10**30, 0.5, 1e308, -0.0]),
        lambda: choose.choice(["", "0", "x" * 300, "é\u0000\u2028", "[]", "loaded", ID]),
    ]
    if depth < 3:
        kinds += [
            lambda: [anything(choose, depth + 1) for _ in range(choose.randrange(3))],
            lambda: {choose.choice(NAMES): anything(choose, depth + 1) for _ in range(choose.randrange(3))},
        ]
    return choose.choice(kinds)()


class AnyNeuron(V1Neuron):
    """Adds random fields to every object of every answer. They change with `seed`."""

    seed = 0
    SPARED = frozenset({"instance_id", "endpoint", "servable", "lost", "mig_mode", "state", "cuda_unavailable_reason"})
    """Fields that mean something when they happen to read."""

    def changed(self, data: Any) -> Any:
        choose = random.Random(self.seed)
        for target in list(objects(data)):
            for name in choose.sample(NAMES, 6):
                if name not in self.SPARED and name not in ("api_key", "url", "since", "max_in_flight"):
                    target.setdefault(name, anything(choose))
        return data


async def test_a_fleet_of_odd_answers_serves(start_cortex: StartCortex) -> None:
    """Polls, loads, endpoints and lists of fifty neurons that differ, as one process sees them."""
    async with AnyNeuron("any", 24000).running() as neuron:
        assert isinstance(neuron, AnyNeuron)
        neuron.rewrite = neuron.changed
        cortex = await start_cortex([neuron], [{"id": ID, "vram_mb": 4000}])
        unload = {"model": ID, "drain": False}
        for seed in range(1, 51):
            neuron.seed = seed
            polls = neuron.calls.count("/models")
            await until(lambda polls=polls: neuron.calls.count("/models") > polls + 1)  # type: ignore[misc]
            if seed % 5 == 0:
                async with cortex.http.post(f"{cortex.url}/fleet/unload", json=unload) as response:
                    assert response.status == 200, await response.text()
            async with timeout(10), cortex.chat(ID) as response:
                assert response.status == 200, (seed, await response.text())
            await shown(cortex)
        assert len(neuron.loads) == 11


async def shown(cortex: RunningCortex) -> None:
    """Everything that shows what neurons tell is valid JSON."""
    for path in ("/fleet", "/v1/models", f"/fleet/explain?model={ID}"):
        async with cortex.http.get(f"{cortex.url}{path}") as response:
            assert response.status == 200, await response.text()
            json.loads(await response.text(), parse_constant=pytest.fail)


def speak_v1(neuron: RawNeuron) -> None:
    neuron.instance = None
    neuron.scripts["/events"] = answer(plain(b"{}", status="404 Not Found"))


def raw(head: str, body: bytes, *, close: bool = False) -> Script:
    async def script(wire: Wire, received: Received) -> None:
        await wire.send(head.encode() + b"\r\n\r\n" + body)
        if close:
            wire.close()

    return script


def framed(page: bytes, kind: str) -> Script:
    """A good answer in another form."""
    big = b"[" + b" " * (1 << 20) + page[1:] if page.startswith(b"[") else b"{" + b" " * (1 << 20) + page[1:]
    forms: dict[str, Script] = {
        "gzip": answer(plain(gzip.compress(page), "Content-Encoding: gzip")),
        "deflate": answer(plain(zlib.compress(page), "Content-Encoding: deflate")),
        "identity": answer(plain(page, "Content-Encoding: identity")),
        "chunked": raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked", chunked(page, 7)),
        "no content-type": raw(f"HTTP/1.1 200 OK\r\nContent-Length: {len(page)}", page),
        "odd content-type": answer(plain(page, content_type="text/plain; charset=latin-1")),
        "HTTP/1.0": raw("HTTP/1.0 200 OK", page, close=True),
        "until close": raw("HTTP/1.1 200 Fine\r\nConnection: close", page, close=True),
        "newline": answer(plain(page + b"\r\n\n")),
        "byte order mark": answer(plain(b"\xef\xbb\xbf" + page)),
        "1 MiB": answer(plain(big)),
        "201": answer(plain(page, status="201 Created")),
    }
    return forms[kind]


def answer(data: bytes) -> Script:
    async def script(wire: Wire, received: Received) -> None:
        await wire.send(data)

    return script


FORMS = [
    *("gzip", "deflate", "identity", "chunked", "no content-type", "odd content-type", "HTTP/1.0", "until close"),
    *("newline", "byte order mark", "1 MiB", "201"),
]


@pytest.mark.parametrize("kind", FORMS)
async def test_answers_in_other_forms(start_cortex: StartCortex, kind: str) -> None:
    """Polls, a cold load, its endpoint and the unload, each answered in that form."""
    async with RawNeuron().running() as neuron, V1Neuron("engine", 1).running() as other:
        speak_v1(neuron)
        endpoint = json.dumps({"url": other.engine.url}).encode()

        def pages(wire_path: str) -> bytes:
            if wire_path.endswith("/endpoint"):
                return endpoint
            if wire_path == "/models/load":
                neuron.change(ID, "loaded", since=None)
            if wire_path.startswith("/models/unload"):
                neuron.models.clear()
                return b'{"status": "unloaded"}'
            return neuron.page(wire_path)

        async def script(wire: Wire, received: Received) -> None:
            await framed(pages(received.target), kind)(wire, received)

        for path in ("/health", "/models", "/discovery", "/models/load", "/models/unload", "/models/org%2Fm/endpoint"):
            neuron.scripts[path] = script
        cortex = await start_cortex([neuron], [{"id": ID, "vram_mb": 4000}])
        async with cortex.chat(ID) as response:
            assert response.status == 200, await response.text()
        async with cortex.http.post(f"{cortex.url}/fleet/unload", json={"model": ID, "drain": False}) as response:
            assert response.status == 200, await response.text()
        await shown(cortex)


@pytest.mark.parametrize(
    ("status", "body", "serves"),
    [
        ("200 OK", b"ok", True),
        ("200 OK", b"", True),
        ("204 No Content", b"", True),
        ("200 OK", b"null", True),
        ("200 OK", b"[1]", True),
        ("400 Bad Request", b'{"error": "model \'org/m\' already loaded"}', True),
        ("409 Conflict", b'{"error": {"message": "Already loaded", "kind": 3}}', True),
        ("422 Unprocessable", b'{"error": {"kind": "quant_not_found", "suggestion": "Q4"}}', False),
        ("400 Bad Request", b'{"error": "hf-hub time-out"}', False),
        ("503 Service Unavailable", b'{"error": "driver mismatch, reboot", "code": "cuda_unavailable"}', False),
        ("500 Oops", b"<html>oops</html>", False),
        ("307 Temporary Redirect", b"", False),
    ],
)
async def test_answers_to_a_load(start_cortex: StartCortex, status: str, body: bytes, serves: bool) -> None:
    """Success in any words; an error reaches the client with its text."""
    async with RawNeuron().running() as neuron, V1Neuron("engine", 1).running() as other:
        speak_v1(neuron)

        async def load(wire: Wire, received: Received) -> None:
            if serves:
                neuron.change(ID, "loaded", since=None)
            empty = f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()
            await wire.send(plain(body, status=status) if body else empty)

        neuron.scripts["/models/load"] = load
        neuron.scripts["/models/org%2Fm/endpoint"] = answer(plain(json.dumps({"url": other.engine.url}).encode()))
        cortex = await start_cortex([neuron], [{"id": ID, "vram_mb": 4000}])
        async with cortex.chat(ID) as response:
            text = await response.text()
            assert response.status == (200 if serves else 503), text
    for word in ("quant_not_found", "hf-hub", "driver mismatch", "oops", "redirects are not followed"):
        assert (word in text) == (word.encode() in body or (word.startswith("redirects") and status.startswith("307")))
