"""`cortex simulate`: the planner and the policies it is compared with, in virtual time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cortex.__main__ import main
from cortex.simulator.engine import SimulatedEngine, SimulatedRequest
from cortex.simulator.fleet_file import SimulatedFleet, load_fleet
from cortex.simulator.outcome import Outcome, waiting
from cortex.simulator.policies import POLICIES
from cortex.simulator.simulation import Simulation, simulate
from cortex.simulator.trace import Ask, read_trace, write_trace
from cortex.simulator.virtual_time import VirtualTimeLoop, run_in_virtual_time
from cortex.simulator.workload import load_workload, make_trace
from shared.protocol import ModelStatus
from shared.settings import SettingsError

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "simulate"
LOAD_SECS, UNLOAD_SECS = 10.0, 2.0

ONE_CARD = """
nodes = [{ name = "solo", devices = [{ vram_total_mb = 24576 }] }]
load_secs = { base = 10, per_gb = 0, unload = 2 }
[[models]]
id = "a"
vram_mb = 20000
[[models]]
id = "b"
vram_mb = 20000
[aliases]
first = "a"
"""


def fleet_of(tmp_path: Path, text: str) -> SimulatedFleet:
    path = tmp_path / "fleet.toml"
    path.write_text(text, encoding="utf-8")
    return load_fleet(path)


def problems_of(tmp_path: Path, text: str) -> str:
    with pytest.raises(SettingsError) as caught:
        fleet_of(tmp_path, text)
    return str(caught.value)


def trace_file(tmp_path: Path, text: str, name: str = "trace.jsonl") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def waits(fleet: SimulatedFleet, asks: list[Ask], policy: str = "planner") -> list[float]:
    """Seconds that each request waited, in the order of the trace."""
    simulation, _ = run(fleet, asks, policy)
    return [request.waited for request in simulation.requests]


def run(
    fleet: SimulatedFleet, asks: list[Ask], policy: str, look: Callable[[Simulation], None] | None = None
) -> tuple[Simulation, Outcome]:
    """The simulation and its outcome. `look` is called after every iteration of the loop."""
    running: list[Simulation] = []

    class Loop(VirtualTimeLoop):
        def advance(self, secs: float) -> None:
            if look is not None and running:
                look(running[0])
            super().advance(secs)

    async def play() -> Outcome:
        running.append(Simulation(fleet, asks, POLICIES[policy], policy))
        return await running[0].run()

    outcome = run_in_virtual_time(play(), Loop())
    return running[0], outcome


@pytest.fixture(scope="module")
def example() -> SimulatedFleet:
    return load_fleet(EXAMPLE / "fleet.toml")


@pytest.fixture(scope="module")
def half_hour(example: SimulatedFleet) -> list[Ask]:
    """Half an hour of the example's workload, with twice its sessions."""
    workload = load_workload(EXAMPLE / "workload.toml", example.catalogue)
    return make_trace(workload.model_copy(update={"hours": 0.5}), example.catalogue, seed=1, load=2)


# Files


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ONE_CARD.replace("{ vram_total_mb = 24576 }", '"RTX 9999"'), "nodes[0].devices = ['RTX 9999']: 'RTX 9999'"),
        (ONE_CARD.replace("{ vram_total_mb = 24576 }", "{ vram = 1 }"), "vram: unknown key"),
        (ONE_CARD.replace("vram_mb = 20000", "", 1), "models[0].vram_mb: required here"),
        (ONE_CARD.replace("per_gb = 0", "per_gb = -1"), "load_secs.per_gb = -1"),
        (
            ONE_CARD.replace("unload = 2", 'unload = 2, models = { "c" = 3 }'),
            "load_secs.models: 'c' is not in the catalogue",
        ),
        ('nodes = [{ name = "solo", devices = ["L4"] }]', "give either models_config or [[models]]"),
        ('models_config = "nowhere.toml"\nnodes = [{ name = "solo", devices = ["L4"] }]', "nowhere.toml: No such file"),
        (ONE_CARD.replace("nodes = [", 'nodes = [{ name = "solo", devices = ["L4"] }, '), "duplicate node name 'solo'"),
        (
            ONE_CARD.replace("24576 }]", '24576 }], links = [{ a = 0, b = 1, kind = "phb" }]'),
            "links: 0 and 1 must be two devices",
        ),
        (
            ONE_CARD.replace("[[models]]", "[placement]\npatience_secs = -1\n[[models]]", 1),
            "placement.patience_secs = -1",
        ),
    ],
)
def test_a_mistake_in_the_fleet_file_is_named_with_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    problems = problems_of(tmp_path, text)
    assert said in problems
    assert str(tmp_path) in problems


