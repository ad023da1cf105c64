"""The progress of one load, as `/models` and `/events` show it, from the engine's lines and the time.

No I/O and no clock; times are seconds of a monotonic clock.
"""

from __future__ import annotations

from collections.abc import Sequence

from neuron.progress.eta import Moment, remaining_secs, share_done
from neuron.progress.load_times import LoadTimes
from neuron.progress.phases import DOWNLOADING, LOADING, STARTING, LoadReading, rank
from shared.protocol import Progress

STEP = 0.01  # of a phase: smaller changes are not reported
REPORT_SECS = 1.0  # report at least this often, since times change too
_MAX_OVERALL = 0.99  # of a load that is not finished


class LoadProgress:
    """Tracks one load from its engine's start at `started`; `expected` is from this host's history."""

    def __init__(self, reading: LoadReading, *, started: float, expected: LoadTimes | None = None) -> None:
        self._reading = reading
        self._expected = expected
        self._started = self._phase_began = self._fraction_reached = started
        self._spent: dict[str, float] = {}
        self._overall: float | None = None
        self._idle: tuple[float, str] | None = None
        self._reported = (reading.phase, reading.fraction, started)

    def tell_idle(self, secs: float | None, text: str = "") -> None:
        """The load has done nothing for `secs`, and `text` is the message. None: it works, and the message is its
        own."""
        self._idle = None if secs is None else (secs, text)

    @property
    def serving(self) -> bool:
        """The engine says that it answers: check its health now."""
        return self._reading.serving

    @property
    def weights_loaded(self) -> bool:
        """The engine has loaded all weights: it compiles or warms up, or is about to."""
        reading = self._reading
        return rank(reading.phase) > rank(LOADING) or (reading.phase == LOADING and reading.fraction == 1.0)

    def feed(self, lines: Sequence[str], now: float) -> bool:
        """Takes new lines, or none. True when it is time for an event: a new phase, 1% of a phase, or one second since
        the last True."""
        for line in lines:
            self._take(self._reading.after(line), now)
        self._overall = self._overall_at(now)
        phase, fraction, reported_at = self._reported
        due = (
            self._reading.phase != phase
            or (self._reading.fraction or 0.0) - (fraction or 0.0) >= STEP - 1e-9
            or now - reported_at >= REPORT_SECS
        )
        if due:
            self._reported = (self._reading.phase, self._reading.fraction, now)
        return due

    def view(self, now: float) -> Progress:
        """For the protocol. `overall` is as of the last `feed`."""
        at = self._moment(now)
        remaining = remaining_secs(self._expected, at)
        return Progress(
            phase=self._reading.phase,
            fraction=self._reading.fraction,
            message=self._idle[1] if self._idle else self._reading.message,
            idle_secs=round(self._idle[0], 1) if self._idle else None,
            elapsed_secs=round(at.elapsed_secs, 3),
            phase_elapsed_secs=round(at.phase_secs, 3),
            overall=None if self._overall is None else round(self._overall, 4),
            remaining_secs=None if remaining is None else max(round(remaining, 1), 0.1),
        )

    def times(self, now: float) -> LoadTimes:
        """Duration of each phase until `now`, for the history of successful loads."""
        return LoadTimes({**self._spent, self._reading.phase: now - self._phase_began})

    def _take(self, new: LoadReading, now: float) -> None:
        old, self._reading = self._reading, new
        if new.phase != old.phase:
            self._spent[old.phase] = now - self._phase_began
            self._phase_began = self._fraction_reached = now
        elif new.fraction != old.fraction:
            self._fraction_reached = now
        if new.downloaded_secs is not None and old.downloaded_secs is None and DOWNLOADING not in self._spent:
            # The engine reports a download only afterwards: until then it looked like a long start.
            secs = min(new.downloaded_secs, self._spent.get(STARTING, 0.0))
            if secs > 0:
                self._spent[STARTING] -= secs
                self._spent[DOWNLOADING] = secs

    def _moment(self, now: float) -> Moment:
        return Moment(
            spent=self._spent,
            phase=self._reading.phase,
            phase_secs=now - self._phase_began,
            fraction=self._reading.fraction,
            fraction_secs=self._fraction_reached - self._phase_began,
        )

    def _overall_at(self, now: float) -> float | None:
        """Never falls; None while there is neither history nor a percentage."""
        at = self._moment(now)
        if self._expected is not None:
            remaining = remaining_secs(self._expected, at)
            done = None if remaining is None else at.elapsed_secs / (at.elapsed_secs + remaining)
        else:
            done = None if at.fraction is None and self._overall is None else share_done(at)
        return self._overall if done is None else max(self._overall or 0.0, min(done, _MAX_OVERALL))
