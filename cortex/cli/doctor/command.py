"""Runs the checks one after the other and prints each line as soon as it is known."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from cortex.cli.client import CallFailed
from cortex.cli.doctor.findings import Finding, as_json, has_fault, summary, warning
from cortex.cli.doctor.neurons import check_neurons
from cortex.cli.doctor.running_cortex import check_cortex, fleet_of
from cortex.cli.doctor.this_host import check_database, check_files, check_state, listen_url
from cortex.cli.options import credential_for


def run_doctor(config_file: Path, *, url: str | None, model: str | None, json_wanted: bool) -> int:
    """Prints what is found; 1 if there is a fault."""
    found: list[Finding] = []
    for finding in _checks(config_file, url, model, _ignore if json_wanted else _tell):
        if finding in found:
            continue
        found.append(finding)
        if not json_wanted:
            print(finding.line, flush=True)
    sys.stdout.write(f"{json.dumps(as_json(found), indent=2)}\n" if json_wanted else f"\n{summary(found)}\n")
    return int(has_fault(found))


def _checks(config_file: Path, url: str | None, model: str | None, tell: Callable[[str], None]) -> Iterator[Finding]:
    files, findings = check_files(config_file)
    yield from findings
    if files is None:
        return
    yield check_state(files)
    yield asyncio.run(check_database(files))
    address = url or listen_url(files.config)
    try:
        key, no_key = credential_for(address), []
    except CallFailed as error:
        key, no_key = None, [warning("cortex", str(error))]
    fleet = fleet_of(address, key) if files.config.discovery.finds else None
    yield from asyncio.run(check_neurons(files, fleet))
    yield from no_key
    yield from check_cortex(address, files, model, key, tell)


def _tell(text: str) -> None:
    """Says what takes a while now; this is not a finding."""
    print(text, file=sys.stderr, flush=True)


def _ignore(_text: str) -> None:
    """Standard error stays empty for programs."""