def test_presets_load_times_and_rules_are_read(example: SimulatedFleet) -> None:
    """A fleet file may name card presets and give load times and planner rules."""
    beast, _, quadbrat = example.file.nodes
    assert [gpu.vram_total_mb for gpu in beast.gpus] == [32607, 32607]
    assert example.load_secs("bge-m3", beast) == 12.0
    assert example.load_secs("bge-m3", quadbrat) == 18.0
    assert example.load_secs("qwen3-14b-awq", beast) == pytest.approx(25 + 0.8 * 14000 / 1024)
    assert example.parallel("flux-schnell-fp8") == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"at": 1, "model": "a"}', "secs: required, but missing"),
        ('{"at": -1, "model": "a", "secs": 1}', "at = -1: must be a number of seconds"),
        ('{"at": 1, "model": "a", "secs": "long"}', "secs = 'long'"),
        ('{"at": 1, "model": "a", "secs": NaN}', "secs = nan"),
        ('{"at": 1, "model": "c", "secs": 1}', "model = 'c': not in the catalogue"),
    ],
)
def test_a_bad_line_of_a_trace_is_named_with_its_number(tmp_path: Path, line: str, said: str) -> None:
    path = trace_file(tmp_path, '{"at": 0, "model": "a", "secs": 1}\n\n' + line + "\n")
    with pytest.raises(SettingsError, match="line 3: ") as caught:
        read_trace(path, fleet_of(tmp_path, ONE_CARD).catalogue)
    assert said in str(caught.value)


def test_a_trace_without_requests_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no request"):
        read_trace(trace_file(tmp_path, "\n"), fleet_of(tmp_path, ONE_CARD).catalogue)


def test_csv_and_json_lines_say_the_same_and_are_sorted(tmp_path: Path) -> None:
    catalogue = fleet_of(tmp_path, ONE_CARD).catalogue
    csv = trace_file(tmp_path, "model,at,secs\nb,5,1\nfirst,2.5,0\n", "trace.csv")
    lines = trace_file(tmp_path, '{"at": 5, "model": "b", "secs": 1}\n{"at": 2.5, "model": "first", "secs": 0}\n')
    assert read_trace(csv, catalogue) == read_trace(lines, catalogue) == [Ask(2.5, "a", 0.0), Ask(5.0, "b", 1.0)]
    bad = trace_file(tmp_path, "at,model,secs\n1,a,2\n1,a\n", "bad.csv")
    with pytest.raises(SettingsError, match="line 3: secs: required"):
        read_trace(bad, catalogue)


@pytest.mark.parametrize("name", ["made.csv", "made.jsonl"])
def test_a_made_trace_reads_back_as_it_was_written(
    tmp_path: Path, name: str, example: SimulatedFleet, half_hour: list[Ask]
) -> None:
    write_trace(tmp_path / name, half_hour)
    assert read_trace(tmp_path / name, example.catalogue) == half_hour


def test_a_trace_follows_from_its_seed_and_is_skewed(example: SimulatedFleet) -> None:
    workload = load_workload(EXAMPLE / "workload.toml", example.catalogue)
    once, again, other = (make_trace(workload, example.catalogue, seed=seed) for seed in (3, 3, 4))
    assert once == again != other
    asked = [ask.model for ask in once]
    assert asked.count("qwen3-30b-a3b-awq") > 5 * asked.count("qwen3-0.6b")


# Small cases, computed by hand


