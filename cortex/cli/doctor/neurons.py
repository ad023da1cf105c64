"""Checks each neuron from here: as cortex asks it, with the same token and TLS."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import aiohttp

from cortex.cli.doctor.findings import Finding, fault, ok, warning
from cortex.cli.doctor.found import NeuronToAsk, find_neurons
from cortex.cli.doctor.this_host import DeploymentFiles
from cortex.config.catalogue import Catalogue
from cortex.config.neurons import NeuronEntry
from cortex.fleet.engine_url import reachable_url
from cortex.fleet.members.roster import name_of
from cortex.fleet.neuron_client import NO_CREDENTIALS, NeuronClient, NeuronRefused, NeuronUnreachable
from cortex.upstream.address import parse_url
from cortex.upstream.pool import EnginePool
from shared import __version__
from shared.protocol import Discovery, ModelView, NeuronHealth
from shared.tasks import timeout
from shared.tls import RenewedContext, TlsError, client_context

ANSWER_SECS: Final = 5.0
SKEW_SECS: Final = 5.0
"""Clocks may differ by that much. The time in an answer has whole seconds."""


class NeuronAnswers(NamedTuple):
    """What one neuron told. `skew_secs`: how far its clock is ahead; None if the answer has no Date."""

    name: str
    discovery: Discovery
    health: NeuronHealth
    models: Sequence[ModelView]
    skew_secs: float | None
    delay_secs: float


async def check_neurons(files: DeploymentFiles, fleet: Any) -> list[Finding]:
    """All at the same time; the findings are in the order of the file, then those of found neurons. `fleet`: the
    running cortex's answer to `GET /fleet`, None without one."""
    try:
        pems = files.config.neuron_tls.files
        tls = await asyncio.to_thread(RenewedContext, pems, client_context) if pems.paths else None
    except TlsError as error:
        return [fault("neuron_tls", str(error))]
    others, findings = await find_neurons(files, fleet)
    wanted = [*(NeuronToAsk(entry) for entry in files.config.neurons), *(others or [])]
    asked = await asyncio.gather(*(_check(each, tls) for each in wanted))
    answers = [answer for answer, _ in asked if answer is not None]
    found = [*(finding for _, lines in asked for finding in lines), *findings]
    if others is not None:  # else an unknown neuron may have the harness
        found += check_harnesses(answers, files.catalogue)
    # A neuron may have several addresses in DNS.
    named = [answer for each, (answer, _) in zip(wanted, asked, strict=True) if answer is not None and each.named]
    return [*found, *check_twins(named)]


async def _check(asked: NeuronToAsk, tls: RenewedContext | None) -> tuple[NeuronAnswers | None, list[Finding]]:
    entry = asked.entry
    with contextlib.closing(EnginePool(tls=tls)) as pool:
        client, began = NeuronClient(entry, pool), time.monotonic()
        try:
            async with timeout(ANSWER_SECS):
                discovery = await client.discovery()
                delay = time.monotonic() - began
                health, models = await client.health(), await client.models()
        except NeuronRefused as error:
            if error.reason == NO_CREDENTIALS and not asked.has_token:
                text = "it answers, but its token is known to cortex only, so that it cannot be examined"
                return None, [warning(entry.name, text, "run doctor as cortex's user, on its host")]
            return None, [fault(entry.name, error.reason)]
        except (NeuronUnreachable, asyncio.TimeoutError) as error:
            reason = getattr(error, "reason", f"no answer within {ANSWER_SECS:g} s")
            advice = (
                f"is neuron running there (systemctl status neuron), and does a firewall let {entry.endpoint} pass?"
            )
            return None, [fault(entry.name, f"{entry.endpoint}: {reason}", advice)]
    if not asked.named:
        entry = entry.model_copy(update={"name": name_of(discovery, entry.endpoint, asked.node)})
    skew = await _skew(entry, tls)
    answers = NeuronAnswers(entry.name, discovery, health, models, skew, delay)
    return answers, [*examine(answers), *_token(entry), *await _engines(answers, entry)]


