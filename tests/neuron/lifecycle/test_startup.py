"""An engine that dies between its first healthy answer and the moment it counts as loaded."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.neuron.neurons import config_of, neuron_here, until

MODEL = "org/model"
# Healthy, but silent to everything else; writes a file when it is asked for its figures.
HALF_SILENT = """
import http.server, pathlib, sys, threading

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/health":
            pathlib.Path(ASKED).touch()
            threading.Event().wait()
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.parametrize("way", ["killed", "unloaded"])
async def test_an_end_is_seen_while_the_engine_is_asked_for_its_figures(way: str, mark: str, tmp_path: Path) -> None:
    """The model does not count as loaded, and no request waits for an answer that cannot come."""
    script, asked = tmp_path / "engine.py", tmp_path / "asked"
    script.write_text(f"ASKED = {str(asked)!r}{HALF_SILENT}")
    settings: dict[str, Any] = {"command": [sys.executable, str(script)], "stop_timeout_secs": 1}
    async with neuron_here(config_of(tmp_path / "state", sim=settings)) as neuron:
        loading = asyncio.create_task(neuron.load(MODEL))
        await until(asked.exists)
        pid = (await neuron.model(MODEL))["pid"]
        if way == "killed":
            os.kill(pid, signal.SIGKILL)
        else:
            assert (await asyncio.wait_for(neuron.unload(MODEL), 1.5)).status == 200
        answer = await asyncio.wait_for(loading, 1.5)
        assert answer.error["code"] == ("load_failed" if way == "killed" else "load_cancelled")
