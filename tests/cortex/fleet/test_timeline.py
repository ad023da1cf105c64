"""The timeline: spans of engines and nodes, minutes, and the file that keeps them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from cortex.fleet.state import Fleet
from cortex.fleet.store import StateFile
from cortex.fleet.timeline import timeline as module
from cortex.fleet.timeline.spans import Cause, StatusSpan, seen
from cortex.fleet.timeline.timeline import ModelCounts, Timeline
from cortex.fleet.timeline.timeline_file import NAME, TimelineFile
from cortex.routing.replica import ReplicaKey
from shared.protocol import Discovery, ModelView, NeuronHealth, Progress
from tests.cortex.raw_http import until

AT = 1_000_000.0


class Bench:
    """A timeline of one neuron, `n`, whose clock stands unless a test sets it."""

    def __init__(self, directory: Path | None = None, now: float = AT) -> None:
        self.now = now
        self.causes: list[Cause] = []
        self.waiting: dict[str, int] = {}
        self.counts = ModelCounts({}, {})
        self.state = StateFile(directory)
        self.fleet = Fleet([("n", "http://n")], unhealthy_after=1)
        self.timeline = Timeline(
            self.fleet,
            causes=lambda: self.causes,
            waiting=lambda: self.waiting,
            counts=self._counts,
            file=None if directory is None else TimelineFile(directory, self.state.acquire_lock),
            clock=lambda: self.now,
        )

    async def _counts(self) -> ModelCounts:
        return self.counts

    def poll(self, *views: ModelView) -> None:
        self.fleet.record_poll(
            "n", started=float("inf"), health=NeuronHealth(), models=list(views), discovery=Discovery()
        )

    def spans(self) -> list[StatusSpan]:
        return list(self.timeline.between(0, float("inf"))["spans"])

    async def look(self) -> list[StatusSpan]:
        """The spans after the timeline has looked."""
        running = asyncio.create_task(self.timeline.run())
        await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait([running])
        return self.spans()


def view(status: str, model: str = "m", **fields: Any) -> ModelView:
    return ModelView(id=model, status=status, devices=[0], **fields)


def short(spans: Iterable[StatusSpan]) -> list[tuple[str, str, float, float | None]]:
    return [(span.model or span.node, span.status, span.since - AT, span.until and span.until - AT) for span in spans]


async def test_an_engine_from_load_to_end() -> None:
    bench = Bench()
    bench.causes = [Cause(ReplicaKey("m", "n", ""), "a request", (ReplicaKey("old", "n", ""),))]
    bench.poll(view("loading", progress=Progress(phase="weights")), view("loaded", "old"))
    await bench.look()
    bench.now += 5
    bench.poll(view("loading", progress=Progress(phase="compile")))
    await bench.look()
    bench.now += 5
    bench.poll(view("loaded"))
    bench.causes = []
    await bench.look()
    bench.now += 5
    bench.poll(view("unloaded"))
    old, loading, loaded = await bench.look()
    assert short([old, loading, loaded]) == [("old", "loaded", 0, 5), ("m", "loading", 0, 10), ("m", "loaded", 10, 15)]
    assert (loading.why, loading.displaces) == ("a request", ("old",))
    assert [tuple(phase) for phase in loading.phases] == [("weights", AT), ("compile", AT + 5)]
    assert (old.displaced_by, loaded.displaced_by, old.devices) == ("m", None, (0,))


async def test_a_failure_keeps_its_reason() -> None:
    bench = Bench()
    bench.poll(view("failed", error="out of memory"))
    assert [span.error for span in await bench.look()] == ["out of memory"]


async def test_a_node_that_is_down() -> None:
    """Its engines are unknown until it answers again. A neuron that was not asked yet is not down."""
    bench = Bench()
    assert await bench.look() == []
    bench.poll(view("loaded"))
    await bench.look()
    bench.now += 5
    bench.fleet.record_miss("n", "connection refused")
    await bench.look()
    bench.now += 5
    bench.poll(view("loaded"))
    first, down, again = await bench.look()
    assert short([first, again]) == [("m", "loaded", 0, 5), ("m", "loaded", 10, None)]
    assert (down.model, down.status, down.until, down.error) == ("", "down", AT + 10, "connection refused")


async def test_an_engine_that_stays_loaded_while_its_node_is_down_is_shown_once() -> None:
    bench = Bench()
    bench.poll(view("loaded", since=AT - 50))
    await bench.look()
    bench.now += 5
    bench.fleet.record_miss("n", "connection refused")
    await bench.look()
    bench.now += 5
    bench.poll(view("loaded", since=AT - 50))
    assert short(span for span in await bench.look() if span.model) == [("m", "loaded", -50, None)]


async def test_a_drain_and_a_removed_node() -> None:
    bench = Bench()
    bench.poll(view("loaded"))
    bench.fleet.set_draining("n", True)
    assert short(await bench.look()) == [("m", "loaded", 0, None), ("n", "draining", 0, None)]
    bench.now += 5
    bench.fleet.set_draining("n", False)
    assert short(await bench.look()) == [("n", "draining", 0, 5), ("m", "loaded", 0, None)]


@pytest.mark.parametrize(
    ("since", "spans"), [(AT - 50, 1), (AT - 49.5, 1), (AT - 10, 2), (None, 1)], ids=["same", "jitter", "again", "v1"]
)
async def test_an_engine_that_was_loaded_again_between_two_looks(since: float | None, spans: int) -> None:
    bench = Bench()
    bench.poll(view("loaded", since=AT - 50))
    await bench.look()
    bench.poll(view("loaded", since=since))
    assert len(await bench.look()) == spans


async def test_a_neuron_whose_clock_is_ahead() -> None:
    bench = Bench()
    for _ in range(3):
        bench.poll(view("loaded", since=AT + 100))
        assert short(await bench.look()) == [("m", "loaded", 0, None)]


async def test_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECS", 0.01)
    bench = Bench()
    running = asyncio.create_task(bench.timeline.run())
    bench.counts = ModelCounts({"m": 5}, {"m": 1})
    bench.waiting = {"m": 7}
    await asyncio.sleep(0.05)
    bench.waiting = {"m": 3}
    bench.now += 60
    await until(lambda: bool(bench.timeline.between(0, float("inf"))["minutes"]))
    bench.counts = ModelCounts({"m": 9, "k": 1}, {"m": 1, "k": 1})
    bench.waiting = {}
    bench.now += 60
    await until(lambda: len(bench.timeline.between(0, float("inf"))["minutes"]) == 2)
    first, second = bench.timeline.between(0, float("inf"))["minutes"]
    assert (first.at, first.waiting, first.requests) == (AT + 60, {"m": 7}, {"m": 5})
    assert (second.at, second.requests, second.errors) == (AT + 120, {"m": 4, "k": 1}, {"k": 1})
    bench.now += 24 * 3600
    await until(lambda: len(bench.timeline.between(0, float("inf"))["minutes"]) == 3)
    running.cancel()
    await asyncio.wait([running])


async def test_what_is_older_than_a_day_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECS", 0.01)
    bench = Bench()
    bench.poll(view("loaded", "old"), view("loaded"))
    await bench.look()
    bench.poll(view("loaded"))
    assert len(await bench.look()) == 2
    bench.now += 25 * 3600
    assert short(await bench.look()) == [("m", "loaded", 0, None)]


async def test_between() -> None:
    bench = Bench()
    for status in ("loading", "loaded", "sleeping"):
        bench.poll(view(status))
        await bench.look()
        bench.now += 10
    found = bench.timeline.between(AT + 12, AT + 15)["spans"]
    assert [span.status for span in found] == ["loaded"]


async def test_a_restart_continues_the_spans(tmp_path: Path) -> None:
    """Those that still hold, by the neuron's word; the others ended when cortex did, as far as it knows."""
    bench = Bench(tmp_path)
    bench.poll(
        view("loaded", since=AT - 9), view("loaded", "gone", since=AT - 9), view("loaded", "again", since=AT - 9)
    )
    await bench.look()
    bench.now += 10
    bench.poll(view("loaded", since=AT - 9), view("loaded", "gone", since=AT - 9), view("sleeping", "again"))
    await bench.look()
    await bench.timeline.flush()
    await bench.state.close()
    with (tmp_path / NAME).open("ab") as file:
        file.write(b'{"span": {"node": "n", "sta')  # killed meanwhile
    bench = Bench(tmp_path, now=AT + 100)
    assert {span.until for span in bench.spans()} == {AT + 10}
    bench.poll(
        view("loaded", since=AT - 9), view("sleeping", "again", since=AT + 9), view("loaded", "new", since=AT + 90)
    )
    spans = {(span.model, span.status): span for span in await bench.look()}
    assert (spans["m", "loaded"].since, spans["m", "loaded"].until) == (AT - 9, None)
    assert spans["gone", "loaded"].until == AT + 10
    assert spans["again", "sleeping"].until is None
    await bench.timeline.flush()
    later = {span.model: span for span in Bench(tmp_path, now=AT + 200).spans()}
    assert later.keys() == {"m", "gone", "again", "new"}
    assert later["gone"].until == AT + 10  # not the file's last line then
    assert Bench(tmp_path, now=AT + 48 * 3600).spans() == []


