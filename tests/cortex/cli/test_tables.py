"""What `cortex status` prints."""

from __future__ import annotations

from typing import Any

import pytest

from cortex.cli.tables import status_table


@pytest.mark.parametrize(
    ("status", "progress", "said"),
    [
        (
            "loading",
            {"phase": "loading weights", "fraction": 0.4, "remaining_secs": 34.6},
            "m (loading weights 40 %, about 35 s)",
        ),
        ("loading", {"phase": "compiling", "fraction": None}, "m (compiling)"),
        ("reloading", {"phase": "starting", "remaining_secs": 0.4}, "m (reloading, starting, about 0 s)"),
        ("loading", {}, "m (loading)"),
        ("loading", None, "m (loading)"),
        ("loaded", {"phase": "warming up", "fraction": 1.0}, "m (loaded)"),
    ],
)
def test_progress_in_the_table(status: str, progress: dict[str, Any] | None, said: str) -> None:
    """The table shows as much as the neuron reports; a protocol v1 neuron reports no progress."""
    model = {"id": "m", "status": status, "progress": progress}
    node = {"name": "n", "healthy": True, "draining": False, "models": [model], "devices": []}
    assert said in status_table({"nodes": [node], "loads": []})
