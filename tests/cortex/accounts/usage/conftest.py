"""A database of each kind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cortex.accounts.database.database import Database, open_database
from cortex.accounts.database.source import DatabaseSource, database_source


@pytest.fixture(params=["sqlite", "postgresql"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> DatabaseSource:
    """An empty database of each kind."""
    url = request.getfixturevalue("new_postgresql")() if request.param == "postgresql" else None
    found = database_source(url, tmp_path)
    assert found is not None
    return found


@pytest.fixture
async def database(source: DatabaseSource) -> AsyncIterator[Database]:
    found = await open_database(source)
    yield found
    await found.close()
