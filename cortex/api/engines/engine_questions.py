"""GET requests of cortex's own to loaded engines."""

from __future__ import annotations

from collections.abc import Mapping

from cortex.fleet.engine_url import reachable
from cortex.fleet.neuron_client import NeuronClient
from cortex.fleet.neuron_http import AnswerTooLarge, fetch
from cortex.fleet.snapshot import EngineSnapshot
from cortex.upstream.address import parse_url
from cortex.upstream.pool import EnginePool, NoConnection
from shared.protocol import EndpointReply


class NoAnswer(Exception):
    """The engine gives no answer that can be used; the message says why."""


class EngineQuestions:
    """Owns the connections for them. `clients` are those of the neurons, by name; `broker` as for `EnginePool`."""

    def __init__(self, clients: Mapping[str, NeuronClient], broker: str | None = None) -> None:
        self._clients = clients
        self._pool = EnginePool(broker=broker)

    async def ask(
        self, engine: EngineSnapshot, path: bytes, *, accept: bytes = b"*/*", max_bytes: int | None = None
    ) -> bytes:
        """The body of the engine's answer. Callers set the deadline.

        Raises:
            NoAnswer: no answer, one with a status other than 200, or one larger than `max_bytes`.
            NeuronRefused, NeuronUnreachable: a protocol v1 neuron did not give its endpoint when asked.
        """
        try:
            endpoint = await self._endpoint(engine)
            address, prefix = parse_url(endpoint.url)
            lines = [
                b"GET %b%b HTTP/1.1" % (prefix, path),
                b"host: " + address.authority,
                b"accept: " + accept,
                b"accept-encoding: identity",
            ]
            if endpoint.api_key is not None:
                lines.append(b"authorization: Bearer " + endpoint.api_key.encode())
            head = b"\r\n".join((*lines, b"", b""))
            try:
                answer = await fetch(self._pool, address, head, again=False, max_bytes=max_bytes)
            finally:
                # A kept connection would make an engine without request figures look busy, and not every engine
                # honours `connection: close`.
                self._pool.retire(address)
        except (OSError, ValueError, NoConnection, AnswerTooLarge) as error:
            raise NoAnswer(str(error) or type(error).__name__) from error
        if answer.status != 200:
            raise NoAnswer(f"status {answer.status}")
        return answer.body

    def close(self) -> None:
        """Closes all connections."""
        self._pool.close()

    async def _endpoint(self, engine: EngineSnapshot) -> EndpointReply:
        model_id, node, instance = engine.key
        if engine.view.endpoint is not None:
            return reachable(engine.view.endpoint, engine.node.endpoint)
        client = self._clients.get(node)
        if client is None:
            raise NoAnswer("the neuron was removed from the configuration")
        return await client.endpoint(model_id, instance)
