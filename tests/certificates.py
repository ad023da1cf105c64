"""A certificate authority for tests, and PEM files that it has signed."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import trustme


@dataclass(frozen=True)
class PairFiles:
    """A certificate and its key."""

    cert: Path
    key: Path

    @property
    def gateway(self) -> dict[str, Any]:
        """Keys of `[gateway]`."""
        return {"tls_cert": str(self.cert), "tls_key": str(self.key)}


@lru_cache(maxsize=1)
def authority() -> trustme.CA:
    """The only one that `trusting` trusts."""
    return trustme.CA()


def pair(directory: Path, name: str = "127.0.0.1", *, until: datetime | None = None) -> PairFiles:
    """Writes cert.pem and key.pem, over what is there. Valid for `name`, also for clients."""
    issued = authority().issue_cert(name, "localhost", not_after=until)
    files = PairFiles(directory / "cert.pem", directory / "key.pem")
    files.key.write_bytes(issued.private_key_pem.bytes())
    files.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    return files


def unusable_pair(directory: Path) -> PairFiles:
    """As `pair`, with a key on a curve that OpenSSL reads, but offers in no handshake."""
    files = PairFiles(directory / "cert.pem", directory / "key.pem")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp256k1", "-nodes", "-keyout", str(files.key)]
    command = ["openssl", "req", "-x509", *key, "-out", str(files.cert), "-subj", "/CN=localhost"]
    subprocess.run(command, check=True, capture_output=True)
    return files


def authority_file(directory: Path) -> Path:
    """Writes the authority's certificate."""
    path = directory / "ca.pem"
    authority().cert_pem.write_to_path(path)
    return path


def trusting() -> ssl.SSLContext:
    """For a client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority().configure_trust(context)
    return context