async def test_a_node_that_is_down_before_and_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is shown once, although each cortex knows only of the silence since its own start."""
    found: list[list[StatusSpan]] = []
    for restart in range(3):
        bench = Bench(tmp_path, now=AT + 100 * restart)
        monkeypatch.setattr("cortex.fleet.state.time.time", lambda bench=bench: bench.now)
        bench.fleet.record_miss("n", f"refused to cortex {restart}")
        found.append(await bench.look())
        await bench.timeline.flush()
        await bench.state.close()
    assert [len(spans) for spans in found] == [1, 1, 1]
    assert found[0][0].since == found[2][0].since
    assert found[2][0].until is None
    assert found[2][0].error == "refused to cortex 2"


async def test_one_cortex_writes_at_a_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that share a directory. The second keeps its timeline in memory, and writes it when the first is gone."""
    monkeypatch.setattr("cortex.fleet.timeline.timeline_file.LONG_LINES", 0)  # the second flush writes it all again
    first, second = Bench(tmp_path), Bench(tmp_path)

    async def spans_after(*benches: Bench) -> list[str]:
        for bench in benches:
            await bench.look()
            await bench.timeline.flush()
        return sorted(span.model for span in Bench(tmp_path).spans())

    first.poll(view("loaded", "a"))
    second.poll(view("loaded", "b"))
    assert await spans_after(first, second, second) == ["a"]
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"the timeline cannot be kept in {tmp_path / NAME}: in use by another cortex"
    ]
    await first.state.close()
    assert await spans_after(second) == ["b"]
    await second.state.close()


