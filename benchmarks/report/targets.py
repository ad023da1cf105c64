"""The targets for cortex, checked against the results."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.results import BASE, Results

US = "cortex"
PYTHON_RIVALS = ("aiohttp", "litellm")
RUST_RIVALS = ("vllm-router", "smg")
MAX_KIB_PER_STREAM = 16.0


@dataclass(frozen=True)
class Target:
    """One target. `passed` is None when its case was not measured."""

    text: str
    figures: str
    passed: bool | None

    @property
    def verdict(self) -> str:
        """`pass`, `FAIL` or `not measured`."""
        return "not measured" if self.passed is None else "pass" if self.passed else "FAIL"

    def __str__(self) -> str:
        return f"{self.verdict:12} {self.text}: {self.figures}"


def targets(results: Results) -> list[Target]:
    """Every target, in the order of the report."""
    found = []
    for case, streams in (("stream200", 200), ("stream1000", 1000)):
        found.append(_at_most(results, case, "cpu_us", 1.15, f"CPU per chunk at {streams} streams"))
        found.append(_below(results, case, "cpu_us", (*RUST_RIVALS, *PYTHON_RIVALS), f"CPU per chunk at {streams}"))
    found.append(_at_most(results, "plain", "cpu_us", 3.0, "CPU per plain request"))
    found.append(_below(results, "plain", "cpu_us", ("vllm-router",), "CPU per plain request"))
    found.append(_first_byte(results))
    found.append(_memory(results))
    found.append(_no_error(results))
    found.append(_two_workers(results))
    found.append(_protocol_v1(results))
    return found


def _at_most(results: Results, case: str, figure: str, times: float, what: str) -> Target:
    ratio = results.ratio(case, US, figure)
    if ratio is None:
        return Target(f"{what} ≤ {times:g} x nginx", "-", None)
    ours, theirs = results.figure(case, US, figure), results.figure(case, BASE, figure)
    return Target(f"{what} ≤ {times:g} x nginx", f"{ratio:.2f} x ({ours:.1f} to {theirs:.1f} µs)", ratio <= times)


def _below(results: Results, case: str, figure: str, rivals: tuple[str, ...], what: str) -> Target:
    text = f"{what} below {', '.join(rivals)}"
    ours = results.figure(case, US, figure)
    theirs = {rival: results.figure(case, rival, figure) for rival in rivals}
    known = {rival: value for rival, value in theirs.items() if value is not None}
    if ours is None or not known:
        return Target(text, "-", None)
    shown = f"{ours:.1f} µs; " + ", ".join(f"{rival} {value:.1f}" for rival, value in known.items())
    missing = [rival for rival, value in theirs.items() if value is None]
    if missing:
        shown += f"; not measured: {', '.join(missing)}"
    below = all(ours < value for value in known.values())
    return Target(text, shown, None if below and missing else below)


def _first_byte(results: Results) -> Target:
    text = "added time to first byte at light load, p99 ≤ 2 x nginx"
    ratio = results.ratio("ttfb", US, "added_p99_us")
    if ratio is None:
        return Target(text, "-", None)
    ours, theirs = (results.figure("ttfb", name, "added_p99_us") for name in (US, BASE))
    return Target(text, f"{ratio:.2f} x ({ours:.0f} to {theirs:.0f} µs)", ratio <= 2.0)


def _memory(results: Results) -> Target:
    kib = results.figure("idle8000", US, "kib_per_stream")
    text = f"RSS per open stream ≤ {MAX_KIB_PER_STREAM:g} KiB"
    return Target(text, "-", None) if kib is None else Target(text, f"{kib:.1f} KiB", kib <= MAX_KIB_PER_STREAM)


def _no_error(results: Results) -> Target:
    text = "8,000 open streams on one worker without an error"
    cell = results.find("idle8000", US)
    if cell is None:
        return Target(text, "-", None)
    ended = cell.values("ended_well")
    well = bool(ended) and not cell.faults and all(value == 8000 for value in ended)
    return Target(text, f"{min(ended, default=0):.0f} ended well, {sum(cell.faults.values())} errors", well)


def _two_workers(results: Results) -> Target:
    text = "two workers: CPU per request not more than 10 % above one worker's"
    ratio = results.ratio("paced", "cortex-2", "cpu_us", base=US)
    if ratio is None:
        return Target(text, "-", None)
    floor = results.ratio("paced", "nginx-2", "cpu_us", base=BASE)
    beside = "" if floor is None else f"; a second worker of nginx {(floor - 1) * 100:+.1f} %"
    return Target(text, f"{(ratio - 1) * 100:+.1f} %{beside}", ratio <= 1.10)


def _protocol_v1(results: Results) -> Target:
    text = "CPU per plain request to a protocol v1 neuron's engine ≤ 1.2 x that to ours"
    ratio = results.ratio("plain", "cortex-v1", "cpu_us", base=US)
    if ratio is None:
        return Target(text, "-", None)
    theirs, ours = (results.figure("plain", name, "cpu_us") for name in ("cortex-v1", US))
    return Target(text, f"{ratio:.2f} x ({theirs:.1f} to {ours:.1f} µs)", ratio <= 1.2)
