"""Atomic file replacement, and stamps of versions."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from shared.system.files import replace_file, stamp_of


@pytest.mark.parametrize("durable", [True, False])
def test_the_new_content_replaces_the_old(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    replace_file(path, b"new", durable=durable)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["state.json"]


def test_a_failed_write_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    (tmp_path / "state.json.new").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"state\.json\.new"):
        replace_file(path, b"new")
    assert path.read_text() == "old"
    assert not (tmp_path / "elsewhere").exists()


def test_stamps_differ(tmp_path: Path) -> None:
    """Also after a change of the mode alone: a file that could not be read may be readable now."""
    path = tmp_path / "key.pem"
    stamps = [stamp_of(path)]
    path.write_text("old")
    stamps.append(stamp_of(path))
    path.chmod(0o400)
    stamps.append(stamp_of(path))
    assert len(set(stamps)) == 3
    assert stamp_of(path) == stamps[-1]
