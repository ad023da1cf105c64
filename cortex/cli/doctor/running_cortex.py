"""Checks the running cortex: that it answers, what it knows of its neurons, and that a model answers through it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from cortex.cli.client import CallFailed, ErrorAnswer, NotConnected, base_url, call
from cortex.cli.doctor.findings import Finding, fault, ok, warning
from cortex.cli.doctor.this_host import DeploymentFiles, check_port, listen_url

ANSWER_SECS: Final = 10.0
COMPLETION_SECS: Final = 1800.0
"""A cold load included."""


def check_cortex(
    url: str, files: DeploymentFiles, model: str | None, api_key: str | None, tell: Callable[[str], None]
) -> Iterator[Finding]:
    """Also a completion: of `model`, or of one that is loaded, announced by `tell`. Blocks."""
    try:
        nodes = _nodes_of(_health(url))
    except NotConnected as error:
        yield from _not_running(url, files, model, str(error))
        return
    except ErrorAnswer as error:
        yield fault("cortex", str(error)) if isinstance(error.body, dict) else _stranger(url, files, f": {error}")
        return
    except CallFailed as error:
        yield fault("cortex", str(error).replace(" or CORTEX_URL", ""))  # doctor does not read it
        return
    if nodes is None:
        yield _stranger(url, files)
        return
    yield _of_health(url, nodes.get("healthy"), nodes.get("total"))
    try:
        fleet = _ask(url, "/fleet", api_key)
    except CallFailed as error:
        yield warning("cortex", f"/fleet: {error}", "the checks that need a key are left out")
        return
    if not isinstance(fleet, dict):
        yield fault("cortex", f"{url}/fleet answers, but not like a cortex", "is a proxy in between?")
        return
    yield from _of_fleet(fleet, files)
    yield check_completion(url, fleet, model, api_key, tell)


def fleet_of(url: str, api_key: str | None) -> Any:
    """What `GET /fleet` answers; None if this cannot be known. Blocks."""
    try:
        fleet = _ask(url, "/fleet", api_key)
    except CallFailed:  # `check_cortex` says why
        return None
    return fleet if isinstance(fleet, dict) else None


def _stranger(url: str, files: DeploymentFiles, said: str = "") -> Finding:
    """Another program has the address. `said`: its answer."""
    here = base_url(url) == listen_url(files.config)
    advice = "end that program, or change [gateway] listen" if here else "correct --url"
    return fault("cortex", f"{url} answers, but not like a cortex{said}", advice)


def _health(url: str) -> Any:
    """A cortex without a healthy neuron answers 503."""
    try:
        return _ask(url, "/health", None)
    except ErrorAnswer as error:
        if _nodes_of(error.body) is None:
            raise
        return error.body


def _nodes_of(health: Any) -> Mapping[str, Any] | None:
    """The counts of neurons; None if no cortex wrote this."""
    nodes = health.get("nodes") if isinstance(health, dict) else None
    return nodes if isinstance(nodes, dict) else None


def _not_running(url: str, files: DeploymentFiles, model: str | None, reason: str) -> Iterator[Finding]:
    yield warning("cortex", f"does not run: {reason.partition(';')[0]}", "start it: systemctl start cortex")
    if base_url(url) == listen_url(files.config):  # at another address it may run here nevertheless
        yield from (check_port(files, key) for key in ("listen", "metrics_listen"))
    if model is not None:
        yield fault("completion", f"{model} cannot be asked: cortex does not run")


def _of_health(url: str, healthy: object, total: object) -> Finding:
    text = f"{url} answers; it reaches {healthy} of {total} neurons"
    if healthy == total and total:
        return ok("cortex", text)
    return (warning if healthy else fault)("cortex", text, "see the lines of the neurons, and `cortex status`")


def _of_fleet(fleet: Any, files: DeploymentFiles) -> list[Finding]:
    """What the running cortex says of its configuration, and of neurons that it reaches and this host does too."""
    found = []
    config = fleet.get("configuration")
    error = config.get("error") if isinstance(config, dict) else None
    if error:
        found.append(
            fault("cortex", f"the files are not in effect: {error}", "correct them; the old ones stay in effect")
        )
    names = {node.get("name") for node in fleet.get("nodes", [])}
    for missing in [entry.name for entry in files.config.neurons if entry.name not in names]:
        text = f"the running cortex does not know {missing}"
        found.append(warning("cortex", text, "does it run with this file? `systemctl reload cortex` reads it again"))
    for node in fleet.get("nodes", []):
        if not node.get("healthy", True):
            error = node.get("last_error") or "no answer"
            found.append(fault("cortex", f"it does not reach {node.get('name')}: {error}", "see the neuron's own line"))
        if node.get("draining"):
            name = node.get("name")
            found.append(warning("cortex", f"{name} is drained: it gets no loads", f"`cortex resume {name}` ends that"))
    return found


def check_completion(
    url: str, fleet: Any, model: str | None, api_key: str | None, tell: Callable[[str], None]
) -> Finding:
    """A chat of one token."""
    chosen = model or loaded_model(fleet)
    if chosen is None:
        return warning("completion", "not tried: no model is loaded", "name one with --model")
    tell(f"asking {chosen} for an answer, which loads it if necessary ...")
    body = {"model": chosen, "messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 1}
    began = time.monotonic()
    try:
        answer = call(url, "POST", "/v1/chat/completions", api_key=api_key, timeout_secs=COMPLETION_SECS, body=body)
    except CallFailed as error:
        # A model that the user did not name may be one for embeddings.
        report = warning if model is None else fault
        return report("completion", f"{chosen}: {error}", f"`cortex explain {chosen}`, docs/troubleshooting.md")
    if not isinstance(answer, dict) or not answer.get("choices"):
        return fault("completion", f"{chosen}: the answer has no choices", f"`cortex logs {chosen}`")
    return ok("completion", f"{chosen} answers after {time.monotonic() - began:.1f} s")


def loaded_model(fleet: Any) -> str | None:
    """A model that is loaded somewhere, by /fleet. Pure."""
    for node in fleet.get("nodes", []):
        models = node.get("models", [])
        entries = models if isinstance(models, list) else []
        for entry in entries:
            if isinstance(entry, Mapping) and entry.get("status") == "loaded":
                return str(entry.get("id"))
    return None


def _ask(url: str, path: str, api_key: str | None) -> Any:
    return call(url, "GET", path, api_key=api_key, timeout_secs=ANSWER_SECS)
