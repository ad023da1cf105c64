"""How a part of a group is described, checked and started. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from neuron.config import NeuronConfig
from neuron.engine.records import spec_fields
from neuron.harness.base import GroupNetwork
from neuron.harness.checks import spec_of
from neuron.harness.registry import HARNESSES
from neuron.spec import EngineSpec
from shared.errors import InvalidRequest
from shared.protocol import GroupPart, LoadCommand, Parallelism
from shared.protocol.group import split_over
from tests.neuron.harness.test_command import planned

PART = {"id": "g1", "rank": 1, "size": 2, "master_addr": "10.0.0.1", "master_port": 21000}


def spec(**fields: Any) -> EngineSpec:
    config = NeuronConfig.model_validate({"harnesses": [{"name": "vllm"}, {"name": "sim"}], **fields.pop("config", {})})
    return spec_of(LoadCommand.model_validate({"model_id": "org/m", "group": PART, **fields}), config)


@pytest.mark.parametrize(
    ("whole", "parts", "local"),
    [
        ({"tensor": 4, "pipeline": 2}, 2, {"tensor": 4}),
        ({"tensor": 2}, 2, {}),
        ({"tensor": 2, "pipeline": 4}, 2, {"tensor": 2, "pipeline": 2}),
        ({"tensor": 8, "expert": True}, 4, {"tensor": 2, "expert": True}),
        ({"pipeline": 3}, 3, {}),
    ],
)
def test_each_part_gets_its_share(whole: dict[str, Any], parts: int, local: dict[str, Any]) -> None:
    assert split_over(Parallelism(**whole), parts) == Parallelism(**local)


@pytest.mark.parametrize(
    ("whole", "parts", "reason"),
    [
        ({"tensor": 4, "data": 2}, 2, "use data = 1"),
        ({"tensor": 3}, 2, "3 devices cannot be split evenly over 2 neurons"),
        ({"tensor": 3, "pipeline": 2}, 3, "tensor must divide 2 or be a multiple of it"),
    ],
)
def test_what_cannot_be_split_is_refused(whole: dict[str, Any], parts: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        split_over(Parallelism(**whole), parts)


def test_a_rank_beyond_the_group_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 of 2 parts: ranks are 0 to 1"):
        GroupPart.model_validate({**PART, "rank": 2})


def test_devices_and_memory_are_those_of_the_part() -> None:
    made = spec(parallel={"tensor": 2, "pipeline": 2}, devices=[0, 1], vram_mb=8000)
    assert (made.device_count, made.share_mb, made.parallel.devices) == (2, 4000, 4)


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"parallel": {"tensor": 3}}, "parallel", "cannot be split evenly"),
        ({}, "parallel", "1 devices cannot be split evenly over 2 neurons"),
        ({"parallel": {"tensor": 2}, "devices": [0, 1]}, "devices", "part 1 of 2 of group g1 has 1 of tensor 2"),
        ({"parallel": {"tensor": 2}, "args": ["--distributed-executor-backend", "uni"]}, "args", "cannot span hosts"),
        ({"parallel": {"tensor": 2}, "args": ["--distributed-ex=external_launcher"]}, "args", "cannot span hosts"),
        ({"parallel": {"tensor": 2}, "args": ["--master-port", "1"]}, "args", "--master-port is set by neuron"),
        ({"parallel": {"tensor": 2}, "args": ["--headless"]}, "args", "--headless is set by neuron"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], param: str, reason: str) -> None:
    """A load of a part whose fields contradict one another."""
    with pytest.raises(InvalidRequest, match=reason) as refused:
        spec(**fields)
    assert refused.value.param == param


def test_the_executor_of_the_multi_node_engine_may_be_named() -> None:
    assert spec(parallel={"tensor": 2}, args=["--distributed-executor-backend", "mp"]).group is not None


def words(argv: tuple[str, ...], flag: str) -> str | None:
    return argv[argv.index(flag) + 1] if flag in argv else None


@pytest.mark.parametrize("harness", ["vllm", "sim"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_command_line_of_a_part(harness: str, rank: int) -> None:
    """vLLM's multi-node flags; only rank 0 has a server."""
    made = spec(harness=harness, parallel={"tensor": 2, "pipeline": 2}, group={**PART, "rank": rank})
    plan, facts = planned(made)
    command = HARNESSES[harness].command(replace(plan, network=GroupNetwork("10.0.0.2", "eth0")), facts)
    given = {flag: words(command.argv, flag) for flag in ("--nnodes", "--node-rank", "--master-addr", "--master-port")}
    assert given == {
        "--nnodes": "2", "--node-rank": str(rank), "--master-addr": "10.0.0.1", "--master-port": "21000",
    }  # fmt: skip
    assert (words(command.argv, "--tensor-parallel-size"), words(command.argv, "--pipeline-parallel-size")) == (
        "2",
        "2",
    )
    assert ("--headless" in command.argv, words(command.argv, "--port")) == ((True, None) if rank else (False, "20001"))
    assert command.env["VLLM_HOST_IP"] == "10.0.0.2"
    assert command.env["NCCL_SOCKET_IFNAME"] == command.env["GLOO_SOCKET_IFNAME"] == "eth0"


