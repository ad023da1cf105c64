"""A wait that no policy can beat, even one that knows the future, by Lagrangian relaxation. Pure.

It holds for every policy that loads a model for the first time only when a request waits for it, and that refuses no
request: a refused one waits for nothing. Later loads may be ahead of the requests; for policies without those the bound
is larger. All simplifications favour the policy: a load always takes its shortest time, unloading none, an engine
serves any number of requests at full speed, and models can be split over the devices they may use, apart from
`_counted` below.

Replicas, variants and models that span hosts only ever favour the policy too:

- A model counts as loaded while at least one instance is, and takes the memory of one. More of them take more memory,
  and save no time, as one serves any number. With `replicas.min` the model may be loaded before any request: its
  requests then wait for nothing, and it takes no memory.
- In whichever variant, and on however many hosts it runs, it takes the memory of the smallest and the load time of the
  fastest of all these ways, and may use the devices of all. A policy may even load another variant for each request.

What remains: between two requests a model either stays loaded, which takes memory, or is loaded again before the later
one, which takes memory during the load, or the later one waits for a load. Loaded models must fit the memory at every
moment. Charging for the memory instead of limiting it gives, at any prices of 0 or more, a bound: the cheapest
behaviour of each model alone, minus the price of all the memory. Subgradient steps look for prices that make it large.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

from cortex.config.profile import ModelProfile
from cortex.placement.devices import eligible
from cortex.placement.spans import spans_of
from cortex.simulator.fleet_file import SimulatedFleet, SimulatedNode
from cortex.simulator.outcome import WaitFigures, waiting
from cortex.simulator.trace import Ask
from shared.gpus import DEVICE_MARGIN_MB, ram_reserve_mb
from shared.protocol import RAM, Device

BIN_SECS = 30.0
"""Prices are constant for this long."""
STEPS = 150
PATIENT_STEPS = 8
"""After this many steps without a better bound, steps get half as long."""

_Device = tuple[str, int]
_Held = tuple[float, float, float]
"""A model is loaded from the first time to the second, where the price does not exceed the third."""


@dataclass(frozen=True)
class _Way:
    """One way to run an instance: in one variant, on one host or spread over several. `devices` are all that it may
    use, `count` how many it takes, and `load_secs` how long its load takes at least."""

    devices: frozenset[_Device]
    count: int
    device_share_mb: int
    load_secs: float

    @property
    def vram_mb(self) -> int:
        return self.count * self.device_share_mb


@dataclass(frozen=True)
class _Limit:
    """At every moment, the loaded models' `shares` of what is limited add up to at most 1."""

    shares: dict[str, float]


@dataclass(frozen=True)
class _Requests:
    """One model's arrivals and seconds of work, in order, and how long its load takes at least, not more than a request
    waits at most (`timeout_secs`). `cold_secs` is what the i-th request and those after it wait if it starts a load at
    once."""

    at: Sequence[float]
    work_secs: Sequence[float]
    load_secs: float
    cold_secs: Sequence[float]
    timeout_secs: float
    loads_ahead: bool

    @property
    def delay_price(self) -> float:
        """What a second's delay of a load costs at least: the request waits that second, unless it times out during the
        load."""
        return 1 - self.load_secs / self.timeout_secs

    def patient(self, index: int) -> bool:
        """Whether delaying the load until the request times out would cost more than its memory can."""
        return self.timeout_secs >= 2 * self.load_secs + self.work_secs[index]


def wait_bound(fleet: SimulatedFleet, asks: Sequence[Ask], *, aim_secs: float, loads_ahead: bool = True) -> WaitFigures:
    """A mean and a p99 in seconds that no such policy's waits are below; the other figures are those of the first loads
    alone, which also give the p99.

    Args:
        fleet: the hosts and models.
        asks: the requests, in order of arrival.
        aim_secs: a mean wait that some policy reaches. It guides the search; any value gives a valid bound.
        loads_ahead: whether the policies may load a model again before it is requested.
    """
    models = _by_model(fleet, asks, loads_ahead)
    first = waiting([secs for model in _by_request(models, asks) for secs in model])
    ways = {model_id: _ways(fleet, model_id) for model_id in models}
    best = _best_bound(models, _limits(fleet, ways), aim_secs * len(asks))
    mean = max(first.mean, best / max(1, len(asks)))
    return WaitFigures(mean, first.p50, first.p95, first.p99, first.max)


def _by_request(models: dict[str, _Requests], asks: Sequence[Ask]) -> Iterator[list[float]]:
    """What each request waits at least for the first load of its model."""
    for ask in asks:
        model = models.get(ask.model)
        yield [0.0 if model is None else max(0.0, model.at[0] + model.load_secs - ask.at)]


