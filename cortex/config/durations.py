"""Durations as people read and write them. Pure."""

from __future__ import annotations

import math
import re

MAX_SECS = 366 * 86400
"""Longest duration that `parse_duration` accepts: a longer one is a mistake."""

_UNIT_SECS = {"d": 86400, "h": 3600, "m": 60, "min": 60, "s": 1, "": 1}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(d|h|min|m|s|)\s*")


def parse_duration(text: str) -> float:
    """Seconds of `2h`, `90m`, `1h30m`, `1.5d`, `45s` or `45`.

    Raises:
        ValueError: anything else, zero, or more than MAX_SECS.
    """
    wanted = text.strip().lower()
    parts, rest = _PART.findall(wanted), _PART.sub("", wanted)
    bare = [unit for _, unit in parts if not unit]
    if not parts or rest or (bare and len(parts) > 1):
        raise ValueError(f"invalid duration {text!r}: write it as 2h, 90m, 1h30m, 1d or 45s")
    secs = sum(float(number) * _UNIT_SECS[unit] for number, unit in parts)
    if not 0 < secs <= MAX_SECS:
        raise ValueError(f"invalid duration {text!r}: must be above 0 and at most {MAX_SECS // 86400} days")
    return secs


def exact_duration(secs: float) -> str:
    """`7d`, `90m`, `45s`: in the largest unit that divides it, as `parse_duration` reads it."""
    for unit in ("d", "h", "m"):
        if secs % _UNIT_SECS[unit] == 0:
            return f"{secs / _UNIT_SECS[unit]:g}{unit}"
    return f"{secs:g}s"


def duration_text(secs: float) -> str:
    """`45 s`, `12 min`, `1 h 59 min`, `3 d 2 h`: rounded up, in at most two units."""
    left = math.ceil(secs)
    if left < 120:
        return f"{left} s"
    minutes = math.ceil(left / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours + bool(minutes), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
