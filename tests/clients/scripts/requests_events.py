"""sseclient-py on a stream of requests."""

from __future__ import annotations

from typing import Any

import requests
import sseclient

from tests.clients.scripts.event_streams import Events, report_events
from tests.clients.scripts.report import BASE_URL


def events(path: str, body: dict[str, Any]) -> Events:
    with requests.post(BASE_URL + path, json=body, stream=True, timeout=60) as response:
        for event in sseclient.SSEClient(response).events():
            yield event.event, event.data


if __name__ == "__main__":
    report_events(events)