@pytest.mark.parametrize(("executable", "ray"), [(None, "ray"), ("/opt/vllm/bin/vllm", "/opt/vllm/bin/ray")])
def test_the_command_lines_with_ray(executable: str | None, ray: str) -> None:
    """Each part brings a Ray node with its devices; only rank 0 runs vLLM, without the multi-node flags."""
    argvs: list[tuple[str, ...]] = []
    for rank in (0, 1):
        fields = {"parallel": {"tensor": 2}, "group": {**PART, "rank": rank}}
        plan, facts = planned(spec(args=["--distributed-executor-backend=ray"], **fields))
        settings = plan.settings.model_copy(update={"command": None if executable is None else [executable]})
        plan = replace(plan, settings=settings, network=GroupNetwork("10.0.0.2", "eth0"))
        command = HARNESSES["vllm"].command(plan, facts)
        assert command.env["RAY_ADDRESS"] == "10.0.0.1:21000"
        argvs.append(command.argv)
    given = [{flag: words(argv, flag) for flag in ("--ray", "--address", "--own-address", "--gpus")} for argv in argvs]
    assert given == [{"--ray": ray, "--address": "10.0.0.1:21000", "--own-address": "10.0.0.2", "--gpus": "1"}] * 2
    assert [any("serve" in word for word in argv) for argv in argvs] == [True, False]
    assert not {"--nnodes", "--master-addr", "--headless"} & {*argvs[0], *argvs[1]}


def test_whose_network_variables_count() -> None:
    """`[group]` before neuron's own environment, that before what neuron finds, and `[harness.NAME] env` before all."""
    made = spec(parallel={"tensor": 2})
    inherited = {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "ib0", "VLLM_HOST_IP": "192.0.2.1"}
    plan, facts = planned(made, environ=inherited)
    network = GroupNetwork("10.0.0.2", "eth0", {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_IB_DISABLE": "1"})
    env = HARNESSES["vllm"].command(replace(plan, network=network), facts).env
    names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "VLLM_HOST_IP", "NCCL_IB_DISABLE")
    assert [env[name] for name in names] == ["ib0", "eth1", "10.0.0.2", "1"]


def test_a_part_cannot_sleep() -> None:
    """The neurons of the other parts would not learn that their memory is free."""
    plan, facts = planned(spec(harness="sim", parallel={"tensor": 2}), control_key="k")
    assert not HARNESSES["sim"].can_sleep(plan, facts)
    alone, facts = planned(replace(plan.spec, group=None), control_key="k")
    assert HARNESSES["sim"].can_sleep(alone, facts)


def test_an_engine_that_does_not_span_hosts_has_no_group_in_its_record() -> None:
    """An earlier version of neuron reads no record with other fields."""
    assert "group" not in spec_fields(replace(spec(parallel={"tensor": 2}), group=None))


def test_another_group_is_another_spec() -> None:
    """A part of an earlier group is not joined by a load for a new one."""
    made = spec(parallel={"tensor": 2})
    assert made.difference(spec(parallel={"tensor": 2})) is None
    other = spec(parallel={"tensor": 2}, group={**PART, "id": "g2"})
    assert "group" in (made.difference(other) or "")
