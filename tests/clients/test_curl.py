"""curl: HTTP/1.1 and 1.0, a chunked body, Expect: 100-continue."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.clients.fleet import MODEL, TEXT, ClientFleet
from tests.clients.programs import client_environment, run_client

FORMS = {
    "h1": ["--http1.1"],
    "http 1.0": ["--http1.0"],
    "chunked": ["-H", "Transfer-Encoding: chunked"],
    "expect": ["-H", "Expect: 100-continue"],
    "compressed": ["--compressed"],
}


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "plain"])
@pytest.mark.parametrize(("form", "cold"), [*((form, False) for form in FORMS), ("h1", True), ("chunked", True)])
def test_answers(fleet: ClientFleet, tmp_path: Path, form: str, cold: bool, streamed: bool) -> None:
    assert shutil.which("curl") is not None, "curl is not installed"
    fleet.get_ready(cold=cold)
    env = client_environment(tmp_path)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": streamed}
    Path(env["HOME"], "body.json").write_text(json.dumps(body), encoding="utf-8")
    command = ["curl", "-sS", "--fail", "-N", *FORMS[form], "-H", "Content-Type: application/json"]
    out = run_client([*command, "--data-binary", "@body.json", f"{fleet.v1}/chat/completions"], env).out
    if not streamed:
        assert json.loads(out)["choices"][0]["message"]["content"].startswith(f'{TEXT}: "Hello"')
        return
    assert (": loading" in out) is cold
    events = [line.removeprefix("data: ") for line in out.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert text.startswith(f'{TEXT}: "Hello"')
