"""Writes docs/benchmarks.md (its generated part), docs/benchmarks.json and docs/benchmarks.png."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from benchmarks.contenders.contender import ContenderUnavailable
from benchmarks.contenders.packages import environment
from benchmarks.report import plot_path
from benchmarks.report.table import spreads, table
from benchmarks.report.targets import targets
from benchmarks.results import Results

BEGIN, END = "<!-- gateways: begin, made by make bench -->", "<!-- gateways: end -->"
_MATPLOTLIB = "matplotlib==3.11.2"


def write(results: Results, docs: Path) -> list[str]:
    """Replaces the generated part of benchmarks.md in `docs` and writes benchmarks.json and benchmarks.png next to it.
    Returns a line for each problem.

    Raises:
        ValueError: the file has no markers.
    """
    problems = []
    results.save(docs / "benchmarks.json")
    try:
        draw(docs / "benchmarks.json", docs / "benchmarks.png")
    except (ContenderUnavailable, subprocess.SubprocessError, OSError) as error:
        problems.append(f"no plot: {error}")
    page = docs / "benchmarks.md"
    page.write_text(replaced(page.read_text(encoding="utf-8"), generated(results)), encoding="utf-8")
    return problems


def replaced(page: str, part: str) -> str:
    """The page with `part` as its generated part.

    Raises:
        ValueError: the page has no markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} … {END} in the page")
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{after}"


def generated(results: Results) -> str:
    """The generated part: machine, table, plot, targets, settings of each gateway, spread of the rounds."""
    machine = results.machine
    parts = [
        f"Measured {machine['date']} at {machine['commit']}: {machine['cpu']}, {machine['cpus']} CPUs, "
        f"{machine['memory_gib']} GiB, {machine['kernel']} (virtual machine: {machine['hypervisor']}), "
        f"Python {machine['python']} on {machine['loop']}, {machine['packages']}. {_rounds(results)} "
        "In brackets: the ratio to nginx.",
        table(results),
        "![CPU per request and chunk, first byte, memory](benchmarks.png)",
        "### Targets",
        "\n".join(
            [
                "| | target | measured |",
                "|---|---|---|",
                *(f"| {t.verdict} | {t.text} | {t.figures} |" for t in targets(results)),
            ]
        ),
        "### What does each gateway do?",
        "\n".join(
            f"- {each['title']} {each['version']}: {each['switched_on']}" for each in results.contenders.values()
        ),
        *(
            ["Skipped: " + "; ".join(f"{name} ({why})" for name, why in results.skipped.items())]
            if results.skipped
            else []
        ),
        "<details><summary>Spread of the rounds, and faults</summary>",
        spreads(results),
        "</details>",
    ]
    return "\n\n".join(parts)


def _rounds(results: Results) -> str:
    rounds = results.settings["rounds"]
    text = f"Medians of {rounds} rounds." if rounds > 1 else "One round."
    if results.settings.get("quick"):
        text += " A quick run: fewer requests in each case."
    foreign = results.foreign()
    return text if foreign is None else f"{text} Other processes used {foreign:.0%} of the gateway's CPU."


def draw(figures: Path, picture: Path) -> None:
    """Draws the plot, with matplotlib from this environment or from one made for it.

    Raises:
        ContenderUnavailable: matplotlib cannot be installed.
        SubprocessError: the plot script failed.
    """
    installed = importlib.util.find_spec("matplotlib") is not None
    python = Path(sys.executable) if installed else environment(_MATPLOTLIB) / "python"
    subprocess.run([python, plot_path(), figures, picture], check=True, timeout=120)
