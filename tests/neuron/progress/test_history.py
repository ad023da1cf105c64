"""A host's history of loads: expectations, limits, and broken files."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import pytest

from neuron.progress.history import LoadHistory
from neuron.progress.load_times import MAX_LOADS, MAX_MODELS, History, LoadKey, LoadTimes, from_json, to_json
from neuron.spec import EngineSpec

KEY = LoadKey("org/m", "vllm", 2, "fp8", "/srv/m")


def names_in(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def weights(*secs: float) -> History:
    history = History()
    for each in secs:
        history = history.with_load(KEY, LoadTimes({"loading weights": each, "warming up": 1.0}))
    return history


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([90], 90),  # the only one
        ([90, 10], 10),  # cold, then warm: the next one is warm
        ([90, 10, 11], 11),
        ([90, 10, 12, 11, 95], 12),  # another cold one changes nothing
        ([90, 10, 12, 11, 30, 31, 32], 30),  # a real change takes effect after three
    ],
)
def test_lower_median(loads: list[float], expected: float) -> None:
    """An even number of loads counts the faster of the two middle ones."""
    times = weights(*loads).expected(KEY)
    assert times == LoadTimes({"loading weights": expected, "warming up": 1.0})


def test_downloads_and_skipped_phases_are_not_expected() -> None:
    """Downloads are not repeated; a phase that most loads skip is not expected."""
    history = History().with_load(KEY, LoadTimes({"starting": 5, "downloading": 600, "compiling": 40}))
    assert history.expected(KEY) == LoadTimes({"starting": 5, "compiling": 40})
    history = history.with_load(KEY, LoadTimes({"starting": 5}))
    assert history.expected(KEY) == LoadTimes({"starting": 5})
    assert History().expected(KEY) is None


def test_bounds() -> None:
    """The last five loads of a model; the model with the oldest last load is dropped first."""
    assert len(weights(*range(1, 20)).loads[KEY]) == MAX_LOADS
    history = weights(1)
    for number in range(MAX_MODELS - 1):
        history = history.with_load(LoadKey(f"m{number}", "vllm", 1, None, "s"), LoadTimes({"starting": 1}))
    history = history.with_load(KEY, LoadTimes({"starting": 1}))
    history = history.with_load(LoadKey("new", "vllm", 1, None, "s"), LoadTimes({"starting": 1}))
    assert len(history.loads) == MAX_MODELS
    assert KEY in history.loads
    assert LoadKey("m0", "vllm", 1, None, "s") not in history.loads


def test_keys_distinguish_loads() -> None:
    """Loads with other parallelism or quantization take other times."""
    spec = EngineSpec(model_id="org/m", harness="vllm", source="/srv/m", quant="fp8", tensor_parallel=2)
    assert LoadKey.of(spec) == KEY
    other = EngineSpec(model_id="org/m", harness="vllm", source="/srv/m", quant=None, tensor_parallel=2)
    assert weights(1).expected(LoadKey.of(other)) is None


async def test_it_survives_a_restart(tmp_path: Path) -> None:
    """The history is one file, readable by this user only and always complete; concurrent loads are all recorded."""
    path = tmp_path / "history.json"
    history = LoadHistory(path)
    await history.read()
    keys = [LoadKey(f"m{number}", "vllm", 1, None, "s") for number in range(5)]
    await asyncio.gather(*(history.record(key, LoadTimes({"starting": 2.0})) for key in keys))
    assert path.stat().st_mode & 0o777 == 0o600
    assert names_in(tmp_path) == ["history.json"]
    again = LoadHistory(path)
    await again.read()
    assert [again.expected(key) for key in keys] == [LoadTimes({"starting": 2.0})] * 5


async def test_in_memory_only() -> None:
    """Without a file the history works until neuron stops."""
    history = LoadHistory(None)
    await history.read()
    await history.record(KEY, LoadTimes({"starting": 2.0}))
    assert history.expected(KEY) == LoadTimes({"starting": 2.0})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"version": 2, "models": []}',
        '{"version": 1, "models": [7]}',
        '{"version": 1, "models": [{"model_id": "m", "harness": "vllm", "tensor_parallel": 1, "source": "s"}]}',
        json.dumps(to_json(weights(1))).replace("1.0", "-1"),
        json.dumps(to_json(weights(1))).replace("1.0", "NaN"),
        json.dumps(to_json(weights(1))).replace("warming up", "cooking"),
        "[" * 100_000,
        "\xff\xfe",
    ],
)
async def test_foreign_content_is_replaced(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    """A warning and an empty history; the next load writes a valid file."""
    path = tmp_path / "history.json"
    path.write_text(content, encoding="latin-1")
    history = LoadHistory(path)
    with caplog.at_level(logging.WARNING):
        await history.read()
    assert str(path) in caplog.text
    assert history.expected(KEY) is None
    await history.record(KEY, LoadTimes({"starting": 2.0}))
    assert from_json(json.loads(path.read_text())).expected(KEY) == LoadTimes({"starting": 2.0})


async def test_a_full_disk_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The load is successful anyway, and its times are known while this neuron runs."""
    history = LoadHistory(tmp_path / "gone" / "history.json")
    await history.read()
    with caplog.at_level(logging.WARNING):
        await history.record(KEY, LoadTimes({"starting": 2.0}))
    assert "cannot be written" in caplog.text
    assert history.expected(KEY) == LoadTimes({"starting": 2.0})


async def test_the_ram_of_a_model_falls_slowly(tmp_path: Path) -> None:
    """It is the most that an engine used, while it runs too; after one that used less it falls by a quarter."""
    history = LoadHistory(tmp_path / "history.json")
    await history.record(KEY, LoadTimes({"starting": 1}))
    figures = []
    for number, measured in enumerate([(3000, 8000, 5000), (4000,), (2000,), (9000,)]):
        for mb in measured:
            history.measured_ram(f"engine-{number}", KEY, mb)
        figures.append(history.ram_mb(KEY))
        history.ended(f"engine-{number}")
        figures.append(history.ram_mb(KEY))
    assert figures == [8000, 8000, 8000, 7000, 7000, 5750, 9000, 9000]
    for number in range(60):
        history.measured_ram(f"small-{number}", KEY, 1000)
        history.ended(f"small-{number}")
    assert history.ram_mb(KEY) == 1000


async def test_measuring_ram_writes_nothing(tmp_path: Path) -> None:
    """The file is written after an engine's end: not with each new peak, and not without a change."""
    path = tmp_path / "history.json"
    history = LoadHistory(path)
    await history.record(KEY, LoadTimes({"starting": 1}))
    path.unlink()
    history.measured_ram("engine", KEY, 3000)
    history.measured_ram("engine", KEY, 4000)
    await history.save()
    assert not path.exists()
    history.ended("engine")
    await history.save()
    again = LoadHistory(path)
    await again.read()
    assert again.ram_mb(KEY) == 4000
    path.unlink()
    history.measured_ram("same", KEY, 4000)
    history.ended("same")
    await history.save()
    assert not path.exists()
