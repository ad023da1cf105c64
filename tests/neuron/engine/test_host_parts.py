"""Log files, ports, the memory of processes, and the state directory."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from neuron.engine.engine import memory_of
from neuron.engine.log import EngineLog, LogFollower
from neuron.engine.ports import PortPool, lingering_ports
from neuron.engine.state_dir import StateDir, StateDirError
from shared.errors import Unavailable
from tests.ports import free_port

# --- log files


def test_tail_is_bounded(tmp_path: Path) -> None:
    """Lines and bytes are limited; an incomplete first line is dropped."""
    path = tmp_path / "engine.log"
    path.write_text("".join(f"line {number:04}\n" for number in range(1000)))
    log = EngineLog(path)
    assert log.tail(2) == ["line 0998", "line 0999"]
    assert log.tail(10_000, max_bytes=25) == ["line 0998", "line 0999"]
    assert log.tail(0) == []
    assert EngineLog(tmp_path / "none").tail(5) == []


def test_follower_gives_each_line_once(tmp_path: Path) -> None:
    """Incomplete lines wait for their rest, progress bars count as lines, invalid UTF-8 is replaced."""
    path = tmp_path / "engine.log"
    follower = LogFollower(EngineLog(path))
    assert follower.new_lines() == []
    path.write_bytes(b"one\ntw")
    assert follower.new_lines() == ["one"]
    with path.open("ab") as file:
        file.write(b"o\r 10%\r 20%\r\n\xff\n\nlast")
    assert follower.new_lines() == ["two", " 10%", " 20%", "\ufffd"]
    path.write_bytes(b"new\n")
    assert follower.new_lines() == ["new"]


def test_log_is_trimmed_while_it_is_written_to(tmp_path: Path) -> None:
    """Only its end is kept, and the writer continues after it."""
    path = tmp_path / "engine.log"
    with path.open("ab", buffering=0) as writer:
        writer.write(b"".join(b"line %06d\n" % number for number in range(100_000)))
        EngineLog(path).trim(max_bytes=1_000_000)
        writer.write(b"after\n")
    assert path.stat().st_size < 600_000
    assert EngineLog(path).tail(2) == ["line 099999", "after"]
    EngineLog(path).trim()
    assert EngineLog(path).tail(1) == ["after"]


# --- ports


def test_ports_in_use_are_skipped() -> None:
    """Reserved and bound ports are skipped, listening or not; a released one is free again."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken = free_port()
        other.bind(("127.0.0.1", taken))
        pool = PortPool("127.0.0.1")
        with pytest.raises(Unavailable) as none_left:
            pool.reserve((taken, taken))
        assert none_left.value.code == "no_free_port"
    assert pool.reserve((taken, taken)) == taken
    with pytest.raises(Unavailable):
        pool.reserve((taken, taken))
    pool.release(taken)
    assert pool.reserve((taken, taken)) == taken


def test_released_port_is_reused_last() -> None:
    """A caller that still has its address does not reach another model's engine."""
    pool = PortPool("127.0.0.1")
    first = pool.reserve((28000, 28009))
    pool.release(first)
    assert pool.reserve((28000, 28009)) != first


def test_lingering_port_is_used_if_no_other_is_free() -> None:
    """An engine that closed its connections leaves its port in TIME_WAIT for a minute; the next one can listen
    there."""
    with socket.create_server(("127.0.0.1", 0)) as engine:
        port = engine.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            engine.accept()[0].close()
            assert client.recv(1) == b""
    pool = PortPool("127.0.0.1")
    with pytest.raises(Unavailable):
        pool.reserve((port, port))
    with socket.create_server(("127.0.0.1", port)), pytest.raises(Unavailable):
        pool.reserve((port, port), lingering=lingering_ports())
    assert pool.reserve((port, port), lingering=lingering_ports()) == port


# --- memory


def test_memory_of_processes() -> None:
    """The sum over devices; None, which does not mean 0, when no device lists any of them."""
    usage = {0: {7: 100, 8: 5}, 1: {7: 50}}
    assert memory_of({7}, usage) == 150
    assert memory_of({9}, usage) is None


# --- the state directory


def test_state_directory(tmp_path: Path) -> None:
    """It is private, locked by one neuron, cleared except what is kept, and removed if configured."""
    path = tmp_path / "state"
    for number in ("1", "2", "10"):
        (path / "engines" / number).mkdir(parents=True)
    with StateDir(path).held(remove_after=True) as state:
        state.keep = False
        assert path.stat().st_mode & 0o777 == 0o700
        left = state.found()
        assert [(each.directory.path.name, each.record) for each in left] == [("1", None), ("2", None), ("10", None)]
        state.clear_except([left[1].directory])
        assert [entry.name for entry in (path / "engines").iterdir()] == ["2"]
        directory = state.new_engine(1)
        directory.log.write_text("x")
        with pytest.raises(StateDirError, match="in use"), StateDir(path).held(remove_after=True):
            pass
        assert directory.log.exists()
    assert not path.exists()


def test_unsafe_state_directory_is_refused(tmp_path: Path) -> None:
    """A link, a file or another user's directory is refused: the parent may be world-writable."""
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(StateDirError), StateDir(tmp_path / name).held(remove_after=False):
            pass
    if os.getuid() == 0:
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", 12345, 12345)
        with pytest.raises(StateDirError, match="12345"), StateDir(tmp_path / "theirs").held(remove_after=False):
            pass


def test_temporary_directory_is_short_enough(tmp_path: Path) -> None:
    """A socket named by a UUID fits into TMPDIR, however long the state directory's path is."""
    with StateDir(tmp_path / ("x" * 90)).held(remove_after=True) as state:
        directory = state.new_engine(1)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(directory.tmp / ("u" * 36)))
        directory.remove()
        assert not directory.tmp.exists()
