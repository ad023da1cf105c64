"""The fleet in this process as cortex tells it: once as a whole, then what changes."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

from cortex.cli.client import CALL_TIMEOUT_SECS, CallFailed, stream
from cortex.cli.options import credential_for

RETRY_SECS = 1.0


def applied(state: Any, patch: Any) -> Any:
    """The state after a JSON merge patch (RFC 7396)."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(state) if isinstance(state, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = applied(merged.get(name), value)
    return merged


class FollowedFleet:
    """Owns the connection, in a thread of its own that ends with the process. `fleet`: None until it is known.
    `problem`: why it is out of date, None if it is not. `heard_at`: when cortex last sent anything, in monotonic
    seconds. `changed` is set at each change of these."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.fleet: dict[str, Any] | None = None
        self.problem: str | None = None
        self.heard_at = time.monotonic()
        self.changed = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="fleet").start()

    def _run(self) -> None:
        while True:
            try:
                self._follow()
                self._tell("cortex has ended the connection")
            except CallFailed as error:
                self._tell(str(error))
            time.sleep(RETRY_SECS)

    def _follow(self) -> None:
        key = credential_for(self._url)
        path = "/fleet/events?changes=true"
        for event in stream(self._url, "GET", path, api_key=key, timeout_secs=CALL_TIMEOUT_SECS):
            if event.name == "fleet":
                self.fleet = json.loads(event.data)
            elif event.name == "change":
                self.fleet = applied(self.fleet, json.loads(event.data))
            self.heard_at = time.monotonic()
            self._tell(None)

    def _tell(self, problem: str | None) -> None:
        self.problem = problem
        self.changed.set()
