"""The progress of a load, on a terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cortex.cli.live.followed import FollowedFleet
from cortex.cli.options import ask

LOOK_SECS = 0.2
_COMING = ("loading", "reloading", "recovering")


def load_with_progress(url: str, body: dict[str, Any]) -> Any:
    """The answer of `POST /fleet/load`. On a terminal a bar shows how far the load is. Ctrl-C ends the wait, not the
    load."""
    if not sys.stderr.isatty():
        return ask(url, "POST", "/fleet/load", body)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[phase]}"), TimeElapsedColumn())
    asked = _Asked(lambda: ask(url, "POST", "/fleet/load", body))
    followed, bars = FollowedFleet(url), dict[str, TaskID]()
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        try:
            while not asked.done.wait(LOOK_SECS):
                _draw(followed.fleet, body["model"], shown, bars)
        except KeyboardInterrupt:
            shown.console.print("The load goes on.")
            raise
    return asked.result()


class _Asked:
    """A question in a thread that ends with the process, so that Ctrl-C need not wait for the answer."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self.done = threading.Event()
        self._ask = ask
        self._answer: Any = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, daemon=True, name="question").start()

    def result(self) -> Any:
        """The answer; raises what the question raised."""
        if self._error is not None:
            raise self._error
        return self._answer

    def _run(self) -> None:
        try:
            self._answer = self._ask()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits, SystemExit among them
            self._error = error
        finally:
            self.done.set()


def _draw(fleet: dict[str, Any] | None, name: str, shown: Progress, bars: dict[str, TaskID]) -> None:
    if fleet is None:
        return
    model_id = fleet["aliases"].get(name, name).partition("@")[0]
    for node in fleet["nodes"].values():
        for place, view in node.get("models", {}).items():
            if view["id"] == model_id and view["status"] in _COMING:
                if place not in bars:
                    bars[place] = shown.add_task(f"{model_id} on {node['name']}", total=1.0, phase="")
                progress = view.get("progress") or {}
                left = progress.get("remaining_secs")
                phase = progress.get("phase", view["status"])
                told = phase if left is None else f"{phase}, {left:.0f} s left"
                shown.update(bars[place], completed=progress.get("overall") or 0.0, phase=told)
