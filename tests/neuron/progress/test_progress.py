"""Progress of a load over time: remaining time, completed share, and when to report."""

from __future__ import annotations

import pytest

from neuron.harness.vllm.phases import VllmLoadReading
from neuron.progress.eta import Moment, remaining_secs, share_done
from neuron.progress.load_times import LoadTimes
from neuron.progress.progress import LoadProgress

EXPECTED = LoadTimes({"starting": 10.0, "loading weights": 40.0, "compiling": 30.0, "warming up": 20.0})
SHARDS = "Loading safetensors checkpoint shards: {:3d}% Completed | 1/4"
COMPILING = "Dynamo bytecode transform time: 3.72 s"
WARMING_UP = "init engine (profile, create kv cache, warmup model) took 58.09 seconds"


def moment(phase: str, secs: float, *, fraction: float | None = None, reached: float = 0.0, **spent: float) -> Moment:
    return Moment({name.replace("_", " "): took for name, took in spent.items()}, phase, secs, fraction, reached)


@pytest.mark.parametrize(
    ("at", "remaining"),
    [
        (moment("starting", 0), 100.0),
        (moment("starting", 4), 96.0),
        # As expected so far: the rest takes its expected time.
        (moment("loading weights", 0, starting=10), 90.0),
        # The start took twice as long: the rest will be slower too, but not twice: (20 + 10) / (10 + 10).
        (moment("loading weights", 0, starting=20), 135.0),
        # Half of the shards in half of the time; then the bar stops for 5 s.
        (moment("loading weights", 20, fraction=0.5, reached=20, starting=10), 70.0),
        (moment("loading weights", 25, fraction=0.5, reached=20, starting=10), 65.0),
        # Half of the shards took as long as all should: the bar (80 s in total) and history (40 s) count half each.
        (moment("loading weights", 40, fraction=0.5, reached=40, starting=10), 80.0),
        # Over its time without a bar: a tenth of its time and half a second, then the later phases.
        (moment("compiling", 40, starting=10, loading_weights=40), 24.5),
        # A phase that is not in the history.
        (moment("capturing graphs", 10, starting=10, loading_weights=40, compiling=30), 21.5),
        # Twice the whole history without a bar: unknown.
        (moment("compiling", 160, starting=10, loading_weights=40), None),
        # The same with a moving bar: known.
        (moment("loading weights", 200, fraction=0.5, reached=200, starting=10), 160.0),
        # A download is not in the history and does not affect the pace; only its bar counts.
        (moment("downloading", 30, starting=10), None),
        (moment("downloading", 30, fraction=0.25, reached=30, starting=10), 180.0),
        (moment("loading weights", 0, starting=10, downloading=600), 90.0),
    ],
)
def test_remaining_time(at: Moment, remaining: float | None) -> None:
    assert remaining_secs(EXPECTED, at) == (None if remaining is None else pytest.approx(remaining, abs=1e-6))


def test_no_estimate_without_history() -> None:
    """A missing or empty history gives no remaining time."""
    assert remaining_secs(None, moment("loading weights", 5, fraction=0.5, reached=5)) is None
    assert remaining_secs(LoadTimes({}), moment("starting", 0)) is None


def test_remaining_time_is_positive() -> None:
    """However late a load is, its remaining time is positive and grows with the delay."""
    late = [remaining_secs(EXPECTED, moment("warming up", secs, starting=10)) for secs in (30.0, 60.0, 120.0, 180.0)]
    assert [value is not None and value > 0 for value in late] == [True] * 4
    assert late == sorted(late, key=lambda value: value or 0)


def test_a_nearly_finished_load_has_time_left() -> None:
    """The value is more than 0 after rounding, as the protocol requires."""
    short = LoadTimes({"starting": 1.0, "loading weights": 1.0, "warming up": 0.03})
    load = LoadProgress(VllmLoadReading(), started=0.0, expected=short)
    load.feed([SHARDS.format(25)], 1.0)
    load.feed([WARMING_UP], 2.0)
    assert load.view(2.0).remaining_secs == 0.1


