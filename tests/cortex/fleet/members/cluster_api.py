"""A process that speaks as much of the Kubernetes API as finding pods takes, over TLS.

It serves the pods of one namespace: lists, and watches that send what has changed since a version. Commands come as
lines of JSON on its standard input, and each is answered with a line. The bearer token must be that in the file
`accepted`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from aiohttp import web

from shared.serve import Site, bind, serving
from shared.tls import RenewedContext, TlsFiles, server_context

NAMESPACE = "gpu"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:cortex"


def status(code: HTTPStatus, reason: str, message: str) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    kind = {"kind": "Status", "apiVersion": "v1", "metadata": meta}
    return {**kind, "status": "Failure", "message": message, "reason": reason, "code": int(code)}


def refusal(code: HTTPStatus, reason: str, message: str) -> web.Response:
    return web.json_response(status(code, reason, message), status=code)


class ClusterApi:
    """`allowed`: the verbs that the service account may use on pods."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pods: dict[str, dict[str, Any]] = {}
        self._version = 100
        self._history: list[tuple[int, str, dict[str, Any]]] = []
        self._oldest = 0  # watches from before this version get 410
        self._allowed = ["list", "watch"]
        self._watches: set[asyncio.Transport] = set()
        self._news = asyncio.Condition()

    async def handle(self, command: dict[str, Any]) -> None:
        """Carries out a command: `put`, `delete`, `cut`, `forget`, `allow`."""
        if "put" in command:
            pod = command["put"]
            self._change("MODIFIED" if pod["metadata"]["name"] in self._pods else "ADDED", pod)
            self._pods[pod["metadata"]["name"]] = pod
        if "delete" in command:
            self._change("DELETED", self._pods.pop(command["delete"]))
        if "forget" in command:
            self._history.clear()
            self._oldest = self._version
        self._allowed = command.get("allow", self._allowed)
        if "cut" in command:  # in the middle of an event
            for transport in self._watches:
                transport.write(b'20\r\n{"type": "ADDED", "object": {"m')
                transport.close()
        async with self._news:
            self._news.notify_all()

    def _change(self, kind: str, pod: dict[str, Any]) -> None:
        self._version += 1
        pod["metadata"]["resourceVersion"] = str(self._version)
        self._history.append((self._version, kind, pod))

    async def pods(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {(self._directory / 'accepted').read_text()}":
            return refusal(HTTPStatus.UNAUTHORIZED, "Unauthorized", "Unauthorized")
        verb = "watch" if request.query.get("watch") == "true" else "list"
        if verb not in self._allowed or request.match_info["namespace"] != NAMESPACE:
            where = f'in API group "" in the namespace "{request.match_info["namespace"]}"'
            text = f'pods is forbidden: User "{ACCOUNT}" cannot {verb} resource "pods" {where}'
            return refusal(HTTPStatus.FORBIDDEN, "Forbidden", text)
        key, _, value = request.query["labelSelector"].partition("=")
        if verb == "watch":
            return await self._watch(request, key, value)
        chosen = [pod for pod in self._pods.values() if pod["metadata"]["labels"].get(key) == value]
        meta = {"resourceVersion": str(self._version)}
        return web.json_response({"kind": "PodList", "apiVersion": "v1", "metadata": meta, "items": chosen})

    async def _watch(self, request: web.Request, key: str, value: str) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        answer.enable_chunked_encoding()
        await answer.prepare(request)
        sent = int(request.query["resourceVersion"])
        assert request.transport is not None
        self._watches.add(request.transport)
        try:
            while sent >= self._oldest:
                for version, kind, pod in [event for event in self._history if event[0] > sent]:
                    if pod["metadata"]["labels"].get(key) == value:
                        await _send(answer, kind, pod)
                    else:
                        meta = {"resourceVersion": str(version)}
                        await _send(answer, "BOOKMARK", {"kind": "Pod", "apiVersion": "v1", "metadata": meta})
                    sent = version
                async with self._news:
                    _ = await self._news.wait_for(partial(self._has_news, sent))
            gone = status(HTTPStatus.GONE, "Expired", f"too old resource version: {sent} ({self._oldest})")
            await _send(answer, "ERROR", gone)
        finally:
            self._watches.discard(request.transport)
        return answer

    def _has_news(self, sent: int) -> bool:
        return max(self._version, self._oldest) > sent


async def _send(answer: web.StreamResponse, kind: str, of: dict[str, Any]) -> None:
    await answer.write(json.dumps({"type": kind, "object": of}).encode() + b"\n")


async def main(directory: Path) -> None:
    """Prints its port, then answers commands until standard input ends."""
    api, app = ClusterApi(directory), web.Application()
    app.router.add_get("/api/v1/namespaces/{namespace}/pods", api.pods)
    tls = RenewedContext(TlsFiles(directory / "cert.pem", directory / "key.pem"), server_context)
    sock = bind("127.0.0.1", 0)
    async with serving([Site(app, sock, tls)], drain_timeout_secs=0):
        print(sock.getsockname()[1], flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            await api.handle(json.loads(line))
            print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
