"""curl: HTTP/1.1 in all its forms, and what it says about HTTP/2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest

from tests.clients.running import MODELS, Bench

MODEL = MODELS[0]
JSON = ("-H", "Content-Type: application/json")


@pytest.fixture(scope="module", autouse=True)
def _curl() -> None:
    """Skips where there is no curl, and fails there in CI."""
    if shutil.which("curl") is None:
        assert os.environ.get("CI") != "true", "CI must have curl"
        pytest.skip("curl is not installed")


def curl(bench: Bench, *arguments: str, path: str = "/v1/chat/completions") -> subprocess.CompletedProcess[str]:
    return bench.attempt(["curl", "-sS", "--max-time", "30", *arguments, bench.url + path])


def body(*, stream: bool, question: str = "Who are you?") -> str:
    return json.dumps({"model": MODEL, "messages": [{"role": "user", "content": question}], "stream": stream})


def text_of(done: subprocess.CompletedProcess[str]) -> str:
    """The whole answer, of either form."""
    assert done.returncode == 0, done.stderr
    if not done.stdout.startswith((":", "data:")):
        text: str = json.loads(done.stdout)["choices"][0]["message"]["content"]
        return text
    lines = [line for line in done.stdout.splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line.removeprefix("data: "))["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
@pytest.mark.parametrize("state", ["cold", "warm"])
def test_answers(bench: Bench, state: str, stream: bool) -> None:
    """A stream that waits for its model begins with comments."""
    if state == "cold":
        bench.cold(MODEL)
    done = curl(bench, "-N", *JSON, "-d", body(stream=stream))
    assert text_of(done).startswith(f'{MODEL} (simulated): "Who are you?"')
    assert done.stdout.startswith(f": loading {MODEL}") == (stream and state == "cold"), done.stdout[:200]


def test_tool_call(bench: Bench) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    request = {**json.loads(body(stream=False, question="What is the weather?")), "tools": [tool]}
    done = curl(bench, *JSON, "-d", json.dumps(request))
    (call,) = json.loads(done.stdout)["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"


@pytest.mark.parametrize(
    "options",
    [
        ["--http1.0"],
        ["-H", "Transfer-Encoding: chunked"],
        ["-H", "Expect: 100-continue"],
        ["-H", "Expect: 100-continue", "-H", "Transfer-Encoding: chunked"],
        ["--http2"],  # offers an upgrade, which cortex declines
        ["--compressed"],
    ],
    ids=" ".join,
)
def test_forms_of_a_request(bench: Bench, options: list[str]) -> None:
    """Each gets the answer."""
    done = curl(bench, *JSON, *options, "-d", body(stream=False))
    assert text_of(done).startswith(f"{MODEL} (simulated)")


def test_large_upload(bench: Bench) -> None:
    """Over 1 MB, curl asks for 100 Continue by itself; cortex tells it to go on, without the second that it waits."""
    file = bench.home / "body.json"
    file.write_text(body(stream=False)[:-1] + f', "user": "{"x" * 2_000_000}"}}', encoding="utf-8")
    done = curl(bench, *JSON, "-v", "-d", f"@{file}")
    assert text_of(done).startswith(f"{MODEL} (simulated)")
    assert "< HTTP/1.1 100 Continue" in done.stderr


def test_http2_is_refused_with_a_reason(bench: Bench) -> None:
    """curl sends an HTTP/2 preface, and gets an answer at once."""
    done = curl(bench, "--http2-prior-knowledge", *JSON, "-d", body(stream=False))
    assert done.returncode != 0
    assert done.returncode != 28, "timed out"
