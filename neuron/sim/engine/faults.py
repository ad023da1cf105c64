"""Faults that a simulated engine can have on demand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum


class Fault(str, Enum):
    """One fault; the values are those of `--fault`."""

    NEVER_READY = "never-ready"
    OOM_AT_LOAD = "oom-at-load"
    UNSUPPORTED_MODEL = "unsupported-model"
    DIE_MID_STREAM = "die-mid-stream"
    HANG = "hang"
    IGNORE_SIGTERM = "ignore-sigterm"
    CRASH_AFTER_SECS = "crash-after-secs"
    SPAWN_CHILD = "spawn-child"
    BAD_HEALTH = "bad-health"
    LOSE_EARLY_SIGTERM = "lose-early-sigterm"
    SLOW_PREFILL = "slow-prefill"
    LEAVE_FILES = "leave-files"
    NO_METRICS = "no-metrics"  # 404
    BARE_METRICS = "bare-metrics"  # none of vLLM's
    HANGING_METRICS = "hanging-metrics"
    CHAT_ONLY = "chat-only"  # 404 for Anthropic's messages and OpenAI's responses
    CHAT_ONLY_405 = "chat-only-405"
    NO_TOKENIZE = "no-tokenize"  # 404


# Defaults of `--fault-after`.
_DEFAULT_AFTER = {
    Fault.DIE_MID_STREAM: 3.0,
    Fault.HANG: 3.0,
    Fault.CRASH_AFTER_SECS: 1.0,
    Fault.BAD_HEALTH: 1.0,
    Fault.SLOW_PREFILL: 5.0,
}

# An orphan that a failed test leaves behind exits after this time.
_CHILD_LIFETIME_SECS = 600


@dataclass(frozen=True)
class Faults:
    """The faults of one engine. `after` counts tokens, requests or seconds, depending on the fault."""

    active: frozenset[Fault] = frozenset()
    after: float | None = None

    def __contains__(self, fault: Fault) -> bool:
        return fault in self.active

    @property
    def ignores_early_sigterm(self) -> bool:
        """True when SIGTERM is ignored from the start."""
        return Fault.IGNORE_SIGTERM in self.active or Fault.LOSE_EARLY_SIGTERM in self.active

    def due(self, fault: Fault, count: float) -> bool:
        """True when `fault` is active and `count` has reached its threshold."""
        return fault in self.active and count >= self.threshold(fault)

    def threshold(self, fault: Fault) -> float:
        return _DEFAULT_AFTER[fault] if self.after is None else self.after


def die() -> None:
    """Kills this process as the kernel's OOM killer would: at once, without output."""
    os.kill(os.getpid(), signal.SIGKILL)


def spawn_stubborn_child() -> subprocess.Popen[bytes]:
    """Starts a child in this session that ignores SIGTERM, keeps the output pipes open and survives this process.

    vLLM's EngineCore and workers do that: only SIGKILL to the whole group ends them. An ignored signal stays ignored
    across exec, so the child ignores it from its first instruction.
    """
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        code = f"import signal; signal.alarm({_CHILD_LIFETIME_SECS}); signal.pause()"
        return subprocess.Popen([sys.executable, "-S", "-E", "-c", code], stdin=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGTERM, before)
