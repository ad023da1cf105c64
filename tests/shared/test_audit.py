"""`make audit` fails on vulnerabilities only."""

from __future__ import annotations

import json

import pytest

from tests.audit import report


def test_findings_are_told_from_what_cannot_be_looked_up() -> None:
    """A package that the service does not know does not count as one."""
    found = {"id": "PYSEC-1", "fix_versions": ["2.1"], "aliases": [], "description": ""}
    output = {
        "dependencies": [
            {"name": "good", "version": "1", "vulns": []},
            {"name": "bad", "version": "2", "vulns": [found]},
            {"name": "ours", "skip_reason": "Dependency not found"},
        ]
    }
    assert report(json.dumps(output)) == (["bad 2: PYSEC-1, fixed in 2.1"], 2, 1)
    with pytest.raises(ValueError, match="Expecting value"):
        report("")
