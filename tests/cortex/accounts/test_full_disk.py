"""What cortex says and does when the disk with its state is full or read-only: real disks, real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from cortex.accounts.storage import marked_as_running
from cortex.cli.tables import status_table
from tests.cortex.accounts.test_keys_everywhere import keys, made, status_of, written
from tests.cortex.cortex_process import cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import connected, request, until

_FILLER = "filler"


def fill(disk: Path) -> None:
    """Until not one more byte can be written."""
    with contextlib.suppress(OSError), (disk / _FILLER).open("ab", buffering=0) as file:
        while True:
            file.write(b"x" * 512)


async def test_a_key_that_cannot_be_revoked(tmp_path: Path, small_disk: Path, benjy: V1Neuron) -> None:
    """The command fails, and says that the key stays valid and what to do."""
    file = written(tmp_path, state_dir=str(small_disk))
    admin = (await made("create", "root", "--admin", "--config", str(file)))["key"]
    fill(small_disk)
    status, _, errors = await keys("revoke", "root", "--config", str(file))
    assert (status, "the key 'root' was not revoked" in errors, "full" in errors) == (1, True, True), errors
    (small_disk / _FILLER).unlink()
    async with cortex_process(tmp_path, [benjy], [], state_dir=str(small_disk)) as cortex:
        await made("create", "alice", url=cortex.url, key=admin)
        fill(small_disk)
        await warned(cortex.url, admin, f"{small_disk} cannot be written: No space left on device; usage is kept in")
        fill(small_disk)  # where cortex had just tried it
        status, output, errors = await keys("revoke", "alice", url=cortex.url, key=admin)
        assert (status, output) == (1, "")
        assert "the key 'alice' was not revoked and stays valid: " in errors
        assert "make sure that cortex can write there (is the disk full or read-only?)" in errors
        assert await status_of(cortex.url, admin, "/keys") == 200
        assert (await answer_of(cortex.url, "/usage", admin))["warnings"][0].startswith("usage cannot be written now")
        (small_disk / _FILLER).unlink()
        assert (await keys("revoke", "alice", url=cortex.url, key=admin))[:2] == (0, "revoked alice\n")
        await warned(cortex.url, admin, None)
        assert (await answer_of(cortex.url, "/usage", admin))["warnings"] == []


async def test_a_directory_that_cannot_be_written_at_first(tmp_path: Path, benjy: V1Neuron) -> None:
    """cortex says so at its start and serves. Usage is kept until the directory can be written, and is not lost."""
    (tmp_path / "file").touch()
    state = tmp_path / "file/state"
    async with cortex_process(tmp_path, [benjy], [], state_dir=str(state)) as cortex:
        assert (
            f"no state can be kept in {state}, which cannot be written: usage is lost when cortex ends" in cortex.log()
        )
        await warned(cortex.url, "", f"{state} cannot be written: Not a directory; usage is kept in memory only")
        assert await status_of(cortex.url, "") == 404
        (tmp_path / "file").unlink()
        await until(lambda: usage_in(state / "cortex.db") == ["/v1/chat/completions"], secs=600)
        await warned(cortex.url, "", f"{state} could not be written when cortex started: restart cortex")


async def test_a_database_that_cannot_be_written(
    tmp_path: Path, benjy: V1Neuron, new_postgresql: Callable[[], str]
) -> None:
    """The recorder finds that out, and the warning has its reason."""
    url = new_postgresql()
    async with cortex_process(tmp_path, [benjy], [], state_dir="state", database=url) as cortex:
        connection = await asyncpg.connect(url)
        await connection.execute("ALTER TABLE usage RENAME TO lost")
        assert await status_of(cortex.url, "") == 404
        await warned(cortex.url, "", "usage cannot be written to the database, and waits in")
        await connection.execute("ALTER TABLE lost RENAME TO usage")
        await warned(cortex.url, "", None)
        assert await connection.fetchval("SELECT count(*) FROM usage") == 1
        await connection.close()


async def answer_of(url: str, target: str, key: str) -> dict[str, Any]:
    lines = [f"x-api-key: {key}"] if key else []
    async with connected(url) as client:
        answer: dict[str, Any] = json.loads((await client.ask(request(b"", *lines, method="GET", target=target))).body)
    return answer


async def warned(url: str, key: str, beginning: str | None) -> None:
    """Returns once the fleet has this warning, or none. It is in the table of `cortex status`, too."""
    while True:
        fleet = await answer_of(url, "/fleet", key)
        if [each[: len(beginning or "")] for each in fleet["warnings"]] == ([] if beginning is None else [beginning]):
            assert (f"warning: {beginning}" in status_table(fleet)) == (beginning is not None)
            return
        await asyncio.sleep(0.1)


def usage_in(file: Path) -> list[str]:
    """The paths of the requests that are recorded there."""
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
            return [path for (path,) in database.execute("SELECT path FROM usage")]
    except sqlite3.OperationalError:  # it is made at this moment
        return []


_RUN = """
import sys, time; from pathlib import Path; from cortex.accounts.storage import marked_as_running
with marked_as_running(Path(sys.argv[1])):
    print("runs", flush=True); time.sleep(600)
"""


def test_an_unclean_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The next start says so once; a start beside a cortex that runs does not."""
    with subprocess.Popen([sys.executable, "-c", _RUN, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"runs\n"
        with marked_as_running(tmp_path):
            assert caplog.messages == []
        process.kill()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with marked_as_running(tmp_path):
                pass
    (message,) = caplog.messages
    assert message.startswith("the last cortex with this state directory was killed or lost power: usage of its last")
