"""What neuron reads from a running engine: how many requests it has, and whether it hangs. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


@dataclass(frozen=True)
class RequestCounts:
    """An engine's requests at one moment. A harness may extend this with what its hang detector needs."""

    running: int
    waiting: int
    ended: float = 0
    """Requests that ended since the engine started, in any way."""

    @property
    def marks(self) -> tuple[float, ...]:
        """Counters: if one differs between two samples, the engine had a request meanwhile."""
        return (self.ended,)


Sample = TypeVar("Sample", bound=RequestCounts)
Observed_contra = TypeVar("Observed_contra", bound=RequestCounts, contravariant=True)


class HangDetector(Protocol[Observed_contra]):
    """Watches the samples of one engine."""

    def observe(self, sample: Observed_contra | None, now: float) -> str | None:
        """Takes a sample made at `now` (seconds of a monotonic clock), None when the engine did not answer.

        Returns why the engine is considered hung; None when it is not.
        """
        ...


class ActivityProbe(ABC, Generic[Sample]):
    """How to read the activity of one kind of engine. `path` is the page to get from the engine."""

    path: str = "/metrics"

    @abstractmethod
    def sample_of(self, page: str) -> Sample | None:
        """The sample in a page; None when the page does not say how many requests run or wait."""

    @abstractmethod
    def hang_detector(self, grace_secs: float, prefill_grace_secs: float) -> HangDetector[Sample]:
        """A detector for one engine. It allows `grace_secs` without progress while tokens are generated, and
        `prefill_grace_secs` while no running request may have its first token yet."""
