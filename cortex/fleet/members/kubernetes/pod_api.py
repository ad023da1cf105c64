"""The two calls of the Kubernetes API that finding pods takes: list and watch. Straight over HTTP, because a client
library would bring thousands of classes for them and its own connections, time-outs and retries."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import quote

import aiohttp
import msgspec

from cortex.fleet.members.kubernetes.pods import Pod, PodMetadata, Pods
from shared.errors import shortened
from shared.system.cluster import Cluster
from shared.tls import TlsError, TlsFiles, client_context

TIMEOUT_SECS = 15.0
"""How long a list may take."""
WATCH_SECS = 60.0
"""When the API ends a watch, and the next one begins: a connection that has died shows soon after."""
_LINE_BYTES = 2 << 20
"""Of one event. etcd holds objects of up to 1.5 MiB."""
_FAILED = (aiohttp.ClientError, OSError, asyncio.TimeoutError, TlsError, ValueError)
"""ValueError: not JSON, a line that is too long, or a token that is not ASCII."""


class PodsUnavailable(Exception):
    """The API does not answer, or refuses; the message says why and what to do."""


class WatchExpired(Exception):
    """The API no longer knows what has changed since then: list again."""


class PodChange(NamedTuple):
    """`pod` is None if only `version` is new."""

    kind: str
    pod: Pod | None
    version: str


class _PodList(msgspec.Struct):
    metadata: PodMetadata
    items: list[Pod] = []


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct):
    message: str = ""
    code: int = 0


_LIST, _EVENT = msgspec.json.Decoder(_PodList), msgspec.json.Decoder(_Event)
_POD, _STATUS = msgspec.json.Decoder(Pod), msgspec.json.Decoder(_Status)


class PodApi:
    """The pods of one namespace with some labels. Each call reads the service account's files: they are renewed."""

    def __init__(self, cluster: Cluster, namespace: str | None, selector: str) -> None:
        """Without `namespace` the pod's own."""
        self.namespace = namespace or cluster.namespace
        self.selector = selector
        self._cluster = cluster
        self._url = f"{cluster.url}/api/v1/namespaces/{quote(self.namespace, safe='')}/pods"

    async def list(self) -> tuple[Pods, str]:
        """The pods as they are now, and the version to watch from. Raises PodsUnavailable."""
        try:
            async with self._asked("listed", {}, aiohttp.ClientTimeout(total=TIMEOUT_SECS)) as answer:
                found = _LIST.decode(await answer.read())
        except _FAILED as error:
            raise self._unavailable("listed", str(error) or f"no answer within {TIMEOUT_SECS:g} s") from error
        return {pod.metadata.uid: pod for pod in found.items}, found.metadata.resource_version

    async def changes(self, version: str) -> AsyncGenerator[PodChange, None]:
        """What changes after `version`, until the API ends the watch or the connection is lost: begin again from the
        last version then, so that nothing is missed.

        Raises:
            PodsUnavailable: the watch could not begin, or its events cannot be read.
            WatchExpired: the version is too old.
        """
        query = {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": f"{WATCH_SECS:g}"}
        limits = aiohttp.ClientTimeout(sock_connect=TIMEOUT_SECS, sock_read=WATCH_SECS + TIMEOUT_SECS)
        began = False
        try:
            async with self._asked("watched", {**query, "resourceVersion": version}, limits) as answer:
                began = True
                async for line in answer.content:
                    yield self._change(line)
        except msgspec.DecodeError as error:
            raise self._unavailable("watched", str(error)) from error
        except _FAILED as error:
            if not began:
                raise self._unavailable("watched", str(error) or "no answer in time") from error

    def _change(self, line: bytes) -> PodChange:
        event = _EVENT.decode(line)
        if event.type == "ERROR":
            status = _STATUS.decode(event.object)
            if status.code == HTTPStatus.GONE:
                raise WatchExpired
            raise self._unavailable("watched", status.message)
        pod = _POD.decode(event.object)
        return PodChange(event.type, None if event.type == "BOOKMARK" else pod, pod.metadata.resource_version)

    @contextlib.asynccontextmanager
    async def _asked(
        self, done: str, query: Mapping[str, str], limits: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to a call, if it is 200. `done`: what was to be done with the pods."""
        token = await asyncio.to_thread(self._cluster.token)
        tls = await asyncio.to_thread(client_context, TlsFiles(ca=self._cluster.ca))
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        asked = {**query, "labelSelector": self.selector}
        async with (
            aiohttp.ClientSession(timeout=limits, headers=headers, read_bufsize=_LINE_BYTES) as http,
            http.get(self._url, params=asked, ssl=tls, allow_redirects=False) as answer,
        ):
            if answer.status == HTTPStatus.GONE and query:
                raise WatchExpired
            if answer.status != HTTPStatus.OK:
                raise self._unavailable(done, _refusal(answer.status, await answer.read()), answer.status)
            yield answer

    def _unavailable(self, done: str, reason: str, status: int = 0) -> PodsUnavailable:
        advice = ""
        if status == HTTPStatus.FORBIDDEN:
            advice = (
                f"; in the namespace {self.namespace!r}, bind cortex's service account to a Role with the rule "
                '{apiGroups: [""], resources: [pods], verbs: [list, watch]}'
            )
        elif status == HTTPStatus.UNAUTHORIZED:
            advice = f"; the API refuses the token in {self._cluster.account}"
        text = f"the pods of the namespace {self.namespace!r} cannot be {done}: {reason}{advice}"
        return PodsUnavailable(text)


def _refusal(status: int, body: bytes) -> str:
    try:
        message = _STATUS.decode(body).message
    except msgspec.DecodeError:
        message = ""
    return f"HTTP {status}: {shortened(message)}" if message else f"HTTP {status}"
