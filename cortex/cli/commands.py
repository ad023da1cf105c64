"""status, models, explain, load, unload, drain, resume."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from cortex.cli.client import CallFailed, call
from cortex.cli.tables import explain_table, models_table, status_table

DEFAULT_URL = "http://127.0.0.1:31313"

Ask = Callable[[argparse.Namespace, "Cortex"], Any]
Show = Callable[[Any], str]


class Cortex:
    """The cortex that `--url`, CORTEX_URL and CORTEX_API_KEY name."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url
        self._api_key = api_key

    def get(self, path: str) -> Any:
        return call(self._url, "GET", path, api_key=self._api_key)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return call(self._url, "POST", path, api_key=self._api_key, body=body, patient=True)


def add_client_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands to the parser of `cortex`."""
    _add(commands, "status", "the neurons, their GPUs and what is on them", lambda _, c: c.get("/fleet"), status_table)
    _add(commands, "models", "what clients may ask for", lambda _, c: c.get("/v1/models"), models_table)
    explain = _add(
        commands,
        "explain",
        "where a model would go, and why",
        lambda args, c: c.get(f"/fleet/explain?model={quote(args.model, safe='')}"),
        explain_table,
    )
    load = _add(commands, "load", "load a model and wait for it", lambda a, c: c.post("/fleet/load", _action(a)), _done)
    unload = _add(commands, "unload", "unload a model", lambda a, c: c.post("/fleet/unload", _action(a)), _done)
    for parser in (explain, load, unload):
        parser.add_argument("model", metavar="MODEL")
    for parser in (load, unload):
        parser.add_argument("--on", metavar="NODE", dest="node", help="the neuron; left out: cortex decides")
    for verb, text in (("drain", "give a neuron no new work"), ("resume", "give a neuron work again")):
        parser = _add(commands, verb, text, _node_action(verb), _done)
        parser.add_argument("node", metavar="NODE")


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, ask: Ask, show: Show
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text)
    parser.add_argument("--url", default=os.environ.get("CORTEX_URL", DEFAULT_URL), help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="the answer as JSON, for scripts")
    parser.set_defaults(run=lambda args: _run(args, ask, show))
    return parser


def _run(args: argparse.Namespace, ask: Ask, show: Show) -> int:
    try:
        answer = ask(args, Cortex(args.url, os.environ.get("CORTEX_API_KEY")))
    except CallFailed as error:
        print(f"cortex: {error}", file=sys.stderr)
        return 1
    try:
        text = json.dumps(answer, indent=2) if args.json else show(answer)
    except (LookupError, TypeError, AttributeError):
        print(f"cortex: {args.url} does not answer as a cortex does", file=sys.stderr)
        return 1
    print(text)
    return 0


def _node_action(verb: str) -> Ask:
    return lambda args, cortex: cortex.post(f"/fleet/nodes/{quote(args.node, safe='')}/{verb}", {})


def _action(args: argparse.Namespace) -> dict[str, Any]:
    return {"model": args.model, "node": args.node}


def _done(answer: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in answer.items())