async def test_an_engine_that_is_seen_again_a_day_after_a_restart(tmp_path: Path) -> None:
    """The span before the restart is forgotten by then."""
    bench = Bench(tmp_path)
    bench.poll(view("loaded", since=AT - 9))
    await bench.look()
    await bench.timeline.flush()
    bench = Bench(tmp_path, now=AT + 100)
    bench.now += 25 * 3600
    await bench.look()
    assert bench.spans() == []
    bench.poll(view("loaded", since=AT - 9))
    assert short(await bench.look()) == [("m", "loaded", -9, None)]


async def test_the_first_line_after_a_crash_that_cut_one(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b'{"span": {"node": "n", "sta')
    bench = Bench(tmp_path)
    bench.poll(view("loaded"))
    await bench.look()
    await bench.timeline.flush()
    assert [span.model for span in Bench(tmp_path, now=AT + 10).spans()] == ["m"]


async def test_a_long_file_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cortex.fleet.timeline.timeline_file.LONG_LINES", 50)
    bench = Bench(tmp_path)
    for number in range(300):
        bench.now += 1
        bench.poll(view("loading", progress=Progress(phase=f"phase {number % 2}")))
        await bench.look()
        await bench.timeline.flush()
    spans = bench.spans()
    assert len((tmp_path / NAME).read_bytes().splitlines()) <= 52
    (kept,) = Bench(tmp_path, now=bench.now).spans()
    assert kept.phases == spans[0].phases


async def test_a_directory_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It costs one warning; what was missing is in the file once it can be written."""
    away = tmp_path / "away"
    away.touch()
    bench = Bench(away)
    for status in ("loading", "loaded"):
        bench.poll(view(status))
        await bench.look()
        await bench.timeline.flush()
    assert [record.message for record in caplog.records] == [
        f"the timeline cannot be kept in {away / NAME}: File exists"
    ]
    away.unlink()
    await bench.timeline.flush()
    assert [span.status for span in Bench(away).spans()] == ["loading", "loaded"]


def test_nothing_is_seen_of_an_unloaded_model() -> None:
    bench = Bench()
    bench.poll(view("unloaded"), view("a status from the future", "k"))
    assert seen(bench.fleet.node("n")) == {}
