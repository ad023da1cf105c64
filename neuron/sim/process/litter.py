"""What vLLM leaves lying about when it is killed: shared memory, semaphores, sockets and directories of its ranks."""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import uuid
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the fixed place of POSIX shared memory
_SEGMENT_BYTES = 4096


class Litter:
    """Files as vLLM and Python's multiprocessing name them; what is shared begins with `owner`.

    Made before the core is forked, which then has what is shared mapped as well: as long as one of the two lives, it
    can be seen whose it is.
    """

    def __init__(self, tmp_dir: str, owner: str, shared: Path = SHARED_MEMORY) -> None:
        tmp = Path(tmp_dir)
        segment = shared / f"psm_{secrets.token_hex(4)}"
        semaphore = shared / f"sem.mp-{secrets.token_hex(4)}"
        self._mapped = [_shared(segment, owner), _shared(semaphore, owner)]
        address = tmp / str(uuid.uuid4())
        with socket.socket(socket.AF_UNIX) as ipc:
            ipc.bind(str(address))
        self.removed_at_the_end = (segment, semaphore, address)
        self.left_for_ever = tmp / f"vllm_dist_{secrets.token_hex(8)}"
        self.left_for_ever.mkdir()

    def clean(self) -> None:
        """What an orderly end removes. The directory of the ranks stays even then, as with vLLM 0.32."""
        for path in self.removed_at_the_end:
            path.unlink(missing_ok=True)


def _shared(path: Path, content: str) -> mmap.mmap:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.write(descriptor, content.encode())
        os.ftruncate(descriptor, _SEGMENT_BYTES)
        return mmap.mmap(descriptor, _SEGMENT_BYTES)
    finally:
        os.close(descriptor)
