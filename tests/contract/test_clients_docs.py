"""docs/clients.md lists the clients and versions that tests/clients runs."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from tests.contract.documents import TOP
from tests.environment.clients import NPM, NPM_OLD, PYTHON, PYTHON_OLD

TEXT = (TOP / "docs" / "clients.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| \[([^\]]+)\]\(#[\w-]+\) \((PyPI|npm)\) \| ([^|]+) \|", re.MULTILINE)


def documented(index: str) -> dict[str, str]:
    """package -> its versions, as the table has them."""
    return {name: versions for name, where, versions in ROW.findall(TEXT) if where == index}


@pytest.mark.parametrize(("index", "pins", "old"), [("PyPI", PYTHON, PYTHON_OLD), ("npm", NPM, NPM_OLD)])
def test_versions_are_those_that_are_installed(index: str, pins: Mapping[str, str], old: Mapping[str, str]) -> None:
    """Each package with its current version, and the old one where that is tested as well."""
    installed = {name: ", ".join([version, *filter(None, [old.get(name)])]) for name, version in pins.items()}
    assert documented(index) == installed
