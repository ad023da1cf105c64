"""httpx-sse."""

from __future__ import annotations

from typing import Any

import httpx
from httpx_sse import connect_sse

from tests.clients.scripts.event_streams import Events, report_events
from tests.clients.scripts.report import BASE_URL


def events(path: str, body: dict[str, Any]) -> Events:
    with httpx.Client(timeout=60) as client, connect_sse(client, "POST", BASE_URL + path, json=body) as source:
        for event in source.iter_sse():
            yield event.event, event.data


if __name__ == "__main__":
    report_events(events)
