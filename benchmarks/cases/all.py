"""The cases by name."""

from __future__ import annotations

from benchmarks.cases.first_byte import BURST_200, FIRST_BYTE
from benchmarks.cases.idle import IDLE_8000
from benchmarks.cases.large import ANSWER_1M, PROMPT_10M
from benchmarks.cases.plain import PACED, PLAIN, SATURATION
from benchmarks.cases.streams import STREAM_200, STREAM_1000

CASES = {
    case.name: case
    for case in (
        PLAIN,
        PACED,
        STREAM_200,
        STREAM_1000,
        FIRST_BYTE,
        BURST_200,
        SATURATION,
        PROMPT_10M,
        ANSWER_1M,
        IDLE_8000,
    )
}
