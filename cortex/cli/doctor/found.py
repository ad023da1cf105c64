"""The neurons that cortex.toml does not list: what the running cortex has found, else what can be found from here."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from cortex.cli.doctor.findings import Finding, fault, ok, warning
from cortex.cli.doctor.this_host import DeploymentFiles
from cortex.config.discovery import DiscoverySettings
from cortex.config.files import state_directory
from cortex.config.neurons import NeuronEntry
from cortex.fleet.members.dns import TIMEOUT_SECS, resolve
from cortex.fleet.members.kubernetes.pod_api import PodApi, PodsUnavailable
from cortex.fleet.members.kubernetes.pods import endpoints
from cortex.fleet.members.roster import endpoint_of, name_of
from cortex.fleet.store import kept_registrations
from shared.protocol import Discovery
from shared.system.cluster import NotInCluster, cluster_here
from shared.tasks import timeout

_SUBJECT = "discovery"


class NeuronToAsk(NamedTuple):
    """`named` False: the neuron's own name counts, and `node` is that of its pod. `has_token` False: the neuron may
    expect one that is not known here."""

    entry: NeuronEntry
    named: bool = True
    node: str | None = None
    has_token: bool = True


async def find_neurons(files: DeploymentFiles, fleet: Any) -> tuple[Sequence[NeuronToAsk] | None, list[Finding]]:
    """Those that are not listed; None if they are unknown. `fleet`: the running cortex's answer to `GET /fleet`, None
    without one."""
    settings = files.config.discovery
    if not settings.finds:
        return [], []
    kept = await asyncio.to_thread(_registered, files) if settings.kind == "register" else []
    looked_up, findings = await _look_up(settings)
    if fleet is not None:
        asked, more = of_fleet(fleet, files, {each.endpoint: each.token for each in kept})
        return asked, [*findings, *more]
    if settings.kind == "register":
        text = "cortex cannot be asked which neurons have registered"
        return [NeuronToAsk(each) for each in kept] or None, [warning(_SUBJECT, text, "see the lines of cortex below")]
    listed = {entry.endpoint for entry in files.config.neurons}
    if looked_up is None:
        return None, findings
    return [
        NeuronToAsk(
            NeuronEntry(name=name_of(Discovery(), endpoint, node), endpoint=endpoint, token=settings.bearer_token),
            named=False,
            node=node,
        )
        for endpoint, node in looked_up.items()
        if endpoint not in listed
    ], findings


def of_fleet(
    fleet: Any, files: DeploymentFiles, tokens: Mapping[str, str | None]
) -> tuple[list[NeuronToAsk], list[Finding]]:
    """The neurons of `GET /fleet` that are not listed. `tokens`: those of registered neurons by endpoint, as far
    as they are known. Pure."""
    settings, listed = files.config.discovery, {entry.name for entry in files.config.neurons}
    asked, findings = [], []
    for node in fleet.get("nodes", []):
        name, endpoint = str(node.get("name")), str(node.get("endpoint"))
        if name in listed:
            continue
        registers = settings.kind == "register"
        token = tokens.get(endpoint) if registers else settings.bearer_token
        try:
            entry = NeuronEntry(name=name, endpoint=endpoint, token=token)
        except ValidationError:
            findings.append(_dials(name, healthy=bool(node.get("healthy", True))))
            continue
        asked.append(NeuronToAsk(entry, has_token=not registers or endpoint in tokens))
    return asked, findings


def _dials(name: str, *, healthy: bool) -> Finding:
    """Of a neuron that connects to cortex, and cannot be asked from here."""
    if healthy:
        return ok(name, "it connects to cortex, which finds it healthy")
    return warning(name, "it connects to cortex, and cannot be asked from here", "read neuron's log on its host")


def _registered(files: DeploymentFiles) -> list[NeuronEntry]:
    """What the state file has. Blocks."""
    directory = state_directory(files.config, files.path)
    kept = [] if directory is None else kept_registrations(directory)
    return [
        NeuronEntry(name=each.name, endpoint=each.endpoint, token=each.token)
        for each in kept
        if each.endpoint.startswith("http")
    ]


async def _look_up(settings: DiscoverySettings) -> tuple[Mapping[str, str | None] | None, list[Finding]]:
    """The endpoints, with the names of their pods' nodes; None if they cannot be looked up."""
    if settings.kind == "dns":
        return await _by_dns(settings)
    if settings.kind == "kubernetes":
        return await _by_pods(settings)
    return None, []


async def _by_dns(settings: DiscoverySettings) -> tuple[Mapping[str, str | None] | None, list[Finding]]:
    host = settings.host or ""
    try:
        async with timeout(TIMEOUT_SECS):
            addresses = await resolve(host, settings.port)
    except (OSError, asyncio.TimeoutError) as error:
        reason = str(error) or f"no answer within {TIMEOUT_SECS:g} s"
        text = f"{host} cannot be looked up: {reason}"
        return None, [fault(_SUBJECT, text, "check that this host can resolve names")]
    if not addresses:
        return {}, [warning(_SUBJECT, f"{host} has no address", "set [discovery] host to the name of the neurons")]
    found = {endpoint_of(address, settings.port, tls=settings.tls): None for address in addresses}
    return found, [ok(_SUBJECT, f"{host} has the addresses {', '.join(addresses)}")]


async def _by_pods(settings: DiscoverySettings) -> tuple[Mapping[str, str | None] | None, list[Finding]]:
    selector = settings.selector or ""
    try:
        cluster = await asyncio.to_thread(cluster_here, os.environ)
        api = PodApi(cluster, settings.namespace, selector)
        pods, _ = await api.list()
    except NotInCluster:  # the configuration's line says it
        return None, []
    except PodsUnavailable as error:
        return None, [fault(_SUBJECT, str(error))]
    found, where = endpoints(pods, port=settings.port, tls=settings.tls), f"in the namespace {api.namespace!r}"
    if not found:
        text = f"no pod {where} with the labels {selector!r} has an address"
        return found, [warning(_SUBJECT, text, "set [discovery] selector to the labels of the neurons' pods")]
    return found, [ok(_SUBJECT, f"pods {where} with the labels {selector!r} are at {', '.join(found)}")]
