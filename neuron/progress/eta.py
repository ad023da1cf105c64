"""How long a load will still take, from its progress and from earlier loads. All times in seconds. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from neuron.progress.load_times import LoadTimes
from neuron.progress.phases import CAPTURING, COMPILING, DOWNLOADING, LOADING, PHASES, STARTING, WARMING_UP, rank

_PRIOR = 0.1  # of the expected total: weight of the assumption that this load is as fast as expected
_LATE = 0.1  # of the time since a late phase's last progress: its assumed remaining time
_LATE_SECS = 0.5
_LOST = 2.0  # expected totals: a load this late gets no estimate in a phase without a progress bar
_MIN_FRACTION = 0.01  # of a download: below this its rate is noise

# Of a load without history; a download counts only if there is one. Chosen, not measured: about right for models of
# some GiB on one GPU.
_SHARES = {STARTING: 0.2, DOWNLOADING: 1.0, LOADING: 0.35, COMPILING: 0.3, CAPTURING: 0.1, WARMING_UP: 0.05}


@dataclass(frozen=True)
class Moment:
    """The state of a load. `spent`: duration of each earlier phase; `fraction_secs`: time into this phase at which its
    fraction was reached (0 without a fraction)."""

    spent: Mapping[str, float]
    phase: str
    phase_secs: float
    fraction: float | None
    fraction_secs: float

    @property
    def elapsed_secs(self) -> float:
        return sum(self.spent.values()) + self.phase_secs


def remaining_secs(expected: LoadTimes | None, at: Moment) -> float | None:
    """Remaining time, always more than 0; None when nothing is known.

    Each future phase takes its expected time, times the pace of this load: the time of its finished phases divided by
    their expected time. The current phase is also extrapolated from its progress bar, with more weight the further the
    bar is. A phase over its time gets half a second more, plus a tenth of the time since its bar last moved or it
    began. When the load has taken twice the expected time and there is no bar, the answer is None.
    """
    if expected is None or expected.total_secs <= 0:
        return None
    usual = _pace(expected, at) * expected.phases.get(at.phase, 0.0)
    rest = _rest_of_phase(usual, at)
    if rest is None:
        return None
    if rest <= 0:
        late = at.elapsed_secs - at.spent.get(DOWNLOADING, 0.0) > _LOST * expected.total_secs
        if late and at.fraction is None:
            return None
        rest = _LATE * (at.phase_secs - at.fraction_secs) + _LATE_SECS
    to_come = sum(secs for phase, secs in expected.phases.items() if rank(phase) > rank(at.phase))
    return rest + _pace(expected, at) * to_come


def share_done(at: Moment) -> float:
    """Completed share of a load without history, 0 to 1, from typical shares of the phases."""
    seen = {*at.spent, at.phase}
    shares = {phase: share for phase, share in _SHARES.items() if phase != DOWNLOADING or phase in seen}
    behind = sum(share for phase, share in shares.items() if rank(phase) < rank(at.phase))
    return (behind + shares[at.phase] * (at.fraction or 0.0)) / sum(shares.values())


def _pace(expected: LoadTimes, at: Moment) -> float:
    """How slow this load is, 1 meaning as expected; near 1 while little of it is done."""
    finished = [phase for phase in PHASES if phase in at.spent and phase in expected.phases]
    prior = _PRIOR * expected.total_secs
    taken = sum(at.spent[phase] for phase in finished)
    return (taken + prior) / (sum(expected.phases[phase] for phase in finished) + prior)


def _rest_of_phase(usual: float, at: Moment) -> float | None:
    """Rest of the current phase; 0 or less when it is over its time, None for a download that has hardly begun."""
    fraction = at.fraction or 0.0
    if at.phase == DOWNLOADING and fraction < _MIN_FRACTION:
        return None
    if fraction <= 0:
        return usual - at.phase_secs
    by_bar = at.fraction_secs / fraction
    whole = fraction * by_bar + (1 - fraction) * usual if usual > 0 else by_bar
    return (1 - fraction) * whole - (at.phase_secs - at.fraction_secs)
