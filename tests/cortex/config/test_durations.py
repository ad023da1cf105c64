"""Durations as operators write and read them."""

from __future__ import annotations

import pytest

from cortex.config.durations import duration_text, parse_duration


@pytest.mark.parametrize(
    ("text", "secs"),
    [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("1h 30min", 5400), ("1.5d", 129600), ("45s", 45), (" 45 ", 45)],
)
def test_durations_that_are_understood(text: str, secs: float) -> None:
    assert parse_duration(text) == secs


@pytest.mark.parametrize("text", ["", "h", "2 weeks", "-2h", "0", "0s", "1h30", "30 30", "400d", "nan", "1e3", "2h!"])
def test_durations_that_are_refused(text: str) -> None:
    """The message shows how to write one, or the limit."""
    with pytest.raises(ValueError, match=r"write it as 2h|must be above 0"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("secs", "text"),
    [
        (0.2, "1 s"),
        (119, "119 s"),
        (120, "2 min"),
        (3541, "1 h"),
        (7140, "1 h 59 min"),
        (86399, "1 d"),
        (93601, "1 d 3 h"),
    ],
)
def test_durations_as_shown(secs: float, text: str) -> None:
    """Rounded up: the time is not over before."""
    assert duration_text(secs) == text
