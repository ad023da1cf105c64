"""The header of a safetensors file: its tensors, without reading their data.

The hub's library can parse it too, but trusts the file: it multiplies any numbers in a shape, and does not notice that
a file is shorter than its tensors, as after an interrupted download.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuron.estimate.files.fields import ModelFilesInvalid

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LENGTH_BYTES = 8
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of one number, by the format's type name."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class Tensor:
    """One tensor as stored in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored_bytes: int

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def tensors_of(path: Path) -> Iterator[Tensor]:
    """The tensors of a file. Blocks; reads the header only.

    Raises:
        ModelFilesInvalid: it is not a safetensors file, or it is truncated.
    """
    header, data_bytes = _read_header(path)
    for name, entry in header.items():
        if name != "__metadata__":
            yield _tensor(path, name, entry, data_bytes)


def read_json(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a file. Blocks.

    Raises:
        ModelFilesInvalid: it is not one, is larger than `max_bytes`, or cannot be read.
    """
    try:
        size = _regular_size(path)
        if size > max_bytes:
            raise ModelFilesInvalid(f"{path} has {size} bytes, more than {max_bytes}")
        return _object(path, path.read_bytes())
    except OSError as error:
        raise ModelFilesInvalid(f"{path} cannot be read: {error.strerror or error}") from error


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and how many bytes of the file follow it."""
    try:
        size = _regular_size(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or not 2 <= length <= MAX_HEADER_BYTES:
                raise ModelFilesInvalid(f"{path} is not a safetensors file: its header would have {length} bytes")
            if length > size - _LENGTH_BYTES:
                raise ModelFilesInvalid(f"{path} is truncated: it has {size} bytes, its header alone {length}")
            return _object(path, file.read(length)), size - _LENGTH_BYTES - length
    except OSError as error:
        raise ModelFilesInvalid(f"{path} cannot be read: {error.strerror or error}") from error


def _regular_size(path: Path) -> int:
    """Size of a regular file in bytes. Opening anything else, such as a pipe, might block."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ModelFilesInvalid(f"{path} is not a regular file")
    return status.st_size


def _object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelFilesInvalid(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFilesInvalid(f"{path}: not a JSON object")
    return value


def _tensor(path: Path, name: str, entry: Any, data_bytes: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise ModelFilesInvalid(f"{path}: {name[:120]!r} has no dtype, shape and data_offsets") from error
    sizes = [*shape, begin, end] if isinstance(shape, list) else [None]
    # A 64-bit limit on each, so that their product is computed in no time.
    if not isinstance(dtype, str) or len(sizes) > 18 or not all(_is_size(size) for size in sizes) or begin > end:
        raise ModelFilesInvalid(f"{path}: {name[:120]!r} has no plausible dtype, shape and data_offsets")
    if end > data_bytes:
        raise ModelFilesInvalid(f"{path} is truncated: {name[:120]!r} ends at byte {end} of {data_bytes}")
    tensor = Tensor(name, dtype, tuple(shape), end - begin)
    if dtype in BITS and tensor.stored_bytes != -(-tensor.numbers * BITS[dtype] // 8):
        raise ModelFilesInvalid(
            f"{path}: {name[:120]!r} has {tensor.stored_bytes} bytes, which does not match its shape"
        )
    return tensor


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
