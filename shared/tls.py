"""TLS from PEM files: contexts for servers and clients, and their renewal when the files change."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shared.system.files import Stamp, stamp_of

log = logging.getLogger(__name__)

LOOK_SECS = 1.0
"""How often the files are checked for changes. Changed files are read once they have been stable for this long: a
renewal replaces one after the other."""
_EXPIRED, _NOT_YET_VALID = 10, 9
"""X509_V_ERR_CERT_HAS_EXPIRED and X509_V_ERR_CERT_NOT_YET_VALID of OpenSSL."""
_DAMAGED = "damaged PEM data"
"""OpenSSL gives no reason for it."""


class TlsError(Exception):
    """A PEM file cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of one side of a connection. `cert`, with the chain that leads to its authority, and `key` prove who
    this side is. `ca` has the authorities that must have signed the other side's certificate."""

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    @property
    def paths(self) -> list[Path]:
        return [path for path in (self.cert, self.key, self.ca) if path is not None]


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """For HTTP/1.1 over TLS 1.2 or newer. With `ca`, clients must have a certificate. Blocks.

    Raises:
        TlsError: a file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # a client could make the server compute without end
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, files)
    if files.ca is not None:
        _load_authorities(context, files.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """Trusts `ca`, or the system's authorities without one. Blocks.

    Raises:
        TlsError: a file cannot be used.
    """
    if files.ca is None:
        context = ssl.create_default_context()
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        _load_authorities(context, files.ca)
    _load_pair(context, files)
    return context


def certificate_warning(files: TlsFiles) -> str | None:
    """Why the other side will not accept the certificate today: it has expired, or is not valid yet. None if nothing is
    wrong with its dates. Blocks.

    Raises:
        TlsError: a file cannot be used.
    """
    if files.cert is None:
        return None
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _load_pair(server, files)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    try:
        certificate = _shake_hands(client, server)
        client.verify_mode = ssl.CERT_REQUIRED
        client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        client.load_verify_locations(cadata=certificate)
        _shake_hands(client, server)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == _EXPIRED:
            return f"{files.cert}: the certificate has expired"
        if error.verify_code == _NOT_YET_VALID:
            return f"{files.cert}: the certificate is not valid yet"
    except ssl.SSLError as error:
        raise TlsError(f"{files.cert}: the certificate cannot be used: {error.reason}") from error
    return None


class RenewedContext:
    """A context that follows its files. `current` is the newest that could be made of them."""

    def __init__(self, files: TlsFiles, make: Callable[[TlsFiles], ssl.SSLContext]) -> None:
        """`make` is `server_context` or `client_context`. Blocks. Raises TlsError."""
        self._files = files
        self._make = make
        self._stamps = self._look()
        self._problem: str | None = None
        self.current = make(files)

    async def watch_loop(self) -> None:
        """Reads the files again after each change. Files that cannot be used change nothing, and are tried again: the
        reason may not be in the files, and end without a change. Never returns."""
        last = self._stamps
        while True:
            await asyncio.sleep(LOOK_SECS)
            stamps = await asyncio.to_thread(self._look)
            if stamps == last and stamps != self._stamps and await asyncio.to_thread(self._renew):
                self._stamps = stamps
            last = stamps

    def switch(self, connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        """For servers that are given a context once, as its `sni_callback`: each handshake uses the current one."""
        connection.context = self.current

    def _look(self) -> list[Stamp]:
        return [stamp_of(path) for path in self._files.paths]

    def _renew(self) -> bool:
        """Whether the files can be used."""
        try:
            context = self._make(self._files)
            warning = certificate_warning(self._files)
        except TlsError as error:
            if str(error) != self._problem:
                log.warning("TLS files have changed and cannot be used, so the previous ones stay in use: %s", error)
            self._problem = str(error)
            return False
        self.current = context
        self._problem = None
        log.info("TLS files reloaded: %s", ", ".join(map(str, self._files.paths)))
        if warning is not None:
            log.warning("%s", warning)
        return True


def _load_pair(context: ssl.SSLContext, files: TlsFiles) -> None:
    if files.cert is None or files.key is None:
        return
    _require(files.cert, "CERTIFICATE")
    _require(files.key, "PRIVATE KEY")
    try:
        context.load_cert_chain(files.cert, files.key, password=lambda: _refuse_password(files.key))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise TlsError(f"{files.key}: the key does not belong to the certificate {files.cert}") from error
        raise TlsError(f"{files.cert} and {files.key} cannot be used: {error.reason or _DAMAGED}") from error
    except OSError as error:
        raise TlsError(f"{files.cert} and {files.key} cannot be used: {error.strerror or error}") from error


def _refuse_password(key: Path | None) -> str:
    raise TlsError(f"{key}: the key is encrypted: store it without a password, readable only by this user")


def _load_authorities(context: ssl.SSLContext, path: Path) -> None:
    _require(path, "CERTIFICATE")
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise TlsError(f"{path}: cannot be used: {error.reason or _DAMAGED}") from error
    except OSError as error:
        raise TlsError(f"{path}: cannot be used: {error.strerror or error}") from error


def _require(path: Path, kind: str) -> None:
    """OpenSSL's errors name neither the file nor what it lacks."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise TlsError(f"{path}: {error.strerror or error}") from error
    if b"-----BEGIN " not in text or f"{kind}-----".encode() not in text:
        raise TlsError(f"{path}: has no PEM block {kind}")


def _shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> bytes:
    """A handshake in memory. Returns the server's certificate, as DER. Raises ssl.SSLError."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server)
    sides = [asking, server.wrap_bio(to_server, to_client, server_side=True)]
    while sides:
        for side in list(sides):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            sides.remove(side)
    return asking.getpeercert(binary_form=True) or b""
