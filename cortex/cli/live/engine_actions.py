"""`cortex sleep`, `wake` and `restart`, and what `--dry-run` prints."""

from __future__ import annotations

from typing import Any

from cortex.cli.options import ask, print_answer


def run_engine_action(url: str, verb: str, body: dict[str, Any], *, dry_run: bool, as_json: bool) -> int:
    """`verb`: sleep, wake or restart."""
    if dry_run:
        return run_dry(url, verb, body, as_json=as_json)
    print_answer(url, ask(url, "POST", f"/fleet/{verb}", body), as_json, done_text)
    return 0


def run_dry(url: str, verb: str, body: dict[str, Any], *, as_json: bool) -> int:
    """Prints what an action would do."""
    print_answer(url, ask(url, "POST", f"/fleet/{verb}?dry_run=true", body), as_json, effects_text)
    return 0


def effects_text(answer: dict[str, Any]) -> str:
    return "\n".join(answer["effects"])


def done_text(answer: dict[str, Any]) -> str:
    places = [f"{each['node']}{'/' + each['instance'] if 'instance' in each else ''}" for each in answer["results"]]
    done = f"{answer['model']} is {answer['status']} on {', '.join(places)}"
    return f"{done}\n{answer['next']}" if answer.get("next") else done
