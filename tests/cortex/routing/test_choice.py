"""The choice among replicas, case by case, and its effect on waiting times."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from statistics import fmean

import pytest

from cortex.routing.choice import beyond_ours, choose, least_work
from cortex.routing.replica import ReplicaKey
from cortex.routing.speeds import Speeds
from tests.cortex.fleets import replica_key
from tests.cortex.replicas_simulated import Simulation, ideal, learned, least_in_flight, with_affinity

NODES = ["a", "b", "c"]
EQUAL = [1.0, 1.0, 1.0]
KIND = ("m", b"/v1/chat/completions", True)


def keys(model_id: str, *nodes: str) -> list[ReplicaKey]:
    return [replica_key(model_id, name) for name in nodes]


@pytest.mark.parametrize(
    ("outstanding", "speeds", "expected"),
    [
        ([0, 0, 0], EQUAL, "a"),  # a tie
        ([1, 0, 0], EQUAL, "b"),
        ([2, 1, 0], EQUAL, "c"),
        ([0, 0, 0], [1.0, 1.0, 2.0], "c"),  # all idle: the fastest
        ([0, 0, 1], [1.0, 1.0, 2.0], "a"),  # equal times: by name
        ([0, 0, 1], [1.0, 1.0, 2.5], "c"),
        ([4, 4, 15], [1.0, 1.0, 4.0], "c"),
        ([2, 3, 15], [1.0, 1.0, 4.0], "a"),
    ],
)
def test_least_work_by_speed(outstanding: list[int], speeds: list[float], expected: str) -> None:
    """The new request counts as work too."""
    assert NODES[least_work(NODES, outstanding, speeds)] == expected
    assert NODES[choose(NODES, outstanding, speeds, None)] == expected


def test_the_order_of_replicas_does_not_matter() -> None:
    """A tie goes to the first name, wherever it stands in the list."""
    assert least_work(["b", "c", "a"], [0, 0, 0], EQUAL) == 2
    key = 12345
    first = NODES[choose(NODES, [0, 0, 0], EQUAL, key)]
    for names in (["b", "c", "a"], ["c", "b", "a"]):
        assert names[choose(names, [0, 0, 0], EQUAL, key)] == first


@pytest.mark.parametrize(
    ("running", "waiting", "ours", "expected"),
    [
        (0, 0, 0, 0),
        (5, 0, 5, 0),  # all ours: counted once
        (5, 0, 2, 3),  # another cortex has three there
        (2, 0, 5, 0),  # reported before we sent the last three
        (8, 4, 12, 4),  # four of ours are queued: each counts once more
        (0, 3, 0, 6),
    ],
)
def test_requests_of_other_clients_count(running: int, waiting: int, ours: int, expected: int) -> None:
    """Requests queued inside the engine weigh twice."""
    assert beyond_ours(running, waiting, ours) == expected


def _order(key: int, load_factor: float = 1.25) -> list[str]:
    """The replicas of a key in its order of preference, found by filling each in turn."""
    names, order = list(NODES), []
    while names:
        best = names[choose(names, [0] * len(names), [1.0] * len(names), key, load_factor)]
        order.append(best)
        names.remove(best)
    return order


@pytest.mark.parametrize(
    ("loads", "speeds", "rank"),
    [
        ((0, 0, 0), (1, 1, 1), 0),
        ((1, 0, 0), (1, 1, 1), 1),  # this one included, it has 2 of 2; its limit is 0.83, rounded up: 1
        ((1, 1, 0), (1, 1, 1), 0),  # 2 of 3; its limit is 1.25, rounded up
        ((2, 1, 1), (1, 1, 1), 0),
        ((3, 1, 1), (1, 1, 1), 1),
        ((5, 5, 1), (1, 1, 1), 2),  # the second in the order is full too
        ((9, 9, 9), (1, 1, 1), 0),
        ((12, 8, 8), (1, 1, 1), 0),  # 13 of 29; its limit is 12.08, rounded up
        ((13, 8, 8), (1, 1, 1), 1),
        ((13, 8, 8), (2, 1, 1), 0),  # twice the speed, twice the share
        ((4, 12, 12), (0.25, 1, 1), 0),
        ((5, 12, 12), (0.25, 1, 1), 1),
    ],
)
def test_a_key_stays_unless_its_replica_has_too_much(
    loads: tuple[int, ...], speeds: tuple[float, ...], rank: int
) -> None:
    """`loads` and `speeds` are in the key's order of replicas; the request goes to index `rank`."""
    for key in range(0, 2**64, 2**60):
        order = _order(key)
        by_name = dict(zip(order, zip(loads, speeds, strict=True), strict=True))
        chosen = choose(NODES, [by_name[n][0] for n in NODES], [float(by_name[n][1]) for n in NODES], key)
        assert NODES[chosen] == order[rank]


def test_some_replica_is_always_chosen() -> None:
    """This holds for any loads and speeds. A key never selects a replica above its bound while another is below."""
    generator = random.Random(7)
    for _ in range(2000):
        size = generator.randint(1, 6)
        names = [f"n{i}" for i in range(size)]
        loads = [generator.choice((0, 1, 2, generator.randint(0, 400))) for _ in names]
        speeds = [generator.uniform(0.25, 4) for _ in names]
        factor = generator.choice((1.0, 1.25, 3.0))
        place = choose(names, loads, speeds, generator.getrandbits(64), factor)
        bound = factor * (sum(loads) + 1) * speeds[place] / sum(speeds)
        assert loads[place] + 1 < bound + 1


