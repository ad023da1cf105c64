"""What can be wrong with a model's files."""

from __future__ import annotations

from shared.errors import NotFound, ServiceError
from shared.protocol import ErrorCode


class ModelFilesInvalid(ServiceError):
    """A model's file is broken, or lacks what has to be known; the message names the file."""

    status = 422
    default_code = ErrorCode.MODEL_FILES_INVALID


def files_not_found(source: str, reason: str) -> NotFound:
    return NotFound(f"the files of {source!r} are not on this host: {reason}", code=ErrorCode.MODEL_FILES_NOT_FOUND)
