"""The link of two GPUs: derived from given facts, and read through the real nvidia-ml-py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neuron.gpu.links import LinkFacts, NvLinks, links_between
from neuron.gpu.nvml_device import kernel_numa_node
from shared.protocol import Link, LinkKind
from tests.nvml.library import (
    GPU_IS_LOST,
    HOST_BRIDGE,
    NVLINKED_PAIR,
    SINGLE_SWITCH,
    Gpu,
    pci_bus_id_of,
    write_scenario,
)
from tests.nvml.probe import probing


def links_seen(library: dict[str, str], hardware: Path, gpus: tuple[Gpu, ...], **keys: object) -> list[Any]:
    with probing(library | write_scenario(hardware, gpus, **keys)) as probe:
        return [(link["a"], link["b"], link["kind"], link["nvlinks"]) for link in probe.ask("discover")["links"]]


def test_nvlinked_pair(library: dict[str, str], tmp_path: Path) -> None:
    """Direct NVLinks are counted and take precedence over the PCIe path."""
    assert links_seen(library, tmp_path / "hardware", NVLINKED_PAIR, topology__0__1=HOST_BRIDGE) == [
        (0, 1, "nvlink", 4)
    ]


def test_inactive_nvlinks_do_not_count(library: dict[str, str], tmp_path: Path) -> None:
    """Without an NVLink bridge the PCIe path counts."""
    gpus = (Gpu(nvlinks=("off", "off")), Gpu(nvlinks=("off", "off")))
    assert links_seen(library, tmp_path / "hardware", gpus, topology__0__1=50) == [(0, 1, "sys", 0)]


def test_pci_switch_pair(library: dict[str, str], tmp_path: Path) -> None:
    """Two cards below one PCIe switch are linked by PIX."""
    assert links_seen(library, tmp_path / "hardware", (Gpu(), Gpu()), topology__0__1=SINGLE_SWITCH) == [
        (0, 1, "pix", 0)
    ]


def test_nvswitch(library: dict[str, str], tmp_path: Path) -> None:
    """GPUs on NVSwitches have the smaller number of their links, unless the driver says that they are not peers."""
    gpus = tuple(Gpu(nvlinks=("switch",) * count) for count in (18, 18, 12))
    keys = {"topology.0.1": 50, "topology.0.2": 50, "topology.1.2": 40, "p2p.0.1": 0, "p2p.1.2": 5}
    assert links_seen(library, tmp_path / "hardware", gpus, **keys) == [
        (0, 1, "nvlink", 18),
        (0, 2, "nvlink", 12),
        (1, 2, "node", 0),
    ]


def test_an_unknown_pair_has_no_link(library: dict[str, str], tmp_path: Path) -> None:
    """A pair that the driver reports nothing about has no link, and neither has a device lost meanwhile."""
    gpus = (Gpu(), Gpu(), Gpu(figures={"error.nvmlDeviceGetNvLinkState": GPU_IS_LOST}))
    assert links_seen(library, tmp_path / "hardware", gpus, topology__0__2=10, topology__1__2=10) == []


@pytest.mark.parametrize(
    ("level", "kind"),
    [(0, "pix"), (10, "pix"), (20, "pxb"), (30, "phb"), (40, "node"), (50, "sys")],
)
def test_kind_of_each_level_of_nvml(level: int, kind: str) -> None:
    """Every level of nvmlGpuTopologyLevel_t has a kind."""
    facts = LinkFacts(pci_bus_ids={}, nvlinks={}, ancestors={(0, 1): level})
    assert links_between([1, 0], facts) == (Link(a=0, b=1, kind=LinkKind(kind)),)


def test_a_direct_nvlink_needs_one_readable_end() -> None:
    """The other end may be unreadable."""
    buses = {index: pci_bus_id_of(index) for index in range(3)}
    facts = LinkFacts(pci_bus_ids=buses, nvlinks={2: NvLinks(to_peer={buses[0]: 2})}, ancestors={})
    assert links_between([0, 1, 2], facts) == (Link(a=0, b=2, kind=LinkKind.NVLINK, nvlinks=2),)


@pytest.mark.parametrize(("content", "node"), [("1\n", 1), ("0\n", 0), ("-1\n", None), ("", None), (None, None)])
def test_numa_node_of_the_kernel(tmp_path: Path, content: str | None, node: int | None) -> None:
    """The kernel writes -1 without NUMA; its addresses are lower-case with a four-digit domain."""
    if content is not None:
        directory = tmp_path / "0000:c1:00.0"
        directory.mkdir()
        (directory / "numa_node").write_text(content)
    assert kernel_numa_node("00000000:C1:00.0", root=tmp_path) == node
