"""Opens tracing where it is configured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cortex.config.settings import TracingSettings

if TYPE_CHECKING:  # needs packages that may be missing
    from cortex.metrics.tracing.tracing import Tracing


def open_tracing(settings: TracingSettings) -> Tracing | None:
    """None if no endpoint is configured."""
    if settings.endpoint is None:
        return None
    from cortex.metrics.tracing.tracing import Tracing  # noqa: PLC0415 - only where the packages are there

    return Tracing(settings)
