"""Words of the commands' messages. Pure."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """The count with its noun: `1 model`, `2 models`. `plural`: if it is not the noun with an s."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"
