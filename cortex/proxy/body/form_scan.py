"""Finds the `model` of a multipart form while the form arrives. Pure."""

from __future__ import annotations

import email.parser
import email.policy
from typing import Final, NamedTuple

from shared.errors import InvalidRequest

MAX_PARTS: Final = 1000
"""Limit for the parts of a form, as in Starlette, which vLLM uses. 32 MiB of empty parts would take half a minute."""
_MAX_PART_HEAD_BYTES: Final = 4096
_HEAD_END: Final = b"\r\n\r\n"


def is_form(content_type: str) -> bool:
    """True for the content type of a multipart form."""
    return content_type.lower().startswith("multipart/form-data")


def delimiter_of(content_type: str) -> bytes:
    """What each part of a form begins with. Raises InvalidRequest without a boundary."""
    header = email.parser.HeaderParser(policy=email.policy.HTTP).parsestr(f"Content-Type: {content_type}\r\n\r\n")
    boundary = header.get_boundary()
    if not boundary:
        raise InvalidRequest("the multipart Content-Type has no boundary")
    return b"--" + boundary.encode("utf-8", "surrogateescape")


class FormPart(NamedTuple):
    """A complete part of a form, which begins with the delimiter at `start`; the next one begins at `next`. `name` is
    None for a file."""

    name: str | None
    start: int
    next: int


class FormScan:
    """Takes a form piece by piece and keeps only what it still has to look at.

    `model` is the place of the value of the last complete part of that name, as in Starlette, or None. `first_part` is
    where the first part begins, None until it has arrived. `parts` are those that have arrived completely. All count
    bytes from the start of the form.
    """

    __slots__ = (
        "_at",
        "_base",
        "_delimiter",
        "_ended",
        "_in_value",
        "_name",
        "_names_model",
        "_start",
        "_value",
        "_window",
        "first_part",
        "model",
        "parts",
    )

    def __init__(self, delimiter: bytes) -> None:
        self._delimiter = delimiter
        self._window = b""
        self._base = 0  # where the window begins
        self._at = 0  # in the window: where to look next
        self._start = 0  # of the current part
        self._in_value = False  # the head of the current part was read
        self._name: str | None = None  # of that part, unless it is a file
        self._names_model = False  # that part is a `model`
        self._value = 0
        self._ended = False  # what follows cannot be parsed as parts
        self.first_part: int | None = None
        self.model: tuple[int, int] | None = None
        self.parts: list[FormPart] = []

    def feed(self, data: bytes) -> None:
        """Raises InvalidRequest for more than MAX_PARTS parts."""
        self._window = self._window + data if self._window else data
        while not self._ended and self._step():
            pass
        if self._ended:
            self._at = len(self._window)
        self._base += self._at
        self._window = self._window[self._at :]
        self._at = 0

    def _step(self) -> bool:
        """False if it needs more bytes."""
        if self.first_part is None:
            return self._find_first_part()
        if not self._in_value:
            return self._read_part_head()
        return self._find_part_end()

    def _find_first_part(self) -> bool:
        at = self._window.find(self._delimiter, self._at)
        if at < 0:
            self._keep_last(len(self._delimiter) - 1)
            return False
        self.first_part = self._start = self._base + at
        self._at = at + len(self._delimiter)
        return True

    def _read_part_head(self) -> bool:
        head, end, _ = self._window[self._at : self._at + _MAX_PART_HEAD_BYTES].partition(_HEAD_END)
        if not end:
            self._ended = len(head) == _MAX_PART_HEAD_BYTES
            return False
        parser = email.parser.BytesHeaderParser(policy=email.policy.HTTP)
        part = parser.parsebytes(head.lstrip(b"\r\n") + _HEAD_END)
        name = part.get_param("name", header="content-disposition")
        is_file = part.get_param("filename", header="content-disposition") is not None
        self._name = None if is_file or not isinstance(name, str) else name
        self._names_model = name == "model"
        self._value = self._base + self._at + len(head) + len(end)
        self._in_value = True
        return True

    def _find_part_end(self) -> bool:
        end = self._window.find(b"\r\n" + self._delimiter, self._at)
        if end < 0:
            self._keep_last(len(self._delimiter) + 1)
            return False
        if len(self.parts) + 1 == MAX_PARTS:
            raise InvalidRequest(f"the multipart body has more than {MAX_PARTS} parts")
        following = self._base + end + 2
        self.parts.append(FormPart(self._name, self._start, following))
        self._start = following
        if self._names_model:
            self.model = self._value, max(self._value, self._base + end)
        self._in_value = False
        self._at = end + 2 + len(self._delimiter)
        return True

    def _keep_last(self, size: int) -> None:
        self._at = max(self._at, len(self._window) - size)
