"""`cortex config`: the configuration of a running cortex."""

from __future__ import annotations

from typing import Any

from cortex.cli.options import ask, print_answer
from shared.terminal.command_line import fail
from shared.terminal.tables import table
from shared.terminal.wording import counted


def run_config(url: str, *, check: bool, reload: bool, as_json: bool) -> int:
    """Prints it; the exit status is 1 if the files have errors. `check`: only what is wrong and what would change.
    `reload`: after the files have been applied."""
    path = "/fleet/configuration"
    answer = ask(url, "POST", f"{path}/reload", {}) if reload else ask(url, "GET", path)
    if not isinstance(answer, dict) or "errors" not in answer:
        fail("cortex", f"{url} does not answer like a cortex, check --url")
    print_answer(url, answer, as_json, problems_text if check else configuration_text)
    return int(bool(answer["errors"]))


def configuration_text(answer: dict[str, Any]) -> str:
    """Where it comes from, the keys that differ from their defaults, and what is wrong."""
    rows = [
        [setting["key"], str(setting["value"]), "restart" if setting["needs_restart"] else "applies"]
        for setting in answer["settings"]
        if not setting["default"]
    ]
    lines = [f"from {', '.join(answer['files'])}"]
    if answer["environment"]:
        lines.append(f"and the environment: {', '.join(answer['environment'])}")
    lines.append(f"{counted(len(answer['neurons']), 'neuron')}, {counted(len(answer['models']), 'model')}")
    if rows:
        lines += ["", table([["KEY", "VALUE", "A CHANGE"], *rows])]
    return "\n".join([*lines, "", problems_text(answer)])


def problems_text(answer: dict[str, Any]) -> str:
    """What is wrong in the files, and what a reload would change."""
    lines = [f"error: {_text(each)}" for each in answer["errors"]]
    lines += [f"warning: {_text(each)}" for each in answer["warnings"]]
    reload = answer["reload"]
    if not reload["possible"]:
        return "\n".join([*lines, "a reload would change nothing until the errors are fixed"])
    lines += [f"a reload changes: {change}" for change in reload["changes"]]
    lines += [f"after a restart: {change}" for change in reload["restart"]]
    if not reload["changes"] and not reload["restart"]:
        lines.append("the files are in force")
    return "\n".join(lines)


def _text(problem: dict[str, Any]) -> str:
    return problem["message"] if problem["file"] is None else f"{problem['file']}: {problem['message']}"
