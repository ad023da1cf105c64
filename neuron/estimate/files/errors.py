"""Errors about a model's files."""

from __future__ import annotations

from shared.errors import NotFound, ServiceError


class ModelFilesInvalid(ServiceError):
    """A file of the model is broken or incomplete; the message names it."""

    status = 422
    default_code = "model_files_invalid"


def files_not_found(source: str, reason: str) -> NotFound:
    return NotFound(f"the files of {source!r} are not on this host: {reason}", code="model_files_not_found")
