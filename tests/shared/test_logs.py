"""Log records carry the id of the request they belong to, in both formats."""

from __future__ import annotations

import asyncio
import datetime
import io
import json
import logging
import subprocess
import sys

import pytest

from shared.logs import JsonFormatter, TextFormatter, add_request_id, configure_logging
from shared.request_ids import current_request_id, request_id, request_scope
from shared.terminal.command_line import version_text


def logger_to(formatter: logging.Formatter) -> tuple[logging.Logger, io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(add_request_id)
    handler.setFormatter(formatter)
    logger = logging.Logger("cortex.test")
    logger.addHandler(handler)
    return logger, stream


def test_text_ends_with_the_request_id() -> None:
    logger, stream = logger_to(TextFormatter())
    logger.info("polled")
    with request_scope("abc"):
        logger.warning("slow")
    outside, inside = stream.getvalue().splitlines()
    assert outside.endswith(" INFO    cortex.test: polled")
    assert inside.endswith(" WARNING cortex.test: slow id=abc")


def test_json_is_one_object_a_line() -> None:
    logger, stream = logger_to(JsonFormatter())
    with request_scope("abc"):
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logger.exception("failed for %s", "ü")
    (line,) = stream.getvalue().splitlines()
    fields = json.loads(line)
    assert set(fields) == {"time", "level", "logger", "message", "request_id", "exception"}
    assert fields["message"] == "failed for ü"
    assert (fields["level"], fields["logger"], fields["request_id"]) == ("error", "cortex.test", "abc")
    assert "ValueError: two\nlines" in fields["exception"]
    assert fields["time"].endswith("Z")
    written = datetime.datetime.fromisoformat(fields["time"].replace("Z", "+00:00"))
    assert abs((datetime.datetime.now(datetime.timezone.utc) - written).total_seconds()) < 60


def test_json_has_all_fields_outside_a_request() -> None:
    logger, stream = logger_to(JsonFormatter())
    logger.info("started")
    fields = json.loads(stream.getvalue())
    assert fields["request_id"] is None
    assert fields["exception"] is None


async def test_tasks_started_in_a_scope_keep_its_id() -> None:
    """A load started for a request logs that request's id after the request has gone."""

    async def later() -> str | None:
        await asyncio.sleep(0)
        return current_request_id()

    with request_scope("abc"):
        task = asyncio.create_task(later())
    assert current_request_id() is None
    assert await task == "abc"


@pytest.mark.parametrize("given", [None, b"", b"a b", b"a\r\nx: y", b"x" * 129, b"\xff"])
def test_unsafe_request_ids_are_replaced(given: bytes | None) -> None:
    first, second = request_id(given), request_id(given)
    assert first != second
    assert len(first) == 32


def test_safe_request_ids_are_kept() -> None:
    assert request_id(b"trace-1:a.b_C") == "trace-1:a.b_C"


def test_configure_logging_chooses_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.Logger("root")
    monkeypatch.setattr(logging, "getLogger", lambda _=None: root)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logging("info", "json")
    root.info("hello")
    assert json.loads(stream.getvalue())["message"] == "hello"


def test_debug_is_for_our_own_loggers() -> None:
    """aiosqlite would log every statement with its values: digests of keys, names, usage."""
    script = (
        "import logging; from shared.logs import configure_logging; configure_logging('debug')\n"
        "for name in ('aiosqlite', 'cortex.accounts', 'neuron.engine', '__main__'):\n"
        "    logging.getLogger(name).debug('of %s', name)\n"
        "logging.getLogger('aiosqlite').info('of a library')"
    )
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, check=True)
    assert [line.partition("of ")[2] for line in done.stderr.splitlines()] == [
        "cortex.accounts",
        "neuron.engine",
        "__main__",
        "a library",
    ]


def test_version_names_the_build() -> None:
    assert version_text("cortex") in ("cortex 0.1.0 (pure Python)", "cortex 0.1.0 (compiled)")
