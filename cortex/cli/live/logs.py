"""`cortex logs`."""

from __future__ import annotations

import json
import sys
from typing import Any
from urllib.parse import urlencode

from cortex.cli.client import CALL_TIMEOUT_SECS, CallFailed, stream
from cortex.cli.options import ask, credential_for
from shared.terminal.command_line import fail


def run_logs(
    url: str, model: str, *, node: str | None, instance: str | None, tail: int, follow: bool, as_json: bool
) -> int:
    """Prints the lines, with the neuron in front if there are several engines. Exit 1 if a neuron does not tell."""
    query: dict[str, Any] = {"model": model, "tail": tail, "node": node, "instance": instance}
    path = "/fleet/logs?" + urlencode({name: value for name, value in query.items() if value is not None})
    if follow:
        return _follow(url, path + "&follow=true", as_json)
    engines = ask(url, "GET", path)["engines"]
    if as_json:
        sys.stdout.write(json.dumps({"engines": engines}, indent=2) + "\n")
    failed = False
    for engine in engines:
        prefix = f"[{_place(engine)}] " if len(engines) > 1 else ""
        if not as_json:
            sys.stdout.writelines(f"{prefix}{line}\n" for line in engine["lines"])
        if "error" in engine:
            failed = True
            sys.stderr.write(f"{_place(engine)}: {engine['error']}\n")
    return int(failed)


def _follow(url: str, path: str, as_json: bool) -> int:
    """0 once every engine is gone; 1 if the stream ends before that."""
    places: set[str] = set()
    ended = False
    try:
        for event in stream(url, "GET", path, api_key=credential_for(url), timeout_secs=CALL_TIMEOUT_SECS):
            if not event.data:
                continue
            told = json.loads(event.data)
            ended = "end" in told or ("left_out" in told and ended)
            if "end" in told and "node" not in told:
                fail("cortex", f"{told['end']}; the log may go on")
            if as_json:
                sys.stdout.write(event.data + "\n")
            elif "line" in told:
                places.add(_place(told))
                prefix = f"[{_place(told)}] " if len(places) > 1 else ""
                sys.stdout.write(f"{prefix}{told['line']}\n")
            else:
                what = told.get("end") or f"{told['left_out']} lines were left out"
                sys.stderr.write(f"{_place(told)}: {what}\n" if "node" in told else f"{what}\n")
            sys.stdout.flush()
    except CallFailed as error:
        fail("cortex", error)
    except KeyboardInterrupt:
        return 0
    if not ended:
        fail("cortex", "the connection has ended; the log may go on: does cortex run? `cortex status` tells")
    return 0


def _place(told: dict[str, Any]) -> str:
    return f"{told['node']}/{told['instance']}" if told.get("instance") else str(told["node"])
