"""docs/benchmarks.md: the generated part, the figures beside it, the plot."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from benchmarks.contenders.contender import ContenderUnavailable
from benchmarks.contenders.packages import environment
from benchmarks.report import plot_path
from benchmarks.report.bars import bars
from benchmarks.report.table import spreads, table
from benchmarks.results import Results

BEGIN, END = "<!-- gateways: begin, made by make bench -->", "<!-- gateways: end -->"
_MATPLOTLIB = "matplotlib==3.11.2"


def write(results: Results, docs: Path) -> list[str]:
    """Replaces the generated part of benchmarks.md in `docs`, and writes benchmarks.json and benchmarks.png beside it;
    what could not be done, as lines.

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
    """The page with another generated part.

    Raises:
        ValueError: it has no markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} … {END} in the page")
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{after}"


def generated(results: Results) -> str:
    """Machine, table, bars, and what lies behind the medians."""
    told = results.machine
    parts = [
        f"Measured {told['date']} at {told['commit']}: {told['cpu']}, {told['cpus']} CPUs, {told['memory_gib']} GiB, "
        f"{told['kernel']} (virtual machine: {told['hypervisor']}), Python {told['python']} on {told['loop']}, "
        f"{told['packages']}. {_rounds(results)} In brackets: times nginx.",
        table(results),
        "![CPU per request and chunk, first byte, memory](benchmarks.png)",
        "### The bars",
        "\n".join(
            ["| | bar | measured |", "|---|---|---|", *(_bar(b.verdict, b.text, b.figures) for b in bars(results))]
        ),
        "### What is switched on",
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
        text += " A quick run: less work in each case."
    foreign = results.foreign()
    return text if foreign is None else f"{text} Others had {foreign:.0%} of the gateway's CPU meanwhile."


def _bar(verdict: str, text: str, figures: str) -> str:
    return f"| {verdict} | {text} | {figures} |"


def draw(figures: Path, picture: Path) -> None:
    """Draws the plot, with our own matplotlib or with that of an environment made for it.

    Raises:
        ContenderUnavailable: there is none and it cannot be installed.
        SubprocessError: the drawing failed.
    """
    ours = importlib.util.find_spec("matplotlib") is not None
    python = Path(sys.executable) if ours else environment(_MATPLOTLIB) / "python"
    subprocess.run([python, plot_path(), figures, picture], check=True, timeout=120)
