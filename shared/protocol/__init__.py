"""The neuron protocol: what travels between a cortex and a neuron, as frozen pydantic models.

Unknown fields are ignored on both sides, and every field that the seed protocol does not have is optional, so that
versions and foreign implementations mix.
"""

from shared.protocol.commands import (
    EndpointReply,
    LoadCommand,
    LoadReply,
    SleepCommand,
    UnloadCommand,
    WakeCommand,
)
from shared.protocol.errors import ErrorCode
from shared.protocol.estimate import EstimateLine, EstimateOption, EstimateReply
from shared.protocol.health import Activation, DeviceHealth, ModelActivity, NeuronHealth
from shared.protocol.models import ModelStatus, ModelView, Progress, Transition
from shared.protocol.refusal import DeviceFigures, FailureCause
from shared.protocol.topology import Device, Discovery, Link, LinkKind

__all__ = [
    "Activation",
    "Device",
    "DeviceFigures",
    "DeviceHealth",
    "Discovery",
    "EndpointReply",
    "ErrorCode",
    "EstimateLine",
    "EstimateOption",
    "EstimateReply",
    "FailureCause",
    "Link",
    "LinkKind",
    "LoadCommand",
    "LoadReply",
    "ModelActivity",
    "ModelStatus",
    "ModelView",
    "NeuronHealth",
    "Progress",
    "SleepCommand",
    "Transition",
    "UnloadCommand",
    "WakeCommand",
]
