"""The broker's process: `python -m cortex.fleet.members.dialled`. Only the control starts it; ends with its input.

Its arguments are the descriptors of its listening sockets: for neurons, and for cortex's own processes. Reads a
`BrokerSettings` per line of its input: the first to begin, later ones when other neurons are registered. Writes the
names of the neurons that have connections as a line of JSON whenever they change.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import ssl
import sys
from pathlib import Path

import msgspec

from cortex.fleet.members.dialled.broker import Broker
from cortex.fleet.members.dialled.broker_process import BrokerSettings
from shared.logs import configure_logging
from shared.serve import run
from shared.tasks import running
from shared.tls import RenewedContext, TlsError, TlsFiles, server_context

log = logging.getLogger(__name__)


def _tell(names: list[str]) -> None:
    with contextlib.suppress(OSError):  # cortex is gone
        print(json.dumps(names), flush=True)


async def _main(neurons: socket.socket, requests: socket.socket) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it must outlive the workers
    for listening in (neurons, requests):
        listening.setblocking(False)
    decoder = msgspec.json.Decoder(BrokerSettings)
    reader = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    first = await reader.readline()
    if not first:
        return
    settings = decoder.decode(first)
    configure_logging(settings.log_level, settings.log_format)
    tls: RenewedContext | None = None
    if settings.tls_cert is not None and settings.tls_key is not None:
        tls = RenewedContext(TlsFiles(Path(settings.tls_cert), Path(settings.tls_key)), server_context)

    def context() -> ssl.SSLContext | None:
        return None if tls is None else tls.current

    broker = Broker(_tell)
    broker.use(settings.keys)
    loops = {
        "neurons": lambda: broker.accept_neurons(neurons, context),
        "requests": lambda: broker.accept_requests(requests),
        "pings": broker.ping_loop,
        **({} if tls is None else {"TLS files": tls.watch_loop}),
    }
    async with running(loops):
        async for line in reader:
            broker.use(decoder.decode(line).keys)
    await broker.close()


if __name__ == "__main__":
    try:
        run(_main(*(socket.socket(fileno=int(argument)) for argument in sys.argv[1:])))
    except TlsError as error:  # changed since cortex has checked them
        log.error('neurons with dial = "out" cannot connect: %s', error)  # noqa: TRY400 - the message says all
        sys.exit(1)
