"""What the kernel tells of an engine's connections, and when one counts as busy. With real sockets."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import sys
from asyncio.subprocess import PIPE

from neuron.engine.connections import ConnectionTraffic, connections_to, is_busy
from tests.neuron.neurons import until

_CLIENT = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as sock:
    print(flush=True)
    for line in sys.stdin:
        sock.sendall(line.encode())
        print(sock.recv(99), flush=True)
"""


def _only(port: int) -> ConnectionTraffic:
    found = connections_to(port)
    assert found is not None
    (connection,) = found
    return connection


async def test_connections_of_others() -> None:
    """Another process's connection is seen with its traffic; this process's own and a closed port's are not."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
            assert connections_to(port) == []
            client = await asyncio.create_subprocess_exec(
                sys.executable, "-c", _CLIENT, str(port), stdin=PIPE, stdout=PIPE
            )
            assert client.stdin is not None
            assert client.stdout is not None
            await client.stdout.readline()
            with server.accept()[0] as engine:
                assert not is_busy(_only(port))  # it has asked for nothing
                client.stdin.write(b"request\n")
                await client.stdin.drain()
                engine.recv(1, socket.MSG_PEEK)
                assert _only(port).queued == 8
                assert is_busy(_only(port))
                assert engine.recv(99) == b"request\n"
                assert is_busy(_only(port))
                await asyncio.sleep(0.02)  # the kernel counts in ticks of up to 10 ms
                engine.sendall(b"answer")
                await client.stdout.readline()
                answered = await until(lambda: None if _only(port).queued else _only(port))  # acknowledged
                assert (answered.bytes_received, answered.bytes_sent) == (8, 6)
                assert is_busy(answered)  # it may go on
            client.stdin.close()
            await client.wait()
    assert connections_to(port) is None


def test_busy_by_who_spoke_last() -> None:
    """An unanswered request is busy however old it is while the engine computes. An answered one until both have been
    quiet."""
    unanswered = ConnectionTraffic(bytes_received=9, bytes_sent=0, last_received_age=900, last_sent_age=900, queued=0)
    again = dataclasses.replace(unanswered, bytes_sent=5, last_sent_age=901)
    unread = dataclasses.replace(unanswered, bytes_sent=5, last_sent_age=900, queued=1)
    for owed in (unanswered, again, unread):
        assert is_busy(owed)
        assert is_busy(owed, idle_secs=29)
        assert not is_busy(owed, idle_secs=30)
    assert is_busy(dataclasses.replace(unanswered, last_received_age=29), idle_secs=99)
    only_a_head = dataclasses.replace(again, bytes_sent=256, last_sent_age=29)
    assert is_busy(only_a_head, idle_secs=29)
    assert not is_busy(dataclasses.replace(only_a_head, last_sent_age=30))
    answered = dataclasses.replace(again, bytes_sent=257, last_sent_age=29)
    assert is_busy(answered)
    assert is_busy(answered, idle_secs=4)
    assert not is_busy(answered, idle_secs=5)
    assert is_busy(dataclasses.replace(answered, last_sent_age=4), idle_secs=99)
    assert not is_busy(dataclasses.replace(answered, last_sent_age=30))
    unused = ConnectionTraffic(bytes_received=0, bytes_sent=0, last_received_age=0, last_sent_age=0, queued=0)
    assert not is_busy(unused)
