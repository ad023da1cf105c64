"""TLS between cortex and neuron: who is let in, and what cortex says of the others."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cortex.config.neurons import NeuronEntry
from cortex.fleet.neuron_client import IDLE_SECS, NeuronClient, NeuronUnreachable
from cortex.upstream.pool import EnginePool
from neuron.app import build_app
from shared.serve import Site, bind, serving
from shared.tasks import running
from shared.tls import RenewedContext, TlsFiles, client_context, server_context
from tests.certificates import PairFiles, authority_file, pair, unusable_pair
from tests.cortex.raw_http import until
from tests.neuron.neurons import config_of


@pytest.fixture
def files(tmp_path: Path) -> PairFiles:
    return pair(tmp_path)


@pytest.fixture
async def endpoint(tmp_path: Path, files: PairFiles) -> AsyncIterator[str]:
    """A neuron that asks its callers for a certificate."""
    tls = RenewedContext(TlsFiles(files.cert, files.key, authority_file(tmp_path)), server_context)
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    app = build_app(config_of(tmp_path / "state"), port=port)
    async with serving([Site(app, sock, tls)], drain_timeout_secs=0):
        yield f"https://127.0.0.1:{port}"


@contextlib.asynccontextmanager
async def caller(endpoint: str, files: TlsFiles | None) -> AsyncIterator[NeuronClient]:
    tls = None if files is None else RenewedContext(files, client_context)
    with contextlib.closing(EnginePool(IDLE_SECS, tls)) as pool:
        yield NeuronClient(NeuronEntry(name="n", endpoint=endpoint), pool)


async def test_both_sides_show_certificates(
    endpoint: str, tmp_path: Path, files: PairFiles, caplog: pytest.LogCaptureFixture
) -> None:
    """Only a caller with a certificate of the neuron's authority gets an answer, and only from a neuron that it trusts.
    The neuron uses a renewed certificate without a restart."""
    ca = authority_file(tmp_path)
    async with caller(endpoint, TlsFiles(files.cert, files.key, ca)) as client:
        assert (await client.health()) is not None
    async with caller(endpoint, TlsFiles(ca=ca)) as client:
        with pytest.raises(NeuronUnreachable, match="certificate"):
            await client.health()
    async with caller(endpoint, None) as client:
        with pytest.raises(NeuronUnreachable, match="is not trusted"):
            await client.health()
    async with caller(endpoint.replace("https", "http"), None) as client:
        with pytest.raises(NeuronUnreachable):
            await client.health()
    caplog.set_level("INFO")
    renewed = pair(tmp_path)
    await until(lambda: "TLS files reloaded" in caplog.text)
    async with caller(endpoint, TlsFiles(renewed.cert, renewed.key, ca)) as client:
        assert (await client.health()) is not None


async def test_a_renewed_certificate_that_no_client_accepts_changes_nothing(
    tmp_path: Path, files: PairFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says that the previous one stays in use, and it does."""
    monkeypatch.setattr("shared.tls.LOOK_SECS", 0.02)
    tls = RenewedContext(TlsFiles(files.cert, files.key), server_context)
    before = tls.current
    async with running({"TLS files": tls.watch_loop}):
        unusable_pair(tmp_path)
        await until(lambda: "the certificate cannot be used" in caplog.text)
    assert tls.current is before
