"""What is known of the neurons' pods. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from msgspec import Struct, field

from cortex.fleet.members.roster import endpoint_of

_ENDED = ("Succeeded", "Failed")


class PodMetadata(Struct, frozen=True, rename="camel"):
    """Of a pod or a list; `resource_version` is where a watch of what comes later begins."""

    uid: str = ""
    resource_version: str = ""


class PodSpec(Struct, frozen=True, rename="camel"):
    node_name: str | None = None


class PodStatus(Struct, frozen=True):
    phase: str | None = None
    address: str | None = field(default=None, name="podIP")


class Pod(Struct, frozen=True):
    """The fields of a pod that are used here."""

    metadata: PodMetadata
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


Pods = Mapping[str, Pod]
"""By uid, as the API lists them."""
NO_PODS: Pods = MappingProxyType({})


def after_change(pods: Pods, kind: str, pod: Pod) -> Pods:
    """The pods after an event of a watch. `kind` is ADDED, MODIFIED or DELETED."""
    if kind == "DELETED":
        return {uid: each for uid, each in pods.items() if uid != pod.metadata.uid}
    return {**pods, pod.metadata.uid: pod}


def endpoints(pods: Pods, *, port: int, tls: bool) -> dict[str, str | None]:
    """The names of their nodes by endpoint, for pods that have an address and have not ended. Those that are not ready
    count: cortex watches the neurons' health itself."""
    return {
        endpoint_of(pod.status.address, port, tls=tls): pod.spec.node_name
        for pod in pods.values()
        if pod.status.address and pod.status.phase not in _ENDED
    }