def test_shares_of_a_load_without_history() -> None:
    """Phases share the time in their order; a download is the largest part."""
    done = [
        share_done(moment("loading weights", 1, starting=1)),
        share_done(moment("loading weights", 1, fraction=0.5, starting=1)),
        share_done(moment("compiling", 1, starting=1)),
        share_done(moment("warming up", 1, starting=1)),
    ]
    assert done == sorted(done)
    assert done[0] == pytest.approx(0.2)
    assert share_done(moment("downloading", 1, fraction=1.0, starting=1)) == pytest.approx(0.6)


def test_progress_of_a_load() -> None:
    """Phases with their times; `overall` never falls and is 1 only when the engine serves."""
    progress = LoadProgress(VllmLoadReading(), started=100.0, expected=EXPECTED)
    assert progress.view(100.0).model_dump() == {
        "phase": "starting",
        "fraction": None,
        "message": None,
        "elapsed_secs": 0.0,
        "phase_elapsed_secs": 0.0,
        "overall": None,
        "remaining_secs": 100.0,
        "idle_secs": None,
    }
    steps = [
        (110.0, [SHARDS.format(0)], 0.1),
        (130.0, [SHARDS.format(50)], 0.3),
        (150.0, [SHARDS.format(100)], 0.4975),
        (150.0, [COMPILING], 0.5),
        (180.0, [WARMING_UP], 0.8),
        (199.0, ["Application startup complete."], 0.99),
    ]
    for now, lines, overall in steps:
        assert not progress.serving
        progress.feed(lines, now)
        assert progress.view(now).overall == pytest.approx(overall, abs=0.005)
    view = progress.view(199.0)
    assert progress.serving
    assert (view.phase, view.elapsed_secs, view.phase_elapsed_secs, view.remaining_secs) == ("warming up", 99, 19, 1)
    assert progress.times(200.0) == LoadTimes(
        {"starting": 10.0, "loading weights": 40.0, "compiling": 30.0, "warming up": 20.0}
    )


def test_overall_never_falls() -> None:
    """A load that is slower than its history keeps its value; without history there is none until a percentage."""
    slow = LoadProgress(VllmLoadReading(), started=0.0, expected=EXPECTED)
    seen = []
    for now in range(0, 400, 5):
        slow.feed([SHARDS.format(25)] if now == 60 else [], float(now))
        seen.append(slow.view(now).overall or 0.0)
    assert seen == sorted(seen)
    assert seen[-1] < 1
    unknown = LoadProgress(VllmLoadReading(), started=0.0)
    unknown.feed(["Starting to load model m..."], 3.0)
    assert (unknown.view(3.0).overall, unknown.view(3.0).remaining_secs) == (None, None)
    unknown.feed([SHARDS.format(50)], 5.0)
    before = unknown.view(5.0).overall
    assert before is not None
    unknown.feed([COMPILING], 6.0)
    assert (unknown.view(6.0).overall or 0) > before


def test_when_progress_is_reported() -> None:
    """Progress is reported for a new phase, 1% of one, or after a second: not for every line."""
    progress = LoadProgress(VllmLoadReading(), started=0.0)
    assert not progress.feed([], 0.2)
    assert not progress.feed(["hello"], 0.9)
    assert progress.feed([], 1.0)
    assert not progress.feed([], 1.5)
    assert progress.feed([SHARDS.format(10)], 1.6)
    assert not progress.feed([SHARDS.format(10), SHARDS.format(4)], 1.7)
    assert progress.feed([SHARDS.format(11)], 1.8)
    assert progress.feed([COMPILING], 1.8)


def test_a_silent_download_does_not_count_as_start() -> None:
    """vLLM reports a download only afterwards: the history must not count it as part of the start."""
    progress = LoadProgress(VllmLoadReading(), started=0.0)
    progress.feed(["Starting to load model m..."], 10.0)
    progress.feed(["Time spent downloading weights for org/m: 600.5 seconds"], 612.0)
    assert progress.times(615.0) == LoadTimes({"starting": 11.5, "downloading": 600.5, "loading weights": 3.0})
