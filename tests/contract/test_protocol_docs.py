"""docs/protocol.md and docs/api.md list every field on the wire, and mark those of protocol v1."""

from __future__ import annotations

import json
import re

import pytest
from pydantic import BaseModel

from cortex.api.models import ModelList
from cortex.config.catalogue import Catalogue
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot, by_instance
from neuron.lifecycle.instance_state import NeuronModelView
from shared.protocol import (
    Activation,
    Device,
    DeviceFigures,
    DeviceHealth,
    Discovery,
    EndpointReply,
    EstimateLine,
    EstimateOption,
    EstimateReply,
    FailureCause,
    GroupPart,
    GroupPeer,
    InstanceEnergy,
    LeaseCommand,
    LeaseReply,
    Link,
    LinkKind,
    ListenCommand,
    ListenReply,
    LoadCommand,
    LoadReply,
    ModelActivity,
    ModelStatus,
    ModelView,
    NeuronHealth,
    Progress,
    ReachCommand,
    ReachReply,
    SleepCommand,
    Transition,
    UnloadCommand,
    WakeCommand,
)
from tests.contract.documents import TOP

# Section -> (its wire model, the fields that are part of protocol v1).
SECTIONS: dict[str, tuple[tuple[type[BaseModel], ...], str]] = {
    "GET /discovery": (
        (Discovery, Device, Link),
        "hostname os kernel cuda_version driver_version devices harnesses index name vram_total_mb compute_capability",
    ),
    "GET /health": (
        (NeuronHealth, DeviceHealth, Activation, InstanceEnergy, ModelActivity),
        "uptime_secs devices index vram_used_mb vram_free_mb utilization_pct temp_c",
    ),
    "GET /models": ((ModelView, NeuronModelView, Progress, Transition), "id harness status devices vram_used_mb"),
    "POST /models/load": ((LoadCommand, GroupPart, DeviceFigures), "model_id harness quant tensor_parallel devices"),
    "POST /models/unload": ((UnloadCommand,), "model_id"),
    "POST /models/sleep": ((SleepCommand,), ""),
    "POST /models/wake": ((WakeCommand,), ""),
    "POST /groups/listen": ((ListenCommand, ListenReply), ""),
    "POST /groups/reach": ((ReachCommand, GroupPeer, ReachReply), ""),
    "POST /models/lease": ((LeaseCommand, LeaseReply), ""),
    "GET /models/{model_id}/endpoint": ((EndpointReply,), "url"),
    "GET /estimate": ((EstimateReply, EstimateLine, EstimateOption), ""),
}
PROTOCOL = (TOP / "docs" / "protocol.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PROTOCOL.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("title", SECTIONS)
def test_every_field_is_documented(title: str) -> None:
    """Each field is in the section of its request: bold when it is part of protocol v1, in code marks otherwise."""
    models, v1 = SECTIONS[title]
    bold = set(re.findall(r"\*\*(\w+)\*\*", section(title)))
    code = set(re.findall(r"`(\w+)`", section(title)))
    fields = {field for model in models for field in model.model_fields}
    assert bold == set(v1.split())
    assert fields - bold <= code


def test_every_status_and_link_is_documented() -> None:
    """docs/protocol.md has every value of the enumerated fields."""
    assert all(f"`{status.value}`" in section("GET /models") for status in ModelStatus)
    assert all(f"`{kind.value}`" in section("GET /discovery") for kind in LinkKind)
    assert all(f"`{cause.value}`" in section("POST /models/load") for cause in FailureCause)
    assert set(LoadReply.model_fields) == {"status", "model_id", "instance", "url", "api_key"}


def test_every_field_of_the_models_list_is_documented() -> None:
    """docs/api.md has every field of /v1/models, those of an alias included."""
    catalogue = Catalogue.model_validate({"models": [{"id": "m", "limit": {"context": 1}}], "aliases": {"a": "m"}})
    discovery = Discovery(devices=[Device(index=0)], harnesses=["vllm"])
    node = NodeSnapshot(
        "n", "http://n", healthy=True, discovery=discovery, models=by_instance([ModelView(id="m", status="loaded")])
    )
    blocks = ModelList().blocks(catalogue, FleetSnapshot({"n": node}), created=0)
    entries = {entry["id"]: entry for entry in json.loads(b"".join(blocks))["data"]}
    text = (TOP / "docs" / "api.md").read_text(encoding="utf-8").partition("\n## Models\n")[2].partition("\n## ")[0]
    for field in entries["a"]:
        assert f"`{field}`" in text
    for field in entries["m"]["locations"][0]:
        assert field in text
