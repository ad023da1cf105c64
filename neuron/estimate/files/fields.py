"""Typed access to the fields of an untrusted config.json, and the errors of a model's files. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import NotFound, ServiceError
from shared.protocol import ErrorCode

_LARGEST = 1 << 40  # upper bound of any number in a configuration


class ModelFilesInvalid(ServiceError):
    """A file of the model is broken or incomplete; the message names it."""

    status = 422
    default_code = ErrorCode.MODEL_FILES_INVALID


def files_not_found(source: str, reason: str) -> NotFound:
    return NotFound(f"the files of {source!r} are not on this host: {reason}", code=ErrorCode.MODEL_FILES_NOT_FOUND)


@dataclass(frozen=True)
class Fields:
    """A JSON object and the name of its file. A null field counts as absent."""

    values: Mapping[str, Any]
    file: str

    def integer(self, *names: str) -> int | None:
        """The first of `names` that is present: configurations use several names for one thing.

        Raises:
            ModelFilesInvalid: it is not a whole number from 0 to 2**40.
        """
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
                raise self.invalid(name, "is not a whole number from 0 to 2**40")
            return value
        return None

    def number(self, name: str) -> float | None:
        """Raises ModelFilesInvalid when the field is not a number."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
            raise self.invalid(name, "is not a number up to 2**40")
        return float(value)

    def required(self, *names: str) -> int:
        """As `integer`, at least 1.

        Raises:
            ModelFilesInvalid: all of the fields are missing, or the value is not such a number.
        """
        value = self.integer(*names)
        if value is None:
            raise ModelFilesInvalid(f"{self.file} has no {' or '.join(names)}")
        if value == 0:
            raise ModelFilesInvalid(f"{self.file}: {names[0]} is 0")
        return value

    def flag(self, name: str) -> bool | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.invalid(name, "is neither true nor false")
        return value

    def text(self, *names: str) -> str | None:
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if not isinstance(value, str):
                raise self.invalid(name, "is not a string")
            return value
        return None

    def inner(self, *names: str) -> Fields | None:
        """The first of `names` that is present, which must be an object."""
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if not isinstance(value, dict):
                raise self.invalid(name, "is not an object")
            return Fields(value, self.file)
        return None

    def listed(self, name: str) -> list[Any] | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, list):
            raise self.invalid(name, "is not a list")
        return value

    def invalid(self, name: str, reason: str) -> ModelFilesInvalid:
        shown = repr(self.values.get(name))
        return ModelFilesInvalid(f"{self.file}: {name} = {shown[:80]} {reason}")
