"""The neuron protocol: messages between cortex and neuron as frozen pydantic models, and error codes. Both use it.

Both sides ignore unknown fields, every field that protocol v1 lacks is optional, and `read_answer` treats one that does
not validate as absent, so versions and other implementations mix.
"""

from shared.protocol.answers import read_answer
from shared.protocol.base import first_problem, plain_reason
from shared.protocol.commands import (
    ENGINE_KEYS_HEADER,
    FIRST_INSTANCE,
    LEASE_SECS,
    MAX_DRAIN_SECS,
    MAX_MODEL_ID_CHARS,
    AdapterCommand,
    AdapterReply,
    EndpointReply,
    LeaseCommand,
    LeaseReply,
    LoadCommand,
    LoadReply,
    LogsReply,
    SleepCommand,
    UnloadCommand,
    WakeCommand,
)
from shared.protocol.errors import ErrorCode
from shared.protocol.estimate import EstimateLine, EstimateOption, EstimateReply
from shared.protocol.group import (
    GroupPart,
    GroupPeer,
    ListenCommand,
    ListenReply,
    ReachCommand,
    ReachReply,
)
from shared.protocol.health import (
    Activation,
    DeviceHealth,
    HostMemoryHealth,
    InstanceEnergy,
    ModelActivity,
    NeuronHealth,
    SpareView,
)
from shared.protocol.interconnect import Link, LinkKind
from shared.protocol.models import ModelFacts, ModelStatus, ModelView, Progress, Transition
from shared.protocol.parallel import Parallelism
from shared.protocol.refusal import DeviceFigures, FailureCause
from shared.protocol.registration import DialReply, Registration, RegistrationReply
from shared.protocol.topology import RAM, Device, Discovery, HostResources

__all__ = [
    "ENGINE_KEYS_HEADER",
    "FIRST_INSTANCE",
    "LEASE_SECS",
    "MAX_DRAIN_SECS",
    "MAX_MODEL_ID_CHARS",
    "RAM",
    "Activation",
    "AdapterCommand",
    "AdapterReply",
    "Device",
    "DeviceFigures",
    "DeviceHealth",
    "DialReply",
    "Discovery",
    "EndpointReply",
    "ErrorCode",
    "EstimateLine",
    "EstimateOption",
    "EstimateReply",
    "FailureCause",
    "GroupPart",
    "GroupPeer",
    "HostMemoryHealth",
    "HostResources",
    "InstanceEnergy",
    "LeaseCommand",
    "LeaseReply",
    "Link",
    "LinkKind",
    "ListenCommand",
    "ListenReply",
    "LoadCommand",
    "LoadReply",
    "LogsReply",
    "ModelActivity",
    "ModelFacts",
    "ModelStatus",
    "ModelView",
    "NeuronHealth",
    "Parallelism",
    "Progress",
    "ReachCommand",
    "ReachReply",
    "Registration",
    "RegistrationReply",
    "SleepCommand",
    "SpareView",
    "Transition",
    "UnloadCommand",
    "WakeCommand",
    "first_problem",
    "plain_reason",
    "read_answer",
]
