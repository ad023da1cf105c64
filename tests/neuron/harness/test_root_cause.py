"""Why an engine exited, from its output. `vllm_logs/` has the real output of vLLM 0.32 for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neuron.harness.registry import HARNESSES
from neuron.harness.vllm.errors import root_cause
from neuron.lifecycle.failure_cause import exit_reason

LOGS = Path(__file__).parent / "vllm_logs"


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("badflag", "unrecognized arguments: --no-such-flag"),
        ("badvalue", "argument --max-model-len: invalid human_readable_int_or_auto value: 'banana'"),
        ("nopath", "HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/tmp/does"),
        ("offline", "LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder"),
        ("toolong", "User-specified max_model_len (100000) is greater than the derived max_model_len"),
        ("kv", "ValueError: Available memory on node 0 (7.53/9.09 GiB) on kv cache allocation is less than requested"),
        ("sleep", "Sleep mode is not supported on current platform."),
        ("json", "ValueError: No available memory for the cache blocks."),
        ("tp2", "AssertionError: Not enough allowed NUMA nodes to bind threads of 2 local CPUWorkers."),
    ],
)
def test_real_failures(log: str, cause: str) -> None:
    """The cause is found anywhere in the output."""
    found = root_cause((LOGS / f"{log}.txt").read_text().splitlines())
    assert found is not None
    assert found.startswith(cause)
    assert "input_value" not in found


@pytest.mark.parametrize("log", ["badflag", "nopath", "sleep", "tp2", "toolong"])
@pytest.mark.parametrize("prefix", ["2026-11-29T19:20:11.123Z stderr F ", "node7 vllm[312]: ", "[1,0]<stderr>: "])
def test_unknown_prefixes_hide_no_cause(log: str, prefix: str) -> None:
    """What collects the output puts something of its own before each line."""
    lines = (LOGS / f"{log}.txt").read_text().splitlines()
    assert root_cause([prefix + line for line in lines]) == root_cause(lines)


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        ({"level": "error", "msg": "ValueError: x"}, "ValueError: x"),
        ({"severity": "ERROR", "event": "failed", "exception": "Traceback:\nKeyError: 'y'"}, "KeyError: 'y'"),
        ({"levelname": "INFO", "message": "all is well"}, None),
        ({"no": "message"}, None),
    ],
)
def test_records_in_json(record: dict[str, str], cause: str | None) -> None:
    """Loggers give different names to the same parts. The prefix of a process may come first."""
    for prefix in ("", "(EngineCore pid=6) "):
        assert root_cause([prefix + json.dumps(record), "{not json"]) == cause


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        ([], None),
        (["(APIServer pid=1) INFO 11-23 11:11:55 [a.py:1] all is well"], None),
        (["(APIServer pid=1) WARNING 11-23 11:11:55 [a.py:1] may cause `OSError: [Errno 24] x`"], None),
        (["OSError: [Errno 98] Address already in use"], "OSError: [Errno 98] Address already in use"),
        (
            [
                "(Worker_TP1 pid=7) ERROR 11-23 11:11:55 [w.py:1] torch.OutOfMemoryError: CUDA out of memory.",
                "(EngineCore pid=6) ERROR 11-23 11:11:55 [c.py:1] RuntimeError: Worker failed",
                "RuntimeError: Engine core initialization failed. See root cause above.",
                "UserWarning: resource_tracker: there appear to be leaks",
            ],
            "OutOfMemoryError: CUDA out of memory.",
        ),
        (
            ["ImportError: libcudart.so.13: cannot open", "RuntimeError: Engine core initialization failed."],
            "ImportError: libcudart.so.13: cannot open",
        ),
        (
            ["RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'x': -9}"],
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'x': -9}",
        ),
        (["  raise ValueError(", "AssertionError"], "AssertionError"),
    ],
)
def test_cause_of(lines: list[str], cause: str | None) -> None:
    """Engine processes before the server, causes before references to them, no warnings."""
    assert root_cause(lines) == cause


@pytest.mark.parametrize(
    ("code", "lines", "reason"),
    [
        (-9, ["INFO: fine"], "killed by signal 9 (out of memory?)"),
        (-11, [], "killed by signal 11"),
        (-9, ["ValueError: x"], "killed by signal 9 (out of memory?); its log says: ValueError: x"),
        (1, ["ValueError: x"], "ValueError: x"),
        (0, ["INFO: bye "], "exited with status 0; its last line: INFO: bye"),
        (3, [], "exited with status 3 and no output"),
    ],
)
def test_reason_of_an_exit(code: int, lines: list[str], reason: str) -> None:
    """A signal comes first: the log cannot mention it."""
    assert exit_reason(HARNESSES["vllm"], code, lines) == reason


@pytest.mark.parametrize(
    "line",
    [
        "OSError: [Errno 98] Address already in use",
        "OSError: [Errno 98] error while attempting to bind on address ('127.0.0.1', 20000): address already in use",
        "listen tcp 127.0.0.1:20000: bind: address already in use",
        "Error: listen EADDRINUSE: address already in use 127.0.0.1:20000",
        "main: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 20000",
    ],
)
def test_other_words_for_a_port_that_is_taken(line: str) -> None:
    """Whatever the engine is written in, it is started again on another port."""
    assert HARNESSES["vllm"].port_was_taken(["INFO: starting", line])
    assert not HARNESSES["vllm"].port_was_taken(["INFO: starting"])