def test_more_requests_than_an_engine_serves_at_full_speed_share_it() -> None:
    """The first request runs at full speed. The second arrives after 5 of its 10 s; the remaining 5 take 10."""
    engine = SimulatedEngine("a", (0,), 1000, parallel=1)
    first, second = (SimulatedRequest(number, "a", at, 10.0) for number, at in enumerate((0.0, 5.0)))
    engine.begin(first, 0.0)
    assert engine.next_end() == 10.0
    engine.begin(second, 5.0)
    assert engine.next_end() == 15.0
    assert engine.end_next(15.0) is first
    assert engine.next_end() == 20.0
    assert engine.end_next(20.0) is second
    assert engine.next_end() is None


@pytest.mark.parametrize("policy", POLICIES)
def test_cold_request_waits_for_the_load_and_warm_one_does_not(tmp_path: Path, policy: str) -> None:
    """Requests that arrive during the load wait for the rest of it."""
    fleet = fleet_of(tmp_path, ONE_CARD)
    asks = [Ask(1.0, "a", 5.0), Ask(4.0, "a", 5.0), Ask(30.0, "a", 5.0)]
    assert waits(fleet, asks, policy) == [LOAD_SECS, LOAD_SECS - 3.0, 0.0]


@pytest.mark.parametrize("policy", POLICIES)
def test_idle_model_is_evicted_at_once(tmp_path: Path, policy: str) -> None:
    fleet = fleet_of(tmp_path, ONE_CARD)
    asks = [Ask(0.0, "a", 5.0), Ask(60.0, "b", 5.0)]
    assert waits(fleet, asks, policy) == [LOAD_SECS, UNLOAD_SECS + LOAD_SECS]


@pytest.mark.parametrize(
    ("policy", "waited"),
    [
        # b's patience ends at 75: a gets no new requests, finishes its 100 s at 110, and is unloaded.
        ("planner", [LOAD_SECS, 50.0 + UNLOAD_SECS + LOAD_SECS, None]),
        ("lru", [LOAD_SECS, 120.0 + UNLOAD_SECS + LOAD_SECS, 0.0]),
        ("first-fit", [LOAD_SECS, 120.0 + UNLOAD_SECS + LOAD_SECS, 0.0]),
    ],
)
def test_the_planner_drains_a_busy_model_where_others_wait_until_it_is_idle(
    tmp_path: Path, policy: str, waited: list[float | None]
) -> None:
    """a works on its first request until 110, on its second (at 100) until 180; b comes at 60."""
    fleet = fleet_of(tmp_path, ONE_CARD.replace("[[models]]", "[placement]\npatience_secs = 15\n[[models]]", 1))
    asks = [Ask(0.0, "a", 100.0), Ask(60.0, "b", 5.0), Ask(100.0, "a", 80.0)]
    got = waits(fleet, asks, policy)
    for seen, expected in zip(got, waited, strict=True):
        assert expected is None or seen == pytest.approx(expected, abs=0.3)
    if policy == "planner":
        assert got[2] > 30.0  # arrived while a was draining, and waits for its turn


def test_request_times_out(tmp_path: Path) -> None:
    """A request that waits longer than `timeout_secs` is unserved, and its whole wait counts."""
    fleet = fleet_of(tmp_path, ONE_CARD + "[serving]\ntimeout_secs = 4\n")
    outcome = simulate(fleet, [Ask(0.0, "a", 1.0)], "planner")
    assert (outcome.total.unserved, outcome.total.waiting.max) == (1, 4.0)


def test_model_that_fits_nowhere_is_refused_at_once(tmp_path: Path) -> None:
    text = ONE_CARD.replace('id = "b"', 'id = "b"\nmin_devices = 2')
    for policy in POLICIES:
        outcome = simulate(fleet_of(tmp_path, text), [Ask(0.0, "b", 1.0)], policy)
        assert (outcome.total.unserved, outcome.total.waiting.max, outcome.total.loads) == (1, 0.0, 0)


def test_planner_unloads_a_model_after_its_idle_ttl(tmp_path: Path) -> None:
    text = ONE_CARD.replace('id = "a"', 'id = "a"\nidle_ttl_secs = 20')
    asks = [Ask(0.0, "a", 1.0), Ask(100.0, "a", 1.0)]
    assert waits(fleet_of(tmp_path, text), asks) == [LOAD_SECS, LOAD_SECS]


