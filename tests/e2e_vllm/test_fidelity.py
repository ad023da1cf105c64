"""A request through cortex gets the answer that vLLM gives directly: status, content type, body and events."""

from __future__ import annotations

import http.client
import json
import re
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from tests.e2e_vllm.fidelity import EMBEDDING_CASES, TEXT_CASES, Case
from tests.e2e_vllm.fleet import MINILM, TINY
from tests.processes import eventually
from tests.services import Fleet

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

# Values that vLLM makes for each request: ids, times, and figures of its own clock.
_VOLATILE = (
    (
        re.compile(rb"(?<=[-_\"])([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}|[0-9a-f]{32}|[0-9a-f]{16})(?![0-9a-f])"),
        b"<id>",
    ),
    (re.compile(rb'("(?:created|created_at|completed_at)":) ?[0-9.]+'), rb"\1 0"),
    (re.compile(rb'("cached_tokens":) ?[0-9]+'), rb"\1 0"),
)


@dataclass(frozen=True)
class Events:
    """A stream without its timing: vLLM decides by its load how many tokens an event has, and in which order choices
    come. `kinds` are the events without text, each once; `text` by choice; `last` the last event."""

    kinds: tuple[str, ...]
    text: dict[int, str]
    last: str


@dataclass(frozen=True)
class RawAnswer:
    """What a client sees, without what differs from request to request. Of a stream `events` are compared."""

    status: int
    content_type: str | None
    body: bytes
    events: Events | None = None


def test_answers_through_cortex_are_those_of_the_engine(fleet: Fleet) -> None:
    """142 requests, good and faulty, whole and streamed. Each is sent to vLLM twice, since the first one fills
    its prefix cache, and then through cortex."""
    differences = []
    for model, cases in ((TINY, TEXT_CASES), (MINILM, EMBEDDING_CASES)):
        engine, key = _endpoint(fleet, model)
        for case in cases:
            payload = case.payload(model)
            _send(engine, key, case, payload)
            direct = _send(engine, key, case, payload)
            through = _send(fleet.cortex.url, "none", case, payload)
            if direct != through:
                differences.append(f"{case.name}:\n  vLLM:   {direct}\n  cortex: {through}"[:4000])
    assert differences == [], "\n".join(differences)


def test_tokens_are_those_of_the_engines_own_counters(fleet: Fleet) -> None:
    """Plain answers and streams, whether their client asks for usage or not: the sums in cortex's log are what vLLM's
    metrics say of the same requests. With several answers to one prompt vLLM's metrics count it several times."""
    engine, _ = _endpoint(fleet, TINY)
    cases = [case for case in TEXT_CASES if case.body.get("n", 1) == 1 and not case.body.get("use_beam_search")]
    before = eventually(lambda: _settled_counts(engine), "the engine has counted what came before", within_secs=30)
    logged = len(fleet.cortex.log())
    assert before is not None
    streams = 0
    for case in cases:
        answer = _send(fleet.cortex.url, "none", case, case.payload(TINY))
        streams += answer.status == 200 and answer.events is not None
    assert streams > 20

    def counted() -> tuple[int, int]:
        found = re.findall(r" prompt=(\d+) completion=(\d+)", fleet.cortex.log()[logged:])
        return sum(int(prompt) for prompt, _ in found), sum(int(completion) for _, completion in found)

    def differences() -> tuple[int, int]:
        after, found = _engine_counts(engine), counted()
        return after[0] - before[0] - found[0], after[1] - before[1] - found[1]

    eventually(lambda: differences() == (0, 0), f"the counts agree: {counted()}, {differences()}", within_secs=30)


def _settled_counts(url: str) -> tuple[int, int] | None:
    """`_engine_counts` if they have not changed for a second. vLLM counts a request some time after its answer, and one
    whose client has left even later."""
    counts = _engine_counts(url)
    time.sleep(1.0)
    return counts if _engine_counts(url) == counts else None


def _engine_counts(url: str) -> tuple[int, int]:
    """Tokens of prompts and of answers, by vLLM's metrics."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    sums = [
        re.findall(rf"^vllm:{kind}_tokens_total\{{[^}}]*\}} (\S+)$", text, re.M) for kind in ("prompt", "generation")
    ]
    return int(sum(map(float, sums[0]))), int(sum(map(float, sums[1])))


def _endpoint(fleet: Fleet, model: str) -> tuple[str, str]:
    """Address and key of the model's engine, after loading it if necessary."""
    loaded = fleet.cortex.request("/fleet/load", {"model": model})
    assert loaded.status == 200, loaded.body
    endpoint = fleet.neuron.request(f"/models/{quote(model, safe='')}/endpoint").body
    return endpoint["url"], endpoint["api_key"]


def _send(base: str, key: str, case: Case, payload: bytes) -> RawAnswer:
    address = urlsplit(base)
    assert address.hostname is not None
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=120)
    try:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", **case.headers}
        connection.request("POST", case.path, payload, headers)
        response = connection.getresponse()
        body = response.read()
        for pattern, replacement in _VOLATILE:
            body = pattern.sub(replacement, body)
        content_type = response.getheader("content-type")
        if content_type is None or not content_type.startswith("text/event-stream"):
            return RawAnswer(response.status, content_type, body)
        return RawAnswer(response.status, content_type, b"", _merged(body.decode()))
    finally:
        connection.close()


def _merged(stream: str) -> Events:
    assert stream.endswith("\n\n"), stream[-200:]
    events = stream.removesuffix("\n\n").split("\n\n")
    kinds: set[str] = set()
    text: dict[int, str] = {}
    for event in events:
        head, _, data = event.rpartition("data: ")
        if data == "[DONE]":
            kinds.add(event)
            continue
        parsed = json.loads(data)
        if not _take_text(parsed, text):
            kinds.add(head + json.dumps(parsed))
    return Events(tuple(sorted(kinds)), text, events[-1] if "DONE" in events[-1] else "")


def _take_text(event: dict[str, Any], text: dict[int, str]) -> bool:
    """Moves the text of an event into `text`, and removes what depends on the timing. True if nothing else is left."""
    event.pop("sequence_number", None)
    choices = event.get("choices") or []
    for choice in choices:
        event.pop("usage", None)
        choice.pop("logprobs", None)
        words = choice.pop("text", None) or choice.get("delta", {}).pop("content", None) or ""
        text[choice["index"]] = text.get(choice["index"], "") + words
    if choices:
        return not any(choice.get("finish_reason") or choice.get("delta") for choice in choices)
    if "delta" in event.get("type", ""):
        delta = event["delta"]
        words = delta if isinstance(delta, str) else delta.pop("text", None)
        if words is not None:
            text[0] = text.get(0, "") + words
            return True
    return False