def _by_model(fleet: SimulatedFleet, asks: Iterable[Ask], loads_ahead: bool) -> dict[str, _Requests]:
    """Without models that fit nowhere, whose requests no policy can serve."""
    listed: defaultdict[str, list[Ask]] = defaultdict(list)
    for ask in asks:
        listed[ask.model].append(ask)
    found: dict[str, _Requests] = {}
    for model_id, each in listed.items():
        profile, ways = fleet.catalogue.profile(model_id), _ways(fleet, model_id)
        if profile is None or not ways:
            continue
        secs = min(way.load_secs for way in ways)
        # With `replicas.min` it may be loaded before anyone asks.
        timeout_secs = fleet.file.serving.timeout_secs
        secs = 0.0 if profile.replicas.min else min(secs, timeout_secs)
        at = [ask.at for ask in each]
        found[model_id] = _Requests(
            at, [ask.secs for ask in each], secs, _cold_secs(at, secs), timeout_secs, loads_ahead
        )
    return found


def _cold_secs(at: Sequence[float], load_secs: float) -> list[float]:
    found: list[float] = []
    end = 0
    until = [0.0, *accumulate(at)]
    for index, begin in enumerate(at):
        end = max(end, index)
        while end < len(at) and at[end] < begin + load_secs:
            end += 1
        found.append((end - index) * (begin + load_secs) - (until[end] - until[index]))
    return found


def _ways(fleet: SimulatedFleet, model_id: str) -> list[_Way]:
    """All ways to run an instance of the model; none if it fits nowhere."""
    profile = fleet.catalogue.profile(model_id)
    found: list[_Way | None] = []
    for choice in () if profile is None else profile.choices:
        found.append(_way(fleet, choice, 1))
        found += [_way(fleet, span.part, span.hosts) for span in spans_of(choice)]
    return [way for way in found if way is not None]


def _way(fleet: SimulatedFleet, part: ModelProfile, hosts: int) -> _Way | None:
    """The way that puts such a part on each of so many hosts; None without enough hosts that have devices for one. The
    last part to load is at best on the fastest of these but `hosts` - 1."""
    usable = {node.name: devices for node in fleet.file.nodes if (devices := _usable(part, node))}
    if len(usable) < hosts or (hosts > 1 and not _has_equal_cards(usable.values(), part.device_count, hosts)):
        return None
    secs = sorted(fleet.load_secs(part.id, node, part.vram_mb) for node in fleet.file.nodes if node.name in usable)
    every = frozenset((name, gpu.index) for name, gpus in usable.items() for gpu in gpus)
    return _Way(every, part.shares * hosts, part.device_share_mb, secs[hosts - 1])


def _usable(profile: ModelProfile, node: SimulatedNode) -> list[Device]:
    """The devices of the node that the model may use; none when they are too few."""
    if profile.harness not in node.harnesses or (profile.pinned_on and node.name not in profile.pinned_on):
        return []
    if profile.on_cpu:
        return [] if node.ram is None or _capacity_mb(node.ram) < profile.device_share_mb else [node.ram]
    found = [gpu for gpu in eligible(profile, list(node.gpus)) if _capacity_mb(gpu) >= profile.device_share_mb]
    return found if len(found) >= profile.device_count else []


def _capacity_mb(device: Device) -> int:
    """What models can book there. A unified device and the RAM that it shares count as two, which only makes the bound
    lower."""
    total = device.vram_total_mb
    return total - (ram_reserve_mb(total) if device.index == RAM or device.unified else DEVICE_MARGIN_MB)


def _has_equal_cards(usable: Iterable[Sequence[Device]], count: int, hosts: int) -> bool:
    """Whether so many hosts have so many of the same card. Engines do not span hosts with different ones."""
    kinds = Counter(
        card
        for gpus in usable
        for card, there in Counter((gpu.name, gpu.vram_total_mb) for gpu in gpus).items()
        if there >= count
    )
    return max(kinds.values(), default=0) >= hosts


def _limits(fleet: SimulatedFleet, models: Mapping[str, Sequence[_Way]]) -> list[_Limit]:
    """For each set of devices to which some models are confined: their memory, and how many large models fit."""
    capacity = {
        (node.name, device.index): _capacity_mb(device)
        for node in fleet.file.nodes
        for device in (*node.gpus, *([] if node.ram is None else [node.ram]))
    }
    usable = {
        model_id: frozenset(chain.from_iterable(way.devices for way in ways)) for model_id, ways in models.items()
    }
    limits: list[_Limit] = []
    for devices in set(usable.values()):
        confined = {model_id: ways for model_id, ways in models.items() if usable[model_id] <= devices}
        total = sum(capacity[device] for device in devices)
        limits.append(
            _Limit({model_id: min(way.vram_mb for way in ways) / total for model_id, ways in confined.items()})
        )
        limits.append(_Limit(_counted(confined, max(capacity[device] for device in devices), len(devices))))
    return limits


def _counted(confined: Mapping[str, Sequence[_Way]], largest_mb: int, devices: int) -> dict[str, float]:
    """Each device holds one model that takes more than half of the largest device, whichever way it runs."""
    counts = {
        model_id: min(way.count if 2 * way.device_share_mb > largest_mb else 0 for way in ways)
        for model_id, ways in confined.items()
    }
    return {model_id: count / devices for model_id, count in counts.items() if count}


