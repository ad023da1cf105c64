"""What vLLM leaves behind when it is killed: shared memory, semaphores, sockets and directories of its ranks."""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import uuid
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the fixed place of POSIX shared memory
_SEGMENT_BYTES = 4096


class LeftoverFiles:
    """Files as vLLM and Python's multiprocessing name them; the shared ones begin with `owner`.

    Create them before the core is forked, so that the core maps the shared ones too: while one of the two processes
    lives, /proc shows which engine they belong to.
    """

    def __init__(self, tmp_dir: str, owner: str, shared: Path = SHARED_MEMORY) -> None:
        tmp = Path(tmp_dir)
        segment = shared / f"psm_{secrets.token_hex(4)}"
        semaphore = shared / f"sem.mp-{secrets.token_hex(4)}"
        self._mapped = [_shared(segment, owner), _shared(semaphore, owner)]
        address = tmp / str(uuid.uuid4())
        with socket.socket(socket.AF_UNIX) as ipc:
            ipc.bind(str(address))
        self._removed_on_exit = (segment, semaphore, address)
        rank_directory = tmp / f"vllm_dist_{secrets.token_hex(8)}"
        rank_directory.mkdir()

    def remove(self) -> None:
        """Removes what an orderly exit removes: all but the directory of the ranks, as vLLM 0.32 does."""
        for path in self._removed_on_exit:
            path.unlink(missing_ok=True)


def _shared(path: Path, content: str) -> mmap.mmap:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.write(descriptor, content.encode())
        os.ftruncate(descriptor, _SEGMENT_BYTES)
        return mmap.mmap(descriptor, _SEGMENT_BYTES)
    finally:
        os.close(descriptor)
