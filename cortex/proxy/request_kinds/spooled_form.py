"""A large multipart form whose file comes before its `model`: it waits on disk until the model is known."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Final

from cortex.config.aliases import Rewrite
from cortex.proxy.body.alias_edit import Splice, form_splices
from cortex.proxy.body.form_scan import FormScan, delimiter_of
from cortex.proxy.body.model_field import form_part, form_value, form_without_model
from shared.errors import Unavailable
from shared.protocol import ErrorCode

PIECE_BYTES: Final = 1 << 18
"""Read from the file at a time: the event loop does other work in between."""
_RETRY_SECS: Final = 10


class SpooledForm:
    """Implements `http.streamed_body.BodySpool` with a file that has no name.

    Reads and writes are those of the page cache, so they do not run in a thread. `left` is the number of bytes that an
    engine gets. The form can be sent again: `passed_on` stays False.
    """

    def __init__(self, content_type: str) -> None:
        """Raises InvalidRequest if the content type has no boundary, Unavailable if there is no place for the file."""
        self._delimiter = delimiter_of(content_type)
        self._scan = FormScan(self._delimiter)
        try:
            self._file = tempfile.TemporaryFile(buffering=0, dir=spool_directory())  # noqa: SIM115
        except OSError as error:
            raise _no_place(error) from error
        self._loop = asyncio.get_running_loop()
        self._size = 0
        self._splices: list[Splice] = []  # parts of the file, and what an engine gets instead
        self._segments: list[tuple[int, int] | bytes] = []  # what an engine still gets, the next one last
        self._write: Callable[[bytes], None] | None = None
        self._full = False
        self._sent = 0
        self._next: asyncio.Handle | None = None
        self.ended = False
        self.passed_on = False

    def write(self, data: bytes) -> None:
        """Adds the next bytes. Raises InvalidRequest for too many parts, Unavailable if the disk is full."""
        self._scan.feed(data)
        view = memoryview(data)
        while view:
            try:
                view = view[self._file.write(view) :]
            except OSError as error:
                raise _no_place(error) from error
        self._size += len(data)

    def model(self) -> str:
        """The form's `model`. Raises InvalidRequest, MissingModel without one."""
        if self._scan.model is None:
            raise form_without_model()
        start, end = self._scan.model
        return form_value(os.pread(self._file.fileno(), end - start, start))

    def rewrite(self, rewrite: Rewrite) -> None:
        """Replaces the form's `model`, or adds it, and applies the other changes."""
        if rewrite.edits is not None:
            self._splices = form_splices(self._scan.parts, self._delimiter, rewrite.edits)
        elif self._scan.model is None:
            start = self._scan.first_part or 0
            self._splices = [(start, start, form_part(self._delimiter, "model", rewrite.model_id))]
        else:
            self._splices = [(*self._scan.model, rewrite.model_id.encode())]

    @property
    def left(self) -> int:
        return self._size + sum(len(value) - (end - start) for start, end, value in self._splices)

    def framed(self, data: bytes) -> bytes:
        return data

    def open(self, write: Callable[[bytes], None]) -> None:
        self._write, self._sent, self._full, self.ended = write, 0, False, False
        self._segments = list(reversed(_segments(self._size, self._splices)))
        self._go_on()

    def hold_back(self, full: bool) -> None:
        self._full = full
        if not full and self._next is None:
            self._go_on()

    def close(self) -> None:
        self._write = None
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def discard(self) -> None:
        self.close()
        self._file.close()

    def _go_on(self) -> None:
        """Passes one piece on."""
        self._next = None
        if self._write is None or self._full or self.ended:
            return
        piece = self._piece()
        self._sent += len(piece)
        self.ended = self._sent == self.left
        if not self.ended:
            self._next = self._loop.call_soon(self._go_on)
        self._write(piece)

    def _piece(self) -> bytes:
        segment = self._segments.pop()
        if isinstance(segment, bytes):
            return segment
        start, end = segment
        stop = min(end, start + PIECE_BYTES)
        if stop < end:
            self._segments.append((stop, end))
        return os.pread(self._file.fileno(), stop - start, start)


def _segments(size: int, splices: Sequence[Splice]) -> list[tuple[int, int] | bytes]:
    """What an engine gets of a file of this size: bytes from one position to another, and what takes the place of
    others. None is empty."""
    found: list[tuple[int, int] | bytes] = []
    at = 0
    for start, end, value in [*splices, (size, size, b"")]:
        found += [(at, start)] if at < start else []
        found += [value] if value else []
        at = end
    return found


def spool_directory() -> str:
    """TMPDIR, otherwise /var/tmp: /tmp is in memory on many hosts."""
    persistent = "/var/tmp"  # noqa: S108
    usable = os.access(persistent, os.W_OK | os.X_OK)
    return persistent if usable and not os.environ.get("TMPDIR") else tempfile.gettempdir()


def _no_place(error: OSError) -> Unavailable:
    return Unavailable(
        f"no place for the upload in cortex's temporary directory ({error.strerror}): send the field 'model' before the"
        " file, then the upload passes through without being stored",
        code=ErrorCode.UNAVAILABLE,
        retry_after=_RETRY_SECS,
    )
