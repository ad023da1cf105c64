"""The Kubernetes cluster that this process runs in, as the pod's environment and its service account tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes mounts the files of the pod's service account."""


class NotInCluster(Exception):
    """This process does not run in a pod that may use the API; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Cluster:
    """`url` is that of the cluster's API, `namespace` the pod's own. Kubernetes renews the files in `account` while the
    pod runs."""

    url: str
    namespace: str
    account: Path

    @property
    def ca(self) -> Path:
        """PEM file with the authority that signs the API's certificate."""
        return self.account / "ca.crt"

    def token(self) -> str:
        """The service account's token as of now. Blocks. Raises OSError."""
        return (self.account / "token").read_text(encoding="ascii").strip()


def cluster_here(environ: Mapping[str, str], account: Path | None = None) -> Cluster:
    """The cluster of this process's pod. Blocks.

    Raises:
        NotInCluster: there is none, or the service account's files are not mounted.
    """
    account = account or ACCOUNT
    host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise NotInCluster("this is not a pod of Kubernetes: KUBERNETES_SERVICE_HOST is not set")
    try:
        for name in ("ca.crt", "token"):
            _ = (account / name).read_bytes()
        namespace = (account / "namespace").read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NotInCluster(
            f"the files of the pod's service account in {account} cannot be read ({reason}): set "
            "automountServiceAccountToken: true in the pod"
        ) from error
    return Cluster(f"https://{f'[{host}]' if ':' in host else host}:{port}", namespace, account)
