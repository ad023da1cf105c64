"""The access log has the same format as the rest of the log."""

from __future__ import annotations

import json

from cortex.http.access_log import AccessLog


async def test_text_line() -> None:
    """The text format of an access log line is stable: people grep it."""
    written: list[str] = []
    access = AccessLog(written.append)
    access.line("POST /v1/models 200 id=abc", "abc")
    access.flush()
    assert "".join(written).endswith(" INFO    cortex.access: POST /v1/models 200 id=abc\n")


async def test_json_line() -> None:
    """The JSON format of an access log line is stable: scripts read it."""
    written: list[str] = []
    access = AccessLog(written.append, as_json=True)
    access.line('POST /v1/"x" 200 id=abc', "abc")
    access.flush()
    fields = json.loads("".join(written))
    assert fields["message"] == 'POST /v1/"x" 200 id=abc'
    assert (fields["level"], fields["logger"], fields["request_id"]) == ("info", "cortex.access", "abc")
    assert fields["time"].endswith("Z")
    assert fields["exception"] is None