def examine(answers: NeuronAnswers) -> list[Finding]:
    """What a neuron's answers say. Pure."""
    name, discovery, health = answers.name, answers.discovery, answers.health
    version = discovery.version or "protocol v1"
    devices = [device.name or f"device {device.index}" for device in discovery.devices]
    driver = "" if discovery.driver_version is None else f", driver {discovery.driver_version}"
    found = [
        ok(name, f"answers in {answers.delay_secs * 1000:.0f} ms: {version}, {', '.join(devices) or 'no GPU'}{driver}")
    ]
    if discovery.version is not None and discovery.version != __version__:
        advice = "update the older one; neurons first"
        found.append(warning(name, f"neuron is {discovery.version}, this cortex is {__version__}", advice))
    if answers.skew_secs is not None and abs(answers.skew_secs) > SKEW_SECS:
        way = "ahead of" if answers.skew_secs > 0 else "behind"
        text = f"its clock is {abs(answers.skew_secs):.0f} s {way} this host's"
        found.append(warning(name, text, "run a time service on both (chrony, systemd-timesyncd)"))
    if discovery.cuda_unavailable_reason is not None:
        found.append(fault(name, f"no GPU can be used: {discovery.cuda_unavailable_reason}", "see nvidia-smi there"))
    elif not discovery.devices and (discovery.host is None or not discovery.host.ram_total_mb):
        found.append(warning(name, "it has no GPU", "is the driver installed? See `neuron check` there"))
    found += [
        fault(name, f"GPU {device.index} is lost: {device.lost}", "reset the GPU, or restart the host")
        for device in discovery.devices
        if device.lost is not None
    ]
    for live in health.devices:
        if live.fault is not None:
            found.append(fault(name, f"GPU {live.index}: {live.fault}", "reset the GPU, or restart the host"))
        found += [warning(name, f"GPU {live.index}: {text}") for text in live.warnings]
    found += [
        warning(name, f"{view.id} failed: {view.error}", f"`cortex logs {view.id}`, `cortex explain {view.id}`")
        for view in answers.models
        if view.error is not None and not view.loaded
    ]
    return found


def check_twins(answers: Iterable[NeuronAnswers]) -> list[Finding]:
    """Names that stand for one neuron. Pure."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for each in answers:
        if each.discovery.instance_id is not None:
            names[each.discovery.instance_id].append(each.name)
    return [
        fault(" and ".join(same), "are one neuron under two names", "give each entry the endpoint of its own host")
        for same in names.values()
        if len(same) > 1
    ]


def check_harnesses(answers: Sequence[NeuronAnswers], catalogue: Catalogue) -> list[Finding]:
    """Models that no answering neuron has an engine for. Pure."""
    if not answers:
        return []
    offered = {harness for each in answers for harness in each.discovery.harnesses}
    lacking: defaultdict[str, list[str]] = defaultdict(list)
    for profile in catalogue.models:
        wanted = {choice.harness for choice in profile.choices}
        if profile.base is None and offered and wanted.isdisjoint(offered):
            lacking[" or ".join(sorted(wanted))].append(profile.id)
    return [
        warning("models", f"no neuron has the harness {harness}, for {', '.join(ids)}", "add it to a neuron.toml")
        for harness, ids in lacking.items()
    ]


def _token(entry: NeuronEntry) -> list[Finding]:
    host = urlsplit(entry.endpoint).hostname or ""
    if entry.bearer_token is not None or host in ("localhost", "127.0.0.1", "::1"):
        return []
    text = "it asks for no token: anyone who can reach its port can run programs there"
    return [warning(entry.name, text, "set token_env in neuron.toml and cortex.toml")]


async def _engines(answers: NeuronAnswers, entry: NeuronEntry) -> list[Finding]:
    """Whether loaded engines, to which cortex sends requests itself, can be reached from here."""
    urls: Mapping[str, str] = {
        view.id: reachable_url(view.endpoint.url, entry.endpoint)
        for view in answers.models
        if view.servable_now and view.endpoint is not None
    }
    reasons = await asyncio.gather(*(_why_unreachable(url) for url in urls.values()))
    advice = "open neuron's port_range in the firewall, and set `host` in neuron.toml to an address that cortex reaches"
    return [
        fault(entry.name, f"the engine of {model} at {url} cannot be reached: {reason}", advice)
        for (model, url), reason in zip(urls.items(), reasons, strict=True)
        if reason is not None
    ]


async def _why_unreachable(url: str) -> str | None:
    address, _ = parse_url(url)
    try:
        async with timeout(ANSWER_SECS):
            _, writer = await asyncio.open_connection(address.host, address.port)
    except (OSError, asyncio.TimeoutError) as error:
        return getattr(error, "strerror", None) or str(error) or "no connection in time"
    writer.close()
    return None


async def _skew(entry: NeuronEntry, tls: RenewedContext | None) -> float | None:
    """How far the neuron's clock is ahead, by the time in its answer; None if it has none."""
    headers = {} if entry.bearer_token is None else {"Authorization": f"Bearer {entry.bearer_token}"}
    limit, context = aiohttp.ClientTimeout(total=ANSWER_SECS), True if tls is None else tls.current
    try:
        async with aiohttp.ClientSession(timeout=limit) as http:
            began = time.time()
            async with http.get(f"{entry.endpoint}/discovery", headers=headers, ssl=context) as answer:
                there = parsedate_to_datetime(answer.headers.get("Date", ""))
            middle = (began + time.time()) / 2
    except (OSError, aiohttp.ClientError, asyncio.TimeoutError, ValueError):
        return None
    return there.timestamp() + 0.5 - middle
