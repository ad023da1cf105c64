"""A worker process. Only the control starts it; its arguments are inherited file descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from cortex.app import working
from cortex.config.settings import CortexConfig
from cortex.proxy.gateway import Gateway
from cortex.routing.replica import ReplicaKey
from cortex.upstream.address import Address
from cortex.workers.channel import Channel
from cortex.workers.messages import (
    AdmitRefused,
    Admitted,
    AskRequests,
    CatalogueChanged,
    Collect,
    ConfigChanged,
    Counted,
    DownChanged,
    EngineEnd,
    EngineFound,
    EngineRetired,
    InFlightNow,
    KeysChanged,
    MakerFound,
    Notes,
    OthersInFlight,
    PersonFound,
    ProspectFound,
    Ready,
    Refused,
    RequestsSeen,
    Resolved,
    ResponseMade,
    Setup,
    Stop,
    TableChanged,
    ToWorker,
    counts_from_wire,
    counts_to_wire,
)
from cortex.workers.remote_control import RemoteControl
from shared.logs import configure_logging
from shared.serve import run, settle
from shared.tasks import cancel_all
from shared.tls import TlsError

log = logging.getLogger(__name__)

REPORT_SECS = 0.2
"""How soon the other workers learn of a change in the requests in flight here."""


async def work(channel_fd: int, listen_fds: list[int]) -> None:
    """Serves until the control says stop or is gone."""
    decoder = msgspec.msgpack.Decoder(ToWorker)
    channel: Channel[ToWorker] = await Channel.over(socket.socket(fileno=channel_fd), decoder)
    messages = channel.messages()
    setup = await anext(messages, None)
    if not isinstance(setup, Setup):
        return
    config = CortexConfig.model_validate_json(setup.config)
    configure_logging(config.log_level, config.log_format)
    control = RemoteControl(setup, channel.send)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the control reloads the files and sends the changes
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    socks = [socket.socket(fileno=fd) for fd in listen_fds]
    address = Address(setup.control_host, 0)
    directory = None if setup.usage_directory is None else Path(setup.usage_directory)
    settle()
    async with working(
        control,
        config,
        socks,
        address,
        keys=setup.keys,
        people=control if config.auth.oidc.on else None,
        prices=setup.prices,
        usage_directory=directory,
        broker=setup.broker,
    ) as gateway:
        _report_in_flight(gateway, channel)
        listening = loop.create_task(listen(messages, channel, control, gateway, stop), name="control")
        channel.send(Ready())
        await stop.wait()
    channel.send(_counted(0, gateway, callers=True))
    await cancel_all([listening])
    await channel.close()


async def listen(
    messages: AsyncIterator[ToWorker],
    channel: Channel[ToWorker],
    control: RemoteControl,
    gateway: Gateway,
    stop: asyncio.Event,
) -> None:
    """Applies the control's messages until it is gone. Sets `stop` then, or when the control sends Stop."""
    async with contextlib.aclosing(messages):  # type: ignore[type-var]
        async for message in messages:
            match message:
                case CatalogueChanged():
                    control.receive(message)
                    gateway.use_prices(message.prices)
                case TableChanged() | DownChanged() | ResponseMade():
                    control.receive(message)
                case Admitted() | AdmitRefused():
                    control.limiter.receive(message)
                case (
                    Resolved()
                    | Refused()
                    | ProspectFound()
                    | EngineFound()
                    | EngineEnd()
                    | MakerFound()
                    | PersonFound()
                    | Notes()
                ):
                    control.receive(message)
                case EngineRetired(url):
                    gateway.retire(url)
                case ConfigChanged(config):
                    gateway.configure(CortexConfig.model_validate_json(config))
                case KeysChanged(keys):
                    gateway.use_keys(keys)
                case OthersInFlight(counts):
                    gateway.in_flight.elsewhere = counts_from_wire(counts)
                case Collect() | AskRequests():
                    channel.send(await _told(message, gateway))
                case Stop():
                    gateway.draining = True
                    stop.set()
                case Setup():
                    raise AssertionError("second Setup message")
    log.warning("the control process is gone: stopping")
    control.lost()
    stop.set()


async def _told(question: Collect | AskRequests, gateway: Gateway) -> Counted | RequestsSeen:
    if isinstance(question, AskRequests):
        seen = await gateway.requests_since(question.place, question.asked, question.limit)
        return RequestsSeen(question.number, seen)
    await asyncio.sleep(0)  # lets requests that were just given an engine start, so that they count
    return _counted(question.number, gateway, callers=question.callers)


def _counted(number: int, gateway: Gateway, *, callers: bool) -> Counted:
    return Counted(number, gateway.collect(callers=callers), counts_to_wire(gateway.in_flight.here), callers)


def _report_in_flight(gateway: Gateway, channel: Channel[ToWorker]) -> None:
    """Reports changes in batches."""
    loop = asyncio.get_running_loop()
    scheduled = False
    reported: dict[ReplicaKey, int] = {}

    def report() -> None:
        nonlocal scheduled
        scheduled = False
        begun = {key: count for key, count in gateway.in_flight.begun.items() if reported.get(key) != count}
        reported.update(begun)
        callers = list(gateway.in_flight.take_callers().items())
        channel.send(InFlightNow(counts_to_wire(gateway.in_flight.here), counts_to_wire(begun), callers))

    def changed() -> None:
        nonlocal scheduled
        if not scheduled:
            scheduled = True
            loop.call_later(REPORT_SECS, report)

    gateway.in_flight.on_change = changed


if __name__ == "__main__":
    try:
        run(work(int(sys.argv[1]), [int(fd) for fd in sys.argv[2:]]))
    except TlsError as error:  # changed since cortex has checked them
        log.error("this worker cannot serve: %s", error)  # noqa: TRY400 - the message says all
        sys.exit(1)