def test_keys_spread_evenly() -> None:
    """Similar keys and nodes with similar names spread evenly too."""
    generator = random.Random(3)
    names = ["gpu-1", "gpu-2", "gpu-3", "gpu-4"]
    for keys in (range(8000), [generator.getrandbits(64) for _ in range(8000)]):
        counts = Counter(names[choose(names, [0] * 4, [1.0] * 4, key)] for key in keys)
        assert min(counts.values()) > 1850, counts


def test_a_replica_that_leaves_moves_only_its_own_keys() -> None:
    """A replica that joins takes over only the keys that become its own."""
    generator = random.Random(5)
    for key in (generator.getrandbits(64) for _ in range(500)):
        before = NODES[choose(NODES, [0, 0, 0], EQUAL, key)]
        after = ["a", "c"][choose(["a", "c"], [0, 0], [1.0, 1.0], key)]
        assert before in ("b", after)


def test_all_processes_agree() -> None:
    """A choice does not depend on the hash seed of the process."""
    program = (
        "from cortex.routing.affinity import Affinity; from cortex.routing.choice import choose\n"
        'body = b\'{"messages": [{"role": "user", "content": "hello %d"}]}\'\n'
        "key = Affinity('', 256).key\n"
        "print([choose(['a', 'b', 'c'], [0] * 3, [1.0] * 3, key(b'/v1/chat/completions', (), body % i))"
        " for i in range(50)])"
    )
    told = {subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(told) == 1


def test_an_unmeasured_replica_is_average() -> None:
    """A replica without measurements counts as average."""
    speeds = Speeds()
    assert speeds.of(keys("m", *NODES)) == EQUAL
    for _ in range(50):
        speeds.learn(KIND, replica_key("m", "a"), 4.0, 1000)
        speeds.learn(KIND, replica_key("m", "b"), 1.0, 1000)
    slow, fast, unknown = speeds.of(keys("m", *NODES))
    assert unknown == 1.0
    assert slow < unknown < fast
    assert fast / slow == pytest.approx(4, rel=0.2)
    assert speeds.of(keys("other", *NODES)) == EQUAL


def test_a_slow_first_answer_hardly_counts() -> None:
    """Of a replica that has just started; the fiftieth slow one does."""
    speeds = Speeds()
    for _ in range(20):
        speeds.learn(KIND, replica_key("m", "a"), 1.0, 1000)
    speeds.learn(KIND, replica_key("m", "b"), 10.0, 1000)
    assert speeds.of(keys("m", "b"))[0] > 0.8
    for _ in range(50):
        speeds.learn(KIND, replica_key("m", "a"), 1.0, 1000)
        speeds.learn(KIND, replica_key("m", "b"), 4.0, 1000)
    fast, slow = speeds.of(keys("m", "a", "b"))
    assert fast / slow > 3


def test_speeds_are_bounded() -> None:
    """A replica that is a thousand times slower still gets a few requests, so its recovery is noticed."""
    speeds = Speeds()
    for _ in range(200):
        speeds.learn(KIND, replica_key("m", "a"), 1000.0, 1000)
        speeds.learn(KIND, replica_key("m", "b"), 1.0, 1000)
    for speed in speeds.of(keys("m", "a", "b")):
        assert 0.25 - 1e-9 <= speed <= 4 + 1e-9


def test_kinds_of_answers_are_not_compared() -> None:
    """Streams have fifty times the bytes of plain answers: a replica with more of one kind is not faster."""
    speeds = Speeds()
    plain = (*KIND[:2], False)
    for _ in range(50):
        speeds.learn(KIND, replica_key("m", "a"), 1.0, 50_000)
        speeds.learn(plain, replica_key("m", "b"), 1.0, 1000)
    for _ in range(50):
        speeds.learn(KIND, replica_key("m", "b"), 1.0, 50_000)
    assert speeds.of(keys("m", "a", "b")) == pytest.approx([1.0, 1.0])


def test_a_replica_that_has_become_slow_is_noticed() -> None:
    """It takes some tens of answers; one slow answer is not enough."""
    speeds = Speeds()
    for _ in range(500):
        for node in ("a", "b"):
            speeds.learn(KIND, replica_key("m", node), 1.0, 1000)
    speeds.learn(KIND, replica_key("m", "a"), 100.0, 1000)
    assert speeds.of(keys("m", "a"))[0] > 0.9
    for _ in range(30):
        speeds.learn(KIND, replica_key("m", "a"), 4.0, 1000)
        speeds.learn(KIND, replica_key("m", "b"), 1.0, 1000)
    slow, fast = speeds.of(keys("m", "a", "b"))
    assert slow < 0.6 * fast


def test_an_empty_answer_teaches_nothing() -> None:
    """An answer that took no time does not change the speed either."""
    speeds = Speeds()
    speeds.learn(KIND, replica_key("m", "a"), 1.0, 0)
    speeds.learn(KIND, replica_key("m", "a"), 0.0, 10)
    assert speeds.of(keys("m", "a")) == [1.0]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_waiting_with_mismatched_replicas(seed: int) -> None:
    """Speeds 1, 2 and 4 at 80 % load: about as good as with known speeds, and clearly better than by requests in flight
    alone."""
    before, known, now = (Simulation(p, 0.8, seed=seed).run(5000) for p in (least_in_flight, ideal, learned))
    assert fmean(now.times) < 1.1 * fmean(known.times)
    assert fmean(now.times) < 0.8 * fmean(before.times)
    assert fmean(now.waits) < 0.25 * fmean(before.waits)


def test_affinity_keeps_conversations_at_little_cost() -> None:
    """More turns reach the engine of the previous turn, and the bound keeps waiting times close."""
    without, kept = (Simulation(policy, 0.8).run(5000) for policy in (learned, with_affinity))
    assert fmean(kept.kept) > fmean(without.kept) + 0.1
    assert fmean(kept.times) < 1.15 * fmean(without.times)