def test_memory_is_averaged_over_the_time(tmp_path: Path) -> None:
    """Rejection from the load's begin at 0 to the end at 40, in use from 10 to 40."""
    outcome = simulate(fleet_of(tmp_path, ONE_CARD), [Ask(0.0, "a", 30.0)], "lru")
    assert outcome.secs == 40.0
    assert outcome.vram_loaded_pct == pytest.approx(100 * 20000 / 24576)
    assert outcome.vram_in_use_pct == pytest.approx(75 * 20000 / 24576)


def test_percentiles_are_of_the_nearest_rank() -> None:
    summed = waiting([float(secs) for secs in range(1, 101)])
    assert (summed.mean, summed.p50, summed.p95, summed.p99, summed.max) == (50.5, 50.0, 95.0, 99.0, 100.0)


# Invariants


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_served_once_by_a_loaded_model_within_memory(
    example: SimulatedFleet, half_hour: list[Ask], policy: str
) -> None:
    """The invariants hold after every iteration of the loop."""

    def look(simulation: Simulation) -> None:
        for neuron in simulation.neurons.values():
            assert all(neuron.bookable_mb(gpu.index) >= 0 for gpu in neuron.node.gpus)
            for engine in neuron.engines.values():
                assert engine.status is ModelStatus.LOADED or not engine.in_flight
        loads = [(each.model_id, each.node) for each in simulation.fleet.snapshot().reservations]
        assert len(loads) == len(set(loads))

    simulation, outcome = run(example, half_hour, policy, look)
    assert len(simulation.requests) == len(half_hour)
    for request in simulation.requests:
        assert request.ended is not None
        if request.begun is not None:
            assert request.at <= request.begun
            assert request.ended >= request.begun + request.secs - 1e-6
    total = outcome.total
    by_model = outcome.by_model.values()
    assert total.requests == sum(each.requests for each in by_model)
    assert total.unserved == 0
    held = sum(len(neuron.engines) for neuron in simulation.neurons.values())
    assert total.loads - total.evictions <= held <= total.loads  # an eviction that is not needed any more is given up


def test_the_same_trace_gives_the_same_figures(example: SimulatedFleet, half_hour: list[Ask]) -> None:
    def once() -> list[Outcome]:
        return [simulate(example, half_hour, policy) for policy in POLICIES]

    assert once() == once()


# The command


def test_the_command_shows_the_policies_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet_of(tmp_path, ONE_CARD)
    trace = trace_file(tmp_path, '{"at": 0, "model": "first", "secs": 1}\n')
    arguments = ["simulate", "--fleet", str(tmp_path / "fleet.toml"), "--trace", str(trace)]
    assert main([*arguments, "--by-model"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split() == ["planner", "lru", "first-fit"]
    assert "10.00 s" in shown
    assert shown.splitlines()[-1].split()[:2] == ["a", "1"]
    assert main([*arguments, "--json", "--policy", "lru"]) == 0
    (figures,) = json.loads(capsys.readouterr().out)
    assert (figures["policy"], figures["total"]["cold_starts"], figures["total"]["waiting"]["mean"]) == ("lru", 1, 10.0)


def test_the_command_makes_a_trace_that_it_replays_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trace written by `--make-trace` gives the same figures as its workload."""
    workload = trace_file(tmp_path, "hours = 0.05\n[[users]]\nmodel = 'a'\n[[users]]\nmodel = 'b'\n", "workload.toml")
    fleet_of(tmp_path, ONE_CARD)
    base = ["simulate", "--fleet", str(tmp_path / "fleet.toml")]
    made = [*base, "--workload", str(workload), "--seed", "5", "--load", "2"]
    assert main([*made, "--make-trace", str(tmp_path / "made.jsonl")]) == 0
    assert main([*made, "--json"]) == 0
    direct = capsys.readouterr().out
    assert {"displacements", "hot_displacements"} <= json.loads(direct)[0]["total"].keys()  # scripts read these names
    assert main([*base, "--trace", str(tmp_path / "made.jsonl"), "--json"]) == 0
    assert capsys.readouterr().out == direct


def test_the_command_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet_of(tmp_path, ONE_CARD)
    missing = str(tmp_path / "none.jsonl")
    assert main(["simulate", "--fleet", str(tmp_path / "fleet.toml"), "--trace", missing]) == 1
    assert capsys.readouterr().err == f"{missing}: No such file or directory\n"
