"""Whether an answer is the one the engine sent."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.engine.answer_spec import AnswerSpec
from benchmarks.engine.answers import DONE, plain_body, stream_payload
from benchmarks.load.connection import Answer

_TOKEN = re.compile(rb" tok-(\d{6})")


def fault(answer: Answer | None, spec: AnswerSpec) -> str | None:
    """The fault of an answer, or None. A gateway may reformat JSON, but no token may be missing,
    doubled or out of place, a stream ends with [DONE], and `usage` is there."""
    if answer is None:
        return "connection lost or broken framing"
    if answer.status != 200:
        return f"status {answer.status}"
    if unchanged(answer, spec):
        return None
    return _stream_fault(answer.body, spec) if spec.chunks else _plain_fault(answer.body, spec)


def unchanged(answer: Answer, spec: AnswerSpec) -> bool:
    """Byte for byte what the engine sent as the body."""
    return answer.body == (stream_payload(spec.chunks) if spec.chunks else plain_body(spec.size))


def _stream_fault(body: bytes, spec: AnswerSpec) -> str | None:
    if not body.rstrip(b"\n").endswith(DONE.rstrip(b"\n")):
        return "no [DONE] at the end"
    numbers = [int(number) for number in _TOKEN.findall(body)]
    if numbers != list(range(spec.chunks)):
        return f"{len(numbers)} tokens in order, not {spec.chunks}" if numbers else "no tokens"
    return None if b'"usage"' in body else "no usage"


def _plain_fault(body: bytes, spec: AnswerSpec) -> str | None:
    try:
        got, sent = json.loads(body), json.loads(plain_body(spec.size))
        same = got["choices"][0]["message"]["content"] == sent["choices"][0]["message"]["content"]
        tokens = got["usage"]["completion_tokens"] == sent["usage"]["completion_tokens"]
    except (ValueError, LookupError, TypeError):
        return "not a chat completion"
    return None if same and tokens else "another text or usage"


@dataclass
class AnswerCounts:
    """What became of the requests of one measurement. Times in nanoseconds."""

    answers: int = 0
    unchanged: int = 0
    body_bytes: int = 0
    pieces: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    first_byte_ns: list[int] = field(default_factory=list)

    def add(self, answer: Answer | None, spec: AnswerSpec) -> None:
        """Counts an answer, or the lack of one."""
        wrong = fault(answer, spec)
        if wrong is not None:
            self.faults[wrong] += 1
            return
        assert answer is not None
        self.answers += 1
        self.unchanged += unchanged(answer, spec)
        self.body_bytes += len(answer.body)
        self.pieces += answer.pieces
        self.first_byte_ns.append(answer.first_byte_ns)

    @property
    def failed(self) -> int:
        """Requests that did not get their answer."""
        return sum(self.faults.values())

    def merge(self, other: AnswerCounts) -> None:
        """Adds other counts to these."""
        self.answers += other.answers
        self.unchanged += other.unchanged
        self.body_bytes += other.body_bytes
        self.pieces += other.pieces
        self.faults += other.faults
        self.first_byte_ns += other.first_byte_ns
