"""Callbacks that learn of changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec

Change = ParamSpec("Change")


class Subscribers(Generic[Change]):
    """The callbacks for one kind of change. The owner of the state announces it; everyone else subscribes."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[Change, None]] = []

    def subscribe(self, callback: Callable[Change, None]) -> Callable[[], None]:
        """Calls `callback` synchronously at each change. Call the result to unsubscribe."""
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def announce(self, *args: Change.args, **kwargs: Change.kwargs) -> None:
        """Calls the subscribers, in the order of their subscription."""
        for callback in list(self._callbacks):
            callback(*args, **kwargs)
