"""`python -m benchmarks.dashboard`: what an open dashboard of a large fleet costs cortex, and how smoothly it scrolls.

The fleet is that of `benchmarks.fleet_size`: neurons whose GPUs' load, temperature and power change in every answer.
The page runs in Chromium without a screen or a GPU, so a computer on a desk draws faster than this.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from benchmarks.fleet_size import healthy_in, write_configuration
from benchmarks.limits import raise_open_files
from benchmarks.loops import run
from benchmarks.scale.http1 import Connection, until_answers
from benchmarks.scale.services import Child, cpu_secs, free_ports, service

_HOST = "127.0.0.1"
_CHROMIUM = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
_PAGES = {"fleet": "Fleet", "models": "Models", "timeline": "Timeline"}

_SCROLL = """async (secs) => {
  const gaps = [];
  const end = performance.now() + secs * 1000;
  let before = performance.now();
  while (performance.now() < end) {
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    gaps.push(now - before);
    before = now;
    const bottom = document.documentElement.scrollHeight - innerHeight;
    scrollTo(0, scrollY >= bottom - 1 ? 0 : scrollY + 40);
  }
  return gaps.sort((one, two) => one - two);
}"""
"""Scrolls down 40 pixels a frame. Returns the milliseconds between frames, shortest first."""


@dataclass(frozen=True)
class Figures:
    """Measurements of one page."""

    page: str
    shown_secs: float  # from the address to the heading
    cortex_cpu_pct: float  # of a core, minus what cortex uses without the page
    frame_p50_ms: float
    frame_p99_ms: float
    frame_max_ms: float
    slow_frames_pct: float  # longer than 50 ms


def measure(page: Page, cortex: Child, base: str, name: str, idle: float, *, secs: float) -> Figures:
    began = time.perf_counter()
    page.goto(f"{base}/#/{name}")
    page.wait_for_selector(f"h1:text-is('{_PAGES[name]}')")
    shown = time.perf_counter() - began
    rate = cpu_rate(page, cortex, secs)
    gaps: list[float] = page.evaluate(_SCROLL, secs)
    return Figures(
        name,
        shown,
        (rate - idle) * 100,
        gaps[len(gaps) // 2],
        gaps[len(gaps) * 99 // 100],
        gaps[-1],
        100 * sum(gap > 50 for gap in gaps) / len(gaps),
    )


def cpu_rate(page: Page, cortex: Child, secs: float) -> float:
    """CPU seconds per second that cortex uses meanwhile."""
    used, began = cpu_secs(cortex.pid), time.perf_counter()
    page.wait_for_timeout(secs * 1000)
    return (cpu_secs(cortex.pid) - used) / (time.perf_counter() - began)


async def until_healthy(port: int, count: int) -> None:
    connection = Connection(_HOST, port)
    deadline = time.perf_counter() + 60
    while healthy_in(await connection.get("/health")) != count:
        if time.perf_counter() > deadline:
            raise TimeoutError(f"{count} neurons are not healthy within 60 s")
        await asyncio.sleep(0.2)
    connection.close()


def table(rows: list[Figures]) -> str:
    names = [field.name for field in fields(Figures)]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells: list[Any] = [getattr(row, name) for name in names]
        lines.append("| " + " | ".join(c if isinstance(c, str) else f"{c:.3g}" for c in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.dashboard", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--neurons", type=int, default=200, metavar="N")
    parser.add_argument("--models", type=int, default=50, metavar="N")
    parser.add_argument("--secs", type=float, default=10.0, help="how long each figure is measured (default 10)")
    given = parser.parse_args()
    raise_open_files()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium: install Debian's package chromium")
    port, metrics_port, neurons_port = free_ports(3)
    with tempfile.TemporaryDirectory(prefix="dashboard-") as name:
        config = write_configuration(
            Path(name), given.neurons, port, metrics_port, neurons_port, catalogue=given.models
        )
        command = [sys.executable, "-m", "benchmarks.scale.neurons", "--port", str(neurons_port)]
        command += ["--count", str(given.neurons), "--models", str(given.models)]
        with Child(command, Path(name) / "neurons.log"), service("cortex", config) as cortex:
            run(until_answers(_HOST, port, "/health", within_secs=30))
            run(until_healthy(port, given.neurons))
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=list(_CHROMIUM))
                page = browser.new_page(viewport={"width": 1280, "height": 900})
                idle = cpu_rate(page, cortex, given.secs)
                base = f"http://{_HOST}:{port}"
                rows = [measure(page, cortex, base, each, idle, secs=given.secs) for each in _PAGES]
                browser.close()
    sys.stdout.write(f"load average {os.getloadavg()[0]:.1f}; cortex without a page {idle * 100:.1f} % of a core\n\n")
    sys.stdout.write(f"{table(rows)}\n")


if __name__ == "__main__":
    main()
