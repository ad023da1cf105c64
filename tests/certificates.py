"""A certificate authority for tests, and PEM files that it has signed."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

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


def _no_file(files: PairFiles) -> str:
    files.cert.unlink()
    return f"{files.cert}: No such file or directory"


def _no_key_file(files: PairFiles) -> str:
    files.key.unlink()
    return f"{files.key}: No such file or directory"


def _directory(files: PairFiles) -> str:
    files.cert.unlink()
    files.cert.mkdir()
    return f"{files.cert}: Is a directory"


def _empty(files: PairFiles) -> str:
    files.cert.write_bytes(b"")
    return f"{files.cert}: has no PEM block CERTIFICATE"


def _certificate_as_key(files: PairFiles) -> str:
    files.key.write_bytes(files.cert.read_bytes())
    return f"{files.key}: has no PEM block PRIVATE KEY"


def _key_of_another(files: PairFiles) -> str:
    (files.key.parent / "other").mkdir()
    files.key.write_bytes(pair(files.key.parent / "other").key.read_bytes())
    return f"{files.key}: the key does not belong to the certificate {files.cert}"


def _damaged(files: PairFiles) -> str:
    text = files.cert.read_bytes()
    files.cert.write_bytes(text[:100] + b"\n" + text[-40:])
    return f"{files.cert} and {files.key} cannot be used: "


def _damaged_chain(files: PairFiles) -> str:
    with files.cert.open("ab") as file:
        file.write(b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n")
    return f"{files.cert} and {files.key} cannot be used: "


def _encrypted(files: PairFiles) -> str:
    key = files.key.read_bytes()
    command = ["openssl", "pkcs8", "-topk8", "-passout", "pass:secret", "-out", str(files.key)]
    subprocess.run(command, input=key, check=True, capture_output=True)
    return f"{files.key}: the key is encrypted"


def _unusable(files: PairFiles) -> str:
    unusable_pair(files.cert.parent)
    return f"{files.cert}: the certificate cannot be used"


FAULTS: Final[tuple[Callable[[PairFiles], str], ...]] = (
    _no_file,
    _no_key_file,
    _directory,
    _empty,
    _certificate_as_key,
    _key_of_another,
    _damaged,
    _damaged_chain,
    _encrypted,
    _unusable,
)
"""Each damages a usable pair, and returns what a message must say of it."""
