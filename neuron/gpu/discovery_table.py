"""`neuron discover` for people: the host, its GPUs and a matrix of their links."""

from __future__ import annotations

from collections.abc import Sequence

from shared.protocol import Device, Discovery, Link, LinkKind
from shared.terminal.tables import table

_HEADINGS = ("GPU", "NAME", "MEMORY", "CC", "PCI BUS ID", "NUMA", "MIG", "UUID")
_NUMERIC = frozenset({"GPU", "MEMORY", "CC", "NUMA"})

_MEANINGS = {
    LinkKind.NVLINK: "NV#  # NVLinks",
    LinkKind.XGMI: "XGMI direct XGMI",
    LinkKind.PIX: "PIX  at most one PCIe switch",
    LinkKind.PXB: "PXB  several PCIe switches, no host bridge",
    LinkKind.PHB: "PHB  a PCIe host bridge",
    LinkKind.NODE: "NODE host bridges of one NUMA node",
    LinkKind.SYS: "SYS  between NUMA nodes",
}
UNKNOWN_LINK = "?"


def table_of(discovery: Discovery) -> str:
    """Lines of text, each with a newline."""
    blocks = [_host(discovery)]
    if discovery.devices:
        blocks.append(
            [
                table(
                    [_HEADINGS, *map(_device_row, discovery.devices)],
                    right={place for place, heading in enumerate(_HEADINGS) if heading in _NUMERIC},
                )
            ]
        )
    else:
        blocks.append(["no GPU" if discovery.cuda_unavailable_reason else "no GPU on this host"])
    unified = [f"GPU {device.index} shares the host's RAM" for device in discovery.devices if device.unified]
    blocks.append(unified)
    lost = [f"GPU {device.index} cannot be used: {device.lost}" for device in discovery.devices if device.lost]
    blocks.append(lost)
    gpus = [device for device in discovery.devices if not device.is_mig_instance]
    if len(gpus) > 1:
        blocks.append(_link_matrix(gpus, discovery.links))
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _host(discovery: Discovery) -> list[str]:
    kind = "  (simulated)" if discovery.simulated else ""
    lines = [
        f"host    {discovery.hostname}{kind}",
        f"system  {discovery.os}, kernel {discovery.kernel}",
        f"driver  {discovery.driver_version or '-'}, CUDA {discovery.cuda_version or '-'}",
    ]
    if discovery.host is not None:
        lines.append(f"RAM     {discovery.host.ram_total_mb} MiB, {discovery.host.cores} cores")
    if discovery.cuda_unavailable_reason:
        lines.append(f"CUDA is unavailable: {discovery.cuda_unavailable_reason}")
    return lines


def _device_row(device: Device) -> tuple[str, ...]:
    mig = {None: "-", True: "on", False: "off"}[device.mig_mode]
    if device.is_mig_instance:
        mig = f"of GPU {device.parent}"
    return (
        str(device.index),
        device.name or "-",
        f"{device.vram_total_mb} MiB" if device.vram_total_mb else "-",
        device.compute_capability or "-",
        device.pci_bus_id or "-",
        "-" if device.numa_node is None else str(device.numa_node),
        mig,
        device.uuid or "-",
    )


def _link_matrix(devices: Sequence[Device], links: Sequence[Link]) -> list[str]:
    """The matrix of `nvidia-smi topo -m` with a legend of the kinds that occur."""
    between = {(link.a, link.b): link for link in links}
    indices = [device.index for device in devices]
    rows = [("", *(f"GPU{index}" for index in indices))]
    rows += [(f"GPU{a}", *(_link_cell(a, b, between) for b in indices)) for a in indices]
    present = {link.kind for link in links}
    legend = [f"  {meaning}" for kind, meaning in _MEANINGS.items() if kind in present]
    if any(UNKNOWN_LINK in row for row in rows):
        legend.append(f"  {UNKNOWN_LINK}    the driver does not say")
    return [table(rows), "", *legend]


def _link_cell(a: int, b: int, between: dict[tuple[int, int], Link]) -> str:
    if a == b:
        return "X"
    link = between.get((min(a, b), max(a, b)))
    if link is None:
        return UNKNOWN_LINK
    return f"NV{link.nvlinks}" if link.kind is LinkKind.NVLINK else link.kind.name