def _best_bound(models: dict[str, _Requests], limits: Sequence[_Limit], aim_secs: float) -> float:
    """The largest bound found, in seconds of waiting of all requests together."""
    bins = 1 + int(max((each.at[-1] for each in models.values()), default=0.0) / BIN_SECS)
    prices = [[0.0] * bins for _ in limits]
    best, length, stale = 0.0, 1.0, 0
    for _ in range(STEPS):
        found = -BIN_SECS * math.fsum(map(math.fsum, prices))
        excess = [[-BIN_SECS] * bins for _ in limits]
        for model_id, requests in models.items():
            shares = [(index, limit.shares[model_id]) for index, limit in enumerate(limits) if model_id in limit.shares]
            price = [sum(share * prices[index][each] for index, share in shares) for each in range(bins)]
            cost, held = _cheapest(requests, price)
            found += cost
            for index, share in shares:
                _add(excess[index], held, price, share)
        stale = 0 if found > best else stale + 1
        best = max(best, found)
        if stale >= PATIENT_STEPS:
            length, stale = length / 2, 0
        # Unused memory lowers a price, but not below 0.
        slopes = [
            [over if over > 0 or price > 0 else 0.0 for over, price in zip(*pair, strict=True)]
            for pair in zip(excess, prices, strict=True)
        ]
        square = math.fsum(slope * slope for row in slopes for slope in row)
        if not square:
            break
        step = length * max(aim_secs - found, 0.01 * aim_secs) / square
        prices = [
            [max(0.0, price + step * slope) for price, slope in zip(*pair, strict=True)]
            for pair in zip(prices, slopes, strict=True)
        ]
    return best


def _cheapest(requests: _Requests, price: Sequence[float]) -> tuple[float, list[_Held]]:
    """The least that one model costs, in waiting and memory, and when it is loaded on the way there.

    Each request finds the model loaded (warm) or not (cold). After a warm one, the model stays until the next request
    or leaves once it has served. After a cold one, its load starts before the next request, and again the model stays
    or leaves; or the next one waits as well. A load that starts later needs no memory until then, but its request waits
    that much longer: memory costs at most `delay_price` a second until the load starts. A model that has left may also
    be loaded ahead of the next request, which takes memory during that load.
    """
    paid, paid_at_most = _paid_until(price), _paid_until([min(each, requests.delay_price) for each in price])
    at, secs, load_secs = requests.at, requests.work_secs, requests.load_secs
    warm, cold = math.inf, 0.0
    choices: list[tuple[tuple[bool, float, float], tuple[bool, float, float]]] = []
    for index in range(len(at) - 1):
        begin, end, loaded = at[index], at[index + 1], cold + requests.cold_secs[index]
        served, reloaded = (min(end, begin + each) for each in (secs[index], load_secs + secs[index]))
        if not requests.patient(index):
            reloaded = begin
        # (cost, after a warm request, held until, and again from)
        leaves = (
            (warm + paid(served) - paid(begin), True, served, end),
            (loaded + paid_at_most(reloaded) - paid_at_most(begin), False, reloaded, end),
        )
        ahead = end - load_secs
        be_warm = min(
            (warm + paid(end) - paid(begin), True, end, end),
            (loaded + paid_at_most(end) - paid_at_most(begin), False, end, end),
            *(
                (cost + paid(end) - paid(ahead), was_warm, until, ahead)
                for cost, was_warm, until, _ in leaves
                if requests.loads_ahead and ahead >= until
            ),
        )
        be_cold = min(*leaves, (cold + min(requests.timeout_secs, end - begin + load_secs), False, begin, end))
        choices.append((be_warm[1:], be_cold[1:]))
        warm, cold = be_warm[0], be_cold[0]
    held: list[_Held] = []
    loaded = cold + requests.cold_secs[-1]
    is_warm = warm < loaded
    for index in range(len(at) - 2, -1, -1):
        was_warm, until, again = choices[index][0 if is_warm else 1]
        held.append((at[index], until, math.inf if was_warm else requests.delay_price))
        held.append((again, at[index + 1], math.inf))
        is_warm = was_warm
    return min(warm, loaded), held


def _paid_until(price: Sequence[float]) -> Callable[[float], float]:
    """What a model pays that is loaded from 0 until a time."""
    paid = [0.0, *accumulate(each * BIN_SECS for each in price)]

    def until(when: float) -> float:
        index = min(int(when / BIN_SECS), len(price) - 1)
        return paid[index] + (when - index * BIN_SECS) * price[index]

    return until


def _add(used: list[float], held: Iterable[_Held], price: Sequence[float], share: float) -> None:
    """Adds the share to each bin, for the seconds in it that the model is loaded."""
    for begin, end, at_most in held:
        first, last = int(begin / BIN_SECS), int(end / BIN_SECS)
        for index in range(first, min(last + 1, len(used))):
            if price[index] <= at_most:
                used[index] += share * (min(end, (index + 1) * BIN_SECS) - max(begin, index * BIN_SECS))
