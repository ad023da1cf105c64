"""What the guard on instruction counts calls worse, and what it refuses to compare."""

from __future__ import annotations

from pathlib import Path

from benchmarks.instructions.record import (
    Record,
    installed_versions,
    other_versions,
    read_record,
    worse,
    write_record,
)

RECORDED = Record({"python": "3.11.7", "uvloop": "0.23.0"}, 5.0, {"plain request": 200_000, "streamed chunk": 9_000})


def test_only_more_than_the_tolerance_is_worse() -> None:
    """Noise and improvements pass; so does what was never recorded."""
    assert worse(RECORDED, {"plain request": 209_000, "streamed chunk": 5_000, "new": 1}) == []
    assert worse(RECORDED, {"plain request": 211_000, "streamed chunk": 9_000}) == ["plain request"]


def test_a_missing_figure_is_worse() -> None:
    """A recorded figure that a run lacks fails the comparison."""
    assert worse(RECORDED, {"plain request": 200_000}) == ["streamed chunk"]


def test_other_versions_are_named() -> None:
    """The message has both versions of each package, also where only one side has it."""
    assert other_versions(RECORDED.versions, RECORDED.versions) == []
    assert other_versions(RECORDED.versions, {"python": "3.12.1", "uvloop": "0.23.0", "libc": "2.36"}) == [
        "libc: None, here 2.36",
        "python: 3.11.7, here 3.12.1",
    ]


def test_a_record_is_read_as_written(tmp_path: Path) -> None:
    """The file keeps all of it."""
    write_record(RECORDED, tmp_path / "r.json")
    assert read_record(tmp_path / "r.json") == RECORDED


def test_the_committed_record_knows_what_it_depends_on() -> None:
    """A version that the code looks at and the record lacks would make every comparison impossible."""
    assert read_record().versions.keys() == installed_versions().keys()
