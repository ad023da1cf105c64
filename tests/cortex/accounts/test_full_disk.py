"""What cortex says and does when the disk with its state is full or read-only: real disks, real processes."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tests.cortex.accounts.test_keys_everywhere import keys, made, status_of, written
from tests.cortex.cortex_process import cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron

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
        status, output, errors = await keys("revoke", "alice", url=cortex.url, key=admin)
        assert (status, output) == (1, "")
        assert "the key 'alice' was not revoked and stays valid: " in errors
        assert "make sure that cortex can write there (is the disk full or read-only?)" in errors
        assert await status_of(cortex.url, admin, "/keys") == 200
        (small_disk / _FILLER).unlink()
        assert (await keys("revoke", "alice", url=cortex.url, key=admin))[:2] == (0, "revoked alice\n")
