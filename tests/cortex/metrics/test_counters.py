"""What the request path counts, alone and added up."""

from __future__ import annotations

import msgspec
import pytest

from cortex.metrics.counters import (
    FIRST_BYTE_BUCKETS,
    REQUEST_BUCKETS,
    CallerSeries,
    Counters,
    Histogram,
    Series,
    merged,
)
from cortex.metrics.request_tally import RequestTally
from cortex.upstream.usage import Usage


def counted(times: int = 1) -> Counters:
    """Counters of everything that is counted, each `times` times."""
    counts = RequestTally()
    for _ in range(times):
        counts.request("m", "beast", 200, 0.25, 0.004, waited_secs=0.125)
        counts.request("m", "beast", 502, 0.5, None)
        counts.answer("m", "beast", 70, 900)
        counts.stream("m", "beast", 0.25, 1.5, 3)
        counts.failover("m", "beast", "reset")
        counts.caller("ci", "m", 200, Usage(3, 5, 2))
        counts.caller("ci", "m", 502, None)
        counts.caller("oidc:ann@example.com", "m", 200, None)
        counts.error("m", "beast", "upstream_unreachable")
        counts.tokens("m", "beast", 3, 5, 2)
        counts.request('odd "name"\n', "benjy", 200, 7200.0, 7200.0)
        counts.usage_records_dropped(1)
    return counts.collect(callers=True)


def test_everything_is_counted_once() -> None:
    """Statuses, errors, tokens and durations are counted for their model and neuron."""
    series = dict(counted().items())
    assert set(series) == {("m", "beast"), ('odd "name"\n', "benjy")}
    here = series["m", "beast"]
    assert (here.statuses, here.errors) == ({200: 1, 502: 1}, {"upstream_unreachable": 1})
    assert here.tokens == {"prompt": 3, "completion": 5, "cached": 2}
    assert (sum(here.duration.counts), here.duration.secs) == (2, 0.75)
    assert (sum(here.first_byte.counts), here.first_byte.secs) == (1, 0.004)
    assert (sum(here.first_event.counts), here.first_event.secs) == (1, 0.25)
    assert (sum(here.per_token.counts), here.per_token.secs) == (1, 0.5)
    assert (sum(here.waits.counts), here.waits.secs) == (1, 0.125)
    assert (here.failovers, here.body_bytes) == ({"reset": 1}, {"request": 70, "answer": 900})
    assert counted(2).dropped_usage_records == 2


def test_requests_are_counted_by_key_and_people_only_together() -> None:
    """Addresses of people are not for a page of metrics."""
    callers = counted().callers
    assert callers["ci"]["m"] == CallerSeries({200: 1, 502: 1}, {"prompt": 3, "completion": 5, "cached": 2})
    assert callers["oidc:people"]["m"] == CallerSeries({200: 1})
    assert len(callers) == 2


def test_keys_that_are_gone_are_forgotten() -> None:
    """And keys are told only to those that ask for them: there may be thousands."""
    counts = RequestTally()
    for name in ("ci", "gone", "oidc:ann@example.com"):
        counts.caller(name, "m", 200, None)
    counts.keep_callers({"ci", "new"})
    assert set(counts.collect(callers=True).callers) == {"ci", "oidc:people"}
    assert counts.collect().callers == {}


def test_a_stream_of_one_token_has_no_time_between_tokens() -> None:
    counts = RequestTally()
    counts.stream("m", "beast", 0.25, 0.0, 0)
    (series,) = (series for _, series in counts.collect().items())
    assert (sum(series.first_event.counts), sum(series.per_token.counts)) == (1, 0)


def test_what_was_collected_changes_no_more() -> None:
    counts = RequestTally()
    counts.request("m", "beast", 200, 0.25, 0.004)
    before = counts.collect()
    counts.request("m", "beast", 200, 0.25, 0.004)
    counts.tokens("m", "beast", 3, 5, 0)
    counts.error("m", "beast", "upstream_unreachable")
    (series,) = (series for _, series in before.items())
    assert (series.statuses, series.tokens, series.errors) == ({200: 1}, {}, {})
    assert (sum(series.duration.counts), sum(series.first_byte.counts)) == (1, 1)
    assert before != counts.collect()


def test_an_answer_without_cached_tokens_counts_none() -> None:
    counts = RequestTally()
    counts.tokens("m", "beast", 3, 0, 0)
    (series,) = (series for _, series in counts.collect().items())
    assert series.tokens == {"prompt": 3, "completion": 0}


@pytest.mark.parametrize("buckets", [REQUEST_BUCKETS, FIRST_BYTE_BUCKETS])
def test_a_duration_falls_into_the_bucket_that_ends_with_it(buckets: tuple[float, ...]) -> None:
    """Upper bounds are inclusive, as Prometheus defines `le`; what is above all is kept too."""
    for place, bound in enumerate(buckets):
        histogram = Histogram.of(buckets)
        histogram.observe(buckets, bound)
        histogram.observe(buckets, bound * 1.0001)
        assert [place, place + 1] == [at for at, count in enumerate(histogram.counts) if count]


def test_counters_travel_between_processes() -> None:
    """Counters survive both of msgspec's encodings, and others can be added to them afterwards."""
    there = msgspec.msgpack.decode(msgspec.msgpack.encode(counted(3)), type=Counters)
    assert there == counted(3) == msgspec.json.decode(msgspec.json.encode(counted(3)), type=Counters)
    there.add(counted())
    assert there == counted(4)


@pytest.mark.parametrize("field", Series.__struct_fields__)
def test_the_sum_of_several_workers_has_every_field(field: str) -> None:
    """A field that `Series.add` forgets would be missing from the metrics page without an error."""
    series = dict(counted().items())["m", "beast"]
    assert getattr(series, field) != getattr(Series(), field), "extend `counted` so that it fills this field"
    total = Series()
    total.add(series)
    assert getattr(total, field) == getattr(series, field)


def test_the_sum_of_several_workers_has_all_fields() -> None:
    """A new field of Counters needs a line in `Counters.add`."""
    assert Counters.__struct_fields__ == ("series", "dropped_usage_records", "callers")
    assert merged([Counters(dropped_usage_records=1), Counters(dropped_usage_records=2)]).dropped_usage_records == 3


def test_counters_add_up_and_stay_unchanged() -> None:
    """Three workers count as much as one that did it all; the sum shares no state with them."""
    one, two = counted(), counted(2)
    total = merged([one, two, Counters()])
    assert total == counted(3)
    total.add(counted())
    assert (one, two) == (counted(), counted(2))
    assert merged([]) == Counters()


def test_other_buckets_are_not_added() -> None:
    """A sum over different buckets would be wrong."""
    foreign = counted()
    foreign.series["m"]["beast"].duration.counts.append(1)
    with pytest.raises(ValueError, match="longer"):
        merged([counted(), foreign])
