"""One simulated fleet for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.dev import Dev, running_dev


@pytest.fixture(scope="module")
def dev() -> Iterator[Dev]:
    with running_dev() as running:
        yield running
