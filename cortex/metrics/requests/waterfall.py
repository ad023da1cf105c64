"""Where the time of a request went. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from cortex.fleet.timeline.spans import StatusSpan
from cortex.metrics.requests.entries import FailedAttempt, Wait
from shared.protocol import ModelStatus

_COMING = (ModelStatus.LOADING, ModelStatus.RELOADING, ModelStatus.RECOVERING)
_SHORTEST = 0.02
"""Waits, and gaps in them, that are shorter, in seconds, are not told."""


class WaterfallStep(msgspec.Struct, frozen=True, omit_defaults=True):
    """A part of a request's life, in seconds since it came.

    `kind`: wait, unload (`name`: the model that had to go), load (`name`: the phase), wake, failed (`name`: why),
    engine (until the first byte) or answer. `node`: where.
    """

    kind: str
    name: str
    since: float
    until: float
    node: str = ""


class SpansByModel:
    """The timeline's spans, to be found by the model whose requests waited for them."""

    def __init__(self, spans: Iterable[StatusSpan]) -> None:
        self._spans: defaultdict[str, list[StatusSpan]] = defaultdict(list)
        for span in spans:
            if span.status in _COMING or span.status == ModelStatus.SLEEPING:
                self._spans[span.model].append(span)
            if span.displaced_by is not None:
                self._spans[span.displaced_by].append(span)

    def steps(self, model: str, started: float, now: float) -> list[WaterfallStep]:
        """What was done for requests for the model. Both times are Unix times; `started` counts as 0."""
        return [
            step
            for span in self._spans.get(model, ())
            if span.since < now and (span.until is None or span.until > started)  # most of a day's spans are not
            for step in (_load(span, started, now) if span.model == model else _unload(span, started, now))
        ]


def waterfall(
    model: str,
    started: float,
    secs: float,
    spans: SpansByModel,
    *,
    node: str,
    first_byte_secs: float | None,
    attempts: Sequence[FailedAttempt],
    waits: Sequence[Wait],
) -> list[WaterfallStep]:
    """The steps of a request, in the order in which they began. `started`: Unix time; `secs`: up to its end, or to now.
    `node`: where its engine is, "" without one."""
    found = spans.steps(model, started, started + secs) if waits else []
    steps = [step for since, until in waits for step in _filled(_clipped(found, since, until), since, until)]
    at = 0.0
    for attempt in attempts:
        began = max([at, *(until for _, until in waits if until <= attempt.at)])
        steps.append(WaterfallStep("failed", attempt.reason, began, attempt.at, attempt.node))
        at = attempt.at
    sent = max([at, *(until for _, until in waits)])
    head = secs if first_byte_secs is None else first_byte_secs
    if node and head > sent:
        steps.append(WaterfallStep("engine", "until the first byte", sent, head, node))
    if node and first_byte_secs is not None:
        steps.append(WaterfallStep("answer", "answering", max(head, sent), max(secs, head), node))
    return sorted(steps, key=lambda step: step.since)


def _load(span: StatusSpan, started: float, now: float) -> Iterator[WaterfallStep]:
    until = (now if span.until is None else span.until) - started
    if span.status == ModelStatus.SLEEPING:
        if span.until is not None:
            yield WaterfallStep("wake", "waking", 0.0, until, span.node)
        return
    begins = [(phase.name, phase.since - started) for phase in span.phases] or [(span.status, span.since - started)]
    ends = [since for _, since in begins[1:]] + [until]
    if begins[0][1] - (span.since - started) > _SHORTEST:
        yield WaterfallStep("load", "starting", span.since - started, begins[0][1], span.node)
    for (name, since), end in zip(begins, ends, strict=True):
        yield WaterfallStep("load", name, since, end, span.node)


def _unload(span: StatusSpan, started: float, now: float) -> Iterator[WaterfallStep]:
    if span.evicted_since is not None:
        until = now if span.until is None else span.until
        yield WaterfallStep("unload", span.model, span.evicted_since - started, until - started, span.node)


def _clipped(steps: Iterable[WaterfallStep], since: float, until: float) -> list[WaterfallStep]:
    inside = (
        msgspec.structs.replace(step, since=max(step.since, since), until=min(step.until, until)) for step in steps
    )
    return sorted((step for step in inside if step.until > step.since), key=lambda step: step.since)


def _filled(steps: list[WaterfallStep], since: float, until: float) -> list[WaterfallStep]:
    """With the waiting in between."""
    filled, at = [], since
    for step in steps:
        if step.since - at > _SHORTEST:
            filled.append(WaterfallStep("wait", "waiting", at, step.since))
        filled.append(step)
        at = max(at, step.until)
    if until - at > _SHORTEST:
        filled.append(WaterfallStep("wait", "waiting", at, until))
    return filled
