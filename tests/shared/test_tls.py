"""PEM files: those that OpenSSL reads, and their renewal."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from shared import tls
from shared.tasks import running
from shared.tls import RenewedContext, TlsError, TlsFiles, certificate_warning, server_context
from tests.certificates import pair
from tests.cortex.raw_http import until


@pytest.mark.parametrize("label", ["X509 CERTIFICATE", "CERTIFICATE"])
@pytest.mark.parametrize("before", ["", "subject=CN = é, -----BEGIN CERTIFICATE-----\n"])
def test_labels_of_a_certificate(tmp_path: Path, label: str, before: str) -> None:
    """OpenSSL reads both, and ignores the lines between blocks."""
    files = pair(tmp_path)
    text = files.cert.read_text(encoding="ascii").replace("CERTIFICATE", label)
    files.cert.write_text(before + text, encoding="utf-8")
    assert certificate_warning(TlsFiles(cert=files.cert, key=files.key)) is None


async def test_files_that_cannot_be_read_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Although they do not change: the process may have had no file descriptor left. The log says it once."""
    monkeypatch.setattr(tls, "LOOK_SECS", 0.01)
    files, failures = pair(tmp_path), [TlsError("Too many open files")] * 3
    renewed = RenewedContext(TlsFiles(cert=files.cert, key=files.key), server_context)
    first = renewed.current

    def fail_at_first(files: TlsFiles) -> ssl.SSLContext:
        if failures:
            raise failures.pop()
        return server_context(files)

    renewed._make = fail_at_first
    async with running({"TLS files": renewed.watch_loop}):
        pair(tmp_path)
        await until(lambda: renewed.current is not first)
    assert not failures
    assert caplog.text.count("Too many open files") == 1
